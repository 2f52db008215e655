"""``explain``: the convolutions of a whole function, forward and backward, and the plan of each."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.lax import rev_p
from jax.sharding import AbstractMesh

from jaxconv import compat, tables
from jaxconv.planning.choose import checked_platform
from jaxconv.planning.plan import Plan, plan_spec
from jaxconv.pooling.choose import choose
from jaxconv.pooling.spec import KINDS, Pooling
from jaxconv.spec import ConvSpec
from jaxconv.transforms.accelerate import accelerate
from jaxconv.transforms.jaxprs import Found, operations, over_arrays, source_line
from jaxconv.transforms.primitive import Lowered, observers


@dataclasses.dataclass(frozen=True)
class Row:
    """A convolution of a function, or several that are identical except for the count."""

    spec: ConvSpec  # of arrays on several devices, a device's part
    # "file:line (function)" of it or, in a gradient, of its forward convolution; empty if unknown.
    where: str
    algorithm: str  # the one that runs
    why: str  # the reason for it
    seconds: float | None  # of one call, measured or predicted; None where nothing was measured
    sigma: float | None  # standard deviation of its logarithm; see ``Candidate``
    measured: bool  # whether exactly this one was measured on this machine, by ``autotune``
    lax_seconds: float | None  # of one call of lax's convolution, likewise
    workspace: int  # bytes of intermediate arrays of one call
    plan: Plan = dataclasses.field(repr=False)  # with all candidates
    # "forward", "input gradient", "weight gradient"; "recomputed" for a forward one that
    # ``jax.checkpoint`` runs again; "backward" for any other in the backward pass.
    direction: str = ""
    count: int = 1  # how often it is run; in a scan, once for each step
    # "while" where ``count`` is for one iteration of a ``while_loop``, "cond" where it assumes that
    # the branch is taken; else empty.
    within: str = ""
    exchanged: str = ""  # what devices exchange for it: borders of the image, sums


@dataclasses.dataclass(frozen=True)
class PoolingRow:
    """A pooling of a function, or several that are identical except for the count."""

    pooling: Pooling
    where: str  # as in ``Row``
    algorithm: str  # the way that it is computed: "taps", "axes" or "xla"
    why: str  # the reason for it
    direction: str = ""  # "forward", "gradient"; "tangent" in forward mode
    count: int = 1
    within: str = ""


HEADER = ("where", "direction", "algorithm", "count", "time", "sure", "lax", "× lax")
HEADER += ("workspace", "convolution")
FIGURES = range(3, 9)
SPARE = (5, 8, 6, 3, 1)
CAUTION = "Times are per call, measured or else predicted, likely within the factor ×/÷."
UNKNOWN = "There are no times: nothing was measured on this platform."
POOLED = "Poolings are chosen by rules; there are no times of them."
WITHIN = "while: count of one iteration. cond: count if this branch is taken."


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(tables.Report):
    """Convolutions of a function: a table that fits the terminal; ``table()`` is the whole one."""

    platform: str  # the one they are planned for: "cpu", "gpu", "tpu", …
    rows: tuple[Row, ...]  # in the order of the program
    poolings: tuple[PoolingRow, ...] = ()  # likewise

    @property
    def count(self) -> int:
        """How many convolutions are run, counting one iteration per ``while_loop``, each branch."""
        return sum(row.count for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """The total time; None where that of a row is unknown."""
        return _total((row.seconds, row.count) for row in self.rows)

    @property
    def lax_seconds(self) -> float | None:
        """The total time by lax; None where that of a row is unknown."""
        return _total((row.lax_seconds, row.count) for row in self.rows)

    @property
    def workspace(self) -> int:
        """The maximum of the convolutions' bytes of intermediate arrays."""
        return max((row.workspace for row in self.rows), default=0)

    def _contents(self) -> tables.Table:
        if not self.rows and not self.poolings:
            return tables.Table(["There is no convolution in this function."])
        total = ("all", "", "", str(self.count), *_figures(self, ""), "")
        last = [total] if self.rows else []
        return _table(f"Planned for {self.platform}.", self.rows, self.poolings, last)


