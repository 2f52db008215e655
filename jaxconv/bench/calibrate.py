"""Makes the data that predictions rest on: ``python -m jaxconv.bench.calibrate FILE``.

Random convolutions, those of the suite ``layers`` and those of three networks' training steps are
timed by every algorithm that can do them, in turn; then constants are fitted to the times and what
they leave is interpolated (see ``jaxconv.planning.predict``). FILE is the
calibration, ``jaxconv/planning/data/*.json``; what is measured goes to FILE.measured as it comes, a
line for each convolution, so that an interrupted run goes on where it was. What the package's
calibrations of Zen 4 rest on lies beside them; ``--measured`` fits it again.
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from scipy import optimize  # JAX depends on it

from jaxconv.algorithms import ALGORITHMS, Algorithm
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.bench.cases import LAYERS
from jaxconv.bench.networks import NETWORKS
from jaxconv.bench.regret import random_specs
from jaxconv.planning import predict as prediction
from jaxconv.planning.predict import QUANTITIES, Calibration, Constants
from jaxconv.planning.timing import Compiled, alternate
from jaxconv.spec import ConvSpec
from jaxconv.tools.autotune import as_it_arrives, operands, quickest
from jaxconv.transforms.jaxprs import choice, fn_jaxpr, walk

SEED = 101  # not that of ``regret``
WORKSPACE = 600 << 20  # bytes of intermediate arrays above which an algorithm is not tried
HOPELESS = 5.0  # slower than this many times the best after a few calls: not timed further
SECONDS, ROUNDS = 0.25, 41  # for each convolution
# Of the interpolation: how much it may correct (logarithmic), the noise of a measurement, and the
# distance over which convolutions tell of each other. Chosen by cross-validated regret.
AMPLITUDE, NOISE, DISTANCE = 0.6, 0.12, 2.5


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


def measure(spec: ConvSpec, names: Sequence[str] | None = None) -> Measured:
    """Times ``spec`` by each algorithm that can do it, or by ``names``."""
    able = names or [
        name
        for name, algorithm in ALGORITHMS.items()
        if not algorithm.by_name_only
        and refusal(algorithm, spec) is None
        and algorithm.cost(prepared(spec)).workspace <= WORKSPACE
    ]
    arrays = operands(spec)
    platform = jax.default_backend()
    subjects = {
        name: Compiled(partial(as_it_arrives, spec, name, platform), *arrays) for name in able
    }
    seconds = {name: quickest(subject.call) for name, subject in subjects.items()}
    limit = HOPELESS * min(seconds.values())
    hopeful = [name for name in subjects if seconds[name] <= limit]
    times = alternate([subjects[name] for name in hopeful], ROUNDS, SECONDS)
    seconds |= dict(zip(hopeful, map(float, np.median(times, 0)), strict=True))
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


def text(document: Mapping[str, Any]) -> str:
    """A document as JSON, a line for each kind and each point."""
    head = {key: value for key, value in document.items() if key not in ("kinds", "points")}
    kinds = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in document["kinds"].items())
    points = ",\n".join(map(json.dumps, document["points"]))
    opening = json.dumps(head, indent=1)[:-2]
    return f'{opening},\n "kinds": {{\n{kinds}\n}},\n "points": [\n{points}\n]\n}}\n'


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
    options.file.write_text(text(document(fit(measured), where)), encoding="utf-8")


if __name__ == "__main__":
    main()
