"""The public functions against lax: values, dtypes, and everything that lax's arguments may be."""

import functools
import inspect
import re
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from oracles import assert_close as same

import jaxconv
from jaxconv import ALGORITHMS, UnsupportedConvError
from jaxconv.algorithms.base import unsupported
from jaxconv.spec import ConvSpec

LAST = cases.LAST | {4: ("NHWDTC", "HWDTIO", "NHWDTC")}


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# conv

X, W = normal(2, 9, 8, 4), normal(3, 3, 4, 6, seed=1)

CONVS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, lax's; both on X and W
    "defaults": ({}, {}),
    "SAME, stride 2": ({"strides": 2}, {"window_strides": (2, 2)}),
    "strides": ({"strides": (1, 2)}, {"window_strides": (1, 2)}),
    "NumPy integers": ({"strides": np.int64(2)}, {"window_strides": (2, 2)}),
    "SAME_LOWER": (
        {"strides": 2, "padding": "SAME_LOWER"},
        {"window_strides": (2, 2), "padding": "SAME_LOWER"},
    ),
    "VALID": ({"padding": "VALID"}, {"padding": "VALID"}),
    "lower case": ({"padding": "valid"}, {"padding": "VALID"}),
    "an integer": ({"padding": 2}, {"padding": ((2, 2), (2, 2))}),
    "a negative integer": ({"padding": -1}, {"padding": ((-1, -1), (-1, -1))}),
    "pairs": ({"padding": [(0, 3), (2, -1)]}, {"padding": ((0, 3), (2, -1))}),
    "dilation": ({"dilation": 2}, {"rhs_dilation": (2, 2)}),
    "dilations": ({"dilation": [1, 3]}, {"rhs_dilation": (1, 3)}),
    "precision": ({"precision": "highest"}, {"precision": "highest"}),
    **{
        f"{groups} groups to {n}": (
            {"w": normal(3, 3, 4 // groups, n), "groups": groups},
            {"feature_group_count": groups},
        )
        for groups, n in ((2, 6), (4, 4), (4, 8))
    },
}


@pytest.mark.parametrize("name", CONVS)
def test_conv_is_lax_channels_last(name: str) -> None:
    ours, arguments = CONVS[name]
    ours = {"w": W} | ours
    arguments = {"window_strides": (1, 1), "padding": "SAME"} | arguments
    expected = lax.conv_general_dilated(X, ours["w"], dimension_numbers=LAST[2], **arguments)
    same(jaxconv.conv(X, **ours), expected)


@pytest.mark.parametrize("ndim", LAST)
@pytest.mark.parametrize("padding", ["SAME", 1])
def test_conv_has_the_kernels_dimensions(ndim: int, padding: Any) -> None:
    x, w = normal(2, *(5, 4, 3, 4)[:ndim], 3), normal(*(3, 2, 2, 3)[:ndim], 3, 4, seed=1)
    pads = padding if isinstance(padding, str) else ((1, 1),) * ndim
    expected = lax.conv_general_dilated(x, w, (1,) * ndim, pads, dimension_numbers=LAST[ndim])
    same(jaxconv.conv(x, w, padding=padding), expected)
    same(jaxconv.conv(x[0], w, padding=padding), expected[0])


@pytest.mark.parametrize(
    ("padding", "strides", "dilation"), [("CAUSAL", 1, 1), ("causal", 1, 3), ("CAUSAL", 2, 2)]
)
def test_causal_conv_sees_no_later_input(padding: str, strides: int, dilation: int) -> None:
    x, w = normal(2, 12, 3), normal(4, 3, 5, seed=1)
    conv = functools.partial(jaxconv.conv, w=w, strides=strides, padding=padding, dilation=dilation)
    out = conv(x)
    expected = lax.conv_general_dilated(
        x, w, (strides,), [(3 * dilation, 0)], None, (dilation,), LAST[1]
    )
    same(out, expected)
    later = x.copy()
    later[:, 7:] += 1
    unchanged = -(-7 // strides)
    np.testing.assert_array_equal(conv(later)[:, :unchanged], out[:, :unchanged])
    assert not np.any(conv(later)[:, unchanged:] == out[:, unchanged:])


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("float32", "float64"), ("bfloat16", "float32"), ("int8", "int32"), ("uint8", "int32")],
)
def test_conv_with_preferred_element_type(dtype: str, preferred: str) -> None:
    x, w = (np.round(4 * np.abs(a)).astype(jnp.dtype(dtype)) for a in (X, W))
    out = jaxconv.conv(x, w, preferred_element_type=preferred)
    assert out.dtype == jnp.dtype(preferred)
    expected = oracles.lax_conv(x, w, (1, 1), "SAME", dimension_numbers=LAST[2])
    np.testing.assert_array_equal(out, expected.astype(preferred))  # small whole numbers: exact


