"""What the choice of "auto" costs: its time over the best algorithm's, on random convolutions.

Yardstick: https://docs.scipy.org/doc/scipy/reference/generated/scipy.signal.choose_conv_method.html
states the same of SciPy's choice.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv import layout
from jaxconv.bench.measure import Effort, difference
from jaxconv.planning.choose import choose
from jaxconv.planning.plan import plan_spec
from jaxconv.planning.timing import Compiled, alternate
from jaxconv.spec import ConvSpec, dilate
from jaxconv.tools.autotune import operands, quickest

SEED = 2024
COUNT = 200
ENOUGH = Effort(16, 1.0, fewest=6)
# Slower than this many times the best after a few calls: not timed further.
HOPELESS = 3.0
# Operations that take as long as a call; those that lax does in half a second where it is fast, and
# in its loops; bytes of operands, and of a candidate's intermediate arrays.
FEWEST_FLOPS, FAST_FLOPS, LOOP_FLOPS = 1e6, 2e10, 6e8
OPERANDS, WORKSPACE = 64 << 20, 1 << 30


def random_specs(seed: int, count: int) -> list[ConvSpec]:
    """Random convolutions as they occur in practice, the same for the same seed.

    One, two and three dimensions, kernels of 1 to 31, strides, groups, dilations, batches of 1 to
    8, transposed ones, and weight gradients in the layout that JAX derives; most in float32. All
    are such that lax takes about half a second at most.
    """
    rng = np.random.default_rng(seed)
    specs: list[ConvSpec] = []
    while len(specs) < count:
        spec = _random_spec(rng)
        if spec is not None and _bounded(spec):
            specs.append(spec)
    return specs


def _random_spec(rng: np.random.Generator) -> ConvSpec | None:
    ndim = int(rng.choice([1, 2, 3], p=[0.2, 0.65, 0.15]))
    largest = {1: 16384, 2: 256, 3: 40}[ndim]
    size = _between(rng, 4, largest)
    sizes = (
        (size,) * ndim
        if rng.random() < 0.8
        else tuple(_between(rng, 4, largest) for _ in range(ndim))
    )
    kernels, weights = {
        1: ((1, 2, 3, 4, 5, 7, 10, 16, 31), (1, 2, 3, 2, 1, 1, 1, 1, 1)),
        2: ((1, 2, 3, 4, 5, 7, 11, 16, 31), (4, 1, 6, 1, 2, 2, 1, 0.5, 0.5)),
        3: ((1, 2, 3, 5), (2, 2, 6, 1)),
    }[ndim]
    kernel = int(rng.choice(kernels, p=np.array(weights) / sum(weights)))
    kind = rng.choice(["dense", "depthwise", "grouped", "single"], p=[0.6, 0.2, 0.12, 0.08])
    c, o = _channels(rng), _channels(rng)
    if rng.random() < 0.4:
        o = c
    groups = 1
    if kind == "depthwise":
        groups, o = c, c * int(rng.choice([1, 2], p=[0.9, 0.1]))
    elif kind == "grouped":
        groups = int(rng.choice([2, 4, 8, 16, 32]))
        c, o = groups * math.ceil(c / groups), groups * math.ceil(o / groups)
    elif kind == "single":
        c, o = 1, int(rng.choice([1, 2, 8]))
    stride = (
        int(rng.choice([1, 2, 4], p=[0.75, 0.2, 0.05]))
        if kernel > 1
        else int(rng.choice([1, 2], p=[0.9, 0.1]))
    )
    if kernel in (2, 4, 16) and rng.random() < 0.5:
        stride = kernel  # patches
    dilation = int(rng.choice([1, 2, 4], p=[0.9, 0.07, 0.03])) if stride == 1 and kernel > 1 else 1
    transposed = kernel > 1 and stride == 1 and dilation == 1 and rng.random() < 0.1
    extent = dilate(kernel, dilation)
    pads = ("valid", "half", "causal")[int(rng.choice(3, p=[0.2, 0.65, 0.15]))]
    lo, hi = {
        "valid": (0, 0),
        "half": ((extent - 1) // 2, extent // 2),
        "causal": (extent - 1, 0),
    }[pads]
    dtype = str(rng.choice(["float32", "bfloat16", "int8", "float64"], p=[0.85, 0.06, 0.05, 0.04]))
    spec = ConvSpec(
        (int(rng.choice([1, 2, 4, 8])), *sizes, c),
        (*(kernel,) * ndim, c // groups, o),
        (stride,) * ndim,
        ((lo, hi),) * ndim,
        (2 if transposed else 1,) * ndim,
        (dilation,) * ndim,
        np.dtype(dtype),
        np.dtype("int32" if dtype == "int8" else dtype),
        groups,
        precision=(lax.Precision.DEFAULT, lax.Precision.DEFAULT),
    )
    if spec.is_empty:
        return None
    if not transposed and dtype != "int8" and rng.random() < 0.3:
        return layout.weight_gradient_of(spec)
    return spec


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """A size, all orders of magnitude alike."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _channels(rng: np.random.Generator) -> int:
    if rng.random() < 0.1:
        return 3
    return 2 ** int(rng.integers(3, 10)) if rng.random() < 0.6 else _between(rng, 1, 512)


