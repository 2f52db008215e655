"""Timing lax, jaxconv and their peers in turn, and checking their results."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv.bench.cases import Layer
from jaxconv.planning.timing import Compiled, Subject, alternate, quickest

# Seconds after which threads of another runtime have stopped spinning: 2 taps on 4×199×512 by
# jaxconv took 3.7 ms if run 2 ms after a call of PyTorch, 2.5 ms after 10 ms or more.
SETTLE = 0.015

Pairs = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long subjects are timed, the arguments of ``timing.alternate``, and against whom.

    Attributes:
      against: names of ``PEERS``.
    """

    rounds: int = 101
    seconds: float = 1.0
    precision: float = 0.01
    fewest: int = 3
    against: tuple[str, ...] = ()

    def times(self, subjects: Sequence[Subject], settle: float = 0.0) -> Pairs:
        """Seconds of each subject, called in turn: a tuple for each round."""
        return tuple(
            alternate(subjects, self.rounds, self.seconds, self.precision, settle, self.fewest)
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a suite.

    Attributes:
      name, direction: the case measured.
      how: the algorithms that "auto" chose, or "accelerate".
      lax: seconds of lax and of jaxconv, called in turn.
      compile_seconds: of lax and of jaxconv, including tracing and lowering.
      workspace: bytes of intermediate arrays of lax and of jaxconv.
      difference: the largest difference from lax's result, over the largest value.
      differing: whose result that is: jaxconv's, a peer's, or an algorithm's.
      tolerance: the upper limit of ``difference``.
      peers: by names of other ``TITLES``, their seconds and jaxconv's, called in turn.
      flops: of the convolutions, without inserted zeros.
      peak: FLOP/s of a large float32 matrix product, measured with this result.
      errors: root mean square error of lax and of jaxconv against float64, over the root mean
        square; None where it was not measured.
      gemm: (count, m, n, k) of the matrix products, None where there are none, or several kinds.
      best: the fastest algorithm, and ``regret`` the time of "auto" over its time.
      is_lax: whether jaxconv's program is lax's own: what differs in their times is noise.
    """

    name: str
    direction: str
    how: str
    lax: Pairs
    compile_seconds: tuple[float, float]
    workspace: tuple[int | None, int | None]
    difference: float
    differing: str
    tolerance: float
    peers: Mapping[str, Pairs] = dataclasses.field(default_factory=dict, hash=False)
    flops: float | None = None
    peak: float | None = None
    errors: tuple[float, ...] | None = None
    gemm: tuple[int, int, int, int] | None = None
    best: str = ""
    regret: float | None = None
    is_lax: bool = False

    def quartiles(self, peer: str = "lax") -> tuple[float, float, float]:
        """First quartile, median and third quartile of the time of ``peer``, "lax" or one of
        ``peers``, over jaxconv's: above 1 jaxconv is faster; 1 if both are one program."""
        if self.is_lax and peer == "lax":
            return 1.0, 1.0, 1.0
        other, own = np.transpose(self.lax if peer == "lax" else self.peers[peer])
        low, median, high = np.quantile(other / own, (0.25, 0.5, 0.75)).tolist()
        return low, median, high

    @property
    def rate(self) -> float | None:
        """FLOP/s of jaxconv, by the median of its times next to lax."""
        return None if self.flops is None else self.flops / float(np.median(self.lax, axis=0)[1])

    @property
    def label(self) -> str:
        return f"{self.name}, {self.direction}" if self.direction else self.name

    @property
    def error_ratio(self) -> float | None:
        """jaxconv's error over lax's; 1 where both are exact."""
        if self.errors is None:
            return None
        by_lax, own = self.errors
        return own / by_lax if by_lax else 1.0 if own == 0 else float("inf")

    @property
    def wrong(self) -> str | None:
        """A message if a result disagrees with lax's; None if none does."""
        if self.difference < self.tolerance:
            return None
        return (
            f"{self.label}: {self.differing} is off by {self.difference:.1e} of the largest value,"
            f" more than {self.tolerance:.0e}"
        )

    def as_json(self) -> dict[str, Any]:
        """The fields and the quantities computed from them."""
        ratios = {peer: self.quartiles(peer) for peer in ("lax", *self.peers)}
        computed = {name: getattr(self, name) for name in ("rate", "error_ratio", "wrong")}
        return dataclasses.asdict(self) | computed | {"ratios": ratios}


@dataclasses.dataclass
class Call:
    """A peer's function without arguments, ready to be called and timed; see ``timing.Subject``.

    Attributes:
      as_jax: converts an output to JAX's layout.
      expected: converts JAX's output to the form that ``as_jax`` returns.
    """

    function: Callable[[], Any]
    as_jax: Callable[[Any], Any] = np.asarray
    expected: Callable[[Any], Any] = lambda output: output
    output: Any = None

    def call(self) -> float:
        """Calls it once and returns the seconds."""
        start = time.perf_counter()
        self.output = self.function()
        return time.perf_counter() - start


class Peer(NamedTuple):
    """Another runtime against which jaxconv is measured, by the module ``torch_peer``.

    Attributes:
      packages: that must be installed; the first is the runtime.
    """

    title: str
    packages: tuple[str, ...]

    @property
    def installed(self) -> bool:
        return all(find_spec(package) is not None for package in self.packages)


# By the name that users ask for them by.
PEERS = {
    "torch": Peer("PyTorch", ("torch",)),
    "torch.compile": Peer("torch.compile", ("torch",)),
    "onnxruntime": Peer("ONNX Runtime", ("onnxruntime", "onnxscript", "torch")),
    "openvino": Peer("OpenVINO", ("openvino", "onnxscript", "torch")),
}
TITLES = {"lax": "lax"} | {name: peer.title for name, peer in PEERS.items()}


def peers(
    effort: Effort, kind: str, case: Any, direction: str, args: Sequence[Any]
) -> dict[str, Call]:
    """A call of this case by each of ``effort.against`` that can compute it.

    Args:
      kind: "layer" or "network": the function of ``torch_peer`` that makes the call.
    """
    if not effort.against:
        return {}
    make = getattr(import_module("jaxconv.bench.torch_peer"), kind)
    calls = {name: make(name, case, direction, *args) for name in effort.against}
    return {name: call for name, call in calls.items() if call is not None}


@cache
def _product(size: int) -> Compiled:
    x = jnp.ones((size, size), jnp.float32)
    return Compiled(jnp.dot, x, x)


def gemm_peak(size: int = 1024) -> float:
    """FLOP/s of a float32 matrix product, the best of a few calls."""
    return 2 * size**3 / quickest(_product(size).call)


def measure(
    effort: Effort,
    baseline: Compiled,
    subject: Compiled,
    peers: Mapping[str, Call] | None = None,
    exact: Callable[[], np.ndarray] | None = None,
    **facts: Any,
) -> Result:
    """Times and compares.

    Args:
      baseline, subject: by lax and by jaxconv.
      peers: by their names.
      exact: computes the output in float64; called after the timing, which its spinning threads
        would disturb.
      facts: the rest of ``Result``.
    """
    if "flops" in facts:
        facts["peak"] = gemm_peak()
    facts["lax"] = effort.times((baseline, subject))
    off = {"jaxconv": difference(baseline.output, subject.output)}
    facts["peers"] = {}
    for name, peer in (peers or {}).items():
        facts["peers"][name] = effort.times((peer, subject), SETTLE)
        off[TITLES[name]] = difference(peer.expected(baseline.output), peer.as_jax(peer.output))
    if exact is not None:
        truth = exact()
        facts["errors"] = error(baseline.output, truth), error(subject.output, truth)
    return compared(baseline, subject, off, **facts)


def compared(
    baseline: Compiled, subject: Compiled, off: Mapping[str, float], **facts: Any
) -> Result:
    """A result with the largest difference in ``off`` (NaN if any is) and whose it is."""
    name = max(off, key=lambda name: (math.isnan(off[name]), off[name]))
    return Result(
        compile_seconds=(baseline.compile_seconds, subject.compile_seconds),
        workspace=(baseline.workspace, subject.workspace),
        difference=off[name],
        differing=name,
        **facts,
    )


def difference(expected: Any, out: Any) -> float:
    """The largest difference over the largest value, of the worst array of two trees; NaN or
    infinite if one of them has non-finite values."""

    def of_array(expected: Any, out: Any) -> float:
        wide = np.asarray(expected, np.float64)
        off = np.max(np.abs(np.asarray(out, np.float64) - wide))
        return float(off / max(np.max(np.abs(wide)), np.finfo(np.float64).tiny))

    return float(np.max(jax.tree.leaves(jax.tree.map(of_array, expected, out))))


def error(output: Any, exact: np.ndarray) -> float:
    """Root mean square error over the root mean square of the exact result."""
    scale = math.sqrt(np.mean(exact**2)) or 1.0
    return math.sqrt(np.mean((np.asarray(output, np.float64) - exact) ** 2)) / scale


def reference(
    layer: Layer, direction: str, lhs: Any, rhs: Any, cotangent: Any = None
) -> np.ndarray:
    """A layer in float64 by NumPy, one matrix product for each tap of its kernel.

    Not by lax, whose float64 convolutions are scalar loops on CPU and need JAX's 64-bit mode. It
    shares no code with the convolutions that it checks.
    """
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    (low, high), up, stride = layer.padding, layer.lhs_dilation, layer.stride
    spans = [(size - 1) * up + 1 for size in layer.spec.lhs_spatial]
    inside = (slice(None), *(slice(low, low + span, up) for span in spans))
    padded = np.zeros((len(lhs), *(low + span + high for span in spans), lhs.shape[-1]))
    padded[inside] = 0 if direction == "input gradient" else lhs
    gradient = np.zeros_like(rhs)

    def split(x: np.ndarray) -> np.ndarray:
        """(…, channels) → (groups, positions, channels of a group)."""
        return x.reshape(-1, layer.groups, x.shape[-1] // layer.groups).swapaxes(0, 1)

    out = np.zeros(layer.spec.out_shape)
    out = split(out if direction == "forward" else np.asarray(cotangent, np.float64))
    for tap in np.ndindex(*rhs.shape[:-2]):
        firsts = [i * layer.rhs_dilation for i in tap]
        ends = zip(firsts, layer.spec.out_spatial, strict=True)
        at = (slice(None), *(slice(i, i + (size - 1) * stride + 1, stride) for i, size in ends))
        image, weights = padded[at], split(rhs[tap])
        if direction == "forward":
            out += split(image) @ weights
        elif direction == "input gradient":
            image += (out @ weights.swapaxes(1, 2)).swapaxes(0, 1).reshape(image.shape)
        else:
            product = split(image).swapaxes(1, 2) @ out
            gradient[tap] = product.swapaxes(0, 1).reshape(rhs[tap].shape)
    if direction == "forward":
        return out.swapaxes(0, 1).reshape(layer.spec.out_shape)
    return padded[inside] if direction == "input gradient" else gradient
