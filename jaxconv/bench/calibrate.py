"""Measured times behind predictions: the package's data, and factors for one machine.

``python -m jaxconv.bench.calibrate FILE`` makes the data. Random convolutions, those of the suite
``layers`` and those of the networks' training steps are timed by every algorithm that can do them,
in turn; then constants are fitted to the times, and the residuals are interpolated (see
``jaxconv.planning.predict``). FILE is the calibration, ``jaxconv/planning/data/*.json``; what is
measured goes to FILE.measured as it comes, a line for each convolution, so that an interrupted run
goes on where it was. What the package's calibrations of Zen 4 rest on lies beside them;
``--measured`` fits it again.

``tune`` makes predicted times those of this machine, within a minute. A sample of random
convolutions is timed by the algorithms that are predicted to be the fastest, and by XLA. The median
ratio of measured to predicted time of each algorithm is kept in the user's cache as a factor; which
shapes suit an algorithm is left as the package's data has it.
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from scipy import optimize  # JAX depends on it

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS, Algorithm
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.arguments import fail
from jaxconv.bench.cases import LAYERS
from jaxconv.bench.measure import Effort
from jaxconv.bench.networks import NETWORKS
from jaxconv.bench.regret import random_specs
from jaxconv.config import notify
from jaxconv.planning import predict as prediction
from jaxconv.planning.choose import predicted_seconds
from jaxconv.planning.measured import record_scales, scales
from jaxconv.planning.plan import Candidate, plan_spec
from jaxconv.planning.predict import QUANTITIES, Calibration, Constants, document_for
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.tools.autotune import as_it_arrives, operands
from jaxconv.transforms.jaxprs import choice, fn_jaxpr, walk

SEED, TUNING_SEED = 101, 7  # neither is that of ``regret``
WORKSPACE = 600 << 20  # bytes of intermediate arrays above which an algorithm is not tried
HOPELESS = 5.0  # slower than this many times the best after a few calls: not timed further
ENOUGH = Effort(41, 0.25, precision=0.0, fewest=1)  # for each convolution
# Of the interpolation: how much it may correct (logarithmic), the noise of a measurement, and the
# distance over which convolutions tell of each other. Chosen by cross-validated regret.
AMPLITUDE, NOISE, DISTANCE = 0.6, 0.12, 2.5
SECONDS = 50.0  # no convolution is begun later: with the last one, a minute
FLOPS = 3e8  # larger convolutions are left out: they take long and say the same
FASTEST = 4  # so many algorithms are timed for each convolution, besides XLA's
# Samples of a kind that count as much as what all kinds have in common. Of one kind's samples half
# lie 1.5-fold apart, which kinds hardly do: with each kind's own median of 2 to 28 samples the
# choices became worse (regret of 70 convolutions 1.27, untuned 1.21).
COMMON = 14


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of a convolution by algorithm, and seconds to compile it."""

    spec: ConvSpec
    seconds: Mapping[str, float]
    compile_seconds: Mapping[str, float]

    def line(self) -> str:
        fields = {**dataclasses.asdict(self.spec), "precision": None}
        fields |= {name: fields[name].name for name in ("dtype", "out_dtype")}
        rounded = (
            {name: float(f"{value:.4g}") for name, value in seconds.items()}
            for seconds in (self.seconds, self.compile_seconds)
        )
        return json.dumps([fields, *rounded])

    @classmethod
    def of_line(cls, line: str) -> "Measured":
        fields, *seconds = json.loads(line)
        fields |= {name: np.dtype(fields[name]) for name in ("dtype", "out_dtype")}
        for name in ("lhs_shape", "rhs_shape", "window_strides", "lhs_dilation", "rhs_dilation"):
            fields[name] = tuple(fields[name])
        fields["padding"] = tuple(map(tuple, fields["padding"]))
        fields["precision"] = (lax.Precision.DEFAULT, lax.Precision.DEFAULT)
        return cls(ConvSpec(**fields), *seconds)


def well_known() -> list[ConvSpec]:
    """The convolutions that users have most: of known networks, forward and backward."""
    found: dict[ConvSpec, None] = {}

    def add(function: Callable[..., Any], *args: Any) -> None:
        for eqn, *_ in walk(fn_jaxpr(function, args, {})):
            found[choice("calibrate", eqn)[0]] = None

    for layer in LAYERS:
        shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
        operands = [jax.ShapeDtypeStruct(shape, layer.dtype) for shape in shapes]
        for direction in layer.directions:
            add(layer.function(lax.conv_general_dilated, direction), *operands)
    for network in NETWORKS[:3]:
        for batch in (1, 8):
            add(network.step, jax.eval_shape(network.init), *network.data(batch))
    return list(found)


