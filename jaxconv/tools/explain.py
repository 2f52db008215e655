"""``explain``: the convolutions of a whole function, forward and backward, and the plan of each."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ParamSpec

import jax
from jax.lax import rev_p
from jax.sharding import AbstractMesh

from jaxconv import compat, tables
from jaxconv.arguments.errors import of_function
from jaxconv.planning.choose import checked_platform
from jaxconv.planning.plan import plan_spec
from jaxconv.spec import ConvSpec
from jaxconv.transforms.accelerate import accelerate
from jaxconv.transforms.jaxprs import (
    BY_NAME,
    arrays_of,
    choice,
    fn_jaxpr,
    results_of,
    source_line,
    walk,
)
from jaxconv.transforms.primitive import Lowered, observers

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Row:
    """A convolution of a function, or several that are identical except for the count.

    Attributes:
      spec: the convolution, in the canonical layout; of arrays on several devices, a device's part.
      where: the source line that it or, in a gradient, its forward convolution comes from:
        "file:line (function)"; empty if unknown.
      direction: "forward", "input gradient", "weight gradient"; "recomputed" for a forward one that
        ``jax.checkpoint`` runs again; "backward" for any other in the backward pass.
      algorithm: the one that runs.
      why: the reason for it.
      seconds: time of one of them, measured or predicted.
      sigma: standard deviation of its logarithm; see ``Candidate``.
      measured: whether exactly this convolution was measured on this machine, by ``autotune``.
      lax_seconds: time of lax's convolution, measured or predicted.
      workspace: bytes of intermediate arrays of one of them.
      count: how often it is run; in a scan, once for each step.
      within: "while" where ``count`` is for one iteration of a ``while_loop``, "cond" where it
        assumes that the branch is taken; else empty.
      exchanged: what devices exchange for it: borders of the image, sums.
    """

    spec: ConvSpec
    where: str
    direction: str
    algorithm: str
    why: str
    seconds: float
    sigma: float
    measured: bool
    lax_seconds: float
    workspace: int
    count: int = 1
    within: str = ""
    exchanged: str = ""


HEADER: tuple[str, ...] = (
    "where",
    "direction",
    "algorithm",
    "count",
    "time",
    "sure",
    "lax",
    "× lax",
    "workspace",
    "convolution",
)
FIGURES = range(3, 9)
SPARE = (5, 8, 6, 3, 1)
CAUTION = "Times are for one of each, measured or else predicted, likely within the factor ×/÷."
WITHIN = "while: count of one iteration. cond: count if this branch is taken."


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(tables.Report):
    """The convolutions of a function.

    It is displayed as a table that fits the terminal; ``table()`` is the whole one.

    Attributes:
      platform: the one they are planned for: "cpu", "gpu", "tpu", …
      rows: the convolutions, in the order of the program.
    """

    platform: str
    rows: tuple[Row, ...]

    @property
    def count(self) -> int:
        """How many convolutions are run, counting one iteration per ``while_loop``, each branch."""
        return sum(row.count for row in self.rows)

    @property
    def seconds(self) -> float:
        """The total time."""
        return sum(row.count * row.seconds for row in self.rows)

    @property
    def lax_seconds(self) -> float:
        """The total time by lax."""
        return sum(row.count * row.lax_seconds for row in self.rows)

    @property
    def workspace(self) -> int:
        """The maximum of the convolutions' bytes of intermediate arrays."""
        return max((row.workspace for row in self.rows), default=0)

    def _contents(self) -> tables.Table:
        if not self.rows:
            return tables.Table(["There is no convolution in this function."], [])
        figures = _figures(self.seconds, "", self.lax_seconds, self.workspace)
        rows = [HEADER, *map(_cells, self.rows), ("all", "", "", str(self.count), *figures, "")]
        return _table(f"Planned for {self.platform}.", rows, [len(self.rows) + 1])


