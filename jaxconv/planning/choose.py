"""The decision: which algorithm "auto" takes for a convolution, and how it is then run."""

import math
from collections.abc import Mapping
from functools import lru_cache

import jax
from jax import Array

from jaxconv.algorithms import ALGORITHMS, Algorithm, UnsupportedConvError
from jaxconv.algorithms.base import apply, prepared, unsupported
from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail
from jaxconv.config import listeners, over_limit
from jaxconv.planning import accelerators
from jaxconv.planning.measured import own_rows
from jaxconv.planning.predict import Time, model, predicted, time_of
from jaxconv.spec import ConvSpec


@lru_cache(maxsize=4096)
def choose(spec: ConvSpec, platform: str, without: frozenset[str] = frozenset()) -> tuple[str, str]:
    """The algorithm for ``spec`` on ``platform``, measured or else predicted, and the reason.

    Args:
      without: algorithms that must not be chosen.
    """
    spec = prepared(spec)
    possible = [n for n, a in ALGORITHMS.items() if n not in without and a.excluded(spec) is None]
    possible = [n for n in possible if rejection(ALGORITHMS[n], spec, platform) is None]
    row = own_rows(platform).get(spec)
    if row is not None and (names := [n for n in possible if n in row.seconds]):
        return decide({n: time_of(n, spec, platform) for n in names}, platform)
    if platform != "cpu":
        return _on_accelerator(spec, platform, possible)
    if spec.is_empty and "xla" in possible:
        return "xla", "there is nothing to compute"
    usual = [name for name in possible if ALGORITHMS[name].doubted(spec) is None] or possible
    if spec.is_empty or not usual:
        return _last_resort(spec)
    return decide({name: predicted(name, spec, platform) for name in usual}, platform)


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
        verb = "was measured" if times[best].measured else "is predicted"
        figures = f"{times[best]}" if lax is None else f"{times[best]}, XLA's own {lax}"
        return best, f"it {verb} to be the fastest ({figures})"
    others = [name for name in times if name != "xla"]
    if not others:
        return "xla", "no other can be taken"
    second = min(others, key=lambda name: times[name].seconds)
    likely = "was measured to be clearly" if times[second].measured else "is likely to be"
    return "xla", f"no other {likely} faster ({lax}, {second} {times[second]})"


def _is_faster(one: Time, other: Time) -> bool:
    gain = math.log(one.seconds / other.seconds) + SIGMAS * math.hypot(one.sigma, other.sigma)
    return gain < math.log(MARGIN)


def worthwhile(seconds: Mapping[str, float]) -> list[str]:
    """The algorithms that are fast enough for their margins."""

    def worth(name: str) -> bool:
        others = [time for other, time in seconds.items() if other != name]
        return seconds[name] <= ALGORITHMS[name].margin * min(others, default=math.inf)

    return [name for name in seconds if ALGORITHMS[name].margin == 1 or worth(name)]


def rejection(algorithm: Algorithm, spec: ConvSpec, platform: str) -> str | None:
    """Why "auto" can't take ``algorithm`` for a prepared ``spec``; None where it can."""
    reason = unsupported(algorithm, spec)
    if reason is not None or spec.is_empty or algorithm.name == "xla":
        return reason  # XLA's own convolution is the fallback, whatever its workspace
    return over_limit(workspace(algorithm, spec, platform))


def workspace(
    algorithm: Algorithm, spec: ConvSpec, platform: str, without: frozenset[str] = frozenset()
) -> int:
    """Bytes of intermediate arrays of a prepared ``spec``, those of delegated parts included; these
    are planned by any algorithm but those in ``without``."""
    total = algorithm.cost(spec).workspace
    for part in map(prepared, algorithm.parts(spec)):
        if not part.is_empty:
            name, _ = choose(part, platform, without)
            total += workspace(ALGORITHMS[name], part, platform, without)
    return total


def _last_resort(spec: ConvSpec) -> tuple[str, str]:
    names = ("im2col_tiled", "pointwise", "im2col")
    possible = (name for name in names if unsupported(ALGORITHMS[name], spec) is None)
    return next(possible, "im2col"), "no other can be taken"


def _on_accelerator(spec: ConvSpec, platform: str, possible: list[str]) -> tuple[str, str]:
    for rule in accelerators.rules(platform):
        if rule.algorithm in possible and rule.applies(spec) and not spec.is_empty:
            return rule.algorithm, rule.why
    if "xla" in possible and not (platform == "gpu" and accelerators.refused(spec)):
        return "xla", "the platform's own convolution is fast for most shapes"
    return _last_resort(spec)


def run(
    lhs: Array, rhs: Array, spec: ConvSpec, algorithm: str, platform: str, moved: bool = False
) -> Array:
    """Computes ``spec`` on canonical arrays by ``algorithm`` or by the one that "auto" chooses.

    ``moved``: an image channels first was channels last before, and still is in memory.

    The smaller convolutions that an algorithm delegates are planned in turn. Those of an algorithm
    asked for by name are never left to XLA, so that a measurement is of the named algorithm.
    """
    without = frozenset(() if algorithm in ("auto", "xla") else {"xla"})
    if algorithm == "auto":
        algorithm, _ = choose(spec, platform)
    if moved:
        spec = spec.replace(channels_first=False)
    return execute(lhs, rhs, spec, algorithm, platform, without)


def execute(
    lhs: Array,
    rhs: Array,
    spec: ConvSpec,
    algorithm: str,
    platform: str,
    without: frozenset[str] = frozenset(),
) -> Array:
    """Computes ``spec`` by ``algorithm``; delegated parts by any but those in ``without``."""

    def convolve(lhs: Array, rhs: Array, part: ConvSpec) -> Array:
        part = part.replace(channels_first=False, kernel_order="xIO")
        return execute(lhs, rhs, part, choose(part, platform, without)[0], platform, without)

    with jax.named_scope(f"{algorithm} {spec.shapes}"):  # profilers show it
        return apply(ALGORITHMS[algorithm], lhs, rhs, spec, convolve)


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
        fail(
            function,
            f"algorithm {algorithm!r} can't do this convolution ({reason})",
            spec,
            f"use algorithm='auto', or one that can: {others}",
            UnsupportedConvError,
        )


def checked_platform(function: str, platform: str | None) -> str:
    """``platform``, or that of JAX's default backend; raises where it is unknown."""
    platform = jax.default_backend() if platform is None else platform
    if platform not in ("cpu", "gpu", "tpu", jax.default_backend()):
        remedy = hints.of_platform(platform)
        fail(function, "platform must be 'cpu', 'gpu' or 'tpu'", repr(platform), remedy)
    return platform


listeners.append(choose.cache_clear)