def _total(times: Iterable[tuple[float | None, int]]) -> float | None:
    products = [None if seconds is None else count * seconds for seconds, count in times]
    return None if None in products else sum(filter(None, products))


def _table(
    title: str,
    rows: Sequence[Row],
    poolings: Sequence[PoolingRow],
    last: Sequence[tuple[str, ...]] = (),
) -> tables.Table:
    known = any(row.seconds is not None for row in rows)
    lines = [HEADER, *map(_cells, rows), *last]
    bold = range(1 + len(rows), len(lines))
    lines += map(_cells, poolings)
    below = [POOLED] if poolings else []
    below += [WITHIN] if any(row.within for row in (*rows, *poolings)) else []
    caution = "" if not rows else CAUTION if known else UNKNOWN
    above = [f"{title} {caution}".rstrip()]
    return tables.Table(above, lines, FIGURES, bold, below, SPARE, detail=True)


def _cells(row: Row | PoolingRow) -> tuple[str, ...]:
    count = f"{row.count} {row.within}".rstrip()
    if isinstance(row, PoolingRow):
        figures, what = ("–",) * (len(HEADER) - 5), str(row.pooling)
    else:
        known = "–" if row.sigma is None else tables.factor(row.sigma)
        figures = _figures(row, "measured" if row.measured else known)
        what = f"{row.spec}; {row.exchanged}" if row.exchanged else str(row.spec)
    return row.where, row.direction, row.algorithm, count, *figures, what


def _figures(of: Row | Explanation, sure: str) -> tuple[str, ...]:
    own, lax = of.seconds, of.lax_seconds
    ratio = f"{lax / own:.1f}" if own and lax is not None else "–"
    milliseconds, size = tables.milliseconds, tables.mebibytes(of.workspace)
    return milliseconds(own), sure, milliseconds(lax), ratio, size


def explain(
    fn: Callable[..., Any], *args: Any, platform: str | None = None, **kwargs: Any
) -> Explanation:
    """Explains how each convolution in a function is planned, without running anything.

    lax's convolutions are planned as by ``accelerate`` and ``enable``. Pass the whole training step
    or the gradient: backward convolutions are listed only if ``fn`` contains them. Convolutions
    with an unused result are omitted, as by XLA. Poolings are listed below the convolutions.

    As for ``jax.jit``, objects that ``fn`` changes must be among its arguments: what it leaves in
    them (or in any ``jax.Ref``) is used, as by NNX's ``optimizer.update``, and they stay as they
    are. Where arguments are on several devices the program is compiled, as XLA decides how the
    arrays within lie, and the convolutions are a device's parts, as inside ``shard_map``.

    Args:
      fn: any function, including jitted and accelerated ones.
      args, kwargs: its arguments. Arrays may also be ``jax.ShapeDtypeStruct``s.
      platform: "cpu", "gpu" or "tpu"; default: that of JAX's default backend.

    Returns:
      An ``Explanation``, a table of the convolutions and poolings; each of its ``rows``, the
      convolutions, has the whole ``plan``.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: an unknown platform; symbolic shapes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxconv
      >>> def loss(image, kernel):
      ...     return (jaxconv.conv(image, kernel) ** 2).sum()
      >>> operands = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
      >>> [row.direction for row in jaxconv.explain(jax.grad(loss, 1), *operands).rows]
      ['forward', 'weight gradient']
    """
    platform = checked_platform("explain", platform)
    found, lowered = operations("explain", fn, args, kwargs), _lowered(fn, args, kwargs)
    parts: dict[ConvSpec, Any] = {
        conv.part_of[0]: (conv.spec, conv.part_of[1]) for conv in lowered if conv.part_of
    }
    counts = Counter[Row | PoolingRow]()
    for each in found:
        where = source_line(each.eqn.source_info.traceback)
        if each.original.name in KINDS:
            algorithm, why = choose(each.pooling, platform)
            if lowered:
                algorithm, why = "xla", "its part of an array is a device's, which XLA knows"
            direction = "gradient" if "transpose(" in each.stack else each.pooling.direction
            row = PoolingRow(each.pooling, where, algorithm, why, direction, within=each.within)
        else:
            whole = each.spec("explain")
            spec, exchanged = parts.get(whole, (whole, ""))
            more = {"direction": _direction(each), "within": each.within, "exchanged": exchanged}
            row = _row(spec, each.algorithm, platform, where, **more)
        counts[row] += each.times
    rows = [dataclasses.replace(row, count=count) for row, count in counts.items()]
    convolutions = tuple(row for row in rows if isinstance(row, Row))
    poolings = tuple(row for row in rows if isinstance(row, PoolingRow))
    return Explanation(platform, convolutions, poolings)


