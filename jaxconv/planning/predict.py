"""How long an algorithm takes: a formula with fitted constants, corrected by near measurements.

    seconds = (Σ constant · quantity) · exp(Σ weight · nearness)

The quantities measure the work: FLOPs in whole vectors, bytes of the matrices, traffic within and
beyond the cache, freshly allocated memory, steps of a loop. Effects that such a formula misses
(which of XLA's kernels a convolution runs, how well it fills the tiles) are interpolated between
measured convolutions, whose nearness is a Gaussian of the distance in shape. Rasmussen & Williams,
"Gaussian Processes for Machine Learning" (2006), chapter 2.

Constants, weights and measured convolutions are data, one file for each platform, class of device
and range of versions of JAX in ``data/``; ``python -m jaxconv.bench.calibrate`` makes them.
"""

import dataclasses
import json
import math
import platform as system
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import jax
import numpy as np

from jaxconv import layout
from jaxconv.algorithms import xla
from jaxconv.algorithms.base import Algorithm
from jaxconv.planning.measured import scales
from jaxconv.spec import ConvSpec

# Bytes that a core's second-level cache holds, with some margin.
CACHE = 1_500_000
# FLOPs and ten times the bytes of an operation above which XLA:CPU splits it between threads;
# waking one takes 20 to 60 µs.
WAKING = 200_000

DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "float64", "complex64")


def kind(algorithm: Algorithm, spec: ConvSpec) -> str:
    """The key of constants: an algorithm's name, with a separate one for its weight gradient."""
    return f"{algorithm.name} gradient" if spec.weight_gradient else algorithm.name