# conv_transpose

TRANSPOSES = {
    "SAME": ((2, 2), "SAME", {}),
    "VALID": ((2, 3), "VALID", {}),
    "stride above kernel": ((4, 5), "SAME", {}),
    "stride 1": ((1, 1), "SAME", {}),
    "stride 1, lower": ((1, 1), "same_lower", {}),
    "pairs": ((2, 1), ((1, 2), (0, 3)), {}),
    "lists": ([2, 2], [[1, 2], [0, -1]], {"rhs_dilation": [1, 2]}),
    "arrays": (np.array([2, 2]), np.array([[1, 2], [0, 3]]), {"rhs_dilation": np.array([1, 2])}),
    "dilated": ((2, 2), "SAME", {"rhs_dilation": (2, 1)}),
    "dilated, VALID": ((2, 3), "VALID", {"rhs_dilation": (1, 3)}),
    "an array of dilations": ((2, 3), "SAME", {"rhs_dilation": np.array([1, 3])}),
    "consistent": ((2, 2), ((1, 0), (1, 1)), {"use_consistent_padding": True}),
    "consistent, dilated": (
        (2, 1),
        ((1, 2), (0, 1)),
        {"use_consistent_padding": True, "rhs_dilation": (2, 2)},
    ),
    "consistent SAME": ((2, 2), "SAME", {"use_consistent_padding": True}),
    "consistent VALID": ((2, 2), "VALID", {"use_consistent_padding": True}),
    "precision": ((2, 2), "SAME", {"precision": lax.Precision.HIGHEST}),
}
OPERANDS = {  # lhs, rhs and dimension_numbers of 2-D convolutions
    "default": (normal(2, 5, 4, 3), normal(3, 4, 3, 2, seed=1), None),
    "odd": (normal(5, 2, 4, 3), normal(3, 3, 2, 4, seed=1), ("HNWC", "HIOW", "CWHN")),
}


@pytest.mark.parametrize("layout", OPERANDS)
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("name", TRANSPOSES)
def test_conv_transpose_is_lax(name: str, transpose_kernel: bool, layout: str) -> None:
    strides, padding, keywords = TRANSPOSES[name]
    lhs, rhs, dimension_numbers = OPERANDS[layout]
    if transpose_kernel:
        spec = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers or LAST[2])
        rhs = rhs.swapaxes(*spec.rhs_spec[:2])
    keywords = keywords | {
        "dimension_numbers": dimension_numbers,
        "transpose_kernel": transpose_kernel,
    }
    expected = lax.conv_transpose(lhs, rhs, strides, padding, **keywords)
    same(jaxconv.conv_transpose(lhs, rhs, strides, padding, **keywords), expected)


@pytest.mark.parametrize("ndim", range(4))
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_conv_transpose_has_defaults_up_to_3d(ndim: int, padding: str) -> None:
    lhs, rhs = normal(2, *(5, 4, 3)[:ndim], 3), normal(*(3, 2, 4)[:ndim], 3, 4, seed=1)
    strides = (2, 3, 2)[:ndim]
    expected = lax.conv_transpose(lhs, rhs, strides, padding)
    same(jaxconv.conv_transpose(lhs, rhs, strides, padding), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["SAME", "stride 1", "pairs", "consistent, dilated"])