def _table(title: str, rows: Sequence[Sequence[str]], bold: Sequence[int] = ()) -> tables.Table:
    counts = [row[HEADER.index("count")] for row in rows]
    below = [WITHIN] if any(" " in count for count in counts) else []
    return tables.Table([f"{title} {CAUTION}"], rows, FIGURES, bold, below, SPARE, detail=True)


def _cells(row: Row) -> tuple[str, ...]:
    count = f"{row.count} {row.within}".rstrip()
    sure = "measured" if row.measured else tables.factor(row.sigma)
    figures = _figures(row.seconds, sure, row.lax_seconds, row.workspace)
    what = f"{row.spec}; {row.exchanged}" if row.exchanged else str(row.spec)
    return row.where, row.direction, row.algorithm, count, *figures, what


def _figures(seconds: float, sure: str, lax_seconds: float, workspace: int) -> tuple[str, ...]:
    times = f"{lax_seconds / seconds:.1f}" if seconds else "–"
    own, by_lax = map(tables.milliseconds, (seconds, lax_seconds))
    return own, sure, by_lax, times, tables.mebibytes(workspace)


@of_function
def explain(fn: Callable[P, Any], *, platform: str | None = None) -> Callable[P, Explanation]:
    """Explains how each convolution in ``fn`` is planned, without running anything.

    lax's convolutions are planned as by ``accelerate`` and ``enable``, jaxconv's by their own
    ``algorithm``. Pass the whole training step or the gradient: backward convolutions are listed
    only if ``fn`` contains them. Convolutions with an unused result are omitted, as by XLA; what
    ``fn`` leaves in a ``jax.Ref`` or an object, as NNX's ``optimizer.update`` does, is used. The
    objects themselves stay as they are.
    Inside ``shard_map`` the shapes are those on one device. Where arguments are on several devices
    (arrays, or ``jax.ShapeDtypeStruct`` with a sharding), the program is compiled, as XLA decides
    how the arrays within lie; the convolutions are then a device's parts.

    Args:
      fn: any function, including jitted and accelerated ones.
      platform: "cpu", "gpu" or "tpu"; default: that of JAX's default backend.

    Returns:
      A function of the arguments of ``fn`` that returns an ``Explanation``, a table of the
      convolutions: source line, direction, algorithm, times and how sure they are, workspace.
      Arrays may also be ``jax.ShapeDtypeStruct``s. Other arguments (numbers, strings, …) are passed
      to ``fn`` unchanged, so that static arguments stay static.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: an unknown platform; symbolic shapes.

    Example:
      >>> import jax, jaxconv
      >>> def loss(image, kernel):
      ...     return (jax.lax.conv(image, kernel, (1, 1), "SAME") ** 2).sum()
      >>> image = jax.ShapeDtypeStruct((1, 3, 8, 8), "float32")
      >>> kernel = jax.ShapeDtypeStruct((4, 3, 3, 3), "float32")
      >>> explanation = jaxconv.explain(jax.jit(jax.grad(loss, argnums=1)))(image, kernel)
      >>> [row.direction for row in explanation.rows]
      ['forward', 'weight gradient']
    """
    platform = checked_platform("explain", platform)

    def explained(*args: P.args, **kwargs: P.kwargs) -> Explanation:
        counts = Counter[Row]()
        parts = _parts(fn, args, kwargs)
        for row in _rows(fn_jaxpr(fn, args, kwargs), platform, parts):
            counts[dataclasses.replace(row, count=1)] += row.count
        rows = (dataclasses.replace(row, count=count) for row, count in counts.items())
        return Explanation(platform, tuple(rows))

    return explained


Parts = Mapping[ConvSpec, tuple[ConvSpec, str]]


