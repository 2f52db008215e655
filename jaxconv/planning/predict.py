"""How long an algorithm takes, and how sure that is, from convolutions that were measured.

    log seconds = log floor + correction

The floor is what the algorithm's work (operations, bytes, steps) takes at least on a common
machine. How far above it the algorithm stays is interpolated between measured convolutions by a
Gaussian process: a weighted sum of the corrections of the nearest, by their positions (see
``position``), with the weights that minimise the expected error if two corrections at distance d
have the covariance

    relation · (SMOOTH² · matern(d / DISTANCE) + ALONE² · [d = 0])

Matérn's function lets them become independent with distance, ALONE is what a convolution does not
share with its neighbours, and a measurement has an error of NOISE.
Rasmussen & Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2 and 4.

``relation`` is how much a row from one machine says about another: a share for all machines, and
more for the same class of processor, the same version of JAX, and the user's own. Cores enter as a
gain, a correction proportional to the logarithm of their number, learned for each shape from rows
on one core and on two.

The process also gives ``sigma``, the standard deviation of the logarithm: small near rows of this
machine, larger away from rows, on processors and versions without rows, and with more cores than
were measured. A row of exactly this convolution on this machine, from ``autotune``, decides.

The constants but OWN, the same for all algorithms and machines, are those of the largest
likelihood of the package's rows. In cross-validation half of the predictions were off by a factor
of 1.3 or less.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.config import listeners
from jaxconv.planning.machine import Machine, here
from jaxconv.planning.position import floors, position
from jaxconv.planning.rows import Timed, own_rows, package_machines, package_rows
from jaxconv.spec import ConvSpec

# The Gaussian process.
SMOOTH, ALONE, DISTANCE, NOISE = 1.5, 0.27, 5.0, 0.1
# Shares of the variance between machines. The package's rows can't tell OWN's. With 0.08 a user's
# machine of a measured class was so unsure that XLA's own was kept where the same convolution had
# been measured; with 0.01, 59 of 993 choices (JAX 0.10, Zen 3) differ and are 1.37 times as fast.
SHARED, PROCESSOR, VERSION, OWN, CORES = 0.87, 0.08, 0.04, 0.01, 0.1
NEAREST, OWN_NEAREST = 128, 32  # rows that a prediction takes into account, the user's besides
OUTLIER = 3.0  # corrections further than this from an algorithm's median are cut
UNKNOWN = 1.0  # sigma of an algorithm without rows
REPEATED = 0.03  # sigma of a measurement that is repeated


class Time(NamedTuple):
    """The time of an algorithm for a convolution."""

    seconds: float  # the median
    sigma: float  # standard deviation of its logarithm
    measured: bool = False  # on this machine, exactly this convolution

    def __str__(self) -> str:
        """ "0.300 ms, measured" or "0.300 ms ×/÷ 1.4"."""
        sure = ", measured" if self.measured else f" {tables.factor(self.sigma)}"
        return tables.milliseconds(self.seconds) + sure


def relation(one: Machine, other: Machine) -> float:
    """How much a row from ``one`` says about ``other``; 1 at most between machines of one core."""
    same = PROCESSOR * (one.processor == other.processor)
    same += VERSION * (release(one.jax) == release(other.jax))
    same += OWN * (one.own == other.own)
    return SHARED + same + CORES * math.log2(one.cores) * math.log2(other.cores)


def release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


class Model:
    """Predictions for one machine from measured rows.

    By algorithm: ``levels``, the median of the logarithm above the floor; ``corrections``, how
    far each row is above that, NaN where it was not measured; and median ``compile_seconds``.
    """

    def __init__(self, rows: Sequence[Timed], machine: Machine) -> None:
        rows = [row.placed() for row in rows]
        self.points = np.array([row.position for row in rows] or [[]])  # (rows, coordinates)
        self.squares = (self.points**2).sum(1)
        machines = {m: i for i, m in enumerate(dict.fromkeys(row.machine for row in rows))}
        self._machine = np.array([machines[row.machine] for row in rows], int)
        own = np.array([row.machine.own for row in rows], bool)
        self._packages, self._users = np.flatnonzero(~own), np.flatnonzero(own)
        self._between = np.array([[relation(a, b) for b in machines] for a in machines])
        self._to_here = np.array([relation(machine, other) for other in machines])
        self._here = relation(machine, machine)
        self.corrections, self.levels, self.compile_seconds = {}, {}, {}
        for name in dict.fromkeys(n for row in rows for n in row.seconds if n in row.floors):
            floor = [row.floors.get(name, math.nan) for row in rows]
            above = np.log([row.seconds.get(name, math.nan) for row in rows]) - floor
            self.levels[name] = level = float(np.nanmedian(above))
            self.corrections[name] = np.clip(above - level, -OUTLIER, OUTLIER)
            compiling = [row.compile_seconds[name] for row in rows if name in row.compile_seconds]
            self.compile_seconds[name] = float(np.median(compiling)) if compiling else 0.0

    def predict(self, name: str, spec: ConvSpec) -> Time | None:
        """The time of an algorithm for a prepared ``spec``; None where it has no rows."""
        if name not in self.corrections:
            return None
        near, covariance, towards, solved = _around(self, spec)
        corrections = self.corrections[name][near]
        known = np.flatnonzero(~np.isnan(corrections))
        key = known.tobytes()  # most algorithms were measured in the same rows
        if key not in solved:
            solved[key] = _solution(covariance[np.ix_(known, known)], towards[known])
        weights = solved[key]
        correction = self.levels[name] + float(weights @ corrections[known])
        before = self._here * (SMOOTH**2 + ALONE**2)  # the variance without rows
        variance = before - float(weights @ towards[known]) + NOISE**2
        floor = floors(spec, [name])[name]
        return Time(math.exp(floor + correction), math.sqrt(variance))


def _solution(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """As ``np.linalg.solve`` of a positive definite matrix, by halves."""
    # From 100 rows on OpenBLAS would take several threads: on busy cores 50 ms instead of 0.3, and
    # 2.7 MB of stack, where JAX 0.10.2 plans programs for several devices on 2 MB.
    half = len(vector) // 2
    upper, lower = matrix[:half, half:], matrix[half:, half:]
    solved = np.linalg.solve(matrix[:half, :half], np.column_stack([upper, vector[:half]]))
    between, alone = solved[:, :-1], solved[:, -1]
    rest = np.linalg.solve(lower - upper.T @ between, vector[half:] - upper.T @ alone)
    return np.append(alone - between @ rest, rest)


def _smallest(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """The indices ``among`` which ``values`` are the ``count`` smallest."""
    # Rounded and stable, as processors differ in the last digits and in how they order equals.
    return among[np.argsort(values[among].round(9), kind="stable")[:count]]


def _alike(squares: np.ndarray) -> np.ndarray:
    """The covariance of corrections on one machine, given squared distances."""
    reach = np.sqrt(3 * np.maximum(squares, 0)) / DISTANCE  # Matérn's function of order 3/2
    return SMOOTH**2 * (1 + reach) * np.exp(-reach) + ALONE**2 * (squares < 1e-6)


@lru_cache(maxsize=64)
def _around(
    model: Model, spec: ConvSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[bytes, np.ndarray]]:
    """For all algorithms: the nearest rows, the covariances between them and with ``spec``, and a
    place for the weights of those in which an algorithm was measured."""
    x = np.array(position(spec))
    related = model._to_here[model._machine]
    squares = model.squares - 2 * model.points @ x + x @ x
    distances = np.sqrt(np.maximum(squares, 0).round(6))  # a product's last digits differ too
    far = -related * np.exp(-distances / DISTANCE)
    # The user's rows have their own places: far ones too tell how this machine differs.
    users = _smallest(far, model._users, OWN_NEAREST)
    near = np.append(_smallest(far, model._packages, NEAREST), users)
    points, machines = model.points[near] - x, model._machine[near]
    products = points @ points.T
    squares = np.diag(products)
    between = squares[:, None] + squares - 2 * products
    covariance = _alike(between) * model._between[np.ix_(machines, machines)]
    covariance[np.diag_indices_from(covariance)] += NOISE**2
    return near, covariance, _alike(squares) * related[near], {}


@lru_cache
def model(platform: str) -> Model:
    """The model for this machine."""
    return Model(known_rows(platform), here(platform))


def known_rows(platform: str) -> list[Timed]:
    """The rows that predictions rest on: the user's, and the package's for ``platform`` of one
    version of JAX, the newest that is not newer than the installed one, else the oldest. Others are
    of the same convolutions and would take time to read."""
    machines = [m for m in package_machines() if m.platform == platform]
    versions = sorted({m.jax for m in machines}, key=release)
    older = [v for v in versions if release(v) <= release(here(platform).jax)]
    wanted = [m for m in machines if [m.jax] == [*versions[:1], *older][-1:]]
    return [*package_rows(tuple(wanted)), *own_rows(platform).values()]


@lru_cache(maxsize=8192)
def predicted(name: str, spec: ConvSpec, platform: str) -> Time | None:
    """The time of an algorithm that supports the prepared ``spec``, from rows of others too; None
    on an accelerator where no row has the algorithm."""
    time = model(platform).predict(name, spec)
    if platform != "cpu":
        return time
    if time is None:
        time = Time(math.exp(floors(spec, [name])[name]), UNKNOWN)
    moving = ALGORITHMS[name].moving(spec)  # the kernels of measured rows are in order
    return Time(time.seconds + moving, time.sigma)


def time_of(name: str, spec: ConvSpec, platform: str) -> Time | None:
    """As ``predicted``, but the measured time where exactly ``spec`` was measured here."""
    row = own_rows(platform).get(spec)
    if row is not None and name in row.seconds:
        return Time(row.seconds[name], REPEATED, measured=True)
    return predicted(name, spec, platform)


listeners += model.cache_clear, predicted.cache_clear