def test_conv_transpose_by_each_algorithm(name: str, algorithm: str) -> None:
    strides, padding, keywords = TRANSPOSES[name]
    lhs, rhs, _ = OPERANDS["default"]

    def by_lax(lhs: Any, rhs: Any) -> jax.Array:
        return lax.conv_transpose(lhs, rhs, strides, padding, **keywords)

    equations = jax.make_jaxpr(by_lax)(lhs, rhs).jaxpr.eqns
    (params,) = (e.params for e in equations if e.primitive.name == "conv_general_dilated")
    reason = unsupported(ALGORITHMS[algorithm], ConvSpec.from_params(lhs, rhs, params))
    ours = functools.partial(
        jaxconv.conv_transpose, lhs, rhs, strides, padding, **keywords, algorithm=algorithm
    )
    if reason is None:
        same(ours(), by_lax(lhs, rhs))
    else:
        match = rf"^jaxconv\.conv_transpose: .*{algorithm}.*{re.escape(reason)}"
        with pytest.raises(UnsupportedConvError, match=match):
            ours()


# pointwise


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2, 2), (2, 0)])
def test_pointwise_is_einsum(leading: tuple[int, ...]) -> None:
    x, w = normal(*leading, 6), normal(6, 4, seed=1)
    same(jaxconv.pointwise(x, w), jnp.einsum("...c,co->...o", x, w))


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("bfloat16", "float32"), ("float32", "float64"), ("int8", "int32"), ("int8", "int8")],
)
def test_pointwise_with_preferred_element_type(dtype: str, preferred: str) -> None:
    x, w = (np.round(4 * normal(*s)).astype(jnp.dtype(dtype)) for s in ((3, 6), (6, 4)))
    out = jaxconv.pointwise(x, w, precision="highest", preferred_element_type=preferred)
    expected = np.asarray(x).astype(oracles.wide(x.dtype)) @ w.astype(oracles.wide(w.dtype))
    np.testing.assert_array_equal(out, expected.astype(preferred), strict=True)


# conv_general_dilated takes what lax takes

LHS, RHS = normal(2, 4, 7, 6, dtype=np.float32), normal(6, 4, 3, 3, dtype=np.float32, seed=1)
FIRST = lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
SWAPPED = lax.ConvDimensionNumbers((1, 0, 2, 3), (0, 1, 3, 2), (0, 2, 3, 1))