def _parts(fn: Callable[..., Any], args: Any, kwargs: Any) -> Parts:
    """A device's part of each convolution, and what is exchanged for it; nothing on one device."""
    arrays = arrays_of(args, kwargs)
    shardings = [getattr(array, "sharding", None) for array in arrays.values()]
    abstract = any(isinstance(getattr(s, "mesh", None), AbstractMesh) for s in shardings)
    if abstract or all(s is None or s.num_devices == 1 for s in shardings):
        return {}
    parts: dict[ConvSpec, tuple[ConvSpec, str]] = {}

    def observe(lowered: Lowered) -> None:
        if lowered.part_of is not None:
            whole, exchanged = lowered.part_of
            parts[whole] = lowered.spec, exchanged

    observers.append(observe)
    try:
        # A new function, so that it is compiled even if it was before.
        compiled = accelerate(partial(results_of, fn, args, kwargs))
        jax.jit(lambda arrays: compiled(arrays)).lower(arrays).compile()
    finally:
        observers.remove(observe)
    return parts


def _rows(jaxpr: Any, platform: str, parts: Parts) -> Iterator[Row]:
    for eqn, names, makers, times, within in walk(jaxpr):
        direction = _direction(eqn, names, makers)
        where = source_line(eqn.source_info.traceback)
        spec, algorithm, why = choice("explain", eqn)
        part, exchanged = parts.get(spec, (spec, ""))
        row = _row(part, algorithm, why, platform, where, direction, times, within)
        yield dataclasses.replace(row, exchanged=exchanged)


class Compiled:
    """Observes compiled convolutions. ``str()`` is a table: each convolution once."""

    def __init__(self) -> None:
        self._counts = Counter[tuple[ConvSpec, str, str]]()
        self._where: dict[tuple[ConvSpec, str, str], str] = {}

    def __call__(self, lowered: Lowered) -> None:
        key = lowered.spec, lowered.algorithm, lowered.platform
        self._counts[key] += 1
        self._where.setdefault(key, source_line(compat.source_info_util.current().traceback))

    def __str__(self) -> str:
        rows = {platform: [HEADER] for _, _, platform in self._counts}
        for (spec, algorithm, platform), count in self._counts.items():
            where = self._where[spec, algorithm, platform]
            row = _row(spec, algorithm, BY_NAME, platform, where, count=count)
            rows[platform].append(_cells(row))
        width = tables.terminal_width()
        found = [_table(f"Compiled for {platform}.", table) for platform, table in rows.items()]
        return "\n".join(table.text(width) for table in found) or "No convolution was compiled."


def _row(
    spec: ConvSpec,
    algorithm: str,
    why: str,
    platform: str,
    where: str,
    direction: str = "",
    count: int = 1,
    within: str = "",
) -> Row:
    plan = plan_spec(spec, platform)
    if algorithm == "auto":
        algorithm, why = plan.algorithm, plan.why
    candidates = {candidate.name: candidate for candidate in plan.candidates}
    cost, lax_cost = candidates[algorithm], candidates["xla"]
    costs = cost.seconds, cost.sigma, cost.measured, lax_cost.seconds, cost.workspace
    return Row(spec, where, direction, algorithm, why, *costs, count, within)


def _direction(eqn: Any, names: str, makers: dict[Any, Any]) -> str:
    """The direction, inferred from the form of JAX's derivatives of a convolution."""
    if "transpose(" not in names:
        return "forward"
    lhs_spec, rhs_spec, _ = eqn.params["dimension_numbers"]
    # A weight gradient sums over the batch: its lhs and rhs have batch and channels exchanged, and
    # in layouts the batch comes before the channels.
    if lhs_spec[0] > lhs_spec[1] and rhs_spec[0] > rhs_spec[1]:
        return "weight gradient"
    # The kernel of an input gradient was reversed just before, even if of size 1.
    maker = _maker(eqn.invars[1], makers)
    while maker is not None and maker.primitive is not rev_p and len(maker.invars) == 1:
        maker = _maker(maker.invars[0], makers)
    if maker is not None and maker.primitive is rev_p:
        return "input gradient"
    return "recomputed" if "rematted_computation" in names else "backward"


def _maker(operand: Any, makers: dict[Any, Any]) -> Any:
    """The equation that made ``operand``; None for constants and arguments."""
    return None if hasattr(operand, "val") else makers.get(operand)
