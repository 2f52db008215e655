"""Running a Python script as Python itself does, and measuring what it compiled."""

import importlib.util
import os
import runpy
import sys

import jax

from jaxconv.config import several_processes
from jaxconv.tools.autotune import autotune
from jaxconv.transforms.primitive import planned_here

INTERRUPTED = 130  # the exit code


def problem(script: str, module: bool) -> str | None:
    """Why there is no such script or module; None if there is one."""
    try:
        if not module:
            open(script, "rb").close()
        elif importlib.util.find_spec(script) is None:
            return "there is no such module"
    except (OSError, ImportError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def execute(script: str, module: bool) -> None:
    """Runs a script as Python itself would; its errors end with a traceback and exit code 1."""
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(os.path.abspath(script), run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        # Not left to typer, which handles some errors differently and would show in the traceback.
        traceback = error.__traceback__
        while traceback and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
            traceback = traceback.tb_next
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        raise SystemExit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None


def measure() -> None:
    """Measures what this process has compiled; the table goes to stderr."""
    report: object = "jaxconv: no convolution was compiled: there is nothing to measure"
    if several_processes():
        report = "jaxconv: plans of several processes use no measurements"
    elif planned_here(jax.default_backend()):
        try:
            report = autotune()
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
    print(report, file=sys.stderr)
