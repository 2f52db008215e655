"""How long an algorithm takes, and how sure that is, from convolutions that were measured.

    log seconds = log roofline + correction

The roofline is what the work takes at least on a common machine: a call, FLOPs over their rate and
bytes over a bandwidth, the same for all algorithms. How far above it an algorithm stays is not
modelled but interpolated between measured convolutions; that is all there is to a prediction.

**Position.** Each convolution has a position: logarithms of its sizes, strides and dilations, its
dtype, and which of XLA's code paths it takes (``position``). Convolutions that behave alike are
near each other, and their corrections are alike.

**Interpolation.** The correction is a Gaussian process: a weighted sum of the corrections of the
nearest measured convolutions, with the weights that minimise the expected error, where two
corrections at distance d of each other have the covariance

    relation · (SMOOTH² · matern(d / DISTANCE) + ALONE² · [d = 0])

Matérn's function lets them become independent with distance, and ALONE is what a convolution does
not share with its neighbours. A measurement has an error of NOISE.
Rasmussen & Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2 and 4.

**Machines.** ``relation`` says how much a row from one machine says about another: what all
machines share, and what only those share that have the same class of processor, the same version
of JAX, or are the user's own. Cores enter as a gain: a correction proportional to the logarithm of
their number, learned for each shape from rows on one core and on two. A loop that runs block after
block gains nothing, a large matrix product all of it.

**Uncertainty.** The process also gives its standard deviation, ``sigma``, of the logarithm: small
beside rows of this machine, larger away from all rows, on a processor or a version of JAX without
rows, and with more cores than were measured. ``choose`` leaves XLA's own convolution only where the
gain is likely. A row of exactly this convolution on this machine, from ``autotune``, decides.

The constants but OWN, the same for all algorithms and machines, are those of the largest
likelihood of the package's rows. In cross-validation half of the predictions were off by a factor
of 1.3 or less.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxconv import layout, tables
from jaxconv.algorithms import ALGORITHMS, xla
from jaxconv.algorithms.base import prepared
from jaxconv.config import listeners
from jaxconv.planning.measured import Machine, Row, here, own_rows, package_machines, package_rows
from jaxconv.spec import ConvSpec, dilate

# The roofline: seconds of a call and of a step of a loop, FLOP/s, bytes/s of two cores.
CALL, STEP, RATE, BANDWIDTH = 5e-6, 1e-6, 5e10, 2e10
# The Gaussian process.
SMOOTH, ALONE, DISTANCE, NOISE = 1.5, 0.27, 5.0, 0.1
# Shares of the variance between machines. The package's rows can't tell OWN's. With 0.08 a user's
# machine of a measured class was so unsure that XLA's own was kept where the same convolution had
# been measured: of 993 convolutions on JAX 0.10 (Zen 3), the 59 choices that differ are 1.37 times
# as fast with 0.01.
SHARED, PROCESSOR, VERSION, OWN, CORES = 0.87, 0.08, 0.04, 0.01, 0.1
NEAREST, OWN_NEAREST = 128, 32  # rows that a prediction takes into account, the user's besides
OUTLIER = 3.0  # corrections further than this from an algorithm's median are cut
UNKNOWN = 1.0  # sigma of an algorithm without rows
REPEATED = 0.03  # sigma of a measurement that is repeated
ACCELERATOR = 0.01  # an accelerator without rows is assumed to be 100 times as fast
# FLOPs and ten times the bytes of an operation above which XLA:CPU splits it between threads.
SPLIT = 200_000
DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "float64", "complex64")


@dataclasses.dataclass(frozen=True)
class Time:
    """The time of an algorithm.

    Attributes:
      seconds: the median.
      sigma: standard deviation of its logarithm: it is likely between ``seconds / exp(sigma)`` and
        ``seconds * exp(sigma)``.
      measured: whether exactly this convolution was measured on this machine.
    """

    seconds: float
    sigma: float
    measured: bool = False

    def __str__(self) -> str:
        """ "0.300 ms, measured" or "0.300 ms ×/÷ 1.4"."""
        sure = ", measured" if self.measured else f" {tables.factor(self.sigma)}"
        return tables.milliseconds(self.seconds) + sure


def roofline(flops: float, traffic: float, steps: int = 1) -> float:
    """Seconds that work takes at least, about: FLOPs, bytes, steps of a loop."""
    return CALL + flops / RATE + traffic / BANDWIDTH + STEP * (steps - 1)


def place(spec: ConvSpec) -> tuple[float, ...]:
    """The logarithm of the roofline of any ``spec``, and its position."""
    spec = prepared(spec)
    return math.log(roofline(spec.flops, spec.operand_bytes)), *position(spec)


def position(spec: ConvSpec) -> tuple[float, ...]:
    """Coordinates of a prepared ``spec``; a weight gradient's are those of its forward one.

    The factors are those of the largest likelihood of the package's rows: the larger, the sooner
    two convolutions that differ in a coordinate behave differently.
    """
    forward = spec.forward
    groups, m, n, k = forward.gemm
    c, size, dtype = forward.rhs_shape[-2], spec.dtype.itemsize, spec.dtype.name
    output = math.prod(spec.out_shape) * spec.accumulator_dtype.itemsize
    image, kernel = (math.prod(shape) * size for shape in (spec.lhs_shape, spec.rhs_shape))
    path = xla.regime(spec)
    return (
        0.1 * _log(m),
        0.35 * _log(n),
        0.25 * _log(c),
        0.4 * _log(forward.taps),
        0.25 * _log(groups),
        0.2 * _log(forward.lhs_shape[0]),
        0.25 * _log(spec.flops),
        0.4 * _log(spec.operand_bytes),
        0.15 * _log(kernel),
        0.12 * _log(groups * m * k * size),
        0.15 * _log(max(forward.kernel_shape, default=1)),
        0.15 * _log(forward.out_spatial[-1] if forward.out_spatial else 1),
        0.1 * _log(min(forward.out_spatial, default=1)),
        # Vectors that are not full.
        0.7 * (_log(-(-n // layout.LANES) * layout.LANES) - _log(n)),
        0.9 * (_log(-(-c // 8) * 8) - _log(c)),
        0.35 * _padding(forward),
        0.3 * _step(forward.window_strides),
        0.65 * _step(forward.lhs_dilation),
        0.2 * _step(forward.rhs_dilation),
        0.7 * forward.spatial_ndim,
        0.9 * (forward.taps == 1),
        0.85 * spec.weight_gradient,
        # What XLA:CPU splits between threads.
        0.25 * (10 * output > SPLIT),
        0.4 * (10 * image > SPLIT),
        0.3 * (spec.flops > 10 * SPLIT),
        0.35 * (path == "swapped") * (_log(spec.taps) - _log(math.prod(spec.lhs_spatial))),
        *(PATHS.get(name, 0.6) * (path == name) for name in xla.REGIMES),
        *(0.7 * (dtype == name) for name in DTYPES),
    )


PATHS = {"multiply": 2.0, "loop": 1.3, "loop in groups": 1.0, "swapped": 1.9}  # unlike the others


def _log(value: int) -> float:
    return math.log2(max(1, value))


def _step(steps: Sequence[int]) -> float:
    """1 more than the logarithm of the largest of strides or dilations, 0 where they are 1."""
    largest = max(steps, default=1)
    return (largest > 1) + _log(largest)


def _padding(spec: ConvSpec) -> float:
    """Logarithm of the share of the padded image that is image."""
    sizes = map(dilate, spec.lhs_spatial, spec.lhs_dilation)
    return sum(_log(p) - _log(size) for p, size in zip(spec.padded_spatial, sizes, strict=True))


def relation(one: Machine, other: Machine) -> float:
    """How much a row from ``one`` says about ``other``; 1 at most between machines of one core."""
    same = PROCESSOR * (one.processor == other.processor)
    same += VERSION * (version(one.jax) == version(other.jax))
    same += OWN * (one.own == other.own)
    return SHARED + same + CORES * math.log2(one.cores) * math.log2(other.cores)


def version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in text.split(".")[:2])


Weights = dict[bytes, np.ndarray]


class Model:
    """Predictions for one machine from measured rows.

    Attributes:
      points: positions of the rows, (rows, coordinates).
      corrections: by algorithm, how far each row is above the roofline, less ``levels``, (rows,);
        NaN where it was not measured.
      levels: by algorithm, the median of the logarithm above the roofline.
      compile_seconds: by algorithm, the median of one convolution's.
    """

    def __init__(self, rows: Sequence[Row], machine: Machine) -> None:
        places = [row.place or place(row.spec) for row in rows]
        floor, self.points = np.split(np.array(places or [[]]), [1], axis=1)
        machines = {m: i for i, m in enumerate(dict.fromkeys(row.machine for row in rows))}
        self._machine = np.array([machines[row.machine] for row in rows], int)
        own = np.array([row.machine.own for row in rows], bool)
        self._packages, self._users = np.flatnonzero(~own), np.flatnonzero(own)
        self._between = np.array([[relation(a, b) for b in machines] for a in machines])
        self._to_here = np.array([relation(machine, other) for other in machines])
        self._here = relation(machine, machine)
        self.corrections, self.levels, self.compile_seconds = {}, {}, {}
        for name in dict.fromkeys(name for row in rows for name in row.seconds):
            above = np.log([row.seconds.get(name, math.nan) for row in rows]) - floor[:, 0]
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
        variance = self._here * VARIANCE - float(weights @ towards[known]) + NOISE**2
        floor = roofline(spec.flops, spec.operand_bytes)
        return Time(floor * math.exp(correction), math.sqrt(variance))


def _solution(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """As ``np.linalg.solve`` of a positive definite matrix, by halves.

    From 100 rows on OpenBLAS would take several threads: on busy cores 50 ms instead of 0.3, and
    always 2.7 MB of stack. In JAX 0.10.2 a program for several devices is planned on a stack of 2,
    and whatever lies beside that was overwritten.
    """
    half = len(vector) // 2
    upper, lower = matrix[:half, half:], matrix[half:, half:]
    solved = np.linalg.solve(matrix[:half, :half], np.column_stack([upper, vector[:half]]))
    between, alone = solved[:, :-1], solved[:, -1]
    rest = np.linalg.solve(lower - upper.T @ between, vector[half:] - upper.T @ alone)
    return np.append(alone - between @ rest, rest)


def _smallest(values: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """The indices ``among`` which ``values`` are the ``count`` smallest."""
    # The same on every processor: they differ in the last digits and in how they partition equals.
    return among[np.argsort(values[among].round(9), kind="stable")[:count]]


def _alike(squares: np.ndarray) -> np.ndarray:
    """The covariance of corrections on one machine, given squared distances."""
    reach = np.sqrt(3 * np.maximum(squares, 0)) / DISTANCE  # Matérn's function of order 3/2
    return SMOOTH**2 * (1 + reach) * np.exp(-reach) + ALONE**2 * (squares < 1e-6)


VARIANCE = SMOOTH**2 + ALONE**2  # of a correction, before there are rows


@lru_cache(maxsize=64)
def _around(model: Model, spec: ConvSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray, Weights]:
    """The nearest rows, the covariances between them, those with ``spec`` itself, and a place
    for the weights of those in which an algorithm was measured; for all algorithms the same."""
    x = np.array(position(spec))
    related = model._to_here[model._machine]
    distances = np.sqrt(((model.points - x) ** 2).sum(1))
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


def known_rows(platform: str) -> list[Row]:
    """The rows that predictions rest on: the package's for ``platform``, and the user's.

    Of the package's rows only those of one version of JAX: the newest that is not newer than the
    installed one, else the oldest. Others are of the same convolutions and would take time to read.
    """
    machines = [m for m in package_machines() if m.platform == platform]
    versions = sorted({m.jax for m in machines}, key=version)
    older = [v for v in versions if version(v) <= version(here(platform).jax)]
    wanted = [m for m in machines if [m.jax] == [*versions[:1], *older][-1:]]
    return [*package_rows(tuple(wanted)), *own_rows(platform).values()]


@lru_cache(maxsize=8192)
def predicted(name: str, spec: ConvSpec, platform: str) -> Time:
    """The time of an algorithm that supports the prepared ``spec``, from rows of others too."""
    time, scale = model(platform).predict(name, spec), 1.0 if platform == "cpu" else ACCELERATOR
    if time is None:
        cost = ALGORITHMS[name].cost(spec)
        time = Time(scale * roofline(cost.flops, cost.traffic, cost.steps), UNKNOWN)
    moving = scale * ALGORITHMS[name].moving(spec)  # the kernels of measured rows are in order
    return Time(time.seconds + moving, time.sigma)


def time_of(name: str, spec: ConvSpec, platform: str) -> Time:
    """As ``predicted``, but the measured time where exactly ``spec`` was measured here."""
    row = own_rows(platform).get(spec)
    if row is not None and name in row.seconds:
        return Time(row.seconds[name], REPEATED, measured=True)
    return predicted(name, spec, platform)


listeners += model.cache_clear, predicted.cache_clear
