"""Measurements behind predictions: the package's data, and factors for one machine.

``python -m jaxconv.bench.calibrate FILE`` makes the data, ``jaxconv/planning/data/*.json``. Random
convolutions, those of the suite ``layers`` and those of the networks' training steps are timed by
every algorithm that supports them, in turn, and the model of ``jaxconv.planning.predict`` is fitted
to the times. The times are written to FILE.measured, a line for each convolution, so that an
interrupted run can be resumed. Those of the package's calibrations on Zen 4 are stored beside the
data; ``--measured`` fits them again.

``tune`` adapts predicted times to this machine, within a minute. A sample of random convolutions is
timed by the algorithms that are predicted to be the fastest, and by XLA. The median ratio of
measured to predicted time of each algorithm is kept in the user's cache as a factor; how times vary
with shape is still taken from the package's data.
"""

import argparse
import dataclasses
import datetime
import gzip
import itertools
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

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, refusal
from jaxconv.arguments import fail
from jaxconv.bench.cases import LAYERS
from jaxconv.bench.measure import Effort
from jaxconv.bench.networks import NETWORKS
from jaxconv.bench.programs import convolutions
from jaxconv.bench.regret import random_specs
from jaxconv.config import notify
from jaxconv.planning import predict as prediction
from jaxconv.planning.choose import predicted_seconds
from jaxconv.planning.fit import Measured, document, fit
from jaxconv.planning.measured import record_scales, scales
from jaxconv.planning.plan import Candidate, plan_spec
from jaxconv.planning.predict import document_for
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.tools.autotune import as_it_arrives, operands

SEED, TUNING_SEED = 101, 7  # neither is that of ``regret``
WORKSPACE = 600 << 20  # bytes of intermediate arrays above which an algorithm is not tried
HOPELESS = 5.0  # slower than this many times the best after a few calls: not timed further
ENOUGH = Effort(41, 0.25, precision=0.0, fewest=1)  # for each convolution
SECONDS = 50.0  # no convolution is begun later: including the last one, a minute
FLOPS = 3e8  # larger convolutions are left out: they take long and add no information
FASTEST = 4  # algorithms timed for each convolution, besides XLA's
# Samples of a kind that weigh as much as the median of all kinds. The quartiles of one kind's
# samples differ 1.5-fold, kinds hardly do: with each kind's own median of 2 to 28 samples the
# choices became worse (regret of 70 convolutions 1.27, untuned 1.21).
COMMON = 14


def as_line(measured: Measured) -> str:
    """A measurement as a line of JSON."""
    fields = {**dataclasses.asdict(measured.spec), "precision": None}
    fields |= {name: fields[name].name for name in ("dtype", "out_dtype")}
    rounded = (
        {name: float(f"{value:.4g}") for name, value in seconds.items()}
        for seconds in (measured.seconds, measured.compile_seconds)
    )
    return json.dumps([fields, *rounded])


def of_line(line: str) -> Measured:
    """The measurement that ``as_line`` wrote."""
    fields, *seconds = json.loads(line)
    fields |= {name: np.dtype(fields[name]) for name in ("dtype", "out_dtype")}
    for name in ("lhs_shape", "rhs_shape", "window_strides", "lhs_dilation", "rhs_dilation"):
        fields[name] = tuple(fields[name])
    fields["padding"] = tuple(map(tuple, fields["padding"]))
    del fields["precision"]
    return Measured(ConvSpec(**fields), *seconds)


def well_known() -> list[ConvSpec]:
    """The most common convolutions: those of well-known networks, forward and backward."""
    specs: list[ConvSpec] = []
    for layer in LAYERS:
        shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
        operands = [jax.ShapeDtypeStruct(shape, layer.dtype) for shape in shapes]
        for direction in layer.directions:
            specs += convolutions(layer.function(lax.conv_general_dilated, direction), *operands)
    for network in NETWORKS:
        for batch in (1, 8):
            params = jax.eval_shape(network.init)
            specs += convolutions(network.step, params, *network.data(batch))
    return list(dict.fromkeys(specs))


