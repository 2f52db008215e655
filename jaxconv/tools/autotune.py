"""``autotune``: measures which algorithm is the fastest for each convolution of a program."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv import layout, tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared
from jaxconv.arguments.errors import fail
from jaxconv.config import notify, several_processes
from jaxconv.planning.choose import choose, execute, unplannable
from jaxconv.planning.machine import here
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.rows import Timed, own_rows, record
from jaxconv.planning.timing import Compiled, alternate, quickest
from jaxconv.spec import ConvSpec
from jaxconv.tools.progress import shown
from jaxconv.transforms.jaxprs import convolutions
from jaxconv.transforms.primitive import planned_here

# Multiples of the best prediction, which may be far off, and of the fastest of a few
# first calls, above which an algorithm is not measured further.
HOPELESS_PREDICTED, HOPELESS_MEASURED = 20, 4
ROUNDS, FEWEST_ROUNDS = 50, 5
SECONDS = 0.5  # after which no further round is begun
WIDE = ("float64", "int64", "uint64", "complex128")  # dtypes that JAX narrows unless told otherwise


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The algorithms for one convolution, timed in turn."""

    spec: ConvSpec
    planned: str  # the algorithm that "auto" took before
    chosen: str  # the one that it takes from now on
    why: str  # the reason for it
    seconds: tuple[tuple[str, float], ...]  # the median by algorithm, the fastest first
    ratio: float | None  # lax's time over that of ``chosen``; None where one was not measured
    known: bool = False  # whether it was measured by an earlier call, or by ``jaxconv tune``


HEADER = ("planned", "chosen", "measured", "× lax", "when", "the others", "convolution")
SPARE = (4, 0, 5)


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning(tables.Report):
    """What ``autotune`` measured: a table that fits the terminal; ``table()`` is the whole one."""

    platform: str  # where it was measured: "cpu", "gpu", "tpu", …
    rows: tuple[Measurement, ...]  # of each convolution, in the order of the program

    def _contents(self) -> tables.Table:
        changed = [i for i, row in enumerate(self.rows, 1) if row.planned != row.chosen]
        known = sum(row.known for row in self.rows)
        line = f"Measured on {self.platform}: {len(self.rows)} different convolutions."
        if changed:
            line += f" {len(changed)} changed algorithm."
        if known:
            line += f" {known} were known before; force=True measures them again."
        rows = [HEADER, *map(_cells, self.rows)]
        return tables.Table([line], rows, (2, 3), changed, spare=SPARE, detail=True)


def _cells(row: Measurement) -> tuple[str, ...]:
    seconds = dict(row.seconds)
    time = seconds.get(row.chosen)

    def other(name: str) -> str:
        margin = ALGORITHMS[name].margin
        lead = "clearly" if margin == 1 else f"{1 / margin:g}×"
        lost = time is not None and seconds[name] < time
        return f"{name} {tables.milliseconds(seconds[name])}" + f" (not {lead} faster)" * lost

    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
    when = "before" if row.known else "now"
    others = ", ".join(other(name) for name in seconds if name != row.chosen)
    return row.planned, row.chosen, tables.milliseconds(time), ratio, when, others, str(row.spec)


def autotune(
    fn: Callable[..., Any] | None = None,
    *args: Any,
    force: bool = False,
    progress: bool | None = None,
    **kwargs: Any,
) -> Tuning:
    """Measures which algorithm is the fastest for each convolution of a program, and remembers it.

    From then on "auto" takes it for convolutions of the same shapes and dtypes, on this machine,
    with these versions of JAX and jaxconv: in this process and, from the folder
    ``config.cache_dir``, in later ones. Predictions for similar ones become better too. Functions
    that JAX has already compiled are unaffected: tune first, or call ``jax.clear_caches()``.

    Pass the whole training step or the gradient: backward convolutions are measured only if ``fn``
    contains them. ``fn`` itself is only traced; objects that it changes must be its arguments, as
    for ``explain``. Without ``fn``, the convolutions are those that this process has compiled
    through jaxconv so far, for JAX's default backend: call it at the end of a program.

    Each is measured alone, on random numbers, for a few seconds, alternating between all algorithms
    that could be the fastest, and saved at once; "auto" departs from XLA's own only for one that is
    clearly faster. Convolutions with an algorithm by name are skipped, and so are poolings, which
    are chosen by rules.

    Args:
      fn: any function, including jitted and accelerated ones.
      args, kwargs: its arguments. Arrays may also be ``jax.ShapeDtypeStruct``s.
      force: whether convolutions that are known are measured again.
      progress: whether to show progress on stderr, if rich is installed; default: in a terminal.

    Returns:
      A ``Tuning``, a table of the convolutions: the algorithms before and now, and their times.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: symbolic shapes; several processes, which must plan alike; without ``fn``, nothing
        was compiled.

    Example:
      >>> import jax.numpy as jnp, jaxconv
      >>> operands = jnp.ones((1, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
      >>> tuning = jaxconv.autotune(jaxconv.conv, *operands)
      >>> len(tuning.rows)
      1
    """
    check_alone("autotune")
    platform = jax.default_backend()
    if fn is None and not args and not kwargs:
        specs = planned_here(platform)
        if not specs:
            remedy = "run the program first, or pass a function and its arguments"
            constraint = "without fn, jaxconv must have planned convolutions in this process"
            fail("autotune", constraint, f"none on {platform}", remedy)
    else:
        every = convolutions("autotune", fn, args, kwargs)
        by_auto = (conv.spec("autotune") for conv in every if conv.algorithm == "auto")
        specs = list(dict.fromkeys(spec for spec in by_auto if not spec.is_empty))
    planned = {spec: choose(spec, platform)[0] for spec in specs}
    own = {} if force else own_rows(platform)
    rows = {s: dataclasses.replace(own[p], spec=s) for s in specs if (p := prepared(s)) in own}
    todo = [spec for spec in specs if spec not in rows]
    try:
        for row in shown(measured(todo, platform), len(todo), progress):
            rows[row.spec] = row
    finally:
        if todo:
            notify()
    found = (_measurement(rows[s], planned[s], s not in todo, platform) for s in specs)
    return Tuning(platform, tuple(found))


