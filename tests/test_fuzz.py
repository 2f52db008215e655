"""The drop-in contract, fuzzed: whatever lax takes, every algorithm gives what lax gives.

A check is one convolution by one algorithm. The default run samples; the whole sweep is
``pytest -m exhaustive``. A convolution follows from its seed alone, which a failure names.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import numpy as np
import oracles
import pytest
from cases import CASES, Case, params_of
from jax import lax
from test_algorithms import assert_as_by_loop

import jaxconv
from jaxconv.algorithms.base import unsupported
from jaxconv.planning import accelerators
from jaxconv.spec import ConvSpec

DTYPES = {
    "float64": (None,),
    "float32": (None, None, "float64"),
    "bfloat16": (None, "float32"),
    "float16": (None, "float32"),
    "complex64": (None, "complex128"),
    "int8": (None, "int32", "float32"),
    "int32": (None, "int64"),
    "uint8": (None, "int32"),
    "bool": (None, "int32"),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    dtype: str
    arguments: dict[str, Any]

    def operands(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        shapes = self.lhs_shape, self.rhs_shape
        preferred = self.arguments["preferred_element_type"]
        return tuple(oracles.drawn(rng, shape, self.dtype, preferred) for shape in shapes)


def sample(seed: int) -> Sample:
    """A convolution that lax takes; its kind follows from ``seed``."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    ndim = int(rng.choice([0, 1, 2, 3, 4], p=[0.06, 0.24, 0.4, 0.2, 0.1]))
    largest = (0, 12, 8, 5, 4)[ndim]
    dtype = pick(*DTYPES)
    # One in thirty has more taps than are written out, and goes by loops.
    long = ndim in (1, 2) and rng.random() < 1 / 30
    if long:
        kernel = [[70], [9, 9]][ndim - 1]
        spatial = [[75], [11, 10]][ndim - 1]
    else:
        kernel = [int(rng.integers(1, min(largest, 4) + 1)) for _ in range(ndim)]
        zero = rng.random() < 0.05
        spatial = [int(rng.integers(0 if zero else 1, largest + 1)) for _ in range(ndim)]
    some = lambda p: [  # noqa: E731
        int(rng.integers(1, 5)) if rng.random() < p and not long else 1 for _ in range(ndim)
    ]
    dilate_lhs = rng.random() < 0.3
    strides, lhs_dilation, rhs_dilation = some(0.4), some(0.7 if dilate_lhs else 0), some(0.3)
    padding = pick("SAME", "SAME_LOWER", "VALID", "pairs", "pairs", "pairs")
    if padding == "pairs" or max(lhs_dilation, default=1) > 1:
        padding = []
        for size, dilation in zip(spatial, lhs_dilation, strict=True):
            low, high = (int(p) for p in rng.integers(-2, 5, 2))
            dilated = max(0, (size - 1) * dilation + 1)
            padding.append((low, max(high, -dilated - low)))
    groups = pick("none", "none", "feature", "depthwise", "batch")
    g = int(rng.integers(2, 4)) if groups != "none" else 1
    n, c, o = (int(rng.integers(1, 4)) for _ in range(3))
    if groups == "none" and rng.random() < 0.05:
        n, c, o = (int(rng.integers(0, 3)) for _ in range(3))
    if groups == "depthwise":
        c = 1
    arguments = {
        "window_strides": tuple(strides),
        "padding": padding,
        "lhs_dilation": pick(tuple(lhs_dilation), None)
        if max(lhs_dilation, default=1) == 1
        else tuple(lhs_dilation),
        "rhs_dilation": tuple(rhs_dilation),
        "feature_group_count": g if groups in ("feature", "depthwise") else 1,
        "batch_group_count": g if groups == "batch" else 1,
        "preferred_element_type": pick(*DTYPES[dtype]),
    }
    letters = "abcd"[:ndim]
    form = pick("none", "last", "strings", "permutations")
    specs = {"none": (f"NC{letters}", f"OI{letters}", f"NC{letters}")}
    specs["last"] = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    names = specs.get(form) or tuple(
        "".join(rng.permutation(list(axes + letters))) for axes in ("NC", "OI", "NC")
    )
    letters = [axis for axis in names[1] if axis in letters]  # rhs orders strides and pads
    lhs = {"N": n * arguments["batch_group_count"], "C": c * arguments["feature_group_count"]}
    rhs = {"I": c, "O": o * g}
    lhs |= dict(zip(letters, spatial, strict=True))
    rhs |= dict(zip(letters, kernel, strict=True))
    arguments["dimension_numbers"] = None if form == "none" else names
    lhs_shape = tuple(lhs[axis] for axis in names[0])
    rhs_shape = tuple(rhs[axis] for axis in names[1])
    if form == "permutations":
        numbers = lax.conv_dimension_numbers(lhs_shape, rhs_shape, names)
        arguments["dimension_numbers"] = numbers
    return Sample(lhs_shape, rhs_shape, dtype, arguments)


def of_case(name: str, dtype: str, preferred: str | None) -> Sample:
    case = CASES[name]
    arguments = case.arguments | {"preferred_element_type": preferred}
    return Sample(case.lhs_shape, case.rhs_shape, dtype, arguments)


