"""Every refusal: its class, and a message with function, constraint, what was given and remedy."""

import ast
import re
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import lax
from test_mistakes import LAST, MISTAKES, Mistake
from test_mistakes import kernel as zeros

import jaxconv
from jaxconv import ALGORITHMS, UnsupportedConvError
from jaxconv.algorithms.base import apply
from jaxconv.bench import calibrate
from jaxconv.transforms import primitive

GOOD: dict[str, Any] = {
    "lhs": zeros(2, 4, 6, 6),
    "rhs": zeros(4, 4, 3, 3),
    "window_strides": (1, 1),
    "padding": ((1, 1), (1, 1)),
}


def at(name: str, *args: Any, **kwargs: Any) -> Callable[[type[Exception], str], Mistake]:
    return lambda error, message: Mistake(name, args, kwargs, error, message)


def type_error(name: str, *args: Any, **kwargs: Any) -> Callable[[str], Mistake]:
    return partial(at(name, *args, **kwargs), TypeError)


def value_error(name: str, *args: Any, **kwargs: Any) -> Callable[[str], Mistake]:
    return partial(at(name, *args, **kwargs), ValueError)


def at_lax(error: type[Exception], match: str, **change: Any) -> Mistake:
    return at("conv_general_dilated", **GOOD | change)(error, match)


value, kind = partial(at_lax, ValueError), partial(at_lax, TypeError)


def numbered(**specs: Any) -> lax.ConvDimensionNumbers:
    return lax.ConvDimensionNumbers(**dict.fromkeys(SPECS, (0, 1, 2, 3)) | specs)


def too_narrow(dtype: str, preferred: str) -> Mistake:
    operands = {name: GOOD[name].astype(dtype) for name in ("lhs", "rhs")}
    return kind(PREFERRED.format(preferred, dtype), **operands, preferred_element_type=preferred)


def given(error: type[Exception], text: str, value: Any, *names: str, **more: Any) -> list[Mistake]:
    """Rows of one value for each of these arguments."""
    return [
        at_lax(error, text.format(name, re.escape(repr(value))), **{name: value, **more})
        for name in names
    ]


SPECS = ("lhs_spec", "rhs_spec", "out_spec")
POSITIVE = "{} must be 2 positive integers, got {}; "
COUNT = "{} must be a positive integer, got {}; "
PAIRS = r"padding must be 'SAME', 'SAME_LOWER', 'VALID' or \(low, high\) pairs of integers, got {}"
CROPS = r"negative padding must not be larger .*, got padding \({}\) of 6 elements; crop less"
PREFERRED = "preferred_element_type must be as wide .*, got {} with {} operands; cast the operands"
PERMUTATION = "each spec of dimension_numbers must be a permutation of 0…3, got .*; name every"
EMPTY = r"at least one tap in each spatial dimension, got kernel shape \({}\); drop the convolution"
DIVIDE = "batch_group_count must divide the {}, got {} groups; use a multiple of "
SCALARS = {"window_strides": (), "padding": "VALID"}