def check_alone(function: str) -> None:
    """Raises in a program of several processes, whose plans don't use measurements."""
    if several_processes():
        constraint = "measurements are for programs of one process, since several must plan alike"
        fail(function, constraint, f"{jax.process_count()} processes", "omit the call there")


def _measurement(row: Timed, planned: str, known: bool, platform: str) -> Measurement:
    todo = prepared(row.spec)
    chosen, why = choose(row.spec, platform)
    possible = {
        name: time
        for name, time in sorted(row.seconds.items(), key=lambda item: item[1])
        # The limit of workspace may have changed since it was measured.
        if name in ALGORITHMS and unplannable(ALGORITHMS[name], todo, platform) is None
    }
    ratio = possible["xla"] / possible[chosen] if {"xla", chosen} <= set(possible) else None
    return Measurement(row.spec, planned, chosen, why, tuple(possible.items()), ratio, known)


def measured(
    specs: Iterable[ConvSpec], platform: str, most: int | None = None, seconds: float = SECONDS
) -> Iterator[str | Timed]:
    """Measures and keeps each. Yields what it is, then its row."""
    for spec in specs:
        yield str(spec)
        row = timed(spec, candidates(spec, platform, most), platform, seconds)
        record([row], platform)
        yield row


def candidates(spec: ConvSpec, platform: str, most: int | None = None) -> list[str]:
    """The algorithms worth measuring: the planned one, XLA's, and ``most`` that may be faster."""
    plan = plan_spec(spec, platform)
    times = sorted((c.seconds or 0.0, c.name) for c in plan.eligible)
    hopeless = HOPELESS_PREDICTED * min((time for time, _ in times if time), default=0.0)
    names = [name for time, name in times[:most] if time <= hopeless]
    return list(dict.fromkeys([plan.algorithm, "xla", *names]))


def timed(spec: ConvSpec, names: Sequence[str], platform: str, seconds: float = SECONDS) -> Timed:
    """Times algorithms for ``spec`` in turn, on random operands; stores nothing. All but the first
    are left out where XLA refuses them, and called a few times only where these are hopeless."""
    planned, *others = names
    with jax.enable_x64(jax.config.read("jax_enable_x64") or spec.dtype.name in WIDE):
        arrays = operands(spec)
        subjects = {planned: _compiled(spec, planned, platform, arrays)}
        first = {planned: quickest(subjects[planned].call)}
        for name in others:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                subjects[name] = _compiled(spec, name, platform, arrays)
                first[name] = quickest(subjects[name].call)
        limit = HOPELESS_MEASURED * min(first.values())
        running = [name for name, time in first.items() if name == planned or time <= limit]
        rounds = alternate([subjects[n] for n in running], ROUNDS, seconds, fewest=FEWEST_ROUNDS)
    medians = first | dict(zip(running, np.median(rounds, axis=0).tolist(), strict=True))
    compiling = {name: subjects[name].compile_seconds for name in first}
    return Timed(spec, here(platform), medians, compiling)


def operands(spec: ConvSpec) -> tuple[Array, Array]:
    """Random operands in the order of memory."""
    numbers, positive = np.random.default_rng(0), jnp.issubdtype(spec.dtype, np.integer)
    shapes = map(np.take, (spec.lhs_shape, spec.rhs_shape), _memory(spec))
    drawn = (numbers.standard_normal(shape, dtype=np.float32) for shape in shapes)
    lhs, rhs = ((np.abs(8 * x) if positive else x).astype(spec.dtype) for x in drawn)
    return jnp.asarray(lhs), jnp.asarray(rhs)


def _memory(spec: ConvSpec) -> tuple[Sequence[int], Sequence[int]]:
    """The axes of lhs and rhs in the order of memory: those of a weight gradient lie channels last,
    only its dimension numbers exchange channels and batch."""
    *spatial, last = range(1, len(spec.lhs_shape))
    if spec.weight_gradient:
        return (last, *spatial, 0), (last - 1, *range(last - 1), last)
    image = (0, last, *spatial) if spec.channels_first else (0, *spatial, last)
    return image, layout.memory_axes(spec)


def _compiled(
    spec: ConvSpec, algorithm: str, platform: str, operands: tuple[Array, Array]
) -> Compiled:
    """``spec`` as "auto" would run it by ``algorithm``, on operands in the order of memory, and the
    result in it: what is moved is timed too, as in the program."""
    lhs_axes, rhs_axes = map(np.argsort, _memory(spec))

    def as_it_arrives(lhs: Array, rhs: Array) -> Array:
        lhs, rhs = lhs.transpose(lhs_axes), rhs.transpose(rhs_axes)
        out = execute(lhs, rhs, spec, algorithm, platform)
        if spec.weight_gradient:
            return layout.in_memory(jnp.moveaxis(out, 0, -2), spec)
        return jnp.moveaxis(out, -1, 1) if spec.channels_first else out

    return Compiled(as_it_arrives, *operands)