def _lowered(fn: Callable[..., Any], args: Any, kwargs: Any) -> list[Lowered]:
    """The parts of devices, and what is exchanged for them; nothing on one device."""
    traced, arrays = over_arrays(fn, args, kwargs)
    shardings = [getattr(array, "sharding", None) for array in arrays]
    abstract = any(isinstance(getattr(s, "mesh", None), AbstractMesh) for s in shardings)
    if abstract or all(s is None or s.num_devices == 1 for s in shardings):
        return []
    found: list[Lowered] = []
    observers.append(found.append)
    try:
        jax.jit(accelerate(traced)).lower(arrays).compile()
    finally:
        observers.remove(found.append)
    return found


class Compiled:
    """Observes compiled convolutions and poolings. ``str()`` is a table: each of them once."""

    def __init__(self) -> None:
        self._lines: dict[tuple[ConvSpec | Pooling, str, str], list[str]] = {}

    def __call__(self, lowered: Lowered) -> None:
        key = lowered.spec, lowered.algorithm, lowered.platform
        line = source_line(compat.source_info_util.current().traceback)
        self._lines.setdefault(key, []).append(line)

    def __str__(self) -> str:
        rows: dict[str, tuple[list[Row], list[PoolingRow]]] = {}
        for (spec, algorithm, platform), lines in self._lines.items():
            convolutions, poolings = rows.setdefault(platform, ([], []))
            if isinstance(spec, ConvSpec):
                convolutions.append(_row(spec, algorithm, platform, lines[0], count=len(lines)))
            else:
                row = PoolingRow(spec, lines[0], algorithm, "", spec.direction, len(lines))
                poolings.append(row)
        found = [_table(f"Compiled for {where}.", *those) for where, those in rows.items()]
        return "\n".join(map(str, found)) or "No convolution was compiled."


def _row(spec: ConvSpec, algorithm: str, platform: str, where: str, **more: Any) -> Row:
    plan, why = plan_spec(spec, platform), "it was asked for by name"
    if algorithm == "auto":
        algorithm, why = plan.algorithm, plan.why
    candidates = {candidate.name: candidate for candidate in plan.candidates}
    cost, by_lax = candidates[algorithm], candidates["xla"].seconds
    costs = cost.seconds, cost.sigma, cost.measured, by_lax, cost.workspace
    if spec.is_empty:
        costs = 0.0, None, False, 0.0, 0
    return Row(spec, where, algorithm, why, *costs, plan, **more)


def _direction(conv: Found) -> str:
    """The direction, inferred from the form of JAX's derivatives of a convolution."""
    if "transpose(" not in conv.stack:
        return "forward"
    if conv.spec("explain").weight_gradient:
        return "weight gradient"
    # The kernel of an input gradient was reversed just before, even if of size 1.
    maker = conv.maker(conv.eqn.invars[1])
    while maker is not None and maker.primitive is not rev_p and len(maker.invars) == 1:
        maker = conv.maker(maker.invars[0])
    if maker is not None and maker.primitive is rev_p:
        return "input gradient"
    return "recomputed" if "rematted_computation" in conv.stack else "backward"