BAD = [
    # Operands
    kind(r"a channel dimension, got .* of .*\(\); add ", lhs=zeros(), rhs=zeros(), **SCALARS),
    kind("lhs must be an array, got list; conv", lhs=[[[[1.0]]]]),
    kind("rhs must be an array, got list; conv", rhs=[[[[1.0]]]]),
    kind("lhs must be an array, got NoneType; convert", lhs=None),
    kind("rhs must be an array, got float; convert", rhs=1.0),
    value(EMPTY.format("0, 3"), rhs=zeros(4, 4, 0, 3), padding="SAME"),
    value(EMPTY.format("3, 0"), rhs=zeros(4, 4, 3, 0)),
    kind("lhs and rhs must .* got int8 and float32; cast one", lhs=zeros(2, 4, 6, 6, dtype="int8")),
    # Channels and groups
    value(DIVIDE.format("batch of lhs", "2 in 3"), rhs=zeros(3, 4, 3, 3), batch_group_count=3),
    value(DIVIDE.format("output .* of rhs", "3 in 2"), rhs=zeros(3, 4, 3, 3), batch_group_count=2),
    value(
        "at most one of feature_group_count and batch_group_count .* above 1, got 2 and 2; split",
        rhs=zeros(4, 2, 3, 3),
        feature_group_count=2,
        batch_group_count=2,
    ),
    *(
        row
        for error, counts in ((ValueError, (0, -2)), (TypeError, (1.0, "1", None)))
        for count in counts
        for row in given(error, COUNT, count, "feature_group_count", "batch_group_count")
    ),
    # Padding
    value(
        r"padding must be 'SAME', 'SAME_LOWER', 'VALID' or \(low, high\) pairs, got 'FULL'; use",
        padding="FULL",
    ),
    value(
        r"explicit \(low, high\) pairs where lhs_dilation is above 1, got 'SAME'; pass pairs",
        padding="SAME",
        lhs_dilation=(1, 2),
    ),
    kind(r"one \(low, high\) pair for each of 2 spatial dimensions, got \(\); ", padding=()),
    value(PAIRS.format(r"\(\(0.5"), padding=((0.5, 1), (1, 1))),
    value(PAIRS.format("1; pass one pair"), padding=1),
    value(PAIRS.format("None; use 'VALID' for none"), padding=None),
    value(PAIRS.format(r"\(1, 1\); pass one pair"), padding=(1, 1)),
    value(PAIRS.format(r"\(\(1, 1, 0\)"), padding=((1, 1, 0),) * 2),
    value(PAIRS.format(r"\('SAME'"), padding=("SAME", "VALID")),
    value(CROPS.format("-4, -3"), padding=((-4, -3), (0, 0))),
    value(CROPS.format("0, -7"), padding=((0, 0), (0, -7))),
    # Strides and dilation
    *(
        row
        for error, strides in (
            (ValueError, ((1, 0), (-1, 1), (1,), (1, 1, 1))),
            (TypeError, ((1.0, 1.0), (1, 1.5), "11", 1, None)),
        )
        for numbers in strides
        for row in given(error, POSITIVE, numbers, "window_strides", padding="VALID")
    ),
    *(
        row
        for numbers in ((0, 1), (1, -1), (1,), (1, 1, 1), (2.0, 1), 2)
        for row in given(TypeError, POSITIVE, numbers, "lhs_dilation", "rhs_dilation")
    ),
    # Dtypes of results, precisions
    too_narrow("float32", "float16"),
    too_narrow("float32", "bfloat16"),
    too_narrow("float32", "int32"),
    too_narrow("float32", "complex64"),
    too_narrow("int32", "uint32"),
    too_narrow("int32", "int16"),
    too_narrow("int32", "float16"),
    too_narrow("int8", "complex64"),
    too_narrow("int8", "bool"),
    too_narrow("complex64", "float64"),
    # Dimension numbers
    *(
        at_lax(error, PERMUTATION, dimension_numbers=numbered(**specs))
        for error, specs in (
            (ValueError, {"lhs_spec": (0, 1, 2, 2)}),
            (ValueError, {"out_spec": (0, 1, 2, 2)}),
            (ValueError, {"rhs_spec": (0, 1, 2, 4)}),
            (ValueError, {"rhs_spec": (0, 1, 2, -1)}),
            (ValueError, dict.fromkeys(SPECS, (0, 1, 2))),
            (TypeError, dict.fromkeys(SPECS, "NCHW")),
            (TypeError, {"lhs_spec": (0.0, 1.0, 2.0, 3.0)}),
            (TypeError, {"lhs_spec": None}),
        )
    ),
]
# Of test_mistakes, which has what they say word for word; those of conv as lax's function has them.
NAMES = {"groups": "feature_group_count"} | {n: n for n in ("precision", "preferred_element_type")}
OF_LAX = [
    row
    for row in MISTAKES.values()
    if row.name == "conv_general_dilated" and "out_sharding" not in row.kwargs
]
OF_CONV = [
    Mistake(row.name, (*row.args, (1, 1), "SAME", None, None, LAST), kwargs, row.error, row.message)
    for row in MISTAKES.values()
    if row.name == "conv" and NAMES.keys() >= row.kwargs.keys()
    if [getattr(operand, "ndim", 0) for operand in row.args] == [4, 4]
    for kwargs in [{NAMES[name]: value for name, value in row.kwargs.items()}]
]

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


@pytest.mark.parametrize("row", [*BAD, *OF_LAX, *OF_CONV], ids=str)
def test_lax_refuses_it_too(row: Mistake) -> None:
    function = jax.jit(lambda: lax.conv_general_dilated(*row.args, **row.kwargs))
    try:
        traced = function.trace()
    except Exception as error:
        raised = error
    else:
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            traced.lower().compile()
        return
    assert isinstance(raised, (row.error, *STUMBLES))


@pytest.mark.parametrize("change", [{}, {"padding": "SAME"}, {"padding": ((-3, -3), (0, -6))}])
def test_what_the_table_changes_is_good(change: dict[str, Any]) -> None:
    out = jaxconv.conv_general_dilated(**GOOD | change)
    assert out.shape == lax.conv_general_dilated(**GOOD | change).shape


