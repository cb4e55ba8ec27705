"""Models that train in a second: settings for any method, of which each takes those that it has.
And real data and files that people reported, where they are at hand."""

import os
from pathlib import Path

import pytest

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


# beside the repository, or where MCULORA_SHARED says
SHARED = Path(os.environ.get('MCULORA_SHARED') or Path(__file__).resolve().parents[2] / 'shared')


def reported(name, folder='traps'):
    "A file or folder that is not part of the repository; without it the test is skipped."
    path = SHARED / 'data' / folder / name
    if not path.exists():
        pytest.skip(f'{name} is not here')
    return path