ACCEPTED: dict[str, dict[str, Any]] = {
    "tuples": {},
    "jax.Arrays": {"lhs": jnp.asarray(LHS), "rhs": jnp.asarray(RHS)},
    "one of each": {"lhs": jnp.asarray(LHS)},
    "a view": {"lhs": LHS[:, ::-1, :, ::2].transpose(0, 1, 3, 2)},
    "lists": {"window_strides": [2, 1], "padding": [[1, 0], [0, 1]], "rhs_dilation": [1, 2]},
    "an array of strides": {"window_strides": np.array([2, 1])},
    "an array of pads": {"padding": np.array([[1, 0], [2, -1]])},
    "an array of dilations": {"rhs_dilation": np.array([2, 1]), "padding": "SAME"},
    "an array of holes": {"lhs_dilation": np.array([2, 1])},
    "holes of 1 and a string": {"lhs_dilation": (1, 1), "padding": "VALID"},
    "small letters": {"padding": "same"},
    "SAME_LOWER": {"padding": "SAME_LOWER", "window_strides": (2, 2)},
    "NumPy integers": {
        "rhs": RHS[:, :2],
        "window_strides": (np.int8(2), np.int64(1)),
        "padding": ((np.int32(1), 1),) * 2,
        "feature_group_count": np.int64(2),
    },
    "batch groups": {"batch_group_count": np.int32(2)},
    "True for 1": {"feature_group_count": True, "window_strides": (True, 2)},
    "letters": {"dimension_numbers": ("NCHW", "OIHW", "NHWC")},
    "a list of letters": {"dimension_numbers": ["NCHW", "OIHW", "NCHW"]},
    "other letters": {"dimension_numbers": ("NCab", "OIba", "baNC")},
    "permutations": {"dimension_numbers": FIRST},
    "swapped": {"lhs": LHS.swapaxes(0, 1), "dimension_numbers": SWAPPED},
    "a dtype's name": {"preferred_element_type": "float64"},
    "a dtype's class": {"preferred_element_type": jnp.float32},
    "a Python type": {"preferred_element_type": float},
    "no sharding": {"out_sharding": None},
    "weak types": {
        "lhs": lax.full_like(1.0, 1.5, shape=(1, 4, 5, 5), dtype=None),
        "rhs": lax.full_like(1.0, 0.5, shape=(2, 4, 3, 3), dtype=None),
    },
    "a weak type": {
        "lhs": lax.full_like(1.0, 1.5, shape=(1, 4, 5, 5), dtype=None),
        "rhs": jnp.asarray(RHS, jnp.float64),
    },
    "no spatial dimension": {
        "lhs": LHS[..., 0, 0],
        "rhs": RHS[..., 0, 0],
        "window_strides": (),
        "padding": (),
    },
}
DEFAULTS = ["highest", "bfloat16", "BF16_BF16_F32"]
PRECISIONS = [
    *DEFAULTS,
    "tensorfloat32",
    lax.Precision.HIGHEST,
    (lax.Precision.HIGHEST, lax.Precision.DEFAULT),
    ["high", "default"],
    "F32_F32_F32",
    lax.DotAlgorithmPreset.BF16_BF16_F32,
    # A convolution has no dot algorithm: lax takes any and runs by default.
    "TF32_TF32_F32",
    "F16_F16_F32",
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts_what_lax_accepts(name: str) -> None:
    given = {"lhs": LHS, "rhs": RHS, "window_strides": (1, 1), "padding": ((1, 1), (0, 2))}
    given |= ACCEPTED[name]
    # lax counts the ones of a tuple of holes; ours may be an array.
    by_lax = given | {"lhs_dilation": given.get("lhs_dilation")}
    same(jaxconv.conv_general_dilated(**given), lax.conv_general_dilated(**by_lax))


# Of a 1×1 convolution in f64, where a loss shows; the others multiply as these do.
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "im2col", "pointwise", "shift", "xla"])
def test_accepts_precisions(algorithm: str, precision: Any) -> None:
    """As an argument, and names as JAX's default too."""
    operands = LHS.astype(np.float64), normal(24, 4, 1, 1), (1, 1), "SAME"
    conv = functools.partial(jaxconv.conv_general_dilated, *operands, algorithm=algorithm)
    expected = lax.conv_general_dilated(*operands, precision=precision)
    same(conv(precision=precision), expected)
    if precision in DEFAULTS:
        with jax.default_matmul_precision(precision):
            same(conv(), lax.conv_general_dilated(*operands))
            jaxpr = jax.make_jaxpr(conv)()
        assert jaxpr.eqns[-1].params["precision"] is not None


