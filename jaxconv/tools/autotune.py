"""``autotune``: measures which algorithm is the fastest for each convolution of a function."""

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv import tables
from jaxconv.arguments import fail
from jaxconv.config import notify
from jaxconv.planning.choose import decide, execute
from jaxconv.planning.measured import Row, here, record
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import REPEATED, Time
from jaxconv.planning.timing import Compiled, alternate, quickest
from jaxconv.spec import ConvSpec
from jaxconv.transforms.jaxprs import choice, fn_jaxpr, walk

# Multiples of the best prediction, which is an order of magnitude, and of the fastest of a few
# first calls, above which an algorithm is not measured further.
HOPELESS_PREDICTED, HOPELESS_MEASURED = 20, 4
ROUNDS, FEWEST_ROUNDS = 50, 5
SECONDS = 0.5  # after which no further round is begun


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The algorithms for one convolution, timed in turn.

    Attributes:
      spec: the convolution, in the canonical layout.
      planned: the algorithm that "auto" took before.
      chosen: the one that it takes from now on.
      why: the reason for it.
      seconds: (algorithm, median time) of each measured algorithm, the fastest first.
      compile_seconds: (algorithm, seconds to compile it).
      ratio: the time of lax's convolution over that of ``chosen``; None where lax's can't run.
    """

    spec: ConvSpec
    planned: str
    chosen: str
    why: str
    seconds: tuple[tuple[str, float], ...]
    compile_seconds: tuple[tuple[str, float], ...]
    ratio: float | None


HEADER = ("planned", "chosen", "measured", "× lax", "the others", "convolution")


@dataclasses.dataclass(frozen=True)
class Tuning(tables.Report):
    """What ``autotune`` measured. ``str()`` is a table; so is the value in a notebook.

    Attributes:
      platform: where it was measured: "cpu", "gpu", "tpu", …
      rows: a measurement for each convolution, in the order of the program.
    """

    platform: str
    rows: tuple[Measurement, ...]

    def _table(self) -> tables.Table:
        changed = [i for i, row in enumerate(self.rows, 1) if row.planned != row.chosen]
        line = (
            f"Measured on {self.platform}: {len(self.rows)} different convolutions, {len(changed)}"
            " of which have another algorithm now."
        )
        return tables.Table([line], [HEADER, *map(_cells, self.rows)], (2, 3), changed)


def _cells(row: Measurement) -> tuple[str, ...]:
    seconds = dict(row.seconds)
    others = ", ".join(
        f"{name} {tables.milliseconds(time)}" for name, time in row.seconds if name != row.chosen
    )
    return (
        row.planned,
        row.chosen,
        tables.milliseconds(seconds[row.chosen]),
        "–" if row.ratio is None else f"{row.ratio:.2f}",
        others,
        str(row.spec),
    )


def autotune(
    fn: Callable[..., Any], *args: Any, progress: bool | None = None, **kwargs: Any
) -> Tuning:
    """Measures which algorithm is the fastest for each convolution in ``fn``, and remembers it.

    From then on "auto" takes it, in this process and, from the folder ``config.cache_dir``, in
    later ones: for convolutions of the same shapes and dtypes, on this machine, with these versions
    of JAX and jaxconv, wherever they occur. Functions that JAX has already compiled are unaffected:
    tune first, or call ``jax.clear_caches()``.

    Pass the whole training step or the gradient: backward convolutions are measured only if ``fn``
    contains them. ``fn`` itself is only traced. Each convolution is measured in isolation, on
    random numbers, for a few seconds, alternating between all algorithms that could be the fastest.
    Those with an algorithm given by name are skipped. The planned one is kept unless another is at
    least 5 % faster. If it is interrupted, results so far are kept.

    Args:
      fn: any function, including jitted and accelerated ones.
      args, kwargs: its arguments. Arrays may also be ``jax.ShapeDtypeStruct``s.
      progress: whether to show a progress bar on stderr, if the package rich is installed; default:
        if stderr is a terminal.

    Returns:
      A ``Tuning``, a table of the convolutions: the algorithm planned before, the one chosen, the
      median time of each, and how many times as fast as lax's convolution the chosen one is.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: symbolic shapes.

    Example:
      >>> import jax, jaxconv
      >>> image = jax.ShapeDtypeStruct((1, 16, 16, 8), "float32")
      >>> kernel = jax.ShapeDtypeStruct((3, 3, 1, 8), "float32")
      >>> def blurred(image, kernel):
      ...     return jaxconv.conv(image, kernel, groups=8)
      >>> tuning = jaxconv.autotune(blurred, image, kernel)
      >>> len(tuning.rows)
      1
    """
    if not callable(fn):
        given, remedy = type(fn).__name__, "pass the function itself"
        fail("autotune", "fn must be a function", given, remedy, TypeError)
    platform = jax.default_backend()
    choices = (choice("autotune", eqn) for eqn, *_ in walk(fn_jaxpr(fn, args, kwargs)))
    specs = {spec: None for spec, name, _ in choices if name == "auto" and not spec.is_empty}
    rows = []
    for spec in _shown(list(specs), progress):
        row = measure(spec, platform)
        record([Row(spec, here(platform), dict(row.seconds), dict(row.compile_seconds))], platform)
        notify()
        rows.append(row)
    return Tuning(platform, tuple(rows))


def _shown(specs: Sequence[ConvSpec], progress: bool | None) -> Iterator[ConvSpec]:
    """``specs``, with a progress bar."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress or importlib.util.find_spec("rich") is None:
        yield from specs
        return
    from rich.console import Console  # optional
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(specs, "Measuring convolutions", console=console, transient=True)


