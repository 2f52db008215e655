"""Measurements behind predictions: the package's rows, and those of one machine.

``python -m jaxconv.bench.calibrate FILE`` measures random convolutions, relatives of users'
ones, those of the suite ``layers`` and of the networks' training steps on this machine, in an order
that makes an interrupted run a fair sample. FILE, in the format of ``jaxconv.planning.measured``,
has each row as soon as it is measured; called again, it goes on where it ended. ``python -m
jaxconv.bench.calibrate FILE… --into jaxconv/planning/data/rows.jsonl.gz`` merges such files into
the package's rows.

``tune`` measures random convolutions on the user's machine for a minute and keeps them in the
user's cache, from which the model learns how this machine differs.
"""

import argparse
import dataclasses
import datetime
import gzip
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache as once
from pathlib import Path

import jax
import numpy as np

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.algorithms.base import prepared, unsupported
from jaxconv.arguments.errors import fail
from jaxconv.bench.cases import FIELD, LAYERS
from jaxconv.bench.networks import NETWORKS
from jaxconv.bench.programs import convolutions, convolutions_of
from jaxconv.bench.regret import random_specs, relatives
from jaxconv.config import notify
from jaxconv.planning import measured
from jaxconv.planning.measured import Machine, Row, here, own_rows, package_machines, record
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.predict import Model, known_rows, place
from jaxconv.spec import ConvSpec
from jaxconv.tools.autotune import check_alone, timed
from jaxconv.tools.progress import shown

SEED, TUNING_SEED = 101, 7  # neither is that of ``regret``
WORKSPACE = 600 << 20  # bytes of intermediate arrays above which an algorithm is not tried
HOPELESS = 40.0  # times the best prediction above which an algorithm is not tried
EACH = 0.25  # seconds after which no further round of a convolution is begun
SECONDS = 50.0  # no convolution is begun later: including the last one, a minute
FLOPS = 3e8  # larger convolutions are left out: they take long and add no information
FASTEST = 4  # algorithms timed for each convolution of ``tune``, besides XLA's


# The package's rows


def well_known() -> list[ConvSpec]:
    """The most common convolutions: those of well-known networks, forward and backward."""
    specs = convolutions_of(LAYERS)
    for network in NETWORKS:
        for batch in (1, 8):
            params = jax.eval_shape(network.init)
            specs += convolutions(network.step, params, *network.data(batch))
    return list(dict.fromkeys(specs))


