"Models that train in a second: settings for any method, of which each takes those that it has."

from mculora.basics.method import methods

SMALL = dict(
    width=8,
    depth=1,
    rank=1,
    epochs=2,
    lr=1e-2,
    batch_size=4,
    C=0.01,
    heads=1,
    blocks=1,
    couplings=1,
    steps=2,
)


def known(method, options):
    "Those of the options that the method has."
    fields = methods()[method].Settings.model_fields
    return {k: v for k, v in options.items() if k in fields}


def small(method, **more):
    return known(method, SMALL | more)
