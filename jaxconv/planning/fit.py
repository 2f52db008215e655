"""Fitting the model of ``predict`` to measured times.

Constants are fitted by least squares, and the residuals are interpolated by a Gaussian process.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize  # JAX depends on it

from jaxconv.algorithms import ALGORITHMS, Algorithm
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.planning.predict import (
    QUANTITIES,
    Calibration,
    Constants,
    kind,
    nearness,
    position,
    quantities,
)
from jaxconv.spec import ConvSpec

# The Gaussian process: amplitude of its corrections (of logarithms), noise of a measurement, and
# length scale. Chosen by cross-validated regret.
AMPLITUDE, NOISE, DISTANCE = 0.6, 0.12, 2.5


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a convolution by algorithm, and seconds to compile it."""

    spec: ConvSpec
    seconds: Mapping[str, float]
    compile_seconds: Mapping[str, float]


def constants(amounts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative constants with which ``amounts`` (samples, quantities) predict ``seconds``.

    Minimises the errors of logarithms; large ones, where the formula fails, are weighted less.
    """
    used = amounts.any(0)
    start, _ = optimize.nnls(amounts[:, used] / seconds[:, None], np.ones(len(seconds)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        misses = np.log(amounts[:, used] @ np.exp(logs)) - np.log(seconds)
        return np.append(misses, 0.05 * (logs - np.log(0.5)))

    logs = np.log(np.maximum(start, 1e-3))
    solution = optimize.least_squares(residuals, logs, loss="soft_l1", f_scale=0.3, max_nfev=100)
    out = np.zeros(amounts.shape[1])
    out[used] = np.exp(solution.x)
    return out


def fit(measured: Sequence[Measured]) -> Calibration:
    """Constants and corrections from measurements."""
    specs = [prepared(m.spec) for m in measured]
    points = np.array([position(spec) for spec in specs])
    near = nearness(points, points, DISTANCE)
    kinds: dict[str, Constants] = {}
    calibration = Calibration({}, DISTANCE, points, kinds, {})
    # Algorithms that delegate parts come last: their constants cover only the remaining work.
    for algorithm in sorted(ALGORITHMS.values(), key=lambda a: a.parts is not None):
        for gradient in (False, True):
            rows = [
                i
                for i, m in enumerate(measured)
                if algorithm.name in m.seconds and specs[i].weight_gradient == gradient
            ]
            if len(rows) < 4:
                continue
            amounts = np.array([_amounts(calibration, algorithm, specs[i]) for i in rows])
            seconds = np.array([measured[i].seconds[algorithm.name] for i in rows])
            fitted = constants(amounts, seconds)
            misses = np.log(seconds / (amounts @ fitted))
            bias = float(np.median(misses))
            covariance = AMPLITUDE**2 * near[np.ix_(rows, rows)] + NOISE**2 * np.eye(len(rows))
            weights = np.zeros(len(measured))
            weights[rows] = AMPLITUDE**2 * np.linalg.solve(
                covariance, np.clip(misses - bias, -2, 2)
            )
            compiling = [measured[i].compile_seconds.get(algorithm.name, 0.0) for i in rows]
            name = kind(algorithm, specs[rows[0]])
            kinds[name] = Constants(fitted, bias, weights, float(np.median(compiling)))
    return calibration


def _amounts(calibration: Calibration, algorithm: Algorithm, spec: ConvSpec) -> list[float]:
    parts = 0.0
    for part in map(prepared, algorithm.parts(spec) if algorithm.parts else ()):
        if not part.is_empty:
            parts += min(
                calibration.seconds(other, part)
                for other in ALGORITHMS.values()
                if other.parts is None
                and calibration.known(other, part) is not None
                and refusal(other, part) is None
            )
    amounts = quantities(algorithm, spec, parts)
    return [amounts.get(quantity, 0.0) for quantity in QUANTITIES]


def document(calibration: Calibration, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a calibration's file; ``predict.from_document`` reads them."""
    kinds = {}
    for name, known in calibration.kinds.items():
        rows = np.flatnonzero(known.weights)
        kinds[name] = {
            "constants": {
                quantity: float(f"{value:.4g}")
                for quantity, value in zip(QUANTITIES, known.constants, strict=True)
                if value
            },
            "bias": round(known.bias, 4),
            "compile_seconds": round(known.compile_seconds, 4),
            "measured": rows.tolist(),
            "weights": [round(weight, 3) for weight in known.weights[rows].tolist()],
        }
    points = [[float(f"{x:.4g}") for x in point] for point in calibration.points.tolist()]
    return {
        "origin": dict(origin),
        "distance": calibration.distance,
        "kinds": kinds,
        "points": points,
    }
