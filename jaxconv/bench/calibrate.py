"""Measurements behind predictions: the package's rows, and those of one machine.

``python -m jaxconv.bench.calibrate FILE`` measures on this machine the convolutions of the
package's rows, those of the suite ``layers`` and random ones, in an order that makes an interrupted
run a fair sample. FILE, for ``zcat``, has each row as soon as it is measured; called again, it goes
on where it ended. With ``--into jaxconv/planning/data/rows.jsonl.gz`` it is merged into the
package's rows.
"""

import argparse
import dataclasses
import datetime
import gzip
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.arguments.errors import fail
from jaxconv.bench.cases import LAYERS, random_specs
from jaxconv.bench.measure import write
from jaxconv.bench.programs import convolutions_of
from jaxconv.config import notify
from jaxconv.planning import rows as stored
from jaxconv.planning.machine import Machine, here
from jaxconv.planning.predict import Model, known_rows
from jaxconv.planning.rows import Timed, own_rows, package_machines, package_rows
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune
from jaxconv.tools.progress import shown

SEED, TUNING_SEED = 101, 7  # neither is that of the suite "regret"
RANDOM = 450  # random convolutions among the package's rows
EACH = 0.25  # seconds after which no further round of a convolution is begun
SECONDS = 50.0  # no convolution is begun later: including the last one, a minute
FLOPS = 3e8  # larger convolutions are left out: they take long and add no information
FASTEST = 4  # algorithms timed for each convolution of ``tune``, besides XLA's


# The package's rows


def in_order() -> list[ConvSpec]:
    """The convolutions to measure, shuffled."""
    package = [row.spec for row in package_rows()]
    specs = list(dict.fromkeys(package + convolutions_of(LAYERS) + random_specs(SEED, RANDOM)))
    np.random.default_rng(SEED).shuffle(specs)
    return specs


def origin() -> Machine:
    """This machine, as the package's rows name it."""
    note = f"{datetime.date.today()}, python -m jaxconv.bench.calibrate"
    return dataclasses.replace(here(jax.default_backend()), own=False, note=note)


def load(path: Path) -> list[Timed]:
    """The rows in a compressed file; none where there is no file."""
    if not path.exists():
        return []
    return list(stored.read(gzip.decompress(path.read_bytes()).decode().splitlines()))


def save(path: Path, rows: Iterable[Timed]) -> None:
    """Writes the file that ``load`` reads, at once, so that an interrupt leaves the old one."""
    data = "".join(f"{line}\n" for line in stored.written(list(rows))).encode()
    write(path, gzip.compress(data, mtime=0))


def measure_all(path: Path) -> None:
    """Measures those that ``path`` does not have yet. Raises where it is of another machine."""
    machine, rows = origin(), load(path)
    for other in {row.machine for row in rows} - {machine}:
        raise ValueError(f"{path} is of another machine, {other}; this is {machine}")
    done, specs = {row.spec for row in rows}, in_order()
    for i, spec in enumerate(specs, 1):
        if spec not in done:
            print(f"{i} of {len(specs)}: {spec}", flush=True)
            names = autotune.candidates(spec, machine.platform)
            row = autotune.timed(spec, names, machine.platform, EACH)
            rows.append(dataclasses.replace(row, machine=machine))
            save(path, rows)


def merge(into: Path, file: Path) -> None:
    """Adds the rows in ``file`` to those in ``into``; of the same one the last stays."""
    rows = {(row.spec, row.machine): row for row in (*load(into), *load(file))}
    save(into, rows.values())
    print(f"{into}: {len(rows)} rows")


# A user's own


@dataclasses.dataclass(frozen=True, repr=False)
class Tuned(tables.Report):
    """What ``tune`` measured. ``str()`` is a table."""

    platform: str
    convolutions: int
    # Measured over predicted times by algorithm: predicted without them, each half by the other.
    before: Mapping[str, Sequence[float]]
    after: Mapping[str, Sequence[float]]
    file: Path | None  # None where they are known to this process only

    def _contents(self) -> tables.Table:
        above = (
            f"Timed {self.convolutions} random convolutions on {self.platform}. Measured over"
            " predicted time, the median (quartiles): before, predicted without them; after, each"
            " half predicted with the other half."
        )
        kept = "in this process only" if self.file is None else f"in {self.file}"
        below = [f"Kept {kept}.", "jaxconv tune --forget drops them, and those of autotune."]
        both = ((name, self.before.get(name), self.after.get(name)) for name in ALGORITHMS)
        rows = [(n, str(len(b)), _quartiles(a), _quartiles(b)) for n, a, b in both if b]
        header = ("algorithm", "convolutions", "before", "after")
        return tables.Table([above], [header, *rows], (1, 2, 3), below=below)


def _quartiles(ratios: Sequence[float] | None) -> str:
    if not ratios:  # it has no rows to be predicted from
        return "–"
    return "{1:.2f} ({0:.2f}–{2:.2f})".format(*np.quantile(ratios, (0.25, 0.5, 0.75)))


def tune(seconds: float = SECONDS) -> Tuned:
    """Times random convolutions for about ``seconds``, others at each call, and keeps each at once
    as a row of the user's, like those of ``autotune``. A platform without rows in the package, and
    a program of several processes, raise ValueError."""
    autotune.check_alone("tune")
    platform = jax.default_backend()
    if not any(machine.platform == platform for machine in package_machines()):
        constraint = "it takes a platform with measured predictions, the CPU"
        remedy = "use jaxconv.autotune, which measures a program's own convolutions"
        fail("tune", constraint, platform, remedy)
    known, own, end = known_rows(platform), own_rows(platform), time.perf_counter() + seconds
    specs = (spec for spec in _sample() if prepared(spec) not in own)
    specs = itertools.takewhile(lambda _: time.perf_counter() <= end, specs)
    try:
        steps = autotune.measured(specs, platform, FASTEST, EACH)
        rows = list(shown(steps, seconds, seconds=True))
    finally:
        notify()
    after = _ratios(rows[::2], [*known, *rows[1::2]])
    for name, ratios in _ratios(rows[1::2], [*known, *rows[::2]]).items():
        after[name] += ratios
    return Tuned(platform, len(rows), _ratios(rows, known), after, stored.file(platform))


def _ratios(rows: Sequence[Timed], known: Sequence[Timed]) -> dict[str, list[float]]:
    """Measured over predicted times of ``rows`` by algorithm, as ``known`` ones predict them."""
    model = Model(known, here(jax.default_backend()))
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, seconds in row.seconds.items():
            predicted = model.predict(name, prepared(row.spec))
            if predicted is not None:
                ratios[name].append(seconds / predicted.seconds)
    return ratios


def _sample() -> Iterator[ConvSpec]:
    """An endless sequence of convolutions, the same in every process."""
    for seed in itertools.count(TUNING_SEED):
        for spec in random_specs(seed, 50):
            small = spec.flops <= FLOPS and spec.dtype == np.float32
            if small and unsupported(ALGORITHMS["xla"], spec) is None:
                yield spec


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, help="file of rows that FILE is merged into")
    options = parser.parse_args(arguments)
    if options.into is not None:
        merge(options.into, options.file)
    else:
        measure_all(options.file)


if __name__ == "__main__":
    main()
