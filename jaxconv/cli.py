"""The command line, ``jaxconv``: its commands are in ``app``, and need packages of an extra."""

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from jaxconv.app import app
    except ModuleNotFoundError as error:
        print(
            f"jaxconv: the command line needs the package {error.name!r};"
            ' install its extra: pip install "jaxconv[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app(prog_name="jaxconv")
