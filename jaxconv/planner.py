"""``plan``: which algorithm does a convolution, which others could, and what each would cost."""

import dataclasses
import html
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxconv import calibration, layout, tables
from jaxconv.algorithms import ALGORITHMS, Algorithm, UnsupportedConvError
from jaxconv.algorithms.base import Cost, apply, prepared, refusal
from jaxconv.algorithms.pointwise import spreads
from jaxconv.algorithms.slices import part
from jaxconv.parse import fail, parse
from jaxconv.settings import listeners, over_limit
from jaxconv.spec import ConvSpec
from jaxconv.winners import winner


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One algorithm's prospects for one convolution.

    Attributes:
      name: the algorithm.
      reason: why "auto" can't take it; None where it can. The rest counts only then, or where the
        reason is its workspace.
      seconds: predicted time, an order of magnitude: measure before you trust it.
      flops: floating-point operations, a multiply and an add counted as two.
      workspace: bytes of intermediate arrays besides operands and output.
      gemm: (count, m, n, k) of its matrix products, None where it has none.
    """

    name: str
    reason: str | None = None
    seconds: float = 0.0
    flops: int = 0
    workspace: int = 0
    gemm: tuple[int, int, int, int] | None = None


HEADER = ("", "algorithm", "GEMMs × m×n×k", "MFLOP", "workspace", "predicted", "what it does")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen for a convolution, and what was not. ``str()`` is a table that teaches.

    Attributes:
      spec: the convolution, in the canonical layout.
      platform: "cpu", "gpu", "tpu", …
      algorithm: the one that "auto" runs; can be given back as ``algorithm=``.
      why: the reason for the choice.
      candidates: every algorithm, in the order of ``ALGORITHMS``.
    """

    spec: ConvSpec
    platform: str
    algorithm: str
    why: str
    candidates: tuple[Candidate, ...]

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [HEADER]
        for c in self.candidates:
            chosen = "▸" if c.name == self.algorithm else ""
            if c.reason is not None and not c.workspace:
                rows.append((chosen, c.name, "", "", "", "", f"can't: {c.reason}"))
                continue
            gemm = "–" if c.gemm is None else "{} × {}×{}×{}".format(*c.gemm)
            mflop, workspace = f"{c.flops / 1e6:,.1f}", tables.mebibytes(c.workspace)
            seconds = tables.milliseconds(c.seconds)
            summary = ALGORITHMS[c.name].summary if c.reason is None else f"not chosen: {c.reason}"
            rows.append((chosen, c.name, gemm, mflop, workspace, seconds, summary))
        return rows

    def __str__(self) -> str:
        groups, m, n, k = self.spec.gemm
        product = f"{m}×{k} · {k}×{n}" + (f", {groups} times" if groups > 1 else "")
        lines = [str(self.spec), f"as a GEMM: {product}; {self.spec.flops / 1e6:,.1f} MFLOP"]
        lines.append(f"on {self.platform}: {self.algorithm}, since {self.why}")
        lines.append(tables.as_text(self._rows(), right=range(2, 6)))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = self._rows()
        chosen = [i for i, row in enumerate(rows) if row[0]]
        return (
            f"<p><code>{html.escape(str(self.spec))}</code><br>on {self.platform}:"
            f" <b>{self.algorithm}</b>, since {html.escape(self.why)}</p>"
            + tables.as_html(rows, bold=chosen)
        )


@lru_cache(maxsize=4096)
def choose(spec: ConvSpec, platform: str, without: frozenset[str] = frozenset()) -> tuple[str, str]:
    """The algorithm for ``spec`` on ``platform`` and the reason: what was measured, else by rules.

    Args:
      without: algorithms that must not be chosen.
    """
    measured = winner(spec, platform)
    spec = prepared(spec)
    if (
        measured is not None
        and measured.algorithm not in without
        and rejection(ALGORITHMS[measured.algorithm], spec) is None
    ):
        return measured.algorithm, measured.why
    for name, why in _cpu_rules(spec) if platform == "cpu" else _accelerator_rules(spec, platform):
        if name not in without and rejection(ALGORITHMS[name], spec) is None:
            return name, why
    return "im2col_tiled" if spec.spatial_ndim else "pointwise", "it takes every convolution"