def candidates(spec: ConvSpec) -> list[Candidate]:
    """What can be timed: the algorithms that "auto" may choose, within ``WORKSPACE``."""
    return [
        c
        for c in plan_spec(spec, jax.default_backend()).candidates
        if c.reason is None and c.workspace <= WORKSPACE and not ALGORITHMS[c.name].by_name_only
    ]


def measure(spec: ConvSpec, names: Sequence[str] | None = None) -> Measured:
    """Times ``spec`` by each algorithm that can do it, or by ``names``."""
    arrays = operands(spec)
    platform = jax.default_backend()
    subjects = {
        name: Compiled(partial(as_it_arrives, spec, name, platform), *arrays)
        for name in names or [c.name for c in candidates(spec)]
    }
    seconds, times = ENOUGH.times_of_fast(subjects, HOPELESS)
    seconds |= {name: float(np.median(taken)) for name, taken in times.items()}
    return Measured(spec, seconds, {n: s.compile_seconds for n, s in subjects.items()})


def constants(amounts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants with which ``amounts`` (samples, quantities) predict ``seconds``, none negative.

    The logarithms' errors are made small; large ones, which are misses of the formula, count less.
    """
    used = amounts.any(0)
    start, _ = optimize.nnls(amounts[:, used] / seconds[:, None], np.ones(len(seconds)))

    def residuals(logs: np.ndarray) -> np.ndarray:
        misses = np.log(amounts[:, used] @ np.exp(logs)) - np.log(seconds)
        return np.append(misses, 0.05 * (logs - np.log(0.5)))

    logs = np.log(np.maximum(start, 1e-3))
    found = optimize.least_squares(residuals, logs, loss="soft_l1", f_scale=0.3, max_nfev=100)
    out = np.zeros(amounts.shape[1])
    out[used] = np.exp(found.x)
    return out


def fit(measured: Sequence[Measured]) -> Calibration:
    """Constants and corrections from what was measured."""
    specs = [prepared(m.spec) for m in measured]
    points = np.array([prediction.position(spec) for spec in specs])
    near = prediction.nearness(points, points, DISTANCE)
    kinds: dict[str, Constants] = {}
    calibration = Calibration({}, DISTANCE, points, kinds, {})
    # Those that hand parts on come last: their constants are of what they do besides.
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
            found = constants(amounts, seconds)
            misses = np.log(seconds / (amounts @ found))
            bias = float(np.median(misses))
            covariance = AMPLITUDE**2 * near[np.ix_(rows, rows)] + NOISE**2 * np.eye(len(rows))
            weights = np.zeros(len(measured))
            weights[rows] = AMPLITUDE**2 * np.linalg.solve(
                covariance, np.clip(misses - bias, -2, 2)
            )
            compiling = [measured[i].compile_seconds.get(algorithm.name, 0.0) for i in rows]
            name = prediction.kind(algorithm, specs[rows[0]])
            kinds[name] = Constants(found, bias, weights, float(np.median(compiling)))
    return calibration


def _amounts(calibration: Calibration, algorithm: Algorithm, spec: ConvSpec) -> list[float]:
    parts = 0.0
    for part in map(prepared, algorithm.parts(spec) if algorithm.parts else ()):
        if not part.is_empty:
            parts += min(predictions(calibration, part).values())
    found = prediction.quantities(algorithm, spec, parts)
    return [found.get(quantity, 0.0) for quantity in QUANTITIES]


def predictions(calibration: Calibration, spec: ConvSpec) -> dict[str, float]:
    """Seconds of a prepared spec by every algorithm that can do it without handing parts on."""
    return {
        name: calibration.seconds(algorithm, spec)
        for name, algorithm in ALGORITHMS.items()
        if calibration.known(algorithm, spec) is not None
        and algorithm.parts is None
        and refusal(algorithm, spec) is None
    }


def document(calibration: Calibration, origin: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration as its file holds it; ``prediction.from_document`` reads it."""
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


def origin() -> dict[str, Any]:
    """Where measurements come from."""
    return {
        "platform": jax.default_backend(),
        "device": prediction.device_class(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python -m jaxconv.bench.calibrate",
    }


def load(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Measurements and their origin, of a file that may be compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        first, *lines = file
    return json.loads(first), [Measured.of_line(line) for line in lines]


def measure_all(path: Path, count: int) -> None:
    """Appends to ``path`` what it does not hold yet of ``count`` random and the known ones."""
    if not path.exists():
        path.write_text(json.dumps(origin()) + "\n", encoding="utf-8")
    _, done = load(path)
    specs = random_specs(SEED, count) + well_known()
    for i, spec in enumerate(specs):
        if i < len(done):
            continue
        print(f"{i + 1} of {len(specs)}: {spec}", flush=True)
        with jax.enable_x64(spec.dtype == np.float64):
            line = measure(spec).line()
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How far predictions of a kind of algorithm were off.

    Attributes:
      kind: an algorithm, or its weight gradient.
      samples: convolutions it was timed on.
      factor: predictions are multiplied by it: the median of measured over predicted time, drawn
        to that of all kinds as far as there are few samples.
      spread: the quartiles of measured over predicted time.
    """

    kind: str
    samples: int
    factor: float
    spread: tuple[float, float]


HEADER = ("algorithm", "convolutions", "measured over predicted", "quartiles")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What ``tune`` measured. ``str()`` is a table."""

    platform: str
    convolutions: int
    rows: tuple[Scale, ...]

    def __str__(self) -> str:
        rows = [
            (r.kind, str(r.samples), f"{r.factor:.2f}", "{:.2f}–{:.2f}".format(*r.spread))
            for r in self.rows
        ]
        line = f"Timed {self.convolutions} random convolutions on {self.platform}."
        return f"{line}\n{tables.as_text([HEADER, *rows], right=(1, 2, 3))}"


def tune(seconds: float = SECONDS, shown: Callable[[str], None] = lambda _: None) -> Tuned:
    """Times convolutions for about ``seconds`` and keeps the factors of predicted times.

    Args:
      shown: called with each convolution before it is timed.

    Raises:
      ValueError: there are no predictions for this platform that factors could correct.
    """
    platform = jax.default_backend()
    if document_for(platform) is None:
        fail(
            "tune",
            "it takes a platform with measured predictions, the CPU",
            platform,
            "use jaxconv.autotune, which measures a program's own convolutions",
        )
    before = scales(platform)
    ratios: dict[str, list[float]] = defaultdict(list)
    end = time.perf_counter() + seconds
    count = 0
    for spec in _sample():
        if time.perf_counter() > end:
            break
        shown(str(spec))
        count += 1
        todo = prepared(spec)
        for name, taken in measure(spec, _fastest(spec)).seconds.items():
            what = prediction.kind(ALGORITHMS[name], todo)
            unscaled = predicted_seconds(name, todo, platform) / before.get(what, 1.0)
            ratios[what].append(taken / unscaled)
    rows = _rows(ratios)
    record_scales(platform, {row.kind: row.factor for row in rows})
    notify()
    return Tuned(platform, count, rows)


def _rows(ratios: Mapping[str, list[float]]) -> tuple[Scale, ...]:
    common = np.median(np.log([ratio for found in ratios.values() for ratio in found]))
    rows = []
    for what, found in sorted(ratios.items()):
        low, own, high = np.quantile(found, (0.25, 0.5, 0.75))
        weight = len(found) / (len(found) + COMMON)
        factor = float(np.exp(common + weight * (np.log(own) - common)))
        rows.append(Scale(what, len(found), factor, (float(low), float(high))))
    return tuple(rows)


def _sample() -> Iterator[ConvSpec]:
    """Convolutions without end, the same in every process."""
    seed = TUNING_SEED
    while True:
        for spec in random_specs(seed, 50):
            small = spec.flops <= FLOPS and spec.dtype == np.float32
            if small and refusal(ALGORITHMS["xla"], spec) is None:
                yield spec
        seed += 1


def _fastest(spec: ConvSpec) -> list[str]:
    """What is timed: not those that hand parts on, whose time is that of other algorithms."""
    possible = [c for c in candidates(spec) if not ALGORITHMS[c.name].parts]
    possible.sort(key=lambda c: c.seconds)
    return list(dict.fromkeys([*(c.name for c in possible[:FASTEST]), "xla"]))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--convolutions", type=int, default=450, help="random ones")
    parser.add_argument("--measured", type=Path, help="measurements to fit instead of making them")
    options = parser.parse_args(None if arguments is None else list(arguments))
    kept = options.measured or options.file.with_name(options.file.name + ".measured")
    if options.measured is None:
        measure_all(kept, options.convolutions)
    where, measured = load(kept)
    where["convolutions"] = len(measured)
    options.file.write_text(json.dumps(document(fit(measured), where)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