@pytest.mark.parametrize("name", ["conv_general_dilated", "conv_transpose"])
def test_signature_is_laxs_and_algorithm(name: str) -> None:
    def parameters(function: Any) -> list[tuple[Any, ...]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    *ours, algorithm = parameters(getattr(jaxconv, name))
    assert ours == parameters(getattr(lax, name))
    assert algorithm == ("algorithm", inspect.Parameter.KEYWORD_ONLY, "auto")


def test_plan_has_the_arguments_of_conv() -> None:
    """But none of what chooses or cuts."""

    def defaults(function: Any, without: set[str]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in without}

    planned = defaults(jaxconv.plan, {"args", "kwargs", "dtype", "platform"})
    assert planned == defaults(jaxconv.conv, {"spatial_axes", "algorithm"})


# Exactness, and where NaN and Inf go

OF_EACH_KIND = pytest.mark.parametrize(
    "name",
    ["3x3", "1x1", "depthwise", "grouped", "3x3 stride 2", "atrous", "transposed", "whole image"],
)


@OF_EACH_KIND
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "bool"])
def test_integers_are_exact_and_wrap_around(dtype: str, name: str) -> None:
    case, rng = cases.CASES[name], np.random.default_rng(0)
    lhs, rhs = (oracles.drawn(rng, shape, dtype) for shape in (case.lhs_shape, case.rhs_shape))
    out = jaxconv.conv_general_dilated(lhs, rhs, **case.arguments)
    exact = case.loop(lhs, rhs)
    expected = exact != 0 if dtype == "bool" else exact.astype(dtype)
    if dtype in ("int8", "uint8"):
        assert np.any(exact != expected), "nothing wrapped around"
    np.testing.assert_array_equal(out, expected, strict=True)


@OF_EACH_KIND
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_inf_stay_where_they_belong(dtype: str, name: str) -> None:
    arguments = cases.CASES[name].arguments
    lhs, rhs = cases.CASES[name].operands(dtype)
    lhs[0, 1, 1, 1], lhs[-1, 3, 3, 0] = np.nan, np.inf
    out = jaxconv.conv_general_dilated(lhs, rhs, **arguments, precision="highest")
    clean = np.where(np.isfinite(lhs), lhs, 0)
    expected = oracles.lax_conv(clean, rhs, **arguments)
    for value in (np.nan, np.inf):
        # The outputs that see it, and the sign with which: those that a 1 in its place changes.
        mark = np.zeros_like(lhs)
        mark[np.isnan(lhs) if np.isnan(value) else np.isinf(lhs)] = 1
        seen = oracles.lax_conv(mark, rhs, **arguments)
        assert 0 < np.count_nonzero(seen) < seen.size
        expected = np.where(seen != 0, np.copysign(value, seen), expected)
    np.testing.assert_allclose(out, expected, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "arguments", "operand"),
    [
        ((1, 6, 6, 1), (1, 1, 1, 1), {"window_strides": (2, 2), "padding": ((1, 1),) * 2}, 1),
        ((1, 4, 4, 1), (3, 3, 1, 1), {"padding": ((1, 2),) * 2, "lhs_dilation": (2, 2)}, 2),
        ((1, 4, 4, 1), (3, 3, 1, 1), {"padding": ((1, 1),) * 2, "lhs_dilation": (2, 2)}, 2),
    ],
    ids=["kernel of a strided convolution", "cotangent of an upsampling", "without a border"],
)
def test_nan_in_gradients_spreads_as_by_lax(
    lhs_shape: Any, rhs_shape: Any, arguments: dict[str, Any], operand: int
) -> None:
    """Zeros between the elements of a dilated image are not multiplied at precision "highest"."""
    arguments = {"window_strides": (1, 1), "dimension_numbers": LAST[2]} | arguments
    ours, theirs = (
        functools.partial(conv, **arguments, precision="highest")
        for conv in (jaxconv.conv_general_dilated, lax.conv_general_dilated)
    )
    lhs, rhs = normal(*lhs_shape), normal(*rhs_shape, seed=1)
    operands = [lhs, rhs, normal(*jax.eval_shape(theirs, lhs, rhs).shape, seed=2)]
    middle = [size // 2 for size in operands[operand].shape]
    operands[operand][(*middle,)] = np.nan  # lax itself differs with its code path at the border

    def gradients(conv: Any) -> Any:
        lhs, rhs, cotangent = operands
        return jax.jit(lambda *args: jax.vjp(conv, *args)[1](cotangent))(lhs, rhs)

    for out, expected in zip(gradients(ours), gradients(theirs), strict=True):
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