def in_order(count: int) -> list[ConvSpec]:
    """``count`` random convolutions, half as many relatives of users' ones, and the known ones,
    shuffled: two, one, one."""
    drawn, known = random_specs(SEED, count), well_known()
    users = convolutions_of(FIELD)
    users += relatives(users, SEED, max(0, count // 2 - len(users)))
    np.random.default_rng(SEED).shuffle(known)
    fourths = itertools.zip_longest(drawn[::2], drawn[1::2], users, known)
    return list(dict.fromkeys(spec for fourth in fourths for spec in fourth if spec is not None))


def reasons(spec: ConvSpec) -> dict[str, str | None]:
    """Why each algorithm that "auto" may take is not timed; None for those that are. In the order
    of their predicted times."""
    possible = [
        c
        for c in plan_spec(spec, jax.default_backend()).candidates
        if c.reason is None and ALGORITHMS[c.name].excluded(prepared(spec)) is None
    ]
    possible.sort(key=lambda c: c.seconds)
    best = possible[0].seconds
    found: dict[str, str | None] = {}
    for c in possible:
        found[c.name] = None
        if c.workspace > WORKSPACE:
            found[c.name] = f"its workspace is {tables.mebibytes(c.workspace)}"
        elif c.seconds > HOPELESS * best:
            found[c.name] = f"it is predicted to take {c.seconds / best:.0f} times the best's time"
    return found


def origin() -> Machine:
    """This machine, as the package's rows name it."""
    note = f"{datetime.date.today().isoformat()}, python -m jaxconv.bench.calibrate"
    return dataclasses.replace(here(jax.default_backend()), own=False, note=note)


_place = once(place)  # a file is written again with each row


def load(path: Path) -> list[Row]:
    """The rows in a file, which may be compressed; none where there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return list(measured.read(text.splitlines()))


def save(path: Path, rows: Iterable[Row]) -> None:
    """Writes the file that ``load`` reads, at once, so that an interrupt leaves the old one."""
    data = "".join(f"{line}\n" for line in measured.written(list(rows), _place)).encode()
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    os.replace(temporary, path)


def measure_all(path: Path, count: int) -> None:
    """Measures ``count`` random and the known convolutions, those that ``path`` does not have yet.

    Raises:
      ValueError: the file is of another machine.
    """
    machine, rows = origin(), load(path)
    for other in {row.machine for row in rows} - {machine}:
        raise ValueError(f"{path} is of another machine, {other}; this is {machine}")
    done, specs = {row.spec for row in rows}, in_order(count)
    for i, spec in enumerate(specs, 1):
        if spec in done:
            continue
        print(f"{i} of {len(specs)}: {spec}", flush=True)
        left_out = reasons(spec)
        names = [name for name, reason in left_out.items() if reason is None]
        row = timed(spec, names, machine.platform, EACH)
        left_out |= {name: "XLA refuses it" for name in names if name not in row.seconds}
        for name, reason in left_out.items():
            if reason is not None:
                print(f"  not {name}: {reason}", flush=True)
        rows.append(dataclasses.replace(row, machine=machine))
        save(path, rows)


def merge(into: Path, files: Iterable[Path]) -> None:
    """Adds the rows in ``files`` to those in ``into``; of the same one the last stays."""
    rows = {(row.spec, row.machine): row for row in load(into)}
    for file in files:
        new = {(row.spec, row.machine): row for row in load(file)}
        print(f"{file}: {len(new)} rows, of which {len(new.keys() & rows)} replace earlier ones")
        rows |= new
    save(into, rows.values())
    print(f"{into}: {len(rows)} rows")


# A user's own


@dataclasses.dataclass(frozen=True, repr=False)
class Tuned(tables.Report):
    """What ``tune`` measured. ``str()`` is a table.

    Attributes:
      platform: "cpu", …
      convolutions: how many were timed.
      before: measured over predicted times by algorithm, as predicted without them.
      after: as predicted from one half of them for the other half, and the reverse.
      file: where they are kept; None where they are known to this process only.
    """

    platform: str
    convolutions: int
    before: Mapping[str, Sequence[float]]
    after: Mapping[str, Sequence[float]]
    file: Path | None

    def _contents(self) -> tables.Table:
        above = [
            f"Timed {self.convolutions} random convolutions on {self.platform}. Measured over"
            " predicted time, the median (quartiles):",
            "before, as predicted without them; after, one half as predicted with the other half.",
        ]
        kept = "in this process only" if self.file is None else f"in {self.file}"
        below = [f"Kept {kept}.", "jaxconv tune --forget drops them, and those of autotune."]
        rows = [("algorithm", "convolutions", "before", "after")]
        for name in ALGORITHMS:
            if ratios := self.after.get(name):
                before = _quartiles(self.before.get(name, ()))
                rows.append((name, str(len(ratios)), before, _quartiles(ratios)))
        return tables.Table(above, rows, (1, 2, 3), below=below)


def _quartiles(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"  # it has no rows to be predicted from
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def tune(seconds: float = SECONDS) -> Tuned:
    """Times random convolutions for about ``seconds``, and keeps them for predictions.

    They are the user's rows, as those of ``autotune``; called again, it times others. Each is kept
    as soon as it is measured, so that an interrupt loses nothing.

    Raises:
      ValueError: the package has no rows for this platform, which could predict the time of others;
        several processes run this program, whose plans don't use measurements.
    """
    check_alone("tune")
    platform = jax.default_backend()
    if not any(machine.platform == platform for machine in package_machines()):
        fail(
            "tune",
            "it takes a platform with measured predictions, the CPU",
            platform,
            "use jaxconv.autotune, which measures a program's own convolutions",
        )
    known, rows = known_rows(platform), list[Row]()
    try:
        for row in shown(_timed(seconds, platform), seconds, seconds=True):
            rows.append(row)
    finally:
        notify()
    halves = rows[::2], rows[1::2]
    after = _ratios(halves[0], [*known, *halves[1]])
    for name, ratios in _ratios(halves[1], [*known, *halves[0]]).items():
        after[name] += ratios
    return Tuned(platform, len(rows), _ratios(rows, known), after, measured.file(platform))


def _timed(seconds: float, platform: str) -> Iterator[str | Row]:
    """Times and keeps convolutions. Yields what each is, then its row."""
    own, end = own_rows(platform), time.perf_counter() + seconds
    for spec in _sample():
        if prepared(spec) in own:
            continue
        if time.perf_counter() > end:
            break
        yield str(spec)
        row = timed(spec, _fastest(spec), platform, EACH)
        record([row], platform)
        yield row


def _ratios(rows: Sequence[Row], known: Sequence[Row]) -> dict[str, list[float]]:
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


def _fastest(spec: ConvSpec) -> list[str]:
    """The algorithms to time: the planned one, XLA's, and others predicted to be fast."""
    plan = plan_spec(spec, jax.default_backend())
    possible = sorted(plan.eligible, key=lambda c: c.seconds)
    return list(dict.fromkeys([plan.algorithm, "xla", *(c.name for c in possible[:FASTEST])]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--convolutions", type=int, default=450, help="number of random ones")
    parser.add_argument("--into", type=Path, help="file of rows that the files are merged into")
    options = parser.parse_args(arguments)
    try:
        if options.into is not None:
            merge(options.into, options.files)
        elif len(options.files) > 1:
            raise ValueError("several files are merged, with --into, not measured")
        else:
            measure_all(options.files[0], options.convolutions)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