def rejection(algorithm: Algorithm, spec: ConvSpec) -> str | None:
    """Why "auto" can't take ``algorithm`` for a prepared ``spec``; None where it can."""
    reason = refusal(algorithm, spec)
    if reason is not None or spec.is_empty or algorithm.name == "xla":
        return reason  # XLA's own convolution is what is left where nothing else fits
    return over_limit(algorithm.cost(spec).workspace)


def _accelerator_rules(spec: ConvSpec, platform: str) -> list[tuple[str, str]]:
    if platform == "gpu" and jnp.issubdtype(spec.dtype, np.integer):
        why = "XLA refuses integer convolutions on GPU"
        return [("pointwise", why), ("implicit", why)]
    return [("xla", "the platform's own convolution is fast for most shapes")]


# Where shifting is faster than any GEMM: input times output channels of a group at most the first,
# or the second where few terms make an output (3×3 on 3→16 channels: 2.4 times as fast as lax, on
# 8→8 1.8 times, on 16→16 0.4 times).
FEW_CHANNELS = 9
SOME_CHANNELS, FEW_TERMS = 64, 72
# Products of an image element with one phase's kernel, below which reading the image once for each
# phase costs more than multiplying zeros (10 taps of 512→1 channels, stride 5: 0.25 times lax).
PHASE_PRODUCTS = 8
# Positions of an image and depth of its GEMM where one product over the whole batch is fastest:
# 1.3 to 1.9 times as fast as lax.
SMALL_IMAGE, SMALL_IMAGE_DEPTH = 64, 2048
# The same for weight gradients: positions of the forward output, and elements of the patch matrix
# (1.2 to 1.4 times as fast as lax at 1.8 and 3.6 million, 0.4 to 0.9 times at 5 million and above).
GRADIENT_POSITIONS, GRADIENT_MATRIX = 200, 4_000_000
# Channels below which XLA's GEMM of a weight gradient runs at a fifth of its peak.
GRADIENT_CHANNELS = 16


def _cpu_rules(spec: ConvSpec) -> list[tuple[str, str]]:
    """Candidates in order of preference, from what was measured (figures above)."""
    n = spec.gemm[2]
    rules = []
    if spec.is_empty:
        rules.append(("xla", "there is nothing to compute"))
    if spreads(spec) and refusal(ALGORITHMS["phase"], spec) is not None:
        # 16×16 patches: 73 times as fast as lax on JAX 0.12, 19 on 0.10.2; 4×4: 0.9 and 1.7 times.
        rules.append(("pointwise", "each output meets one tap: a GEMM and a reshape"))
    if not xla_is_fast(spec) or spec.taps * n >= PHASE_PRODUCTS * math.prod(spec.lhs_dilation):
        rules.append(("phase", "inserted zeros need no multiplying"))
    return rules + (_gradient_rules(spec) if spec.weight_gradient else _forward_rules(spec))


def _forward_rules(spec: ConvSpec) -> list[tuple[str, str]]:
    groups, _, n, k = spec.gemm
    channels = spec.rhs_shape[-2]
    rules = []
    few = SOME_CHANNELS if spec.taps * channels <= FEW_TERMS else FEW_CHANNELS
    if (groups > 1 and n == 1) or channels * n <= few:
        why = f"a GEMM of {channels} input and {n} output channels a group can't fill its tiles"
        rules.append(("shift", why))
    if jnp.issubdtype(spec.dtype, np.complexfloating) and xla_is_fast(spec):
        # A complex GEMM takes 2 to 4 times as long.
        rules.append(("xla", "three real convolutions make a complex one"))
    if 1 in (spec.taps, spec.positions) or not xla_is_fast(spec):
        # Not for patchify: 0.4 to 0.9 times lax on JAX 0.12, though 1.1 to 2.5 times on 0.10.2.
        rules.append(("pointwise", "windows don't overlap, so nothing need be gathered"))
    if spec.spatial_ndim == 3 and xla_is_fast(part(spec)):
        # 2.5 to 6 times as fast as lax, where im2col_tiled is 1.1 to 3.9 times.
        rules.append(("slices", "XLA:CPU is fast in two dimensions, but not in three"))
    if not xla_is_fast(spec):
        rules.append(("im2col_tiled", SLOW_IN_XLA))
    if spec.positions <= SMALL_IMAGE and k >= SMALL_IMAGE_DEPTH:
        rules.append(("im2col", "small images with many channels make one well-shaped GEMM"))
    rules.append(("xla", "XLA:CPU packs the patches of dense convolutions in cache, at GEMM peak"))
    return rules


