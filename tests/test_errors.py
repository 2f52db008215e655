"""Every refusal: its class, and a message with function, constraint, what was given and remedy."""

import ast
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import lax
from test_mistakes import MISTAKES, at

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


RANK = r"the same rank .*, got lhs of shape \({}\) and rhs of shape \({}\); "
LOW_RANK = r"a batch and a channel dimension, got lhs of shape \({0}\) and rhs of .*\({0}\); add "
POSITIVE = "{} must be 2 positive integers, got {}; "
COUNT = "{} must be a positive integer, got {}; "
PAIRS = r"padding must be 'SAME', 'SAME_LOWER', 'VALID' or \(low, high\) pairs of integers, got {}"
PAIR_COUNT = r"one \(low, high\) pair for each of 2 spatial dimensions, got {}; "
CROPS = r"negative padding must not be larger .*, got padding \({}\) of 6 elements; crop less"
PREFERRED = "preferred_element_type must be as wide .*, got {} with {} operands; cast the operands"
STRINGS = r"dimension_numbers must be None, .* of length 4 such as .*, got {}; "
PERMUTATION = "each spec of dimension_numbers must be a permutation of 0…3, got .*; name every"
EMPTY = r"at least one tap in each spatial dimension, got kernel shape \({}\); drop the convolution"
CHANNELS = r"the channels of {} \({}: 4\) must be {} times the input channels of {} \({}: {}\), got"
LAX_CHANNELS = CHANNELS.format(
    "lhs", "axis 1", r"feature_group_count \({}\)", "rhs", "axis 1", "{}"
)

BAD = {
    "rhs of lower rank": Bad(
        {"rhs": zeros(4, 4, 3)}, TypeError, RANK.format(".*", "4, 4, 3") + "make the leading"
    ),
    "lhs of lower rank": Bad(
        {"lhs": zeros(4, 4, 3)},
        TypeError,
        RANK.format("4, 4, 3", ".*") + r"lhs has no batch: pass lhs\[None\]",
    ),
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
        "feature_group_count must divide the output channels of rhs, got 3 in 2 groups; use a",
    ),
    "batch groups and batch": Bad(
        {"rhs": zeros(3, 4, 3, 3), "batch_group_count": 3},
        ValueError,
        "batch_group_count must divide the batch of lhs, got 2 in 3 groups; use a multiple of 3",
    ),
    "batch groups and output channels": Bad(
        {"rhs": zeros(3, 4, 3, 3), "batch_group_count": 2},
        ValueError,
        "batch_group_count must divide the output channels of rhs, got 3 in 2 groups; use a multi",
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
        r"explicit \(low, high\) pairs where lhs_dilation is above 1, got 'SAME'; pass pairs",
    ),
    "too few pads": Bad({"padding": ((1, 1),)}, TypeError, PAIR_COUNT.format(r"\(\(1, 1\),\)")),
    "too many pads": Bad({"padding": ((1, 1),) * 3}, TypeError, PAIR_COUNT.format(r"\(.*\)")),
    "no pads": Bad({"padding": ()}, TypeError, PAIR_COUNT.format(r"\(\)")),
    "fractional pads": Bad({"padding": ((0.5, 1), (1, 1))}, ValueError, PAIRS.format(r"\(\(0.5")),
    "one pad": Bad({"padding": 1}, ValueError, PAIRS.format("1; pass one pair")),
    "no padding": Bad({"padding": None}, ValueError, PAIRS.format("None; use 'VALID' for none")),
    "single pads": Bad({"padding": (1, 1)}, ValueError, PAIRS.format(r"\(1, 1\); pass one pair")),
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
    **{
        f"precision {given!r}": Bad(
            {"precision": given}, ValueError, f"precision must be .*, got {re.escape(repr(given))}"
        )
        for given in ("exact", ("high",) * 3, 3)
    },
    **{
        f"preferred_element_type {given!r}": Bad(
            {"preferred_element_type": given}, TypeError, "must be a dtype of numbers, got"
        )
        for given in ("float31", object, 3)
    },
    "an image and a filter": Bad(
        {"lhs": zeros(8, 8), "rhs": zeros(3, 3)},
        ValueError,
        r"must have batch and channels .*, got window_strides \(1, 1\); add the two axes, lhs\[",
    ),
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

# lax doesn't check ranks, lists and strides of 0 but trips over them; unknown padding strings are
# RuntimeErrors there, and ValueErrors here, as everywhere else in Python.
STUMBLES = (AttributeError, IndexError, RuntimeError, RuntimeWarning)


