"""``plan``: which algorithm does a convolution, which others could, and what each would cost."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, overload

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS, Algorithm
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.arguments.channels_last import Padding
from jaxconv.config import listeners
from jaxconv.planning.choose import checked_platform, choose, rejection, workspace
from jaxconv.planning.described import described, documented
from jaxconv.planning.predict import Time, time_of
from jaxconv.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One algorithm's prospects for one convolution.

    Attributes:
      name: the algorithm.
      reason: why "auto" can't take it; None where it can. The remaining fields are valid only if it
        can run, within the limit of workspace or not.
      doubt: why "auto" leaves it out, though it could run; None where its time is compared.
      seconds: its time, predicted or measured.
      sigma: standard deviation of the time's logarithm: it is likely between ``seconds /
        exp(sigma)`` and ``seconds * exp(sigma)``.
      measured: whether exactly this convolution was measured on this machine, by ``autotune``.
      flops: floating-point operations, a multiply and an add counted as two.
      workspace: bytes of intermediate arrays besides operands and output.
      gemm: (count, m, n, k) of its matrix products, None where it has none.
    """

    name: str
    reason: str | None = None
    doubt: str | None = None
    seconds: float = 0.0
    sigma: float = 0.0
    measured: bool = False
    flops: int = 0
    workspace: int = 0
    gemm: tuple[int, int, int, int] | None = None


HEADER = ("", "algorithm", "GEMMs × m×n×k", "MFLOP", "workspace", "time", "what it does")
SPARE = (2, 3, 4)


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
    def eligible(self) -> tuple[Candidate, ...]:
        """The candidates that "auto" takes if they are measured to be the fastest."""
        spec = prepared(self.spec)
        possible = (c for c in self.candidates if c.reason is None)
        return tuple(c for c in possible if ALGORITHMS[c.name].excluded(spec) is None)

    def _contents(self) -> tables.Table:
        groups, m, n, k = self.spec.gemm
        product = f"{m}×{k} · {k}×{n}" + (f", {groups} times" if groups > 1 else "")
        above = [str(self.spec), f"as a GEMM: {product}; {self.spec.flops / 1e6:,.1f} MFLOP"]
        above.append(f"on {self.platform}: {self.algorithm}, since {self.why}")
        rows: list[tuple[str, ...]] = [HEADER]
        for c in self.candidates:
            chosen = "▸" if c.name == self.algorithm else ""
            if c.reason is not None and not c.workspace:
                rows.append((chosen, c.name, "", "", "", "", f"can't: {c.reason}"))
                continue
            gemm = "–" if c.gemm is None else "{} × {}×{}×{}".format(*c.gemm)
            mflop, workspace = f"{c.flops / 1e6:,.1f}", tables.mebibytes(c.workspace)
            seconds = str(Time(c.seconds, c.sigma, c.measured))
            summary = ALGORITHMS[c.name].summary if c.reason is None else f"not chosen: {c.reason}"
            if c.reason is None and c.doubt is not None and not chosen:
                summary += f" (left out: {c.doubt})"
            rows.append((chosen, c.name, gemm, mflop, workspace, seconds, summary))
        bold = [i for i, row in enumerate(rows) if row[0]]
        return tables.Table(above, rows, range(2, 6), bold, spare=SPARE, detail=True)


@overload
def plan(
    x: Any,
    w: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    dtype: Any = None,
    platform: str | None = None,
) -> Plan: ...
@overload
def plan(
    lhs: Any, rhs: Any, *args: Any, dtype: Any = None, platform: str | None = None, **kwargs: Any
) -> Plan: ...
def plan(*args: Any, dtype: Any = None, platform: str | None = None, **kwargs: Any) -> Plan:
    """Plans a convolution without running anything, by the arguments of ``conv`` or of lax.

    The arguments are those of ``conv``, channels last, with its defaults. If there is a third
    argument by position, or the name of one that only lax has (``window_strides``,
    ``dimension_numbers``, …), they are those of ``lax.conv_general_dilated`` instead.

    In a program of several processes all plan alike: without measurements, for a common machine.

    Args:
      x, w: image and kernel: arrays, ``jax.ShapeDtypeStruct``s, or shapes.
      strides, padding, dilation, groups, precision, preferred_element_type: as in ``conv``.
      dtype: that of operands given as shapes; default: that of the other operand, or float32.
      platform: "cpu", "gpu" or "tpu"; default: that of JAX's default backend.
      args, kwargs: those of ``lax.conv_general_dilated`` after the operands, instead.

    Returns:
      A ``Plan``: the algorithm that "auto" would run, why, and every candidate with its GEMM
      shape, FLOPs, workspace in bytes and predicted seconds, or the reason why it can't.

    Raises:
      TypeError, ValueError: as ``conv`` or ``conv_general_dilated``; and for arguments of both.

    Example:
      >>> import jax, jaxconv
      >>> p = jaxconv.plan((1, 56, 56, 128), (3, 3, 1, 128), groups=128, platform="cpu")
      >>> p.algorithm
      'shift'

      The same by lax's arguments, for arrays or what stands for them:

      >>> image = jax.ShapeDtypeStruct((1, 56, 56, 128), "float32")
      >>> kernel = jax.ShapeDtypeStruct((3, 3, 1, 128), "float32")
      >>> channels_last = ("NHWC", "HWIO", "NHWC")
      >>> p == jaxconv.plan(image, kernel, (1, 1), "SAME", dimension_numbers=channels_last,
      ...                   feature_group_count=128, platform="cpu")
      True
    """
    spec = described(args, kwargs, dtype)
    return plan_spec(spec, checked_platform("plan", platform))


plan.__signature__ = documented(Plan)  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=4096)
def plan_spec(spec: ConvSpec, platform: str) -> Plan:
    """The plan of a spec; see ``plan``."""
    name, why = choose(spec, platform)
    if caveat := ALGORITHMS[name].caveat:
        why += f"; {caveat}"
    candidate = partial(_candidate, spec=prepared(spec), platform=platform)
    return Plan(spec, platform, name, why, tuple(map(candidate, ALGORITHMS.values())))


def _candidate(algorithm: Algorithm, spec: ConvSpec, platform: str) -> Candidate:
    if spec.is_empty or unsupported(algorithm, spec) is not None:
        return Candidate(algorithm.name, rejection(algorithm, spec, platform))
    name, cost = algorithm.name, algorithm.cost(spec)
    reason, memory = rejection(algorithm, spec, platform), workspace(algorithm, spec, platform)
    doubted = algorithm.excluded(spec) or (algorithm.doubted(spec) if platform == "cpu" else None)
    time = time_of(name, spec, platform)
    times = time.seconds, time.sigma, time.measured
    return Candidate(name, reason, doubted, *times, cost.flops, memory, cost.gemm)


listeners.append(plan_spec.cache_clear)
