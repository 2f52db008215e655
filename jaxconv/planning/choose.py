"""The decision: which algorithm "auto" takes for a convolution, and how it is then run."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxconv import loops, tables
from jaxconv.algorithms import ALGORITHMS, Algorithm, UnsupportedConvError
from jaxconv.algorithms.base import apply, prepared, unsupported
from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail
from jaxconv.config import MEMORY_SHARE, UNKNOWN_MEMORY, config, listeners, several_processes
from jaxconv.planning import accelerators
from jaxconv.planning.predict import Time, model, time_of
from jaxconv.planning.rows import own_rows
from jaxconv.spec import ConvSpec


@lru_cache(maxsize=4096)
def choose(spec: ConvSpec, platform: str, without: frozenset[str] = frozenset()) -> tuple[str, str]:
    """The algorithm for ``spec`` on ``platform``, measured or else predicted, but none of
    ``without``; and the reason."""
    spec = prepared(spec)
    if spec.is_empty:
        return "im2col" if "xla" in without else "xla", "there is nothing to compute"
    others = (a for name, a in ALGORITHMS.items() if name not in without)
    possible = [a.name for a in others if not (unsupported(a, spec) or a.excluded(spec))]
    row = own_rows(platform).get(spec)
    names = [name for name in possible if row is not None and name in row.seconds]
    if measured := _fastest(names, spec, platform):
        return measured
    if platform != "cpu":
        return _on_accelerator(spec, platform, possible)
    names = [name for name in possible if ALGORITHMS[name].doubted(spec) is None]
    fastest = _fastest(names, spec, platform) or _fastest(possible, spec, platform)
    return fastest or _last_resort(spec)


def _fastest(names: Sequence[str], spec: ConvSpec, platform: str) -> tuple[str, str] | None:
    """The decision between these, of which times are known; None where none has the memory."""
    times = {name: time for name in names if (time := time_of(name, spec, platform))}
    while times:
        name, reason = decide(times, platform)
        # Asked of the chosen only: it plans parts, and asked of all, planning took twice as long.
        if _excessive(ALGORITHMS[name], spec, platform) is None:
            return name, reason
        del times[name]
    return None


# XLA's own is kept unless log(ratio of times) + SIGMAS deviations < log(MARGIN). By 0.2 the regret
# in cross-validation is 1.099 instead of 1.105, but 4.2 % instead of 3.1 fall below 0.9 times lax.
MARGIN, SIGMAS = 0.95, 0.4
# Calls over which compile time is spread where two algorithms are almost equally fast.
CALLS = 100_000


def decide(times: Mapping[str, Time], platform: str) -> tuple[str, str]:
    """The algorithm to take, given the time of each, and the reason."""
    names = worthwhile({name: time.seconds for name, time in times.items()})
    compiling = model(platform).compile_seconds
    best = min(names, key=lambda n: times[n].seconds + compiling.get(n, 0.0) / CALLS)
    lax = times.get("xla")
    if lax is None or (best != "xla" and _is_faster(times[best], lax)):
        how = "measured" if times[best].measured else "predicted"
        figures = f"{times[best]}" if lax is None else f"{times[best]}, XLA's own {lax}"
        return best, f"{how} fastest ({figures})"
    others = times.keys() - {"xla"}
    if not others:
        return "xla", "no other algorithm applies"
    second = min((times[name].seconds, name) for name in others)[1]
    how = "measured clearly" if times[second].measured else "likely to be"
    return "xla", f"no other is {how} faster ({lax}, {second} {times[second]})"


def _is_faster(one: Time, other: Time) -> bool:
    gain = math.log(one.seconds / other.seconds) + SIGMAS * math.hypot(one.sigma, other.sigma)
    return gain < math.log(MARGIN)


def worthwhile(seconds: Mapping[str, float]) -> list[str]:
    """The algorithms that are fast enough for their margins."""

    def worth(name: str) -> bool:
        others = [time for other, time in seconds.items() if other != name]
        return seconds[name] <= ALGORITHMS[name].margin * min(others, default=math.inf)

    return [name for name in seconds if ALGORITHMS[name].margin == 1 or worth(name)]


def _on_accelerator(spec: ConvSpec, platform: str, possible: list[str]) -> tuple[str, str]:
    for name, why in accelerators.choices(spec, platform):
        if name in possible and _excessive(ALGORITHMS[name], spec, platform) is None:
            return name, why
    if "xla" in possible and not (platform == "gpu" and accelerators.refused(spec)):
        return "xla", "the platform's own convolution is fast for most shapes"
    return _last_resort(spec)


def _last_resort(spec: ConvSpec) -> tuple[str, str]:
    names = (n for n in ("im2col_tiled", "pointwise") if unsupported(ALGORITHMS[n], spec) is None)
    return next(names, "im2col"), "no other algorithm applies"


def unplannable(algorithm: Algorithm, spec: ConvSpec, platform: str) -> str | None:
    """Why "auto" never takes ``algorithm`` for a prepared, not empty ``spec``; None if it may."""
    reason = unsupported(algorithm, spec) or algorithm.excluded(spec)
    return reason or _excessive(algorithm, spec, platform)


def _excessive(algorithm: Algorithm, spec: ConvSpec, platform: str) -> str | None:
    """That its workspace is too large, if it is."""
    if algorithm.name == "xla":
        return None  # XLA's own convolution is the fallback, whatever its workspace
    taken, limit = workspace(algorithm, spec, platform), workspace_limit()
    if taken <= limit:
        return None
    sizes = tables.mebibytes(taken), tables.mebibytes(limit)
    return "its workspace of {} is over the limit of {}".format(*sizes)


def workspace_limit() -> int:
    """Bytes of intermediate arrays that "auto" lets an algorithm take."""
    if several_processes() and config.given("workspace_limit") is None:
        return UNKNOWN_MEMORY // MEMORY_SHARE  # hosts may differ
    return config.workspace_limit


def workspace(
    algorithm: Algorithm, spec: ConvSpec, platform: str, without: frozenset[str] = frozenset()
) -> int:
    """Bytes of intermediate arrays of a prepared ``spec``, those of delegated parts included, which
    go to any algorithm but those in ``without``."""
    total = algorithm.cost(spec).workspace
    if algorithm.moving(spec):
        total += math.prod(spec.forward.rhs_shape) * spec.dtype.itemsize
    for part in map(prepared, algorithm.parts(spec)):
        if not part.is_empty:
            name, _ = choose(part, platform, without)
            total += workspace(ALGORITHMS[name], part, platform, without)
    return total


def run(
    lhs: Array,
    rhs: Array,
    spec: ConvSpec,
    algorithm: str,
    platform: str,
    moved: bool = False,  # whether an image channels first still is last in memory
    remade: Sequence[bool] = (False, False),  # operands that XLA would make again for each tap
) -> Array:
    """Computes ``spec`` on canonical arrays by ``algorithm``, or by the one that "auto" chooses.

    The convolutions that an algorithm asked for by name delegates never go to XLA, so that a
    measurement is of that algorithm.
    """
    without = frozenset(() if algorithm in ("auto", "xla") else {"xla"})
    if algorithm == "auto":
        algorithm, _ = choose(spec, platform)
    if moved:
        spec = spec.replace(channels_first=False)
    if platform == "cpu" and ALGORITHMS[algorithm].rereads:
        lhs, rhs = _stored(lhs, rhs, spec, remade)
    return execute(lhs, rhs, spec, algorithm, platform, without)


def _stored(lhs: Array, rhs: Array, spec: ConvSpec, remade: Sequence[bool]) -> tuple[Array, Array]:
    """The operands, those ``remade`` kept in memory as they lie in the program: a kernel's gradient
    has its image and cotangent in another order, from which XLA would move them back."""
    if spec.weight_gradient:
        lhs, rhs = lhs.swapaxes(0, -1), jnp.moveaxis(rhs, -2, 0)
    lhs, rhs = (loops.stored(x) if r else x for x, r in zip((lhs, rhs), remade, strict=True))
    if spec.weight_gradient:
        lhs, rhs = lhs.swapaxes(0, -1), jnp.moveaxis(rhs, 0, -2)
    return lhs, rhs


def execute(
    lhs: Array,
    rhs: Array,
    spec: ConvSpec,
    algorithm: str,
    platform: str,
    without: frozenset[str] = frozenset(),
) -> Array:
    """Computes ``spec`` by ``algorithm``; delegated parts by any but those in ``without``."""

    def convolve(lhs: Array, rhs: Array, part: ConvSpec, name: str | None = None) -> Array:
        part = part.replace(channels_first=False, kernel_order="xIO")
        name = name or choose(part, platform, without)[0]
        return execute(lhs, rhs, part, name, platform, without)

    by_xla = partial(convolve, name="xla")
    with jax.named_scope(f"{algorithm} {spec.shapes}"):  # profilers show it
        return apply(ALGORITHMS[algorithm], lhs, rhs, spec, convolve, by_xla)


def check_name(function: str, algorithm: str) -> None:
    """Raises where ``algorithm`` is unknown."""
    if not isinstance(algorithm, str) or algorithm not in ("auto", *ALGORITHMS):
        names, remedy = ", ".join(ALGORITHMS), hints.of_name(algorithm, ("auto", *ALGORITHMS))
        fail(function, f"algorithm must be 'auto' or one of {names}", repr(algorithm), remedy)


def check_algorithm(function: str, algorithm: str, spec: ConvSpec) -> None:
    """Raises where ``algorithm`` is unknown or can't do ``spec``."""
    check_name(function, algorithm)
    reason = None if algorithm == "auto" else unsupported(ALGORITHMS[algorithm], spec)
    if reason is not None:
        others = ", ".join(n for n, other in ALGORITHMS.items() if unsupported(other, spec) is None)
        constraint = f"algorithm {algorithm!r} can't do this convolution ({reason})"
        remedy = f"use algorithm='auto', or one that can: {others}"
        fail(function, constraint, spec, remedy, UnsupportedConvError)


def checked_platform(function: str, platform: str | None) -> str:
    """``platform``, or that of JAX's default backend; raises where it is unknown."""
    platform = jax.default_backend() if platform is None else platform
    if platform not in ("cpu", "gpu", "tpu", jax.default_backend()):
        remedy = hints.of_platform(platform)
        fail(function, "platform must be 'cpu', 'gpu' or 'tpu'", repr(platform), remedy)
    return platform


listeners.append(choose.cache_clear)
