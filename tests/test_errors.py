"""Every refusal: its class, and a message with function, constraint, what was given and remedy."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import lax
from test_mistakes import MISTAKES

import jaxconv
from jaxconv import ALGORITHMS, UnsupportedConvError
from jaxconv.algorithms.base import apply
from jaxconv.bench import calibrate
from jaxconv.config import Config
from jaxconv.transforms import primitive


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


GOOD: dict[str, Any] = {
    "lhs": zeros(2, 4, 6, 6),
    "rhs": zeros(4, 4, 3, 3),
    "window_strides": (1, 1),
    "padding": ((1, 1), (1, 1)),
}


class Bad(NamedTuple):
    """What to change in GOOD so that it is refused, and how."""

    change: dict[str, Any]
    error: type[Exception]
    match: str


SPECS = ("lhs_spec", "rhs_spec", "out_spec")


def permuted(**specs: Any) -> dict[str, Any]:
    identity = dict.fromkeys(SPECS, (0, 1, 2, 3))
    return {"dimension_numbers": lax.ConvDimensionNumbers(**(identity | specs))}


def cast(dtype: Any, preferred: Any) -> dict[str, Any]:
    operands = {name: GOOD[name].astype(dtype) for name in ("lhs", "rhs")}
    return {**operands, "preferred_element_type": preferred}


RANK = r"the same rank .*, got lhs of shape \({}\) and rhs of shape \({}\); add the missing"
LOW_RANK = (
    r"a batch and a channel dimension, got lhs of shape \({0}\) and rhs of .*\({0}\); add them"
)
POSITIVE = "{} must be 2 positive integers, got {}; "
COUNT = "{} must be a positive integer, got {}; "
PAIRS = r"padding must be 'SAME', 'SAME_LOWER', 'VALID' or \(low, high\) pairs of integers, got {}"
PAIR_COUNT = r"one \(low, high\) pair for each of 2 spatial dimensions, got {}; "
CROPS = r"negative padding must not be larger .*, got padding \({}\) of 6 elements; crop less"
PREFERRED = "preferred_element_type must be as wide .*, got {} with {} operands; cast the operands"
STRINGS = r"dimension_numbers must be None, .* of length 4, got {}; "
PERMUTATION = "each spec of dimension_numbers must be a permutation of 0…3, got .*; name every"
EMPTY = r"at least one tap in each spatial dimension, got kernel shape \({}\); drop the convolution"
CHANNELS = r"the channels of {} \({}: 4\) must be {} times the input channels of {} \({}: {}\), got"
LAX_CHANNELS = CHANNELS.format(
    "lhs", "axis 1", r"feature_group_count \({}\)", "rhs", "axis 1", "{}"
)

BAD = {
    "rhs of lower rank": Bad({"rhs": zeros(4, 4, 3)}, TypeError, RANK.format(".*", "4, 4, 3")),
    "lhs of lower rank": Bad({"lhs": zeros(4, 4, 3)}, TypeError, RANK.format("4, 4, 3", ".*")),
    "rank 1": Bad(
        {"lhs": zeros(4), "rhs": zeros(4), "window_strides": (), "padding": ()},
        TypeError,
        LOW_RANK.format("4,"),
    ),
    "rank 0": Bad(
        {"lhs": zeros(), "rhs": zeros(), "window_strides": (), "padding": "VALID"},
        TypeError,
        LOW_RANK.format(""),
    ),
    "a list as lhs": Bad({"lhs": [[[[1.0]]]]}, TypeError, "lhs must be an array, got list; conv"),
    "a list as rhs": Bad({"rhs": [[[[1.0]]]]}, TypeError, "rhs must be an array, got list; conv"),
    "None as lhs": Bad({"lhs": None}, TypeError, "lhs must be an array, got NoneType; convert"),
    "a number as rhs": Bad({"rhs": 1.0}, TypeError, "rhs must be an array, got float; convert"),
    "channels": Bad({"rhs": zeros(4, 3, 3, 3)}, ValueError, LAX_CHANNELS.format(1, 3)),
    "feature groups and input channels": Bad(
        {"rhs": zeros(6, 1, 3, 3), "feature_group_count": 3}, ValueError, LAX_CHANNELS.format(3, 1)
    ),
    "feature groups and output channels": Bad(
        {"rhs": zeros(3, 2, 3, 3), "feature_group_count": 2},
        ValueError,
        "feature_group_count must divide the output channels of rhs, got 3 .* 2 groups; each",
    ),
    "batch groups and batch": Bad(
        {"rhs": zeros(3, 4, 3, 3), "batch_group_count": 3},
        ValueError,
        "batch_group_count must divide the batch of lhs, got a batch of 2 and 3 groups; each group",
    ),
    "batch groups and output channels": Bad(
        {"rhs": zeros(3, 4, 3, 3), "batch_group_count": 2},
        ValueError,
        "batch_group_count must divide the output channels of rhs, got 3 .* 2 groups; each",
    ),
    "both kinds of group": Bad(
        {"rhs": zeros(4, 2, 3, 3), "feature_group_count": 2, "batch_group_count": 2},
        ValueError,
        "at most one of feature_group_count and batch_group_count .* above 1, got 2 and 2; split",
    ),
    **{
        f"{name} {count!r}": Bad({name: count}, error, COUNT.format(name, re.escape(repr(count))))
        for name in ("feature_group_count", "batch_group_count")
        for count, error in (
            (0, ValueError),
            (-2, ValueError),
            (1.0, TypeError),
            ("1", TypeError),
            (None, TypeError),
        )
    },
    "padding of no kind": Bad(
        {"padding": "FULL"},
        ValueError,
        r"padding must be 'SAME', 'SAME_LOWER', 'VALID' or \(low, high\) pairs, got 'FULL'; use",
    ),
    "padding by a string and lhs_dilation": Bad(
        {"padding": "SAME", "lhs_dilation": (1, 2)},
        ValueError,
        r"explicit \(low, high\) pairs where lhs_dilation is above 1, got 'SAME'; give pairs",
    ),
    "too few pads": Bad({"padding": ((1, 1),)}, TypeError, PAIR_COUNT.format(r"\(\(1, 1\),\)")),
    "too many pads": Bad({"padding": ((1, 1),) * 3}, TypeError, PAIR_COUNT.format(r"\(.*\)")),
    "no pads": Bad({"padding": ()}, TypeError, PAIR_COUNT.format(r"\(\)")),
    "fractional pads": Bad({"padding": ((0.5, 1), (1, 1))}, ValueError, PAIRS.format(r"\(\(0.5")),
    "one pad": Bad({"padding": 1}, ValueError, PAIRS.format("1; give one pair")),
    "no padding": Bad({"padding": None}, ValueError, PAIRS.format("None; give one pair")),
    "single pads": Bad({"padding": (1, 1)}, ValueError, PAIRS.format(r"\(1, 1\); give one pair")),
    "triple pads": Bad({"padding": ((1, 1, 0),) * 2}, ValueError, PAIRS.format(r"\(\(1, 1, 0\)")),
    "a string each": Bad({"padding": ("SAME", "VALID")}, ValueError, PAIRS.format(r"\('SAME'")),
    "cropped from both sides": Bad(
        {"padding": ((-4, -3), (0, 0))}, ValueError, CROPS.format("-4, -3")
    ),
    "cropped from one side": Bad({"padding": ((0, 0), (0, -7))}, ValueError, CROPS.format("0, -7")),
    **{
        f"window_strides {given!r}": Bad(
            {"window_strides": given, "padding": "VALID"},
            error,
            POSITIVE.format("window_strides", re.escape(repr(given))),
        )
        for given, error in (
            ((1, 0), ValueError),
            ((-1, 1), ValueError),
            ((1,), ValueError),
            ((1, 1, 1), ValueError),
            ((1.0, 1.0), TypeError),
            ((1, 1.5), TypeError),
            ("11", TypeError),
            (1, TypeError),
            (None, TypeError),
        )
    },
    **{
        f"{name} {given!r}": Bad(
            {name: given}, TypeError, POSITIVE.format(name, re.escape(repr(given)))
        )
        for name in ("lhs_dilation", "rhs_dilation")
        for given in ((0, 1), (1, -1), (1,), (1, 1, 1), (2.0, 1), 2)
    },
    "dtypes": Bad(
        {"rhs": zeros(4, 4, 3, 3, dtype=np.float64)},
        TypeError,
        "lhs and rhs must have the same dtype, got float32 and float64; cast one of them with",
    ),
    "integers and floats": Bad(
        {"lhs": zeros(2, 4, 6, 6, dtype=np.int8)}, TypeError, "got int8 and float32; cast one"
    ),
    **{
        f"{dtype} to {preferred}": Bad(
            cast(dtype, preferred), TypeError, PREFERRED.format(preferred, dtype)
        )
        for dtype, preferred in (
            ("float32", "float16"),
            ("float32", "bfloat16"),
            ("float32", "int32"),
            ("float32", "complex64"),
            ("int32", "uint32"),
            ("int32", "int16"),
            ("int32", "float16"),
            ("int8", "complex64"),
            ("int8", "bool"),
            ("complex64", "float64"),
        )
    },
    **{
        f"dimension_numbers {given!r}": Bad(
            {"dimension_numbers": given}, TypeError, STRINGS.format(re.escape(repr(given)))
        )
        for given in (
            ("NCHW", "OIHW"),
            ("NCW", "OIW", "NCW"),
            ("NCHW", "OIHX", "NCHW"),
            ("XCHW", "OIHW", "NCHW"),
            ("NCHH", "OIHH", "NCHH"),
            ((0, 1, 2, 3),) * 3,
            "NCHW",
            3,
        )
    },
    "an axis twice": Bad(permuted(lhs_spec=(0, 1, 2, 2)), ValueError, PERMUTATION),
    "an output axis twice": Bad(permuted(out_spec=(0, 1, 2, 2)), ValueError, PERMUTATION),
    "a fifth axis": Bad(permuted(rhs_spec=(0, 1, 2, 4)), ValueError, PERMUTATION),
    "a negative axis": Bad(permuted(rhs_spec=(0, 1, 2, -1)), ValueError, PERMUTATION),
    "too few axes": Bad(permuted(**dict.fromkeys(SPECS, (0, 1, 2))), ValueError, PERMUTATION),
    "letters for axes": Bad(permuted(**dict.fromkeys(SPECS, "NCHW")), TypeError, PERMUTATION),
    "fractional axes": Bad(permuted(lhs_spec=(0.0, 1.0, 2.0, 3.0)), TypeError, PERMUTATION),
    "no axes": Bad(permuted(lhs_spec=None), TypeError, PERMUTATION),
    "no taps, SAME": Bad(
        {"rhs": zeros(4, 4, 0, 3), "padding": "SAME"}, ValueError, EMPTY.format("0, 3")
    ),
    "no taps": Bad({"rhs": zeros(4, 4, 3, 0)}, ValueError, EMPTY.format("3, 0")),
}

# What JAX itself refuses, in its own words, because it knows the choices.
JAX_SAYS = {
    "an unknown precision": Bad({"precision": "exact"}, ValueError, "Precision argument must be"),
    "three precisions": Bad({"precision": ("high",) * 3}, ValueError, "Precision argument must be"),
    "an unknown dtype": Bad({"preferred_element_type": "float31"}, TypeError, "float31"),
    "objects for a dtype": Bad({"preferred_element_type": object}, TypeError, "JAX only supports"),
}


# lax doesn't check ranks, lists and strides of 0 but trips over them; unknown padding strings are
# RuntimeErrors there, and ValueErrors here, as everywhere else in Python.
STUMBLES = (AttributeError, IndexError, RuntimeError, RuntimeWarning)


def checked(function: str, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    """Asserts that ``call`` raises ``error`` itself with a whole message that has ``match``.

    Between what was given and the remedy there may be the shapes of the operands.
    """
    match = match.replace("; ", "(?: for .* of shape .*)?; ")
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.type is error
    whole = rf"jaxconv\.{function}: .*, got .*; .*[^.]\."
    assert re.fullmatch(whole, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    change, error, match = BAD[name]
    function = jaxconv.conv_general_dilated
    checked(function.__name__, lambda: function(**GOOD | change), error, match)


@pytest.mark.parametrize("name", JAX_SAYS)
def test_passes_on_what_jax_refuses(name: str) -> None:
    change, error, match = JAX_SAYS[name]
    with pytest.raises(error, match=match):
        jaxconv.conv_general_dilated(**GOOD | change)


@pytest.mark.parametrize("name", [*BAD, *JAX_SAYS])
def test_lax_refuses_it_too(name: str) -> None:
    change, ours, _ = (BAD | JAX_SAYS)[name]
    function = jax.jit(lambda: lax.conv_general_dilated(**GOOD | change))
    try:
        traced = function.trace()
    except Exception as error:
        raised = error
    else:
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            traced.lower().compile()
        return
    assert isinstance(raised, (ours, *STUMBLES))


@pytest.mark.parametrize("change", [{}, {"padding": "SAME"}, {"padding": ((-3, -3), (0, -6))}])
def test_what_the_table_changes_is_good(change: dict[str, Any]) -> None:
    out = jaxconv.conv_general_dilated(**GOOD | change)
    assert out.shape == lax.conv_general_dilated(**GOOD | change).shape


def symbolic(algorithm: str) -> Any:
    (batch,) = jax.export.symbolic_shape("b")
    fun = jax.jit(lambda x: jaxconv.conv_general_dilated(**GOOD | {"lhs": x}, algorithm=algorithm))
    return jax.export.export(fun)(jax.ShapeDtypeStruct((batch, 4, 6, 6), np.float32))


X, W = zeros(2, 6, 6, 4), zeros(3, 3, 4, 5)
LAST = ("NHWC", "HWIO", "NHWC")
UNKNOWN = "algorithm must be 'auto' or one of naive, im2col, .*xla, got {}; {}"
OWN_CHANNELS = CHANNELS.format(
    "x", "the last axis", r"groups \({}\)", "w", "the last axis but one", "{}"
)
SHAPES = r"w must be \(kernel…, C / groups, O\) .*, got x of .* and w of shape \({}\); make the"
AXES = "{} must be an integer or 2 of them, one for each spatial dimension, got {}; give"
FIT = r"x must be \(…, C\) and w \(C, O\), got x of shape {} and w of shape {}; w "
MISFIT = (
    r"one size for each spatial dimension of x, .*, got .* of shape .* and kernel_shape .*; give {}"
)


class Refused(NamedTuple):
    function: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    error: type[Exception]
    match: str


def pads_of_transpose(padding: Any, **keywords: Any) -> tuple[Any, ...]:
    return "conv_transpose", (X, W, (2, 2), padding), keywords


REFUSED = {
    "unknown algorithm": Refused(
        "conv_general_dilated",
        (),
        GOOD | {"algorithm": "magic"},
        ValueError,
        UNKNOWN.format("'magic'", "use one of these"),
    ),
    "no algorithm": Refused(
        "conv_general_dilated",
        (),
        GOOD | {"algorithm": None},
        ValueError,
        UNKNOWN.format("None", ""),
    ),
    "algorithm that can't": Refused(
        "conv_general_dilated",
        (),
        GOOD | {"algorithm": "phase"},
        UnsupportedConvError,
        r"'phase' can't do this convolution \(lhs is not dilated.*\), got float32.*; use algorithm",
    ),
    # conv
    "conv of a list": Refused("conv", ([1.0], W), {}, TypeError, "x must be an array, got list; c"),
    "conv with one of two mesh axes": Refused(
        "conv",
        (X, W),
        {"spatial_axes": ("rows",)},
        ValueError,
        r"spatial_axes must be 2 mesh axes or None, one for each.*, got \('rows',\); give one for",
    ),
    "conv with mesh axes outside shard_map": Refused(
        "conv",
        (X, W),
        {"spatial_axes": ("rows", None)},
        ValueError,
        r"spatial_axes must name axes of the mesh of a jax\.shard_map around it, got .*'rows'",
    ),
    "conv with a list": Refused("conv", (X, [1.0]), {}, TypeError, "w must be an array, got list"),
    "conv of a spec": Refused(
        "conv", (jax.ShapeDtypeStruct(X.shape, X.dtype), W), {}, TypeError, "got ShapeDtypeStruct;"
    ),
    "conv of other rank": Refused(
        "conv", (X, zeros(3, 4, 5)), {}, TypeError, SHAPES.format("3, 4, 5")
    ),
    "conv with rank 1": Refused("conv", (X, zeros(3)), {}, TypeError, SHAPES.format("3,")),
    "conv causal in 2-D": Refused(
        "conv",
        (X, W),
        {"padding": "causal"},
        ValueError,
        r"'CAUSAL' is for one spatial dimension, got 2 of them; give \(low, high\) pairs",
    ),
    "conv stride of 0": Refused("conv", (X, W, 0), {}, ValueError, r"\bstrides must .*\(0, 0\); "),
    "conv dilation of 0": Refused(
        "conv", (X, W), {"dilation": 0}, TypeError, r"\bdilation must .*, got \(0, 0\); "
    ),
    "plan on no platform": Refused(
        "plan",
        (zeros(1, 8, 8, 3), zeros(3, 3, 3, 4)),
        {"platform": "CPU"},
        ValueError,
        "platform must be 'cpu', 'gpu' or 'tpu', got 'CPU'; perhaps 'cpu' is meant",
    ),
    "autotune no function": Refused(
        "autotune", (X,), {}, TypeError, "fn must be a function, got ndarray; pass the function it"
    ),
    "autotune arguments of no function": Refused(
        "autotune", (), {"x": X}, TypeError, "fn must be a function, got NoneType; pass the functio"
    ),
    "explain of no function": Refused(
        "explain", (X,), {}, TypeError, "fn must be a function, got ndarray; pass the function it"
    ),
    "explain on no platform": Refused(
        "explain", (jnp.sin,), {"platform": "CPU"}, ValueError, "platform must .* got 'CPU'; perh"
    ),
    "conv padding": Refused("conv", (X, W, 1, "FULL"), {}, ValueError, "or .* pairs, got 'FULL'; "),
    "conv pads": Refused("conv", (X, W, 1, 1.5), {}, ValueError, "pairs of integers, got 1.5; "),
    "conv crops": Refused("conv", (X, W, 1, -4), {}, ValueError, CROPS.format("-4, -4")),
    "conv strides": Refused(
        "conv", (X, W, (1,)), {}, ValueError, AXES.format("strides", r"\(1,\)")
    ),
    "conv stride": Refused("conv", (X, W, 1.5), {}, ValueError, AXES.format("strides", 1.5)),
    "conv stride 0": Refused("conv", (X, W, 0), {}, ValueError, r"strides must be .*, got \(0, 0"),
    "conv dilation": Refused(
        "conv", (X, W), {"dilation": (1, 1, 1)}, ValueError, AXES.format("dilation", r"\(1, 1, 1\)")
    ),
    "conv dilation 0": Refused(
        "conv", (X, W), {"dilation": 0}, TypeError, r"dilation must be .*, got \(0, 0\)"
    ),
    "conv groups": Refused("conv", (X, W), {"groups": 2}, ValueError, OWN_CHANNELS.format(2, 4)),
    "conv algorithm": Refused(
        "conv", (X, W), {"algorithm": "pointwise"}, UnsupportedConvError, "windows overlap.*, got"
    ),
    # conv_transpose
    "transpose of a list": Refused(
        "conv_transpose", ([1.0], W, (2, 2), "SAME"), {}, TypeError, "lhs must be an array, got li"
    ),
    "transpose of other rank": Refused(
        "conv_transpose",
        (X, zeros(3, 4, 5), (2,), "SAME"),
        {},
        TypeError,
        "lhs and rhs must have the same rank .*; add the missing",
    ),
    "transpose in 4-D": Refused(
        "conv_transpose",
        (zeros(1, 3, 3, 3, 3, 2), zeros(2, 2, 2, 2, 2, 2), (1,) * 4, "SAME"),
        {},
        ValueError,
        "dimension_numbers have a default for 0 to 3 spatial dimensions only, got .*; give them",
    ),
    "transpose by too few strides": Refused(
        "conv_transpose", (X, W, (2,), "SAME"), {}, TypeError, r"strides must be .*, got \(2,\)"
    ),
    "transpose by stride 0": Refused(
        "conv_transpose", (X, W, (0, 1), "SAME"), {}, TypeError, r"\bstrides must .*, got \(0, 1\)"
    ),
    "transpose by fractions": Refused(
        "conv_transpose", (X, W, (1.5, 1), "SAME"), {}, TypeError, r"\bstrides must .*got \(1.5, 1"
    ),
    "transpose, dilation": Refused(
        *pads_of_transpose("SAME", rhs_dilation=(2,)), TypeError, r"rhs_dilation .*, got \(2,\)"
    ),
    "transpose, one dilation": Refused(
        *pads_of_transpose("SAME", rhs_dilation=2), TypeError, "rhs_dilation must be .*, got 2; "
    ),
    "transpose, padding": Refused(*pads_of_transpose("FULL"), ValueError, "padding .* got 'FULL'"),
    "transpose, pads": Refused(*pads_of_transpose(1), ValueError, "pairs of integers, got 1; give"),
    "transpose, consistent padding": Refused(
        *pads_of_transpose("FULL", use_consistent_padding=True),
        ValueError,
        "padding must be 'SAME', 'VALID', .* pairs, got 'FULL'; use one",
    ),
    "transpose, too few consistent pads": Refused(
        *pads_of_transpose(((1, 1),), use_consistent_padding=True), TypeError, "padding must .* got"
    ),
    **{
        f"transpose, consistent {given}": Refused(
            *pads_of_transpose(given, use_consistent_padding=True), ValueError, "padding must .*got"
        )
        for given in (1, (1, 1), ((1, 1, 0),) * 2, ((0.5, 1),) * 2)
    },
    "transpose, dimension_numbers": Refused(
        *pads_of_transpose("SAME", dimension_numbers=("NHWC", "HWIX", "NHWC")),
        TypeError,
        STRINGS.format(".*HWIX.*"),
    ),
    "transpose, permutations": Refused(
        *pads_of_transpose("SAME", **permuted(rhs_spec=(0, 1, 2, 4))), ValueError, PERMUTATION
    ),
    "transpose, channels": Refused(
        "conv_transpose", (X, zeros(3, 3, 3, 5), (2, 2), "SAME"), {}, ValueError, "the channels of"
    ),
    "transpose, no taps": Refused(
        "conv_transpose", (X, zeros(0, 3, 4, 5), (2, 2), "SAME"), {}, ValueError, EMPTY.format(".*")
    ),
    "transpose, unknown algorithm": Refused(
        *pads_of_transpose("SAME", algorithm="shif"),
        ValueError,
        UNKNOWN.format("'shif'", "perhaps"),
    ),
    "transpose, algorithm": Refused(
        *pads_of_transpose("SAME", algorithm="pointwise"), UnsupportedConvError, "'pointwise' can't"
    ),
    # pointwise
    "pointwise of a list": Refused(
        "pointwise", ([1.0], zeros(4, 5)), {}, TypeError, "x must be an array, got list; convert"
    ),
    "pointwise with a list": Refused(
        "pointwise", (X, [1.0]), {}, TypeError, "w must be an array, got list; convert"
    ),
    "pointwise channels": Refused(
        "pointwise", (X, zeros(3, 5)), {}, TypeError, FIT.format(r"\(2, 6, 6, 4\)", r"\(3, 5\)")
    ),
    "pointwise kernel of rank 4": Refused(
        "pointwise", (X, zeros(1, 1, 4, 5)), {}, TypeError, FIT.format(".*", r"\(1, 1, 4, 5\)")
    ),
    "pointwise of a scalar": Refused(
        "pointwise", (zeros(), zeros(4, 5)), {}, TypeError, FIT.format(r"\(\)", ".*")
    ),
    "pointwise dtypes": Refused(
        "pointwise",
        (X, zeros(4, 5, dtype=np.float64)),
        {},
        TypeError,
        r"x and w must have the same dtype, got float32 and float64; .*, for example w\.astype\(x",
    ),
    "pointwise preferred_element_type": Refused(
        "pointwise",
        (X, zeros(4, 5)),
        {"preferred_element_type": np.float16},
        TypeError,
        PREFERRED.format("float16", "float32"),
    ),
    # im2col and col2im
    "im2col of a list": Refused("im2col", ([[1.0]], (1,)), {}, TypeError, "x must be an array, go"),
    "im2col of other rank": Refused("im2col", (X, (3,)), {}, ValueError, MISFIT.format("2 sizes")),
    "im2col of rank 1": Refused(
        "im2col", (zeros(6), (3,)), {}, ValueError, MISFIT.format("x an axis")
    ),
    **{
        f"im2col, kernel {given}": Refused(
            "im2col", (X, given), {}, TypeError, "kernel_shape must be .*, got"
        )
        for given in (3, (3.0, 3.0))
    },
    "im2col, negative taps": Refused(
        "im2col", (X, (-3, 3)), {}, ValueError, "kernel.* must .* got"
    ),
    "im2col, no taps": Refused("im2col", (X, (0, 3)), {}, ValueError, "got kernel_shape .0, 3.; "),
    "im2col, strides": Refused("im2col", (X, (3, 3), (1,)), {}, ValueError, "strides must be an"),
    "im2col, stride 0": Refused(
        "im2col", (X, (3, 3), 0), {}, ValueError, "strides must be 2 posit"
    ),
    "im2col, padding": Refused("im2col", (X, (3, 3), 1, "FULL"), {}, ValueError, "got 'FULL'; use"),
    "im2col causal in 2-D": Refused(
        "im2col", (X, (3, 3), 1, "CAUSAL"), {}, ValueError, "'CAUSAL' is for one spatial dimension"
    ),
    "im2col, dilation": Refused(
        "im2col", (X, (3, 3)), {"dilation": 1.5}, ValueError, AXES.format("dilation", 1.5)
    ),
    "col2im of a list": Refused(
        "col2im", ([1.0], X.shape, (3, 3)), {}, TypeError, "patches must be an array, got list; "
    ),
    "col2im of other patches": Refused(
        "col2im",
        (zeros(2, 4, 4, 35), X.shape, (3, 3)),
        {},
        ValueError,
        r"of x_shape \(2, 6, 6, 4\) must have the shape \(2, 4, 4, 36\), got .*\(2, 4, 4, 35\)",
    ),
    "col2im without its batch": Refused(
        "col2im",
        (zeros(1, 4, 4, 36), X.shape[1:], (3, 3)),
        {},
        ValueError,
        r"x_shape \(6, 6, 4\) must have the shape \(4, 4, 36\), got patches of .*\(1, 4, 4, 36",
    ),
    "col2im to other rank": Refused(
        "col2im", (zeros(2, 4, 4, 36), (6, 6), (3, 3)), {}, ValueError, MISFIT.format("x an axis")
    ),
    "col2im beyond int32": Refused(
        "col2im",
        (zeros(1, 2, 1), (1, 2**31 + 5, 1), (1,)),
        {"strides": 2**31},
        ValueError,
        "no axis may be longer than 2147483647, with its padding, got 2147483653; split the array",
    ),
    "accelerate what is no function": Refused(
        "accelerate",
        (3,),
        {},
        TypeError,
        "fn must be a function, got int; pass the function",
    ),
    "accelerate by an unknown algorithm": Refused(
        "accelerate",
        (zeros,),
        {"algorithm": "magic"},
        ValueError,
        UNKNOWN.format("'magic'", "use one of these"),
    ),
    "enable an unknown platform": Refused(
        "enable",
        (("cpu", "quantum"),),
        {},
        ValueError,
        r"platforms must be among 'cpu', 'gpu' and 'tpu', got \('cpu', 'quantum'\); use one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_refuse(name: str) -> None:
    function, arguments, keywords, error, match = REFUSED[name]
    checked(function, lambda: getattr(jaxconv, function)(*arguments, **keywords), error, match)


SYMBOLIC = "symbolic shapes are for algorithm 'auto' or 'xla', got 'im2col'; use one of these"


def test_symbolic_shapes_are_for_xla() -> None:
    checked(
        "conv_general_dilated", lambda: symbolic("im2col"), UnsupportedConvError, f"{SYMBOLIC}\\."
    )
    assert symbolic("xla").out_avals[0].shape[1:] == (4, 6, 6)


def explain_symbolic() -> None:
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 4, 6, 6), np.float32)
    jaxconv.explain(lambda x: jaxconv.conv_general_dilated(**GOOD | {"lhs": x}), x)


def test_explain_refuses_symbolic_shapes() -> None:
    match = r"shapes must be numbers, got \(b, 4, 6, 6\) and .*; give the sizes"
    checked("explain", explain_symbolic, ValueError, match)


def explain_malformed() -> None:
    lhs, rhs = GOOD["lhs"], GOOD["rhs"]
    jaxconv.explain(lambda x: lax.conv_general_dilated(x, rhs, (0, 1), "VALID"), lhs)


@pytest.mark.filterwarnings("ignore:divide by zero")  # lax's own rule of shape
def test_explain_refuses_what_lax_cannot_compile() -> None:
    match = r"convolutions must have taps, positive strides .* by float32\[4,4,3,3\], window_strid"
    checked("explain", explain_malformed, ValueError, match)


def bad_settings() -> dict[str, Callable[[], Any]]:
    """By what the message says."""
    return {
        "config.update: name must be one of workspace_limit, .*, got 'limits'; use one of these": (
            lambda: jaxconv.config.update("limits", 1)
        ),
        "config.set: each name must be one of .*, got 'cachedir'; perhaps 'cache_dir' is meant": (
            lambda: jaxconv.config.set(cachedir="cache").__enter__()
        ),
        "config.update: workspace_limit must be a number of bytes .*, got 'lots'; pass one": (
            lambda: jaxconv.config.update("workspace_limit", "lots")
        ),
        "the environment variable JAXCONV_USE_CACHE must be a boolean .*, got 'lots'; pass one": (
            lambda: Config({"JAXCONV_USE_CACHE": "lots"}).use_cache
        ),
    }


@pytest.mark.parametrize("match", bad_settings())
def test_settings_refuse(match: str) -> None:
    checked(r"config(\.\w+)?", bad_settings()[match], ValueError, match)


def tune_without_predictions() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "package_machines", lambda: [])
        calibrate.tune(1)


def test_tune_refuses_platforms_without_predictions() -> None:
    match = r"a platform with measured predictions, the CPU, got \w+; use jaxconv.autotune, .*"
    checked("tune", tune_without_predictions, ValueError, match)


def autotune_nothing() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(primitive, "_planned_here", {})
        jaxconv.autotune()


def test_autotune_refuses_where_nothing_was_planned() -> None:
    match = r"without fn, jaxconv must have planned .*, got none on \w+; run the program first, or "
    checked("autotune", autotune_nothing, ValueError, match)


def in_several_processes(measure: Callable[[], Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        measure()


MEASURE = {
    "autotune": lambda: in_several_processes(jaxconv.autotune),
    "tune": lambda: in_several_processes(calibrate.tune),
}


@pytest.mark.parametrize("function", MEASURE)
def test_several_processes_measure_nothing(function: str) -> None:
    match = r"measurements are for .* one process, .*, got 2 processes; leave the call out there"
    checked(function, MEASURE[function], ValueError, match)


def apply_unsupported() -> None:
    spec = CASES["3x3"].spec()
    lhs, rhs = map(jnp.asarray, CASES["3x3"].operands())
    apply(ALGORITHMS["phase"], lhs, rhs, spec, lambda lhs, rhs, part: lhs)


APPLY = "jaxconv: algorithm 'phase' can't do float64.*: lhs is not dilated.*; algorithm='auto' ta"


def test_apply_refuses_what_the_algorithm_does_not_support() -> None:
    with pytest.raises(UnsupportedConvError, match=APPLY):
        apply_unsupported()


def conv_of_parts() -> None:
    """Two devices for five rows of output."""

    def part(x: jax.Array) -> jax.Array:
        return jaxconv.conv(x, np.ones((3, 3, 1, 1)), 2, "VALID", spatial_axes=("rows", None))

    jax.vmap(part, axis_name="rows")(np.ones((2, 1, 6, 12, 1)))


def test_devices_must_divide_the_output() -> None:
    message = (
        r"jaxconv\.conv: the devices along spatial_axes\[0\] must divide the output's size, got 2"
        r" devices and an output of \(5, 5\) for an image of \[12, 12\]; pad the image"
    )
    with pytest.raises(ValueError, match=message):
        conv_of_parts()


def test_unsupported_conv_error_is_a_value_error() -> None:
    assert issubclass(UnsupportedConvError, ValueError)


def test_refuses_while_tracing() -> None:
    """Under jit, grad and vmap the same error comes out, and at tracing time."""
    w = jnp.zeros((3, 3, 3, 5), np.float32)

    def total(x: jax.Array) -> jax.Array:
        return jaxconv.conv(x, w).sum()

    for transformed in (jax.jit(total), jax.grad(total)):
        with pytest.raises(ValueError, match=r"jaxconv\.conv: the channels of x "):
            transformed(jnp.asarray(X))
    with pytest.raises(ValueError, match=r"jaxconv\.conv: the channels of x "):
        jax.vmap(total)(jnp.asarray(X))


MODULES = (
    "arguments.parse",
    "arguments.channels_last",
    "arguments.errors",
    "arguments.padding",
    "config",
    "patches",
    "algorithms.base",
    "planning.choose",
    "planning.plan",
    "transforms.enable",
    "transforms.jaxprs",
    "tools.autotune",
    "tools.explain",
    "api",
)


def sites(path: Path) -> set[range]:
    """The lines of each ``raise`` and ``fail(…)``; not of ``raise`` alone, and not of ``fail``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        is_fail = isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "fail",
            "call.fail",
            "fail_padding",
        )
        raised = node.exc if isinstance(node, ast.Raise) else None
        is_raise = isinstance(raised, ast.Call) and ast.unparse(raised.func) != "error"
        if is_fail or is_raise:
            found.add(range(node.lineno, node.end_lineno + 1))
    return found