def candidates(spec: ConvSpec) -> list[Candidate]:
    """The algorithms to time: those that "auto" may choose, within ``WORKSPACE``."""
    return [
        c
        for c in plan_spec(spec, jax.default_backend()).candidates
        if c.reason is None and c.workspace <= WORKSPACE and not ALGORITHMS[c.name].by_name_only
    ]


def measure(spec: ConvSpec, names: Sequence[str] | None = None) -> Measured:
    """Times ``spec`` by each algorithm that supports it, or by ``names``."""
    arrays = operands(spec)
    platform = jax.default_backend()
    subjects = {
        name: Compiled(partial(as_it_arrives, spec, name, platform), *arrays)
        for name in names or [c.name for c in candidates(spec)]
    }
    seconds, times = ENOUGH.times_of_fast(subjects, HOPELESS)
    seconds |= {name: float(np.median(taken)) for name, taken in times.items()}
    return Measured(spec, seconds, {n: s.compile_seconds for n, s in subjects.items()})


def origin() -> dict[str, Any]:
    """The origin of measurements: device, versions, date, command."""
    return {
        "platform": jax.default_backend(),
        "device": prediction.device_class(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "python -m jaxconv.bench.calibrate",
    }


def load(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Measurements and their origin, from a file that may be compressed."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        first, *lines = file
    return json.loads(first), list(map(of_line, lines))


def measure_all(path: Path, count: int) -> None:
    """Measures ``count`` random and the known convolutions, appending missing ones to ``path``."""
    if not path.exists():
        path.write_text(json.dumps(origin()) + "\n", encoding="utf-8")
    _, done = load(path)
    specs = random_specs(SEED, count) + well_known()
    for i, spec in enumerate(specs[len(done) :], len(done)):
        print(f"{i + 1} of {len(specs)}: {spec}", flush=True)
        with jax.enable_x64(spec.dtype == np.float64):
            line = as_line(measure(spec))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclasses.dataclass(frozen=True)
class Tuned(tables.Report):
    """What ``tune`` measured. ``str()`` is a table.

    Attributes:
      ratios: measured over predicted times, by kind of algorithm.
      factors: by kind; predictions are multiplied by them.
    """

    platform: str
    convolutions: int
    ratios: Mapping[str, list[float]]
    factors: Mapping[str, float]

    def _table(self) -> tables.Table:
        rows = [["algorithm", "convolutions", "measured over predicted", "quartiles"]]
        for what, factor in self.factors.items():
            low, high = np.quantile(self.ratios[what], (0.25, 0.75))
            count = str(len(self.ratios[what]))
            rows.append([what, count, f"{factor:.2f}", f"{low:.2f}–{high:.2f}"])
        line = f"Timed {self.convolutions} random convolutions on {self.platform}."
        return tables.Table([line], rows, (1, 2, 3))


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
    corrections = factors(ratios)
    record_scales(platform, corrections)
    notify()
    return Tuned(platform, count, ratios, corrections)


def factors(ratios: Mapping[str, list[float]]) -> dict[str, float]:
    """The median ratio of each kind, shrunk to that of all kinds where there are few samples."""
    common = np.median(np.log([ratio for column in ratios.values() for ratio in column]))
    factors = {}
    for what, column in sorted(ratios.items()):
        weight = len(column) / (len(column) + COMMON)
        factors[what] = float(np.exp(common + weight * (np.log(np.median(column)) - common)))
    return factors


def _sample() -> Iterator[ConvSpec]:
    """An endless sequence of convolutions, the same in every process."""
    for seed in itertools.count(TUNING_SEED):
        for spec in random_specs(seed, 50):
            small = spec.flops <= FLOPS and spec.dtype == np.float32
            if small and refusal(ALGORITHMS["xla"], spec) is None:
                yield spec


def _fastest(spec: ConvSpec) -> list[str]:
    """The algorithms to time, except those that delegate parts to other algorithms."""
    possible = [c for c in candidates(spec) if not ALGORITHMS[c.name].parts]
    possible.sort(key=lambda c: c.seconds)
    return list(dict.fromkeys([*(c.name for c in possible[:FASTEST]), "xla"]))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--convolutions", type=int, default=450, help="number of random ones")
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
