"""`python -m wit_plugins.cli`: the same as `wit`."""

from wit_plugins.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