def candidates(spec: ConvSpec, platform: str) -> list[str]:
    """The algorithms worth measuring: the planned one, XLA's, and those that may be faster."""
    plan = plan_spec(spec, platform)
    possible = {c.name: c.seconds for c in plan.eligible}
    hopeless = HOPELESS_PREDICTED * min(possible.values())
    names = [name for name, seconds in possible.items() if seconds <= hopeless]
    return list(dict.fromkeys([plan.algorithm, "xla", *names]))


def measure(spec: ConvSpec, platform: str) -> Measurement:
    """Times the candidates for ``spec`` on random operands and chooses one; stores nothing."""
    planned, *others = candidates(spec, platform)
    arrays = operands(spec)
    subjects = {planned: _compiled(spec, planned, platform, arrays)}
    first = {planned: quickest(subjects[planned].call)}
    for name in others:
        # XLA refuses the convolution, or memory is exhausted.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            subjects[name] = _compiled(spec, name, platform, arrays)
            first[name] = quickest(subjects[name].call)
    limit = HOPELESS_MEASURED * min(first.values())
    running = [name for name, seconds in first.items() if name == planned or seconds <= limit]
    rounds = alternate([subjects[name] for name in running], ROUNDS, SECONDS, fewest=FEWEST_ROUNDS)
    times = dict(zip(running, zip(*rounds, strict=True), strict=True))

    seconds = first | {name: float(np.median(times[name])) for name in running}
    compiling = {name: subjects[name].compile_seconds for name in first}
    times_of = {name: Time(time, REPEATED, measured=True) for name, time in seconds.items()}
    chosen, why = decide(times_of, platform, keep=planned)
    lax_times = times.get("xla", (first["xla"],)) if "xla" in first else None
    ratio = None
    if lax_times is not None and chosen in times:
        ratio = float(np.median(np.divide(lax_times, times[chosen])))
    ranked = sorted(seconds.items(), key=lambda item: item[1])
    return Measurement(spec, planned, chosen, why, tuple(ranked), tuple(compiling.items()), ratio)


def operands(spec: ConvSpec) -> tuple[Array, Array]:
    """Random operands in the order of memory; for a weight gradient see ``as_it_arrives``."""
    lhs_shape, rhs_shape = spec.lhs_shape, spec.rhs_shape
    if spec.weight_gradient:
        c, *lhs_spatial, n = lhs_shape
        *rhs_spatial, batch, o = rhs_shape
        lhs_shape, rhs_shape = (n, *lhs_spatial, c), (batch, *rhs_spatial, o)
    numbers = np.random.default_rng(0)

    def drawn(shape: tuple[int, ...]) -> Array:
        values = numbers.standard_normal(shape, dtype=np.float32)
        if jnp.issubdtype(spec.dtype, np.integer):
            values = np.abs(8 * values)
        return jnp.asarray(values.astype(spec.dtype))

    return drawn(lhs_shape), drawn(rhs_shape)


def as_it_arrives(spec: ConvSpec, algorithm: str, platform: str, lhs: Array, rhs: Array) -> Array:
    """``spec`` as "auto" would run it by ``algorithm``, on operands in the order of memory.

    In memory the image and kernel of a weight gradient are channels-last; only its dimension
    numbers exchange channels and batch. The transposition is timed too, as in the program.
    """
    if not spec.weight_gradient:
        return execute(lhs, rhs, spec, algorithm, platform)
    lhs, rhs = jnp.swapaxes(lhs, 0, -1), jnp.moveaxis(rhs, 0, -2)
    return jnp.moveaxis(execute(lhs, rhs, spec, algorithm, platform), 0, -2)


def _compiled(
    spec: ConvSpec, algorithm: str, platform: str, operands: tuple[Array, Array]
) -> Compiled:
    return Compiled(partial(as_it_arrives, spec, algorithm, platform), *operands)