SLOW_IN_XLA = "XLA:CPU would run a scalar loop or a small GEMM for each group here"


def _gradient_rules(spec: ConvSpec) -> list[tuple[str, str]]:
    """For weight gradients, in the terms of the forward convolution."""
    forward = layout.forward_of(spec)
    _, m, n, k = forward.gemm
    channels, matrix = forward.rhs_shape[-2], m * k
    rules = []
    if channels == n == 1:
        rules.append(("shift", "rows of products need no GEMM where a group has one channel"))
    if jnp.issubdtype(spec.dtype, np.complexfloating) and xla_is_fast(spec):
        rules.append(("xla", "three real convolutions make a complex one"))
    if forward.taps == 1:
        rules.append(("pointwise", "nothing need be gathered: one GEMM over all positions"))
    if not xla_is_fast(spec):
        rules.append(("im2col_tiled", SLOW_IN_XLA))
    whole = matrix <= GRADIENT_MATRIX
    if refusal(ALGORITHMS["pointwise"], spec) is None:
        # 1.2 to 3 times as fast as lax, where pointwise, which transposes, is 0.8 to 3.6 times.
        rules.append(("im2col" if whole else "im2col_tiled", "windows don't overlap"))
    if max(channels, n) < GRADIENT_CHANNELS and channels > 1:
        rules.append(("im2col_tiled", "XLA:CPU's GEMM is slow with so few channels"))
    if channels < GRADIENT_CHANNELS and not whole:
        rules.append(("im2col_tiled", "few channels and many positions: tiles stay in cache"))
    if whole and forward.positions <= GRADIENT_POSITIONS:
        rules.append(("im2col", "a weight gradient of small images is one well-shaped GEMM"))
    rules.append(("xla", "XLA:CPU packs the patches of dense convolutions in cache, at GEMM peak"))
    return rules


def xla_is_fast(spec: ConvSpec) -> bool:
    """Whether XLA:CPU has a fast convolution for this, instead of a loop of its own."""
    return (
        jnp.issubdtype(spec.dtype, np.inexact)
        and spec.out_dtype == spec.dtype
        and 1 <= spec.spatial_ndim <= 2
        and spec.groups == 1
    )


def predict(algorithm: Algorithm, cost: Cost, spec: ConvSpec, platform: str) -> float:
    """Seconds: the work over its rate, the traffic over the bandwidth, and a price per step."""
    if platform != "cpu":
        return (
            cost.flops / calibration.ACCELERATOR_RATE
            + cost.traffic / calibration.ACCELERATOR_BANDWIDTH
            + cost.steps * calibration.ACCELERATOR_STEP
        )
    if algorithm.name == "xla":
        if xla_is_fast(spec):
            kind = "xla fast"
        else:
            dense = spec.dtype == np.float32 and spec.rhs_shape[-2] > 1
            kind = "xla grouped" if dense else "xla loop"
    elif cost.gemm is None:
        kind = "multiply-add"
    elif not jnp.issubdtype(spec.dtype, np.inexact):
        kind = "integer gemm"
    else:
        kind = "gemm" if min(cost.gemm[1:3]) >= 16 else "small gemm"
    return (
        cost.flops / calibration.CPU_RATES[kind]
        + cost.traffic / calibration.CPU_BANDWIDTH
        + (cost.steps - 1) * calibration.CPU_STEP
    )


def run(lhs: Array, rhs: Array, spec: ConvSpec, algorithm: str, platform: str) -> Array:
    """Computes ``spec`` on canonical arrays by ``algorithm`` or by the one that "auto" chooses.

    The smaller convolutions that an algorithm hands on are planned in their turn. Those of an
    algorithm that was asked for by name never meet XLA's convolution: what is named is measured.
    """
    without = frozenset[str]()
    if algorithm == "auto":
        algorithm, _ = choose(spec, platform)
    elif algorithm != "xla":
        without = frozenset({"xla"})
    return execute(lhs, rhs, spec, algorithm, platform, without)