def raised(call: Callable[[], Any]) -> set[tuple[str, int]]:
    """File and line of every frame that an error comes through."""
    try:
        call()
    except Exception as error:
        lines, traceback = set(), error.__traceback__
        while traceback is not None:
            lines.add((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
            traceback = traceback.tb_next
        return lines
    return set()


def test_every_refusal_has_a_test() -> None:
    calls: list[Callable[[], Any]] = [
        lambda bad=bad: jaxconv.conv_general_dilated(**GOOD | bad.change) for bad in BAD.values()
    ]
    calls += [
        lambda row=row: getattr(jaxconv, row.function)(*row.arguments, **row.keywords)
        for row in REFUSED.values()
    ]
    calls += [lambda: symbolic("im2col"), explain_symbolic, explain_malformed, apply_unsupported]
    calls += [conv_of_parts]
    calls += [tune_without_predictions, autotune_nothing, *MEASURE.values()]
    calls += bad_settings().values()
    calls += MISTAKES.values()
    tested = set().union(*map(raised, calls))
    root = Path(jaxconv.__file__).parent
    missing = []
    for module in MODULES:
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        for lines in sites(path):
            if not any((str(path), line) in tested for line in lines):
                missing.append(f"{module}:{lines.start}")
    assert not missing, f"no row of this file's tables reaches {missing}"
