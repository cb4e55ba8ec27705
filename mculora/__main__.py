"""The command line, `python -m mculora`: nbs/use/04_cli.ipynb. The one module written by hand: an
exported one would need a notebook of this name."""


def main():
    "Run a command. Ctrl-C while it is being imported ends it without a traceback, too."
    try:
        from mculora.use.cli import app

        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == '__main__':
    main()