def execute(
    lhs: Array,
    rhs: Array,
    spec: ConvSpec,
    algorithm: str,
    platform: str,
    without: frozenset[str] = frozenset(),
) -> Array:
    """Computes ``spec`` by ``algorithm``; what that hands on, by any but those in ``without``."""

    def convolve(lhs: Array, rhs: Array, part: ConvSpec) -> Array:
        return execute(lhs, rhs, part, choose(part, platform, without)[0], platform, without)

    return apply(ALGORITHMS[algorithm], lhs, rhs, spec, convolve)


def check_name(function: str, algorithm: str) -> None:
    """Raises where ``algorithm`` is unknown."""
    if not isinstance(algorithm, str) or algorithm not in ("auto", *ALGORITHMS):
        names = ", ".join(ALGORITHMS)
        fail(function, f"algorithm must be 'auto' or one of {names}", repr(algorithm), "use one")


def check_algorithm(function: str, algorithm: str, spec: ConvSpec) -> None:
    """Raises where ``algorithm`` is unknown or can't do ``spec``."""
    check_name(function, algorithm)
    if algorithm == "auto":
        return
    reason = refusal(ALGORITHMS[algorithm], spec)
    if reason is not None:
        fail(
            function,
            f"algorithm {algorithm!r} can't do this convolution ({reason})",
            spec,
            "use algorithm='auto', which chooses one that can",
            UnsupportedConvError,
        )


def plan(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    platform: str | None = None,
) -> Plan:
    """Plans ``conv_general_dilated`` of the same arguments, without running anything.

    Args:
      lhs, rhs: arrays or ``jax.ShapeDtypeStruct``s.
      platform: "cpu", "gpu" or "tpu"; default: that of JAX's default backend.
      The others: as in ``lax.conv_general_dilated``.

    Returns:
      A ``Plan``: the algorithm that "auto" would run, why, and every candidate with its GEMM
      shape, FLOPs, workspace in bytes and predicted seconds, or the reason why it can't.

    Raises:
      TypeError, ValueError: as ``conv_general_dilated``.

    Example:
      >>> import jax, jaxconv
      >>> image = jax.ShapeDtypeStruct((1, 56, 56, 128), "float32")
      >>> kernel = jax.ShapeDtypeStruct((3, 3, 1, 128), "float32")
      >>> channels_last = ("NHWC", "HWIO", "NHWC")
      >>> p = jaxconv.plan(image, kernel, (1, 1), "SAME", dimension_numbers=channels_last,
      ...                  feature_group_count=128, platform="cpu")
      >>> p.algorithm
      'shift'
    """
    params = parse(
        "plan",
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    return plan_spec(ConvSpec.from_params(lhs, rhs, params), checked_platform("plan", platform))


def checked_platform(function: str, platform: str | None) -> str:
    """``platform``, or that of JAX's default backend; raises where it is unknown."""
    platform = jax.default_backend() if platform is None else platform
    if platform not in ("cpu", "gpu", "tpu", jax.default_backend()):
        fail(function, "platform must be 'cpu', 'gpu' or 'tpu'", repr(platform), "use one of these")
    return platform


@lru_cache(maxsize=4096)
def plan_spec(spec: ConvSpec, platform: str) -> Plan:
    """The plan of a spec; see ``plan``."""
    name, why = choose(spec, platform)
    candidate = partial(_candidate, spec=prepared(spec), platform=platform)
    return Plan(spec, platform, name, why, tuple(map(candidate, ALGORITHMS.values())))


def _candidate(algorithm: Algorithm, spec: ConvSpec, platform: str) -> Candidate:
    if spec.is_empty or refusal(algorithm, spec) is not None:
        return Candidate(algorithm.name, rejection(algorithm, spec))
    cost, reason = algorithm.cost(spec), rejection(algorithm, spec)
    seconds = predict(algorithm, cost, spec, platform)
    return Candidate(algorithm.name, reason, seconds, cost.flops, cost.workspace, cost.gemm)


def forget() -> None:
    """Drops the plans that are kept: settings or measurements have changed."""
    choose.cache_clear()
    plan_spec.cache_clear()


listeners.append(forget)
