"""The commands ``jaxconv compare``, ``jaxconv bench``, ``jaxconv tune``, ``jaxconv run``."""

import io
import os
import re
import sys
from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import typer
from typer.core import TyperGroup

import jaxconv
from jaxconv.algorithms import ALGORITHMS
from jaxconv.bench import calibrate, commands, draw
from jaxconv.bench import compare as engine
from jaxconv.bench.programs import DIRECTIONS, SUITES, Selection
from jaxconv.planning import rows
from jaxconv.tools import memory
from jaxconv.tools import script as scripts
from jaxconv.tools.explain import Compiled
from jaxconv.transforms.enable import PLATFORMS, enable
from jaxconv.transforms.primitive import observers

CLOSED_PIPE = 141  # the exit code of what a closed pipe ends: 128 and the number of SIGPIPE


class Commands(TyperGroup):
    """Interrupts, closed pipes and messages end a command without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise typer.Exit(scripts.INTERRUPTED) from None
        except BrokenPipeError:
            # Its reader has gone, as head does; without this a last flush would fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except commands.CommandError as error:
            _fail(str(error))


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


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxconv {jaxconv.__version__}")
        raise typer.Exit


@app.callback(help="Convolution as matrix multiplication, in pure JAX.")
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    # Not every encoding of stdout includes × and →.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@app.command()
def compare(
    image: Annotated[
        Path | None,
        typer.Argument(
            help="A photograph, in any format that Pillow reads.",
            show_default="the astronaut of scikit-image",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the picture is written.")
    ] = Path("jaxconv-compare.png"),
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            "--algorithm",
            "-a",
            help="Compare this one, by name; may be repeated.",
            show_default="auto and all others",
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=16, help="A longer side is scaled down to this many pixels.")
    ] = 384,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs of calls, lax and the algorithm in turn.",
            show_default=f"what fits {engine.BUDGET} s, from {engine.FEWEST} to {engine.ENOUGH}",
        ),
    ] = None,
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
    names = list(dict.fromkeys(algorithm or known))
    commands.compare(photograph, caption, output, names, repeats)


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help=f"Of {', '.join(SUITES)}.", show_default="layers"
        ),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option(help="Run cases whose names match this regular expression.", metavar="REGEX"),
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help=f"Only this direction, of {', '.join(DIRECTIONS)}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, a moment each.")] = False,
    specs: Annotated[
        int, typer.Option(min=1, help="Random convolutions of regret.")
    ] = Selection.specs,
    torch: Annotated[
        bool | None,
        typer.Option(help="Measure PyTorch too.", show_default="where it is installed"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything to this file, after every result."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--plots", help="Draw pictures into this folder.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the names of the selected cases, and exit.")
    ] = False,
) -> None:
    """Measure jaxconv against lax, and against PyTorch.

    layers: single convolutions of well-known networks and filters, forward and gradients.
    models: whole networks, forward and training step. regret: what the choice of "auto" costs, on
    random convolutions.
    Every result is checked against lax's; a wrong one makes the exit code 1.
    """
    suites = suites or ["layers"]
    _check("suite", suites, SUITES)
    _check("direction", [direction] if direction is not None else [], DIRECTIONS)
    try:
        pattern = None if case is None else re.compile(case)
    except re.error as error:
        _fail(f"--case {case!r} is no regular expression: {error}")
    installed = find_spec("torch") is not None
    if torch and not installed:
        _fail("can't measure PyTorch: install it by pip install torch")
    by_torch = installed if torch is None else torch
    selection = Selection(pattern, direction, quick, specs, by_torch)
    if listed:
        commands.names(suites, selection)
    elif not commands.bench(suites, selection, file, folder):
        raise typer.Exit(1)


@app.command()
def tune(
    seconds: Annotated[
        float, typer.Option(min=1, help="Time budget, in seconds.")
    ] = calibrate.SECONDS,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="Drop what tune and autotune measured on this machine, and exit."
        ),
    ] = False,
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
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python script.")],
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGS]", help="Arguments and options of the script."),
    ] = None,
    *,
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m.")
    ] = False,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            help="Where jaxconv plans: cpu, gpu or tpu; may be repeated.",
            show_default="cpu",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="At the end, print the plans to stderr.")
    ] = False,
    autotune: Annotated[
        bool,
        typer.Option(
            "--autotune",
            help="At the end, measure the convolutions, for later runs; the table goes to stderr.",
        ),
    ] = False,
    kept: Annotated[
        bool,
        typer.Option(
            "--keep-memory/--no-keep-memory",
            help="On Linux with glibc, keep memory that the script frees, for its next arrays.",
        ),
    ] = True,
) -> None:
    """Run an unmodified Python script with its convolutions planned by jaxconv.

    With --autotune those that were compiled are measured after the script has ended, for some
    seconds each, unless they are known or it was interrupted; the next run is planned by them.

    JAX is imported before the script starts: environment variables that JAX reads on import, such
    as JAX_PLATFORMS, must be set outside the script.
    """
    _check("platform", platform or (), PLATFORMS)
    sys.argv = [script, *(args or ())]
    if not sys.flags.safe_path:  # as Python itself does
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(script))
    if problem := scripts.problem(script, module):
        _fail(f"can't run {script!r}: {problem}")
    if kept:
        memory.keep()
    enable(platform or ("cpu",))
    compiled = Compiled()
    if explain:
        observers.append(compiled)
    code = None
    try:
        scripts.execute(script, module)
    except SystemExit as end:
        code = end.code
        raise
    finally:
        if explain:
            print(compiled, file=sys.stderr)
        if autotune and code != scripts.INTERRUPTED:
            scripts.measure()