def _bounded(spec: ConvSpec) -> bool:
    # Groups of a batch, and of features outside f32, become one dense convolution with zeros.
    masked = spec.batch_group_count if spec.dtype == np.float32 else spec.groups
    fast = (
        spec.spatial_ndim < 3
        and spec.groups == max(spec.lhs_dilation) == 1
        and jnp.issubdtype(spec.dtype, np.inexact)
    )
    flops = spec.flops * math.prod(spec.lhs_dilation) * masked
    within = FEWEST_FLOPS <= flops <= (FAST_FLOPS if fast else LOOP_FLOPS)
    return within and spec.operand_bytes <= OPERANDS


def arguments(spec: ConvSpec) -> dict[str, Any]:
    """Those of ``conv_general_dilated`` that ``spec`` says, for ``operands(spec)``."""
    last = 1 + spec.spatial_ndim
    middle = range(1, last)
    numbering = lax.ConvDimensionNumbers(
        (0, last, *middle), (last, last - 1, *range(last - 1)), (0, last, *middle)
    )
    if spec.weight_gradient:
        numbering = lax.ConvDimensionNumbers(
            (last, 0, *middle), (last, 0, *middle), (last - 1, last, *range(last - 1))
        )
    return {
        "window_strides": spec.window_strides,
        "padding": spec.padding,
        "lhs_dilation": spec.lhs_dilation,
        "rhs_dilation": spec.rhs_dilation,
        "dimension_numbers": numbering,
        "feature_group_count": spec.feature_group_count,
        "batch_group_count": spec.batch_group_count,
        "preferred_element_type": None if spec.out_dtype == spec.dtype else spec.out_dtype,
    }


@dataclasses.dataclass(frozen=True)
class Regret:
    """One convolution.

    Attributes:
      spec: in words.
      chosen: what "auto" took.
      best: the fastest candidate in every other round.
      seconds: of "auto", of lax, and of each candidate, medians; of hopeless ones the
        fastest of a few calls.
      regret: time of "auto" over that of the best candidate in the rounds that did not choose it,
        1 where "auto" took it. The best of several medians of the same rounds would be the luckiest
        one too, and its luck counted as regret.
      by_lax: lax's time over that of "auto": above 1 is faster than lax.
      wrong: which disagree with lax, in words; None where none does.
    """

    spec: str
    chosen: str
    best: str
    seconds: dict[str, float]
    regret: float
    by_lax: float
    wrong: str | None


def run(specs: list[ConvSpec], effort: Effort = ENOUGH) -> Iterator[str | Regret]:
    """Measures each. Yields the name of what comes, then the result."""
    for spec in specs:
        yield str(spec)
        with jax.enable_x64(spec.dtype == np.float64):
            yield regret(spec, effort)


def regret(spec: ConvSpec, effort: Effort = ENOUGH) -> Regret:
    """Measures "auto", lax, and every candidate, by turns."""
    chosen, _ = choose(spec, jax.default_backend())
    arrays = operands(spec)
    subjects: dict[str, Compiled] = {}
    once: dict[str, float] = {}
    # The chosen one is measured as "auto", which may hand parts on to algorithms that it may not
    # under its own name.
    for name in ("auto", "lax", *(name for name in candidates(spec) if name != chosen)):
        subjects[name] = Compiled(_function(spec, name), *arrays)
        once[name] = quickest(subjects[name].call)
    expected = subjects["lax"].output
    tolerance = 2e-2 if spec.dtype.name == "bfloat16" else 1e-4
    off = {name: difference(expected, subject.output) for name, subject in subjects.items()}
    wrong = [
        f"{name} is off by {error:.1e}" for name, error in off.items() if not error < tolerance
    ]
    limit = HOPELESS * min(once.values())
    hopeful = [name for name in subjects if name == "auto" or once[name] <= limit]
    times = np.array(
        alternate(
            [subjects[name] for name in hopeful], effort.pairs, effort.seconds, fewest=effort.fewest
        )
    )
    best, over_best = judged({name: times[:, i] for i, name in enumerate(hopeful) if name != "lax"})
    seconds = once | dict(zip(hopeful, map(float, np.median(times, 0)), strict=True))
    return Regret(
        str(spec),
        chosen,
        chosen if best == "auto" else best,
        seconds,
        over_best,
        seconds["lax"] / seconds["auto"],
        "; ".join(wrong) or None,
    )


def judged(times: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The best by the first, third, … round and the time of "auto" over its time in the others."""
    best = min(times, key=lambda name: np.median(times[name][::2]))
    others = slice(1, None, 2) if len(times["auto"]) > 1 else slice(None)
    return best, float(np.median(times["auto"][others]) / np.median(times[best][others]))


def candidates(spec: ConvSpec) -> list[str]:
    """The algorithms that could be chosen for a spec."""
    plan = plan_spec(spec, jax.default_backend())
    return [candidate.name for candidate in plan.eligible if candidate.workspace <= WORKSPACE]


def _function(spec: ConvSpec, name: str) -> Callable[..., Array]:
    if name == "lax":
        return partial(lax.conv_general_dilated, **arguments(spec))
    return partial(jaxconv.conv_general_dilated, **arguments(spec), algorithm=name)