def quantities(algorithm: Algorithm, spec: ConvSpec, parts: float) -> dict[str, float]:
    """The feature vector of the cost model for a prepared ``spec``, scaled to roughly seconds.

    Args:
      parts: seconds of the smaller convolutions that it delegates.
    """
    cost = algorithm.cost(spec)
    size = spec.dtype.itemsize
    amounts = {"call": 5e-6, "steps": 1e-6 * cost.steps, **cost.extra}
    if algorithm.parts is not None:
        amounts["parts"] = parts
    elif cost.gemm is None:
        amounts["flops"] = cost.flops / 5e10
        # Vectorised along the last axis, if that is long enough.
        amounts["narrow"] = cost.flops / 5e10 / min(_innermost(spec), layout.LANES)
    else:
        count, m, n, k = cost.gemm
        # Products with fewer columns than lanes take as long as full vectors.
        amounts["flops"] = 2 * count * m * k * -(-n // layout.LANES) * layout.LANES / 3e11
        amounts["a"] = count * m * k * size / 2e10
        amounts["b"] = count * k * n * size / 2e10
        amounts["c"] = count * m * n * size / 2e10
        amounts["products"] = count * 1e-6
    # Each step of a large enough operation wakes a second thread.
    amounts["woken"] = 2e-5 * cost.steps * (10 * cost.traffic / cost.steps > WAKING)
    amounts["woken by flops"] = 2e-5 * cost.steps * (cost.flops / cost.steps > 10 * WAKING)
    output = math.prod(spec.out_shape) * spec.accumulator_dtype.itemsize
    amounts["woken by output"] = 2e-5 * (10 * output > WAKING)
    in_cache = cost.workspace + spec.operand_bytes < CACHE
    amounts["cached" if in_cache else "beyond"] = cost.traffic / 1e10
    amounts["fresh"] = (cost.workspace + output) / 1e10
    return amounts


def _innermost(spec: ConvSpec) -> int:
    """Length of the axis along which ``shift`` multiplies: channels, or outputs of one channel."""
    forward = layout.forward_of(spec) if spec.weight_gradient else spec
    groups, outputs = forward.groups, forward.out_channels // forward.groups
    alone = outputs == 1 and (not spec.weight_gradient or forward.rhs_shape[-2] == 1)
    return groups if alone else outputs


QUANTITIES = (
    *("call", "steps", "parts", "flops", "narrow", "terms", "looped", "a", "b", "c", "products"),
    *("woken", "woken by flops", "woken by output", "cached", "beyond", "fresh"),
    *xla.REGIMES[2:],
)


def position(spec: ConvSpec) -> np.ndarray:
    """Coordinates of a prepared ``spec``: convolutions that behave alike are near each other."""
    forward = layout.forward_of(spec) if spec.weight_gradient else spec
    groups, m, n, _ = forward.gemm

    def log(value: int) -> float:
        return math.log2(max(1, value))

    spatial = forward.spatial_ndim
    return np.array(
        [
            log(m) / 3,
            log(n) / 2,
            log(forward.rhs_shape[-2]) / 2,
            log(forward.taps) / 2,
            log(groups) / 3,
            log(forward.lhs_shape[0]) / 3,
            log(spec.operand_bytes) / 4,
            log(min(forward.out_spatial, default=1)) / 3,
            1.5 * spatial,
            float(max(forward.window_strides, default=1) > 1),
            float(max(forward.lhs_dilation, default=1) > 1),
            0.7 * (max(forward.rhs_dilation, default=1) > 1),
            float(forward.taps == 1),
            1.5 * (10 * math.prod(spec.out_shape) * spec.accumulator_dtype.itemsize > WAKING),
            1.5 * (10 * math.prod(spec.lhs_shape) * spec.dtype.itemsize > WAKING),
            1.0 * (spec.flops > 10 * WAKING),
            *(3.0 * (xla.regime(spec) == name) for name in xla.REGIMES),
            *(2.0 * (spec.dtype.name == name) for name in DTYPES),
        ]
    )


def nearness(points: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """points: (p, d), others: (q, d) → (p, q), 1 + ``ALONE`` where they are the same."""
    squares = ((points[:, None] - others) ** 2).sum(-1)
    return np.exp(-0.5 * squares / distance**2) + ALONE * (squares < 1e-4)


# Variance that a measurement does not share with its neighbours, over the variance that it does:
# a measured convolution is predicted as measured.
ALONE = 0.2


@dataclasses.dataclass(frozen=True)
class Constants:
    """Fitted parameters of one kind of algorithm.

    Attributes:
      constants: coefficients of the quantities, in the order of ``QUANTITIES``.
      bias: median logarithm of the measured seconds over the formula's.
      weights: of the residuals, one for each measured convolution; 0 where it was not measured.
      compile_seconds: of one convolution, the median.
    """

    constants: np.ndarray
    bias: float
    weights: np.ndarray
    compile_seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Measured constants, and where they come from.

    Attributes:
      origin: device, versions, date, command.
      distance: length scale of nearness, in the units of ``position``.
      points: positions of the measured convolutions.
      kinds: by ``kind``.
      scales: factors for this machine by ``kind``, measured by ``jaxconv tune``; "all": for kinds
        with neither constants nor a factor of their own.
    """

    origin: Mapping[str, Any]
    distance: float
    points: np.ndarray
    kinds: Mapping[str, Constants]
    scales: Mapping[str, float]

    def seconds(self, algorithm: Algorithm, spec: ConvSpec, parts: float = 0.0) -> float:
        """Predicted time of a prepared ``spec``; ``parts`` as in ``quantities``."""
        known = self.known(algorithm, spec)
        amount = quantities(algorithm, spec, parts)
        own = kind(algorithm, spec)
        if known is None:
            scale = self.scales.get(own, self.scales.get("all", 1.0))
            return sum(amount.values()) * scale
        amounts = np.array([amount.get(quantity, 0.0) for quantity in QUANTITIES])
        correction = known.bias + float(_nearness(self, spec) @ known.weights)
        # Times of parts are already scaled.
        scale = 1.0 if algorithm.parts else self.scales.get(own, 1.0)
        return float(amounts @ known.constants) * math.exp(correction) * scale

    def compile_seconds(self, algorithm: Algorithm, spec: ConvSpec) -> float:
        """Median seconds to compile one convolution."""
        known = self.known(algorithm, spec)
        return 0.0 if known is None else known.compile_seconds

    def known(self, algorithm: Algorithm, spec: ConvSpec) -> Constants | None:
        # Some treat a weight gradient as any other convolution: the same constants serve both.
        return self.kinds.get(kind(algorithm, spec)) or self.kinds.get(algorithm.name)


@lru_cache(maxsize=64)
def _nearness(calibration: Calibration, spec: ConvSpec) -> np.ndarray:
    """Nearness of ``spec`` to the measured convolutions; the same for all algorithms."""
    return nearness(position(spec)[None], calibration.points, calibration.distance)[0]


def from_document(document: Mapping[str, Any], scales: Mapping[str, float]) -> Calibration:
    """The calibration in a parsed file."""
    points = np.array(document["points"], float)
    kinds = {}
    for name, entry in document["kinds"].items():
        weights = np.zeros(len(points))
        weights[entry["measured"]] = entry["weights"]
        constants = np.array([entry["constants"].get(q, 0.0) for q in QUANTITIES])
        kinds[name] = Constants(constants, entry["bias"], weights, entry["compile_seconds"])
    return Calibration(document["origin"], document["distance"], points, kinds, scales)


def version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


@cache
def documents() -> tuple[Mapping[str, Any], ...]:
    """All calibrations of the package, by JAX and by device."""
    folder = resources.files("jaxconv.planning") / "data"
    texts = [file.read_text() for file in folder.iterdir() if file.name.endswith(".json")]
    documents = map(json.loads, texts)

    def key(document: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
        return version(document["origin"]["jax"]), document["origin"]["device"]

    return tuple(sorted(documents, key=key))


@lru_cache
def document_for(platform: str) -> Mapping[str, Any] | None:
    """The calibration for a platform: for this class of processor, else the first, and for the
    newest JAX that is not newer than the installed one."""
    fitting = [document for document in documents() if document["origin"]["platform"] == platform]
    if not fitting:
        return None
    here, processor = version(jax.__version__), device_class()

    def likeness(document: Mapping[str, Any]) -> tuple[bool, bool, tuple[int, ...]]:
        other, measured = document["origin"]["device"], version(document["origin"]["jax"])
        newer = measured > here
        rank = tuple(-part for part in measured) if newer else measured
        return other == processor, not newer, rank

    return max(fitting, key=likeness)


@cache
def device_class() -> str:
    """The properties of the processor that decide which algorithm is fast: architecture, vendor and
    family, where the system reports them, and whether it has AVX-512."""
    machine = system.machine().lower()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines()]
    except OSError:
        return machine
    facts = {name.strip(): value.strip() for name, value in (line for line in lines if line[1:])}
    known = [facts[name] for name in ("vendor_id", "cpu family") if name in facts]
    wide = ["with AVX-512"] if "avx512f" in facts.get("flags", "").split() else []
    return " ".join([machine, *known, *wide])


# Where nothing was measured: an accelerator is assumed to be about 100 times as fast.
ESTIMATE = 0.01


@lru_cache
def calibrated(platform: str) -> Calibration:
    """The calibration used for a platform; an estimate where nothing was measured."""
    document = document_for(platform)
    if document is None:
        return Calibration({"device": "an estimate"}, 1.0, np.zeros((0, 0)), {}, {"all": ESTIMATE})
    return from_document(document, scales(platform))
