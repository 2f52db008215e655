"""The commands ``jaxconv compare``, ``jaxconv bench``, ``jaxconv tune``, ``jaxconv run``."""

import io
import itertools
import os
import re
import runpy
import sys
import time
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jax
import typer
from typer import Argument, Option
from typer.core import TyperGroup

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.bench import calibrate, draw, programs
from jaxconv.bench import compare as engine
from jaxconv.bench.programs import DIRECTIONS, SUITES, Selection
from jaxconv.planning import rows
from jaxconv.tables import Table
from jaxconv.tools import memory
from jaxconv.tools.autotune import autotune as tuned
from jaxconv.tools.explain import Compiled
from jaxconv.tools.progress import shown
from jaxconv.transforms.enable import PLATFORMS, enable
from jaxconv.transforms.primitive import observers

KNOWN_SUITES = ", ".join(SUITES)
INTERRUPTED = 130  # the exit code
LEGEND = (
    "▸ what auto chose. × lax: lax's time over the algorithm's, the two called in turn; the median"
    " of the pairs and their quartiles, above 1 is faster; lax's own row shows the noise. = lax: it"
    " is lax's own program. error: root mean square against float64, over lax's."
)


class Commands(TyperGroup):
    """Interrupts end a command without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # typer handles pipes that are closed, as by head
            return result
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors and help as plain text, without frames
)


def _fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"jaxconv: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(2)


def _check(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            _fail(f"unknown {kind} {name!r}; known are {', '.join(known)}")


@app.callback(
    help="Convolution as matrix multiplication, in pure JAX.", invoke_without_command=True
)
def _options(version: bool = Option(False, "--version", help="Print the version.")) -> None:
    if version:
        print(f"jaxconv {jaxconv.__version__}")
        raise typer.Exit
    # Not every encoding of stdout includes × and →.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@app.command()
def compare(
    image: Path | None = Argument(
        None,
        help="A photograph, in any format that Pillow reads.",
        show_default="the astronaut of scikit-image",
    ),
    output: Path = Option(
        Path("jaxconv-compare.png"), "--output", "-o", help="Where the picture is written."
    ),
    algorithm: list[str] | None = Option(
        None,
        "--algorithm",
        "-a",
        help="Compare this one, by name; may be repeated.",
        show_default="auto and all others",
    ),
    size: int = Option(384, min=16, help="A longer side is scaled down to this many pixels."),
    repeats: int | None = Option(
        None,
        min=1,
        help="Pairs of calls, lax and the algorithm in turn.",
        show_default=f"what fits {engine.BUDGET} s, from {engine.FEWEST} to {engine.ENOUGH}",
    ),
) -> None:
    """Compare all algorithms on real convolutions of a photograph.

    Prints, for each convolution as soon as it is measured, the GEMM shape of each algorithm, the
    median time, its ratio to lax (above 1 is faster), the workspace and the error against float64,
    and writes a picture.
    """
    known = ("auto", *ALGORITHMS)
    _check("algorithm", algorithm or (), known)
    try:
        photograph, caption = engine.load(image, size)
    except OSError as error:
        _fail(f"can't read the image {str(image)!r}: {error.strerror or error}")
    if problem := draw.problem(output, image):
        _fail(f"can't write {str(output)!r}: {problem}")
    start = time.perf_counter()
    names, convolutions = list(dict.fromkeys(algorithm or known)), engine.convolutions(photograph)
    versions = f"jaxconv {jaxconv.__version__}, JAX {jax.__version__}"
    where = f"{versions}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    print(Table([f"{caption}; {where}; float32", LEGEND]), flush=True)
    steps = (engine.compare(convolution, names, repeats) for convolution in convolutions)
    comparisons, count = [], len(convolutions) * (1 + len(names))
    for comparison in shown(itertools.chain.from_iterable(steps), count):
        comparisons.append(comparison)
        print(engine.table(comparison), flush=True)
    try:
        draw.picture(photograph, f"{caption}\n{where}", comparisons).savefig(output, dpi=110)
    except OSError as error:
        _fail(f"can't write {str(output)!r}: {error.strerror or error}")
    seconds = time.perf_counter() - start
    print(Table(["", f"The picture: {output}. {seconds:.0f} s in all."]), flush=True)


@app.command()
def bench(
    suites: list[str] = Argument(["layers"], metavar="[SUITE]...", help=f"Of {KNOWN_SUITES}."),
    case: str | None = Option(
        None, metavar="REGEX", help="Run cases whose names match this regular expression."
    ),
    direction: str | None = Option(None, help=f"Only this direction, of {', '.join(DIRECTIONS)}."),
    quick: bool = Option(False, "--quick", help="A few cases, a moment each."),
    specs: int = Option(Selection.specs, min=1, help="Random convolutions of regret."),
    torch: bool | None = Option(
        None, help="Measure PyTorch too.", show_default="where it is installed"
    ),
    file: Path | None = Option(
        None, "--json", help="Write everything to this file, after every result."
    ),
    folder: Path | None = Option(None, "--plots", help="Draw pictures into this folder."),
    listed: bool = Option(False, "--list", help="Print the names of the selected cases, and exit."),
) -> None:
    """Measure jaxconv against lax, and against PyTorch.

    layers: single convolutions and poolings of networks, and filters, forward and gradients.
    models: whole networks, forward and training step. regret: what the choice of "auto" costs, on
    random convolutions.
    Every result is checked against lax's; a wrong one makes the exit code 1.
    """
    _check("suite", suites, SUITES)
    _check("direction", [direction] if direction is not None else [], DIRECTIONS)
    try:
        pattern = None if case is None else re.compile(case)
    except re.error as error:
        _fail(f"--case {case!r} is no regular expression: {error}")
    installed = find_spec("torch") is not None
    if torch and not installed:
        _fail("can't measure PyTorch: install it by pip install torch")
    selection = Selection(pattern, direction, quick, specs, installed and torch is not False)
    cases = {suite: SUITES[suite].selected(selection) for suite in suites}
    if not any(cases.values()):
        every = f"jaxconv bench {' '.join(suites)} --list"
        _fail(f"no case is selected; {every} prints the names of all")
    if listed:
        for selected in cases.values():
            print(*dict.fromkeys(case.name for case in selected), sep="\n")
        return
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"can't write into {str(folder)!r}: {error.strerror}")
    for path in filter(None, (file, folder and folder / "layers.png")):
        if problem := draw.unwritable(path):
            _fail(f"can't write {str(path)!r}: {problem}")
    if not programs.run(cases, selection, file, folder):
        raise typer.Exit(1)


@app.command()
def tune(
    seconds: float = Option(calibrate.SECONDS, min=1, help="Time budget, in seconds."),
    forget: bool = Option(
        False, "--forget", help="Drop what tune and autotune measured on this machine, and exit."
    ),
) -> None:
    """Measure how fast this machine is, to adapt predicted times to it.

    Times random convolutions for about a minute and keeps them in the cache folder, from where
    later plans learn. ``jaxconv.autotune`` measures the convolutions of a program.
    """
    if forget:
        count = rows.forget(jax.default_backend())
        print(f"Dropped {count} convolutions measured with this device and these versions.")
        return
    try:
        print(calibrate.tune(seconds))
    except ValueError as error:  # a platform without predictions
        _fail(str(error).removeprefix("jaxconv."))


# Everything after the script is passed to it, options included.
@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: str = Argument(metavar="SCRIPT", help="A Python script."),
    args: list[str] = Argument([], metavar="[ARGS]", help="Arguments and options of the script."),
    *,
    module: bool = Option(False, "-m", help="SCRIPT is the name of a module, as in python -m."),
    platform: list[str] = Option(
        ["cpu"], help="Where jaxconv plans: cpu, gpu or tpu; may be repeated."
    ),
    explain: bool = Option(False, "--explain", help="At the end, print the plans to stderr."),
    autotune: bool = Option(
        False,
        "--autotune",
        help="At the end, measure the convolutions, for later runs; the table goes to stderr.",
    ),
    kept: bool = Option(
        True,
        "--keep-memory/--no-keep-memory",
        help="On Linux with glibc, keep memory that the script frees, for its next arrays.",
    ),
) -> None:
    """Run an unmodified Python script with its convolutions planned by jaxconv.

    With --autotune those that were compiled are measured after the script has ended, for some
    seconds each, unless they are known or it was interrupted; the next run is planned by them.

    JAX is imported before the script starts: environment variables that JAX reads on import, such
    as JAX_PLATFORMS, must be set outside the script.
    """
    _check("platform", platform, PLATFORMS)
    sys.argv = [script, *args]
    if not sys.flags.safe_path:  # as Python itself does
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(script))
    if not module and not os.path.isfile(script):
        _fail(f"can't run {script!r}: there is no such file")
    if kept:
        memory.keep()
    enable(platform)
    compiled = Compiled()
    if explain:
        observers.append(compiled)
    code = _execute(script, module)
    if explain:
        print(compiled, file=sys.stderr)
    if autotune and code != INTERRUPTED:
        try:
            print(tuned(), file=sys.stderr)
        except ValueError as error:  # nothing was compiled, or there are several processes
            print(error, file=sys.stderr)
    if code:
        raise SystemExit(code)


def _execute(script: str, module: bool) -> Any:
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