def run_checks(seed: int, case: Sample | None = None, precision: str | None = "highest") -> int:
    """Checks one sample by "auto" and by every algorithm that takes it; returns how many."""
    case = case or sample(seed)
    lhs, rhs = case.operands(seed)
    params = params_of(lhs, rhs, **case.arguments, precision=precision)
    spec = ConvSpec.from_params(lhs, rhs, params)
    able = [a for a in jaxconv.ALGORITHMS.values() if unsupported(a, spec) is None]
    if jax.default_backend() == "gpu" and accelerators.refused(spec):
        able = [a for a in able if a.name != "xla"]  # lax itself refuses it there
    names = ["auto", *(a.name for a in able)]

    conv = partial(jaxconv.conv_general_dilated, **case.arguments, precision=precision)
    outs = jax.jit(lambda *pair: [conv(*pair, algorithm=name) for name in names])(lhs, rhs)
    contract = jax.eval_shape(partial(lax.conv_general_dilated, **case.arguments), lhs, rhs)
    del params["precision"], params["preferred_element_type"]
    expected = oracles.loop_conv(lhs, rhs, **params)
    absolute = (np.abs(x.astype(oracles.wide(x.dtype))) for x in (lhs, rhs))
    magnitude = oracles.loop_conv(*absolute, **params)
    length = math.prod(spec.rhs_shape[:-1])
    by_lax = oracles.lax_conv(lhs, rhs, **(case.arguments | {"preferred_element_type": None}))
    oracles.check(by_lax, expected, magnitude, length, by_lax.dtype)
    expected = expected.astype(oracles.wide(contract.dtype))
    for name, out in zip(names, outs, strict=True):
        try:
            assert (out.shape, out.dtype) == (contract.shape, contract.dtype)
            spread = oracles.SPREAD.get(name, 0)
            oracles.check(out, expected, magnitude, length, case.dtype, spread)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, algorithm {name}: {spec}: {error}") from None
    return len(names)


@pytest.mark.parametrize("block", range(8))
def test_sampled(block: int) -> None:
    assert sum(run_checks(1000 * block + i) for i in range(5)) >= 5 * 5


@pytest.mark.usefixtures("loops_early")
@pytest.mark.parametrize("name", ["grouped 1x1", "batch groups", "transposed"])
@pytest.mark.parametrize(
    ("dtype", "preferred"), [(d, p) for d in DTYPES for p in dict.fromkeys(DTYPES[d])]
)
def test_every_dtype(dtype: str, preferred: str | None, name: str) -> None:
    """In any precision; an accelerator would round the operands."""
    precision = None if jax.default_backend() == "cpu" else "highest"
    run_checks(2, of_case(name, dtype, preferred), precision)


@pytest.mark.parametrize(
    ("dtype", "preferred", "name"),
    [
        ("bool", "int8", "grouped 1x1"),
        ("bool", "uint64", "1d"),
        ("bool", "complex64", "batch groups"),
        ("int2", "int32", "1d"),
        ("uint2", None, "grouped"),
        ("int4", None, "grouped"),
        ("int4", "float8_e5m2", "batch groups"),
        ("uint4", "int8", "1d"),
        ("int8", "int4", "grouped"),
        ("float4_e2m1fn", "float32", "grouped"),
    ],
)
def test_narrow_dtypes(dtype: str, preferred: str | None, name: str) -> None:
    """As lax by contract: lax itself compiles only some of these on CPU."""
    run_checks(2, of_case(name, dtype, preferred))


def test_a_dtype_without_zero_and_sign() -> None:
    """Products of integers as float8_e8m0fnu: lax makes NaN of the operands that are no powers."""
    case = CASES["grouped"]
    arguments = case.arguments | {"preferred_element_type": "float8_e8m0fnu"}
    lhs, rhs = of_case(case.name, "int8", None).operands(2)
    seen = np.isnan(case.loop(*(x.astype("float8_e8m0fnu") for x in (lhs, rhs))))
    for name in ("auto", "im2col", "shift", "naive"):
        out = jaxconv.conv_general_dilated(lhs, rhs, **arguments, algorithm=name)
        np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), seen)


@pytest.mark.parametrize("seed", range(12))
def test_derivatives(seed: int) -> None:
    """By one algorithm each, in float64: as linear as the loop, and with its adjoints."""
    drawn = sample(seed)
    arguments = drawn.arguments | {"preferred_element_type": None}
    case = Case("drawn", drawn.lhs_shape, drawn.rhs_shape, arguments)
    able = [a.name for a in jaxconv.ALGORITHMS.values() if unsupported(a, case.spec()) is None]
    name = str(np.random.default_rng(seed).choice(["auto", *able]))
    assert_as_by_loop(name, case, forward_mode=True)


def test_mixed_padding() -> None:
    """Pads of both signs, which lax of JAX 0.10.2 itself gets wrong in float32 on CPU."""
    run_checks(1_058_007)


@pytest.mark.parametrize(
    ("dtype", "preferred", "x64"),
    [("int8", "int32", True), ("uint8", "uint32", True), ("int16", None, False)],
)
def test_integers_with_the_batch_innermost(dtype: str, preferred: str | None, x64: bool) -> None:
    """The layout of a kernel's gradient: sums over blocks of rows and parts of a product."""
    rng = np.random.default_rng([x64, len(dtype)])
    height, i, o = int(rng.choice([24, 26, 36])), *(int(d) for d in rng.integers(1, 4, 2))
    stride, low = (int(s) for s in rng.integers(1, 3, 2))
    arguments = {
        "window_strides": (stride, 1),
        "padding": ((low, 0), (0, low)),
        "dimension_numbers": ("CHWN", "IHWO", "HWNC"),
        "preferred_element_type": preferred,
    }
    with jax.enable_x64(x64):
        run_checks(0, Sample((i, height + 8, 9, 2), (i, height, 6, o), dtype, arguments))


@pytest.mark.exhaustive
@pytest.mark.parametrize("block", range(100))
def test_exhaustive(block: int) -> None:
    assert sum(run_checks(1_000_000 + 1000 * block + i) for i in range(10)) >= 10 * 5
