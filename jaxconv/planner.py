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

from jaxconv import layout, tables
from jaxconv.algorithms import ALGORITHMS, Algorithm, UnsupportedConvError
from jaxconv.algorithms.base import apply, prepared, refusal
from jaxconv.measured import winner
from jaxconv.parse import fail, parse
from jaxconv.prediction import FAST, calibrated
from jaxconv.settings import listeners, over_limit
from jaxconv.spec import ConvSpec


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One algorithm's prospects for one convolution.

    Attributes:
      name: the algorithm.
      reason: why "auto" can't take it; None where it can. The rest counts only then, or where the
        reason is its workspace.
      doubt: why "auto" leaves it out, though it could run; None where it compares its time.
      seconds: predicted time, an order of magnitude: measure before you trust it.
      flops: floating-point operations, a multiply and an add counted as two.
      workspace: bytes of intermediate arrays besides operands and output.
      gemm: (count, m, n, k) of its matrix products, None where it has none.
    """

    name: str
    reason: str | None = None
    doubt: str | None = None
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
            if c.reason is None and c.doubt is not None and not chosen:
                summary += f" (left out: {c.doubt})"
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
    """The algorithm for ``spec`` on ``platform`` and the reason: what was measured, else predicted.

    Args:
      without: algorithms that must not be chosen.
    """
    measured = winner(spec, platform)
    spec = prepared(spec)
    possible = [
        name
        for name, algorithm in ALGORITHMS.items()
        if name not in without and breach(name, spec) is None and rejection(algorithm, spec) is None
    ]
    if measured is not None and measured.algorithm in possible:
        return measured.algorithm, measured.why
    if platform != "cpu":
        return _on_accelerator(spec, platform, possible)
    if spec.is_empty and "xla" in possible:
        return "xla", "there is nothing to compute"
    possible = [name for name in possible if doubt(name, spec) is None] or possible
    if spec.is_empty or not possible:
        return _last_resort(spec)
    seconds = {name: predict(name, spec, platform) for name in possible}
    best = min(seconds, key=lambda name: seconds[name] + _compiling(name, spec, platform))
    lax = seconds.get("xla")
    if lax is None:
        return best, f"it is predicted to be the fastest ({tables.milliseconds(seconds[best])})"
    if best == "xla" or seconds[best] > MARGIN * lax:
        return "xla", "no other is predicted to be clearly faster than XLA's own convolution"
    figures = f"{tables.milliseconds(seconds[best])}, XLA's own {tables.milliseconds(lax)}"
    return best, f"it is predicted to be the fastest ({figures})"


# What "auto" must not become, however fast.
NEVER = {
    "naive": "it is for learning",
    "winograd4": "it rounds more than 'auto' promises",
}
# Products that an output must sum for an FFT to be as accurate as "auto" promises: of one channel
# and 7×7 to 21×21 taps its error was up to 2.6 times lax's, of 32 channels and 3×3×3 2.2 times,
# with 31×31 1.8 times.
LONG = 900


def breach(name: str, spec: ConvSpec) -> str | None:
    """Why an algorithm does not keep what "auto" promises for a prepared ``spec``: at most twice
    the rounding error of lax. None where it does. No measured time outweighs it."""
    if name == "winograd":
        # Points above those of three taps round more: 5×5 on 64 channels has 3.7 times lax's error,
        # 7×7 14 times, 5 taps along one axis 2.0 times. Of two taps it saves less and rounds as
        # much: the phases of 4×4 stride 2, 256→128, had 2.06 times.
        forward = layout.forward_of(spec) if spec.weight_gradient else spec
        if max(forward.kernel_shape, default=1) != 3:
            return "it rounds too much with other than 3 taps along an axis"
        # lax sums the kernel's gradient in groups by a loop that rounds less than a product: 32
        # groups of 16 channels, 14×14, had 2.2 times its error.
        if spec.weight_gradient and spec.groups > 1:
            return "it rounds too much for a kernel's gradient in groups"
    if name == "fft" and _products(spec) < LONG:
        return f"it rounds too much where an output sums fewer than {LONG} products"
    return NEVER.get(name)


# Channels of a group from which on Winograd's transforms cost less than the products they save.
MANY_CHANNELS = 16
# Input times output channels of a group up to which shifting is worth its compiling: at most the
# first, or the second where few terms make an output. In a network XLA writes what comes before
# into each of its terms: with 3×3 on 3→32 and 1×1 on 16→32 channels a step of MobileNetV2 took
# 77 s to compile, without 5 s.
FEW_CHANNELS = 9
SOME_CHANNELS, FEW_TERMS = 64, 72


def doubt(name: str, spec: ConvSpec) -> str | None:
    """Why "auto" does not take an algorithm on CPU for a prepared ``spec``, whatever its predicted
    time; None where that decides. What was measured to be the fastest is beyond doubt."""
    channels, n = spec.rhs_shape[-2], spec.gemm[2]
    forward = layout.forward_of(spec) if spec.weight_gradient else spec
    if name == "xla" and spec.groups > 1:
        # It also makes NaN of what is not finite.
        if spec.dtype.name not in FAST:
            return "in groups of this dtype XLA multiplies all channels by a kernel full of zeros"
        # As gradients have it, it takes 1,400 ms for 5 (32 groups, 4×28×28×256).
        if spec.taps > spec.positions:
            return "XLA is slow in groups with a kernel larger than the output"
    if name == "winograd" and min(forward.rhs_shape[-2], forward.gemm[2]) < MANY_CHANNELS:
        return f"with fewer than {MANY_CHANNELS} channels transforms cost more than they save"
    # By tiles it is fast alone, but XLA fuses nothing into their loop: with two of them the forward
    # of ConvNeXt-T, batch 8, took 257 MiB instead of 101 and 1.12 times as long.
    gathers = name in ("im2col", "im2col_tiled", "implicit")
    if gathers and forward.taps == 1 and _is_pointwise(spec):
        return "it is the product that pointwise has, in other words"
    if name == "phase" and spec.out_channels == 1 and channels >= MANY_CHANNELS:
        # 0.6 ms for the input gradient of 10 taps stride 5, 1×16000×1 to 512 channels, by phases
        # 1.2 to 2.6.
        return "XLA sums many channels to one output at the speed of memory"
    if name == "slices" and spec.spatial_ndim < 3:
        return "in fewer than three dimensions it is another way to spell the same products"
    if name == "shift" and spec.weight_gradient:
        # 32 groups of 4 channels, 4×2306, take 10 ms, as a product 3, and with three taps 4.
        if spec.spatial_ndim == forward.taps == 1:
            return "a single tap along one axis is not compiled to one loop"
    elif name == "shift" and not n == 1 < spec.groups:
        few = SOME_CHANNELS if spec.taps * channels <= FEW_TERMS else FEW_CHANNELS
        if channels * n > few:
            return f"in a network more than {few} products a tap and group take long to compile"
    if name == "implicit" and channels == 1 < spec.groups and not spec.weight_gradient:
        return "a product of one element by one is a shift in another layout"
    return None


def _products(spec: ConvSpec) -> int:
    """Products that an output sums at most: 31×31 taps on 12×12 elements meet 144 of them, the rest
    zeros. By FFT these 144 had 2.4 times lax's error."""
    axes = zip(spec.kernel_shape, spec.lhs_dilation, spec.lhs_spatial, strict=True)
    return spec.rhs_shape[-2] * math.prod(min(-(-k // d), size) for k, d, size in axes)


def _is_pointwise(spec: ConvSpec) -> bool:
    return refusal(ALGORITHMS["pointwise"], spec) is None


# XLA's own convolution stays unless another is predicted to take less than this share of its time.
MARGIN = 0.9
# Calls over which a second of compiling is spread where two algorithms are almost as fast.
CALLS = 100_000


def _compiling(name: str, spec: ConvSpec, platform: str) -> float:
    return calibrated(platform).compile_seconds(ALGORITHMS[name], spec) / CALLS


def rejection(algorithm: Algorithm, spec: ConvSpec) -> str | None:
    """Why "auto" can't take ``algorithm`` for a prepared ``spec``; None where it can."""
    reason = refusal(algorithm, spec)
    if reason is not None or spec.is_empty or algorithm.name == "xla":
        return reason  # XLA's own convolution is what is left where nothing else fits
    return over_limit(algorithm.cost(spec).workspace)


def _last_resort(spec: ConvSpec) -> tuple[str, str]:
    return "im2col_tiled" if spec.spatial_ndim else "pointwise", "it takes every convolution"


def _on_accelerator(spec: ConvSpec, platform: str, possible: list[str]) -> tuple[str, str]:
    if platform == "gpu" and jnp.issubdtype(spec.dtype, np.integer):
        for name in ("pointwise", "implicit"):
            if name in possible:
                return name, "XLA refuses integer convolutions on GPU"
    elif "xla" in possible:
        return "xla", "the platform's own convolution is fast for most shapes"
    return _last_resort(spec)


@lru_cache(maxsize=8192)
def predict(name: str, spec: ConvSpec, platform: str) -> float:
    """Seconds of an algorithm that supports the prepared ``spec``."""
    algorithm = ALGORITHMS[name]
    return calibrated(platform).seconds(algorithm, spec, parts_seconds(algorithm, spec, platform))


def parts_seconds(algorithm: Algorithm, spec: ConvSpec, platform: str) -> float:
    """Predicted seconds of the smaller convolutions that ``algorithm`` hands on."""
    total = 0.0
    for part in map(prepared, algorithm.parts(spec) if algorithm.parts else ()):
        if not part.is_empty:
            total += predict(choose(part, platform)[0], part, platform)
    return total


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
    name, cost, reason = algorithm.name, algorithm.cost(spec), rejection(algorithm, spec)
    doubted = breach(name, spec) or (doubt(name, spec) if platform == "cpu" else None)
    seconds = predict(name, spec, platform)
    return Candidate(name, reason, doubted, seconds, cost.flops, cost.workspace, cost.gemm)


def forget() -> None:
    """Drops the plans that are kept: settings or measurements have changed."""
    for planned in (choose, predict, plan_spec, calibrated):
        planned.cache_clear()


listeners.append(forget)