SYMBOLIC = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4, 6, 6"), np.float32)


def symbolic(algorithm: str) -> Any:
    fun = jax.jit(lambda x: jaxconv.conv_general_dilated(**GOOD | {"lhs": x}, algorithm=algorithm))
    return jax.export.export(fun)(SYMBOLIC)


X, W = zeros(2, 6, 6, 4), zeros(3, 3, 4, 5)
UNKNOWN = "algorithm must be 'auto' or one of naive, im2col, .*xla, got {}; {}"
TRANSPOSE = "conv_transpose", X, W, (2, 2)
CONSISTENT = {"use_consistent_padding": True}
# Calls, and what their messages match; those that test_mistakes has word for word are not here.
REFUSED = [
    *(
        type_error(
            "conv_transpose", X, W, **{"strides": (2, 2), "padding": "SAME", argument: given}
        )(f"{argument} must be 2 positive integers, got {re.escape(repr(given))}; ")
        for argument in ("strides", "rhs_dilation")
        for given in (0, (0, 1), (1,), (1, 1, 1), 1.5, (1.5, 1), 2)
    ),
    *(
        at(*TRANSPOSE, padding, **kwargs)(
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
    ),
    *(
        type_error(name, *args)(
            f"{operand} must be an array, got list; convert it with jnp.asarray"
        )
        for name, operand, args in (
            ("conv", "x", ([1.0], W)),
            ("conv", "w", (X, [1.0])),
            ("conv_transpose", "lhs", ([1.0], W, (2, 2), "SAME")),
            ("conv_transpose", "rhs", (X, [1.0], (2, 2), "SAME")),
            ("pointwise", "x", ([1.0], zeros(4, 5))),
            ("pointwise", "w", (X, [1.0])),
            ("im2col", "x", ([[1.0]], (1,))),
            ("col2im", "patches", ([1.0], X.shape, (3, 3))),
            ("max_pool", "x", ([1.0], (2, 2))),
            ("avg_pool", "x", ([1.0], (2, 2))),
        )
    ),
    *(
        value_error(name, *args, algorithm=algorithm)(
            UNKNOWN.format(re.escape(repr(algorithm)), remedy)
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
    ),
    at("conv_general_dilated", *GOOD.values(), algorithm="phase")(
        UnsupportedConvError,
        r"'phase' can't do this convolution \(lhs is not dilated.*\), got float32.*; use algorithm",
    ),
    at(*TRANSPOSE, "SAME", algorithm="pointwise")(
        UnsupportedConvError, "'pointwise' can't do this convolution .*, got float32"
    ),
    type_error("conv", jax.ShapeDtypeStruct(X.shape, X.dtype), W)(
        "got ShapeDtypeStruct; convert it with jnp.asarray; shapes are for jaxconv.plan"
    ),
    value_error("conv", X, W, spatial_axes=("rows", None))(
        r"spatial_axes must name axes of the mesh of a jax\.shard_map around it, got .*'rows'"
    ),
    type_error("conv_transpose", X, zeros(3, 4, 5), (2,), "SAME")(
        "lhs and rhs must have the same rank .*; make the leading axes of lhs one batch"
    ),
    type_error(*TRANSPOSE, "SAME", None, ("NHWC", "HWIX", "NHWC"))(
        "dimension_numbers must be None, .* of length 4 .*, got .*HWIX.*; name 'N' and 'C', in the"
    ),
    value_error(*TRANSPOSE, "SAME", None, numbered(rhs_spec=(0, 1, 2, 4)))(PERMUTATION),
    value_error("conv_transpose", X, zeros(0, 3, 4, 5), (2, 2), "SAME")(EMPTY.format(".*")),
    type_error("pointwise", zeros(), zeros(4, 5))(
        r"x must be \(…, C\) and w \(C, O\), got x of shape \(\) and w of shape .*; w need"
    ),
    type_error("pointwise", X, zeros(4, 5), preferred_element_type=np.float16)(
        PREFERRED.format("float16", "float32")
    ),
    value_error("col2im", zeros(1, 4, 4, 36), X.shape[1:], (3, 3))(
        r"x_shape \(6, 6, 4\) must have the shape \(4, 4, 36\), got patches of .*\(1, 4, 4, 36"
    ),
    value_error("col2im", zeros(1, 2, 1), (1, 2**31 + 5, 1), (1,), strides=2**31)(
        "no axis may be longer than 2147483647, with its padding, got 2147483653; split the array"
    ),
    *(
        at(name, *args)(error, match)
        for name in ("max_pool", "avg_pool")
        for args, error, match in (
            ((X[0, 0], (2, 2)), TypeError, "x must have 2 spatial dimensions .*; add the missing"),
            ((X[0, 0], 2), TypeError, "x must have 1 spatial dimension and channels last"),
            ((X, ()), TypeError, "x must have 1 spatial dimension and channels last"),
            ((X, 0), ValueError, "window_shape must be a positive integer or 2 of them, got 0"),
            ((X, (2, 2), (1,)), ValueError, r"strides must .*, got \(1,\); pass one for each"),
            ((X, 2, 1, "FULL"), ValueError, "padding must be .*, got 'FULL'; use one of these"),
            ((X, 2, 1, "causal"), ValueError, "'CAUSAL' is for one spatial dimension"),
            ((X, 2, 1, ((1, 1),)), TypeError, r"one \(low, high\) pair for each of 2 spatial"),
        )
    ),
]


@pytest.mark.parametrize("row", [*BAD, *REFUSED], ids=str)
def test_refuses(row: Mistake) -> None:
    checked(row.name, row, row.error, row.message)


def where(target: Any, name: str, value: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` while an attribute has this value."""

    def patched() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            call()

    return patched


def conv_of_parts() -> None:
    """Two devices for five rows of output."""
    arguments = {"strides": 2, "padding": "VALID", "spatial_axes": ("rows", None)}
    part = partial(jaxconv.conv, w=zeros(3, 3, 1, 1), **arguments)
    jax.vmap(part, axis_name="rows")(zeros(2, 1, 6, 12, 1))


malformed = partial(lax.conv_general_dilated, window_strides=(0, 1), padding="VALID")
ONE_PROCESS = r"measurements are for .* one process, .*, got 2 processes; omit the call there"
# By the function and what the message says.
OTHERS: dict[tuple[str, str], Callable[[], Any]] = {
    ("explain", r"sizes that are numbers, .*, got float32\[b,4,6,6\] by .*; pass the sizes"): (
        lambda: jaxconv.explain(
            lambda x: jaxconv.conv_general_dilated(**GOOD | {"lhs": x}), SYMBOLIC
        )
    ),
    ("explain", r"positive strides .* by float32\[4,4,3,3\] with .*'window_strides': \(0, 1\)"): (
        partial(jaxconv.explain, malformed, GOOD["lhs"], GOOD["rhs"])
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
}


@pytest.mark.filterwarnings("ignore:divide by zero")  # lax's own rule of shape
@pytest.mark.parametrize(("function", "match"), OTHERS)
def test_refusals_in_special_places(function: str, match: str) -> None:
    checked(function, OTHERS[function, match], ValueError, match)


def test_symbolic_shapes_are_for_xla() -> None:
    match = "symbolic shapes are for algorithm 'auto' or 'xla', got 'im2col'; use one of these\\."
    checked("conv_general_dilated", partial(symbolic, "im2col"), UnsupportedConvError, match)
    assert symbolic("xla").out_avals[0].shape[1:] == (4, 6, 6)


def apply_unsupported() -> None:
    lhs, rhs = map(jnp.asarray, CASES["3x3"].operands())
    apply(ALGORITHMS["phase"], lhs, rhs, CASES["3x3"].spec(), lambda lhs, rhs, part: lhs)


def test_apply_refuses_what_the_algorithm_does_not_support() -> None:
    assert issubclass(UnsupportedConvError, ValueError)
    match = "jaxconv: algorithm 'phase' can't do float64.*: lhs is not dilated.*; algorithm='auto' "
    with pytest.raises(UnsupportedConvError, match=match):
        apply_unsupported()


def test_refuses_while_tracing() -> None:
    """Under jit, grad and vmap the same error comes out, and at tracing time."""

    def total(x: Any) -> jax.Array:
        return jaxconv.conv(x, zeros(3, 3, 3, 5)).sum()

    for transformed in (jax.jit(total), jax.grad(total), jax.vmap(total)):
        with pytest.raises(ValueError, match=r"jaxconv\.conv: the channels of x "):
            transformed(X)
    with pytest.raises(TypeError, match="pass static Python integers; under"):
        jax.jit(lambda stride: jaxconv.conv(X, W, (stride, 1)))(2)


# Whose errors have tests of their own.
ELSEWHERE = ("bench", "cli.py", "config.py")


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
        frames = traceback.walk_tb(error.__traceback__)
        return {(frame.f_code.co_filename, line) for frame, line in frames}
    return set()


def test_every_refusal_has_a_test() -> None:
    calls = [*BAD, *REFUSED, *OTHERS.values(), *MISTAKES.values()]
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
