"""Running a Python script as Python itself does, and measuring what it compiled."""

import os
import runpy
import sys
from typing import Any

from jaxconv.tools.autotune import autotune

INTERRUPTED = 130  # the exit code


def execute(script: str, module: bool) -> Any:
    """Runs a script as Python itself would, and prints the traceback of an error; the exit code."""
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(script), run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException as error:
        # Not left to typer, which handles some errors differently and would show in the traceback.
        traceback = error.__traceback__
        while traceback and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
            traceback = traceback.tb_next
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def measure() -> None:
    """Measures what this process has compiled; the table goes to stderr."""
    try:
        print(autotune(), file=sys.stderr)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except ValueError as error:  # nothing was compiled, or there are several processes
        print(error, file=sys.stderr)