def checked(name: str, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    """Asserts that ``call`` raises ``error`` itself with a whole message that has ``match``.

    Between what was passed and the remedy there may be the shapes of the operands.
    """
    match = match.replace("; ", "(?: for .* of shape .*)?; ")
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.type is error
    whole = rf"jaxconv\.{name}: .*, got .*; .*([^.?]\.|\?)"
    assert re.fullmatch(whole, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    change, error, match = BAD[name]
    call = partial(jaxconv.conv_general_dilated, **GOOD | change)
    checked("conv_general_dilated", call, error, match)


@pytest.mark.parametrize("name", BAD)
def test_lax_refuses_it_too(name: str) -> None:
    change, ours, _ = BAD[name]
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
TRANSPOSE = "conv_transpose", X, W, (2, 2)
CONSISTENT = {"use_consistent_padding": True}
# A number for each axis, by what is wrong with it.
NUMBERS = {
    0: (ValueError, "got 0; use 1"),
    (0, 1): (ValueError, r"got \(0, 1\); use 1"),
    (1,): (ValueError, r"got \(1,\); pass one for each spatial dimension: \(1, 1\)"),
    (1, 1, 1): (ValueError, r"got \(1, 1, 1\); pass one for each spatial dimension, or add"),
    1.5: (TypeError, "got 1.5; pass static Python integers; under jax.jit, name the argument in"),
    (1.5, 1): (TypeError, r"got \(1.5, 1\); pass static"),
}
# Calls, and what their messages match; those that test_mistakes has word for word are not here.
REFUSED = {
    **{
        f"{name}, {argument} {given!r}": at(name, X, operand, **{argument: given})(
            error, f"{argument} must be a positive integer or 2 of them, {match}"
        )
        for name, operand in (("conv", W), ("im2col", (3, 3)))
        for argument in ("strides", "dilation")
        for given, (error, match) in NUMBERS.items()
    },
    **{
        f"conv_transpose, {argument} {given!r}": at(
            "conv_transpose", X, W, **{"strides": (2, 2), "padding": "SAME", argument: given}
        )(TypeError, f"{argument} must be 2 positive integers, got {re.escape(repr(given))}; ")
        for argument in ("strides", "rhs_dilation")
        for given in (*NUMBERS, 2)
    },
    **{
        f"conv_transpose, padding {padding!r} {kwargs}": at(*TRANSPOSE, padding, **kwargs)(
            error, f"padding must .*, got {re.escape(repr(padding))}; {remedy}"
        )
        for kwargs in ({}, CONSISTENT)
        for padding, error, remedy in (
            ("FULL", ValueError, "use one of these"),
            ("CAUSAL", ValueError, "use one of these"),
            (1, ValueError, r"pass one pair for each spatial dimension: \(\(1, 1\), \(1, 1\)\)"),
            ((1, 1), ValueError, "pass one pair for each spatial dimension: "),
            (((1, 1, 0),) * 2, ValueError, "pass one pair for each spatial dimension"),
            (((0.5, 1),) * 2, ValueError, "pass one pair for each spatial dimension"),
            (((1, 1),), TypeError, "pass one for each spatial dimension: "),
        )
    },
    **{
        f"a list, {name} {place}": at(name, *args)(
            TypeError, f"{operand} must be an array, got list; convert it with jnp.asarray"
        )
        for name, place, operand, args in (
            ("conv", 0, "x", ([1.0], W)),
            ("conv", 1, "w", (X, [1.0])),
            ("conv_transpose", 0, "lhs", ([1.0], W, (2, 2), "SAME")),
            ("conv_transpose", 1, "rhs", (X, [1.0], (2, 2), "SAME")),
            ("pointwise", 0, "x", ([1.0], zeros(4, 5))),
            ("pointwise", 1, "w", (X, [1.0])),
            ("im2col", 0, "x", ([[1.0]], (1,))),
            ("col2im", 0, "patches", ([1.0], X.shape, (3, 3))),
        )
    },
    **{
        f"{algorithm!r}, {name}": at(name, *args, algorithm=algorithm)(
            ValueError, UNKNOWN.format(re.escape(repr(algorithm)), remedy)
        )
        for algorithm, remedy in {
            "magic": "use one of these",
            "shif": "did you mean 'shift'",
            None: "use one of these",
            ALGORITHMS["fft"]: "did you mean 'fft'",
        }.items()
        for name, *args in (
            ("conv_general_dilated", *GOOD.values()),
            ("conv", X, W),
            (*TRANSPOSE, "SAME"),
            ("accelerate", zeros),
        )
    },
    "conv_general_dilated by phase": at("conv_general_dilated", *GOOD.values(), algorithm="phase")(
        UnsupportedConvError,
        r"'phase' can't do this convolution \(lhs is not dilated.*\), got float32.*; use algorithm",
    ),
    "conv_transpose by pointwise": at(*TRANSPOSE, "SAME", algorithm="pointwise")(
        UnsupportedConvError, "'pointwise' can't do this convolution .*, got float32"
    ),
    "conv of a spec": at("conv", jax.ShapeDtypeStruct(X.shape, X.dtype), W)(
        TypeError, "got ShapeDtypeStruct; convert it with jnp.asarray; shapes are for jaxconv.plan"
    ),
    "mesh axes outside shard_map": at("conv", X, W, spatial_axes=("rows", None))(
        ValueError,
        r"spatial_axes must name axes of the mesh of a jax\.shard_map around it, got .*'rows'",
    ),
    **{
        f"{name}, causal in 2-D": at(name, X, operand, padding="causal")(
            ValueError,
            r"'CAUSAL' is for one spatial dimension, got 2 of them; pass \(low, high\) pairs",
        )
        for name, operand in (("conv", W), ("im2col", (3, 3)))
    },
    "conv pads": at("conv", X, W, 1, 1.5)(ValueError, "pairs of integers, got 1.5; pass one pair"),
    "conv groups": at("conv", X, W, groups=2)(ValueError, OWN_CHANNELS.format(2, 4)),
    "conv_transpose of other rank": at("conv_transpose", X, zeros(3, 4, 5), (2,), "SAME")(
        TypeError, "lhs and rhs must have the same rank .*; make the leading axes of lhs one batch"
    ),
    "conv_transpose, letters": at(*TRANSPOSE, "SAME", None, ("NHWC", "HWIX", "NHWC"))(
        TypeError, STRINGS.format(".*HWIX.*") + "name 'N' and 'C', in the"
    ),
    "conv_transpose, permutations": at(*TRANSPOSE, "SAME", **permuted(rhs_spec=(0, 1, 2, 4)))(
        ValueError, PERMUTATION
    ),
    "conv_transpose, no taps": at("conv_transpose", X, zeros(0, 3, 4, 5), (2, 2), "SAME")(
        ValueError, EMPTY.format(".*")
    ),
    "pointwise of a scalar": at("pointwise", zeros(), zeros(4, 5))(
        TypeError,
        r"x must be \(…, C\) and w \(C, O\), got x of shape \(\) and w of shape .*; w need",
    ),
    "pointwise dtypes": at("pointwise", X, zeros(4, 5, dtype=np.float64))(
        TypeError, r"the same dtype, got float32 and float64; .*, for example w\.astype\(x"
    ),
    "pointwise preferred_element_type": at(
        "pointwise", X, zeros(4, 5), preferred_element_type=np.float16
    )(TypeError, PREFERRED.format("float16", "float32")),
    "im2col of rank 1": at("im2col", zeros(6), (3,))(
        ValueError, r"one size .*, got .*; add a channel axis, x\[\.\.\., None\], or pass fewer"
    ),
    "im2col, fractional taps": at("im2col", X, (3.0, 3.0))(
        TypeError, r"kernel_shape must be a sequence of integers, got \(3.0, 3.0\); pass one size"
    ),
    "col2im without its batch": at("col2im", zeros(1, 4, 4, 36), X.shape[1:], (3, 3))(
        ValueError,
        r"x_shape \(6, 6, 4\) must have the shape \(4, 4, 36\), got patches of .*\(1, 4, 4, 36",
    ),
    "col2im beyond int32": at("col2im", zeros(1, 2, 1), (1, 2**31 + 5, 1), (1,), strides=2**31)(
        ValueError,
        "no axis may be longer than 2147483647, with its padding, got 2147483653; split the array",
    ),
    "autotune no function": at("autotune", X)(TypeError, "fn must be a function, got ndarray; "),
    "autotune arguments only": at("autotune", x=X)(TypeError, "fn must be a function, got None"),
    "explain on no platform": at("explain", jnp.sin, platform="CPU")(
        ValueError, "platform must .* got 'CPU'; did you mean 'cpu'"
    ),
    "plan on no platform": at("plan", X, W, platform="CPU")(
        ValueError, "platform must be 'cpu', 'gpu' or 'tpu', got 'CPU'; did you mean 'cpu'"
    ),
    "enable an unknown platform": at("enable", ("cpu", "quantum"))(
        ValueError,
        r"platforms must be among 'cpu', 'gpu' and 'tpu', got \('cpu', 'quantum'\); use one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_refuse(name: str) -> None:
    row = REFUSED[name]
    checked(row.name, row, row.error, row.message)


def explain_symbolic() -> None:
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 4, 6, 6), np.float32)
    jaxconv.explain(lambda x: jaxconv.conv_general_dilated(**GOOD | {"lhs": x}), x)


def explain_malformed() -> None:
    lhs, rhs = GOOD["lhs"], GOOD["rhs"]
    jaxconv.explain(lambda x: lax.conv_general_dilated(x, rhs, (0, 1), "VALID"), lhs)


def where(target: Any, name: str, value: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` while an attribute has this value."""

    def patched() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            call()

    return patched


def conv_of_parts() -> None:
    """Two devices for five rows of output."""

    def part(x: jax.Array) -> jax.Array:
        return jaxconv.conv(x, np.ones((3, 3, 1, 1)), 2, "VALID", spatial_axes=("rows", None))

    jax.vmap(part, axis_name="rows")(np.ones((2, 1, 6, 12, 1)))


ONE_PROCESS = r"measurements are for .* one process, .*, got 2 processes; omit the call there"
# By the function and what the message says.
OTHERS: dict[tuple[str, str], Callable[[], Any]] = {
    ("explain", r"sizes that are numbers, .*, got float32\[b,4,6,6\] by .*; pass the sizes"): (
        explain_symbolic
    ),
    ("explain", r"positive strides .* by float32\[4,4,3,3\] with .*'window_strides': \(0, 1\)"): (
        explain_malformed
    ),
    (
        "tune",
        r"a platform with measured predictions, the CPU, got \w+; use jaxconv.autotune, .*",
    ): where(calibrate, "package_machines", lambda: [], lambda: calibrate.tune(1)),
    (
        "autotune",
        r"without fn, jaxconv must have planned .*, got none on \w+; run the program first, or ",
    ): where(primitive, "_planned_here", deque(), jaxconv.autotune),
    ("autotune", ONE_PROCESS): where(jax, "process_count", lambda: 2, jaxconv.autotune),
    ("tune", ONE_PROCESS): where(jax, "process_count", lambda: 2, calibrate.tune),
    (
        "conv",
        r"the devices along spatial_axes\[0\] must divide the output's size, got 2 devices and an"
        r" output of \(5, 5\) for an image of \[12, 12\]; pad the image",
    ): conv_of_parts,
    (
        "config.update",
        "name must be one of workspace_limit, .*, got 'limits'; use one of these",
    ): lambda: jaxconv.config.update("limits", 1),
    ("config.set", "name must be one of .*, got 'cachedir'; did you mean 'cache_dir'"): (
        lambda: jaxconv.config.set(cachedir="cache").__enter__()
    ),
    ("config.update", r"workspace_limit must be a number of bytes .*, got 'lots'; \w+ one"): (
        lambda: jaxconv.config.update("workspace_limit", "lots")
    ),
    (
        "config",
        r"the environment variable JAXCONV_USE_CACHE must be a boolean .*, got 'lots'; \w+ one",
    ): lambda: Config({"JAXCONV_USE_CACHE": "lots"}).use_cache,
}


@pytest.mark.filterwarnings("ignore:divide by zero")  # lax's own rule of shape
@pytest.mark.parametrize(("function", "match"), OTHERS)
def test_refusals_in_special_places(function: str, match: str) -> None:
    checked(function, OTHERS[function, match], ValueError, match)


SYMBOLIC = "symbolic shapes are for algorithm 'auto' or 'xla', got 'im2col'; use one of these"


def test_symbolic_shapes_are_for_xla() -> None:
    checked(
        "conv_general_dilated", lambda: symbolic("im2col"), UnsupportedConvError, f"{SYMBOLIC}\\."
    )
    assert symbolic("xla").out_avals[0].shape[1:] == (4, 6, 6)


def apply_unsupported() -> None:
    spec = CASES["3x3"].spec()
    lhs, rhs = map(jnp.asarray, CASES["3x3"].operands())
    apply(ALGORITHMS["phase"], lhs, rhs, spec, lambda lhs, rhs, part: lhs)


APPLY = "jaxconv: algorithm 'phase' can't do float64.*: lhs is not dilated.*; algorithm='auto' ta"


def test_apply_refuses_what_the_algorithm_does_not_support() -> None:
    with pytest.raises(UnsupportedConvError, match=APPLY):
        apply_unsupported()


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


# Whose errors have tests of their own.
ELSEWHERE = ("bench", "cli.py")


def sites(path: Path) -> set[range]:
    """The lines of each call that refuses: ``fail(…)`` and ``raise UnsupportedConvError(…)``."""
    names = ("fail", "call.fail", "fail_padding", "UnsupportedConvError")
    return {
        range(node.lineno, (node.end_lineno or 0) + 1)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    }


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
        partial(jaxconv.conv_general_dilated, **GOOD | bad.change) for bad in BAD.values()
    ]
    calls += [*REFUSED.values(), *OTHERS.values(), *MISTAKES.values()]
    calls += [lambda: symbolic("im2col"), apply_unsupported]
    tested = set().union(*map(raised, calls))
    root = Path(jaxconv.__file__).parent
    missing = [
        f"{path.relative_to(root)}:{lines.start}"
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in ELSEWHERE
        for lines in sites(path)
        if not any((str(path), line) in tested for line in lines)
    ]
    assert not missing, f"no row of this file's tables reaches {missing}"
