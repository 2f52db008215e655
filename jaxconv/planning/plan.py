"""``plan``: which algorithm does a convolution, which others could, and what each would cost."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS, Algorithm
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.arguments.channels_last import Padding, lax_arguments
from jaxconv.arguments.errors import check_array, fail
from jaxconv.arguments.parse import parameters
from jaxconv.config import listeners
from jaxconv.planning.choose import checked_platform, choose, unplannable, workspace
from jaxconv.planning.predict import Time, time_of
from jaxconv.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One algorithm's prospects for one convolution.

    Attributes:
      name: the algorithm.
      status: "chosen"; "possible" where it is chosen once measured to be the fastest; "excluded"
        where "auto" never takes it; "unsupported" where it can't run, so that no figures follow.
      reason: why it is excluded or unsupported, or why the predicted time of a possible one is not
        trusted; else None.
      seconds: its time, predicted or measured; None where nothing was measured on the platform.
      sigma: standard deviation of the time's logarithm: it is likely between ``seconds /
        exp(sigma)`` and ``seconds * exp(sigma)``.
      measured: whether exactly this convolution was measured on this machine, by ``autotune``.
      flops: floating-point operations, a multiply and an add counted as two.
      workspace: bytes of intermediate arrays besides operands and output.
      gemm: (count, m, n, k) of its matrix products, None where it has none.
    """

    name: str
    status: Literal["chosen", "possible", "excluded", "unsupported"]
    reason: str | None = None
    seconds: float | None = None
    sigma: float | None = None
    measured: bool = False
    flops: int = 0
    workspace: int = 0
    gemm: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(tables.Report):
    """The algorithm chosen for a convolution, and the alternatives.

    It is displayed as a table that fits the terminal; ``table()`` is the whole one.

    Attributes:
      spec: the convolution, in the canonical layout.
      platform: "cpu", "gpu", "tpu", …
      algorithm: the one that "auto" runs; can be passed as ``algorithm=``.
      why: the reason for the choice.
      candidates: every algorithm, in the order of ``ALGORITHMS``.
    """

    spec: ConvSpec
    platform: str
    algorithm: str
    why: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate that "auto" runs."""
        return next(c for c in self.candidates if c.status == "chosen")

    @property
    def eligible(self) -> tuple[Candidate, ...]:
        """The candidates that "auto" takes if they are measured to be the fastest."""
        return tuple(c for c in self.candidates if c.status in ("chosen", "possible"))

    def _contents(self) -> tables.Table:
        groups, m, n, k = self.spec.gemm
        product = f"{m}×{k} · {k}×{n}" + (f", {groups} times" if groups > 1 else "")
        above = [str(self.spec), f"as a GEMM: {product}; {self.spec.flops / 1e6:,.1f} MFLOP"]
        above.append(f"on {self.platform}, {self.algorithm}: {self.why}")
        header = ("", "algorithm", "GEMMs × m×n×k", "MFLOP", "workspace", "time", "what it does")
        rows = [header, *map(_cells, self.candidates)]
        bold = [i for i, row in enumerate(rows) if row[0]]
        below = [f"No times: nothing was measured on {self.platform}; jaxconv.autotune measures."]
        if self.spec.is_empty or any(c.seconds is not None for c in self.candidates):
            below = []
        return tables.Table(above, rows, range(2, 6), bold, below, spare=(2, 3, 4), detail=True)


def _cells(c: Candidate) -> tuple[str, ...]:
    chosen = "▸" if c.status == "chosen" else ""
    if c.status == "unsupported":
        return chosen, c.name, "", "", "", "", f"can't: {c.reason}"
    gemm = "{} × {}×{}×{}".format(*c.gemm) if c.gemm else "–"
    time = str(Time(c.seconds, c.sigma or 0.0, c.measured)) if c.seconds is not None else "–"
    summary = ALGORITHMS[c.name].summary + (f" (left out: {c.reason})" if c.reason else "")
    mflop, workspace = f"{c.flops / 1e6:,.1f}", tables.mebibytes(c.workspace)
    return chosen, c.name, gemm, mflop, workspace, time, summary


def plan(
    x: Any,
    w: Any,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    dtype: DTypeLike | None = None,
    platform: str | None = None,
) -> Plan:
    """Plans a convolution by the arguments of ``conv``, without running anything.

    Each row of ``explain(lax.conv_general_dilated, lhs, rhs, …)`` has the ``plan`` of a call by
    lax's arguments. In a program of several processes all plan alike: without measurements, for a
    common machine.

    Args:
      x, w: image and kernel: arrays, ``jax.ShapeDtypeStruct``s, or shapes.
      strides, padding, dilation, groups, precision, preferred_element_type: as in ``conv``.
      dtype: that of operands given as shapes; default: that of the other operand, or float32.
      platform: "cpu", "gpu" or "tpu"; default: that of JAX's default backend.

    Returns:
      A ``Plan``: the algorithm that "auto" would run, why, and every candidate with its GEMM
      shape, FLOPs, workspace in bytes and time in seconds, or the reason why it can't. There are
      no times for a platform on which nothing was measured.

    Raises:
      TypeError, ValueError: as ``conv``.

    Example:
      >>> import jaxconv
      >>> p = jaxconv.plan((1, 56, 56, 128), (3, 3, 1, 128), groups=128, platform="cpu")
      >>> p.algorithm
      'shift'
    """
    x, w = _operands(x, w, dtype)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    call, others = lax_arguments("plan", x, w, strides, padding, dilation, groups, **options)
    if len(x.shape) < len(w.shape):
        x = jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
    spec = ConvSpec.from_params(x, w, parameters(call, x, w, **others))
    return plan_spec(spec, checked_platform("plan", platform))


def _operands(x: Any, w: Any, dtype: Any) -> list[Any]:
    """Arrays and what stands for them; shapes with their dtype."""
    dtypes = [operand.dtype for operand in (x, w) if hasattr(operand, "dtype")]
    if dtype is not None and len(dtypes) == 2:
        remedy = "omit it, or pass shapes"
        fail("plan", "dtype is for operands given as shapes", "none of these", remedy)
    operands = []
    for name, operand in (("x", x), ("w", w)):
        integers = isinstance(operand, (tuple, list))
        if integers and all(isinstance(size, (int, np.integer)) for size in operand):
            if min(operand, default=0) < 0:
                constraint = f"the sizes of {name} must not be negative"
                fail("plan", constraint, operand, "pass the whole shape")
            operand = jax.ShapeDtypeStruct(operand, dtype or (dtypes or [np.float32])[0])
        check_array("plan", name, operand)
        operands.append(operand)
    return operands


@lru_cache(maxsize=4096)
def plan_spec(spec: ConvSpec, platform: str) -> Plan:
    """The plan of a spec; see ``plan``."""
    chosen, why = choose(spec, platform)
    if caveat := ALGORITHMS[chosen].caveat:
        why += f"; {caveat}"
    todo = prepared(spec)
    candidates = (_candidate(a, todo, platform, chosen) for a in ALGORITHMS.values())
    return Plan(spec, platform, chosen, why, tuple(candidates))


def _candidate(algorithm: Algorithm, spec: ConvSpec, platform: str, chosen: str) -> Candidate:
    name = algorithm.name
    status = "chosen" if name == chosen else "possible"
    if spec.is_empty:
        return Candidate(name, status)
    if reason := unsupported(algorithm, spec):
        return Candidate(name, "unsupported", reason)
    if name != chosen and (reason := unplannable(algorithm, spec, platform)):
        status = "excluded"
    elif name != chosen and platform == "cpu":
        reason = algorithm.doubted(spec)
    time = time_of(name, spec, platform) or (None, None, False)
    cost, memory = algorithm.cost(spec), workspace(algorithm, spec, platform)
    return Candidate(name, status, reason, *time, cost.flops, memory, cost.gemm)


listeners.append(plan_spec.cache_clear)
