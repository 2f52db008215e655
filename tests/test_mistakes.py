"""The commonest mistakes: what their messages say, word for word, and that the remedies are right.

A message names the function, its own argument, what was given with all shapes, and the remedy.
"""

import inspect
import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxconv

X, W = np.zeros((2, 32, 32, 3), np.float32), np.zeros((3, 3, 3, 8), np.float32)
FIRST = np.zeros((2, 3, 32, 32), np.float32)  # an image channels first
OIHW = np.zeros((8, 3, 5, 5), np.float32)
WIDE = np.zeros((2, 32, 32, 64), np.float32)
LAST = ("NHWC", "HWIO", "NHWC")
GIVEN = "for x of shape (2, 32, 32, 3) and w of shape (3, 3, 3, 8)"
LAX_GIVEN = "for lhs of shape (2, 32, 32, 3) and rhs of shape (3, 3, 3, 8)"
RANKS = "w must be (kernel…, C / groups, O) and x (N, spatial…, C) or (spatial…, C), got"
SAME_RANK = "lhs and rhs must have the same rank (batch, channels and the spatial dimensions), got"
GRAY, ADD = "lhs has no channel axis: pass", "add the two axes,"
SWAPPED = "look swapped: the image comes first"
BESIDES = "lhs and rhs must have batch and channels besides the spatial dimensions of"
LETTERS = (
    "dimension_numbers must be None, a lax.ConvDimensionNumbers, or three strings of length {} such"
    " as {}, got {} for lhs of shape {} and rhs of shape {}; {}"
)
LETTERS_2D = (
    "dimension_numbers must be None, a lax.ConvDimensionNumbers, or three strings of length 4 such"
    " as ('NHWC', 'HWIO', 'NHWC'), got"
)
NAME_ALL = "name 'N' and 'C', in the kernel 'O' and 'I', and in all three the same other letters."
FIT = "x must be (…, C) and w (C, O), got x of shape (2, 32, 32, 3) and"
SIZES = (
    "kernel_shape must have one size for each spatial dimension of x, which is (N, spatial…, C) or"
    " (spatial…, C), got x of shape (2, 32, 32, 3) and"
)
DTYPES = "x and w must have the same dtype, got"
DTYPE = "preferred_element_type must be a dtype of numbers, got"
PRECISION = (
    "precision must be None, a name such as 'highest', a lax.Precision, two of either, or a"
    " lax.DotAlgorithmPreset, got"
)
NUMBERS, NUMBER = "be a positive integer or 2 of them", "be a positive integer"
EACH, PAIR = "pass one for each spatial dimension", "pass one pair for each spatial dimension"
OTHERS = "leave out batch and channels"
STATIC = "pass static Python integers; under jax.jit, name the argument in static_argnums."
PADDINGS = "'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (1-D), an integer, or (low, high) pairs"
INTEGERS = f"be {PADDINGS} of integers"
PAIRS = "have one (low, high) pair for each of 2 spatial dimensions"
AXES = "spatial_axes must be 2 mesh axes or None, one for each spatial dimension, got"
PASS_FN = "pass the function itself, not what it returns."
MOVE = "x looks channels-first: move its channels to the end, jnp.moveaxis(x, 1, -1)"
OI = "w looks like (O, I, kernel…): pass w.transpose(2, 3, 1, 0)"


def kernel(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def function(name: str) -> Callable[..., Any]:
    found: Any = jaxconv
    for part in name.split("."):
        found = getattr(found, part)
    return found


class Mistake(NamedTuple):
    """A call of the public function ``name``, and what it raises."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message:.50}"

    def __call__(self) -> Any:
        return function(self.name)(*self.args, **self.kwargs)


def at(name: str, *args: Any, **kwargs: Any) -> Callable[[type[Exception], str], Mistake]:
    return lambda error, message: Mistake(name, args, kwargs, error, message)


def type_error(name: str, *args: Any, **kwargs: Any) -> Callable[[str], Mistake]:
    return partial(at(name, *args, **kwargs), TypeError)


def value_error(name: str, *args: Any, **kwargs: Any) -> Callable[[str], Mistake]:
    return partial(at(name, *args, **kwargs), ValueError)


def of_channels(x: Any, w: Any, remedy: str, groups: int = 1) -> Mistake:
    """Of ``conv``, where channels don't fit."""
    return value_error("conv", x, w, groups=groups)(
        f"the channels of x (the last axis: {x.shape[-1]}) must be groups ({groups}) times the"
        f" input channels of w (the last axis but one: {w.shape[-2]}), got x of shape {x.shape} and"
        f" w of shape {w.shape}; {remedy}.",
    )


def of_lax_channels(
    lhs: Any, rhs: Any, axes: tuple[int, int], remedy: str, **kwargs: Any
) -> Mistake:
    """Of ``conv_general_dilated``, where channels, at these axes, don't fit."""
    return value_error("conv_general_dilated", lhs, rhs, (1, 1), "SAME", **kwargs)(
        f"the channels of lhs (axis {axes[0]}: {lhs.shape[axes[0]]}) must be feature_group_count"
        f" (1) times the input channels of rhs (axis {axes[1]}: {rhs.shape[axes[1]]}), got lhs of"
        f" shape {lhs.shape} and rhs of shape {rhs.shape}; {remedy}.",
    )


def of_transpose_channels(lhs: Any, rhs: Any, remedy: str) -> Mistake:
    return value_error("conv_transpose", lhs, rhs, (2, 2), "SAME")(
        f"the channels of lhs (axis 3: {lhs.shape[3]}) must be the input channels of rhs (axis 2:"
        f" {rhs.shape[2]}), got lhs of shape {lhs.shape} and rhs of shape {rhs.shape}; {remedy}.",
    )


def of_letters(lhs: Any, rhs: Any, usual: Any, remedy: str, given: Any = LAST) -> Mistake:
    """Of ``conv_general_dilated``, whose dimension numbers are for another rank."""
    strides, rank = (1,) * (lhs.ndim - 2), lhs.ndim
    message = LETTERS.format(rank, usual, given, lhs.shape, rhs.shape, remedy)
    call = at("conv_general_dilated", lhs, rhs, strides, "SAME", dimension_numbers=given)
    return call(TypeError, message)


MISTAKES = {
    # Layouts
    "an image channels first": of_channels(FIRST, W, MOVE),
    "one image channels first": of_channels(
        FIRST[0], W, "x looks channels-first: move its channels to the end, jnp.moveaxis(x, 0, -1)"
    ),
    "a kernel of PyTorch": of_channels(X, OIHW, OI),
    "both of PyTorch": of_channels(FIRST, OIHW, f"{MOVE}; {OI}"),
    "a kernel (kernel…, O, I)": of_channels(
        WIDE, kernel(3, 3, 32, 64), "w looks like (kernel…, O, I): pass w.swapaxes(-1, -2)"
    ),
    "swapped": of_channels(W, X, "x and w look swapped: the image comes first"),
    "too few input channels": of_channels(
        WIDE, kernel(3, 3, 32, 128), "w needs 64 input channels for this x"
    ),
    "depthwise without groups": of_channels(
        WIDE, kernel(3, 3, 1, 64), "the kernel looks depthwise: use groups=64"
    ),
    "depthwise of PyTorch": of_channels(
        WIDE, kernel(64, 1, 3, 3), f"{OI}; the kernel looks depthwise: use groups=64"
    ),
    "depthwise of TensorFlow": of_channels(
        WIDE,
        kernel(3, 3, 64, 1),
        "w looks like TensorFlow's depthwise kernel (kernel…, C, multiplier): pass"
        " w.reshape(*w.shape[:-2], 1, -1)",
        groups=64,
    ),
    "another number of groups": of_channels(WIDE, kernel(3, 3, 16, 64), "use groups=4", groups=2),
    "groups that don't divide": of_channels(
        WIDE, kernel(3, 3, 24, 64), "groups must divide the channels of x", groups=5
    ),
    "gray images": of_channels(
        kernel(8, 28, 28), kernel(3, 3, 1, 8), "x has no channel axis: pass x[..., None]"
    ),
    "a gray image and a filter": of_channels(
        kernel(28, 28),
        kernel(3, 3),
        "x and w have no channel axes: pass x[..., None] and w[..., None, None]",
    ),
    "a kernel without channels": type_error("conv", X, kernel(3, 3))(
        f"{RANKS} x of shape (2, 32, 32, 3) and w of shape (3, 3); w has no channel axes: pass"
        " jnp.tile(w[..., None, None], 3) and groups=3 for the same on each."
    ),
    "a kernel without the one channel": type_error("conv", X[..., :1], kernel(3, 3))(
        f"{RANKS} x of shape (2, 32, 32, 1) and w of shape (3, 3); w has no channel axes: pass"
        " w[..., None, None]."
    ),
    "two leading axes": type_error("conv", X[None], W)(
        f"{RANKS} x of shape (1, 2, 32, 32, 3) and w of shape (3, 3, 3, 8); make the leading axes"
        " of x one batch, or add the missing axes of w."
    ),
    "one gray image": type_error("conv", X[0, ..., 0], kernel(3, 3, 1, 8))(
        f"{RANKS} x of shape (32, 32) and w of shape (3, 3, 1, 8); add the missing axes, such as"
        " x[..., None] for one channel."
    ),
    # Dtypes
    "dtypes": type_error("conv", X, W.astype(np.float64))(
        f"{DTYPES} float32 and float64 {GIVEN}; cast one of them with .astype, for example"
        " w.astype(x.dtype)."
    ),
    "an array of objects": type_error("conv", X.astype(object), W)(
        "x must be an array of numbers, got dtype object and shape (2, 32, 32, 3); convert it"
        " to numbers."
    ),
    "an array of strings": type_error("pointwise", X, np.full((3, 8), "a"))(
        "w must be an array of numbers, got dtype <U1 and shape (3, 8); convert it to numbers."
    ),
    "a shape": type_error("conv", X.shape, W)(
        "x must be an array, got tuple; convert it with jnp.asarray; shapes are for jaxconv.plan."
    ),
    "random keys": type_error("conv", jax.random.split(jax.random.key(0), (1, 8, 8, 3)), W)(
        "x must be an array of numbers, got dtype key<fry> and shape (1, 8, 8, 3); draw"
        " numbers by it, for example jax.random.normal(key, shape)."
    ),
    **{
        f"dtype {given!r}": type_error("conv", X, W, preferred_element_type=given)(
            f"{DTYPE} {given!r} {GIVEN}; {remedy}"
        )
        for given, remedy in {
            "flaot32": "did you mean 'float32'?",
            "f32": "did you mean 'float32'?",
            "fp16": "did you mean 'float16'?",
            "bf16": "did you mean 'bfloat16'?",
            object: "use one such as jnp.float32.",
            3: "use one such as jnp.float32.",
        }.items()
    },
    "an array for a dtype": type_error("conv", X, W, preferred_element_type=X)(
        f"{DTYPE} ndarray {GIVEN}; use its .dtype."
    ),
    **{
        f"precision {given!r}": value_error("conv", X, W, precision=given)(
            f"{PRECISION} {given!r} {GIVEN}; {remedy}"
        )
        for given, remedy in {
            "hihgest": "did you mean 'highest'?",
            "BF16_BF16_F23": "did you mean 'BF16_BF16_F32'?",
            "best": "use a name.",
            3: "use a name.",
            ("high",) * 3: "use a name.",
        }.items()
    },
    "a name for a sharding": type_error(
        "conv_general_dilated", FIRST, OIHW, (1, 1), "SAME", out_sharding="rows"
    )(
        "out_sharding must be a jax.sharding.NamedSharding or PartitionSpec, got 'rows'; pass one"
        " such as jax.P('x')."
    ),
    **{
        f"spatial_axes {given!r}": value_error("conv", X, W, spatial_axes=given)(
            f"{AXES} {given!r}; pass one for each, such as ('rows', None)."
        )
        for given in (("rows",), "rows", 1, (0, 1))
    },
    # Strides, dilation, groups, padding
    **{
        f"{argument} {given!r}": at("conv", X, W, **{argument: given})(
            error, f"{argument} must {must}, got {given!r} {GIVEN}; {remedy}"
        )
        for (argument, error, must), remedies in {
            ("strides", TypeError, NUMBERS): {
                1.5: STATIC,
                (1.0, 2.0): STATIC,
                "SAME": "pass padding by name, padding='SAME'.",
            },
            ("strides", ValueError, NUMBERS): {
                0: "use 1.",
                (2,): f"{EACH}: (2, 2).",
                (1, 2, 2, 1): f"{OTHERS}: (2, 2).",
            },
            ("dilation", ValueError, NUMBERS): {
                (1, 2, 3): f"{EACH}, or add the axes that the operands lack."
            },
            ("groups", ValueError, NUMBER): {0: "use 1 without groups."},
            ("groups", TypeError, NUMBER): {"depthwise": STATIC},
            ("padding", ValueError, f"be {PADDINGS}"): {"SMAE": "did you mean 'SAME'?"},
            ("padding", ValueError, INTEGERS): {
                None: "use 'VALID' for none.",
                (1, 2): f"{PAIR}: ((1, 1), (2, 2)).",
            },
            ("padding", TypeError, PAIRS): {
                ((1, 1),): f"{EACH}: ((1, 1), (1, 1)).",
                ((0, 0), (1, 1), (1, 1), (0, 0)): f"{OTHERS}: ((1, 1), (1, 1)).",
            },
        }.items()
        for given, remedy in remedies.items()
    },
    "groups that don't divide the outputs": value_error(
        "conv", WIDE, kernel(3, 3, 32, 9), groups=2
    )(
        "groups must divide the output channels of w, got 9 in 2 groups for x of shape"
        " (2, 32, 32, 64) and w of shape (3, 3, 32, 9); use a multiple of 2, or change groups."
    ),
    "a pair in 1-D": value_error("conv", X[0], W[0], padding=(2, 0))(
        f"padding must {INTEGERS}, got (2, 0) for x of shape (32, 32, 3) and w of shape (3, 3, 8);"
        f" {PAIR}: ((2, 0),)."
    ),
    "cropped away": value_error("conv", X, W, padding=-20)(
        "negative padding must not be larger than the dimension that it crops, got padding (-20,"
        f" -20) of 32 elements {GIVEN}; crop less."
    ),
    "misspelled algorithm": value_error("conv", X, W, algorithm="Winogard")(
        "algorithm must be 'auto' or one of naive, im2col, im2col_tiled, implicit, pointwise,"
        " shift, phase, slices, winograd, winograd4, fft, xla, got 'Winogard'; did you mean"
        " 'winograd'?"
    ),
    "algorithm that can't": at("conv", X, W, algorithm="pointwise")(
        jaxconv.UnsupportedConvError,
        "algorithm 'pointwise' can't do this convolution (windows overlap: kernel (3, 3), strides"
        " (1, 1)), got float32[2,32,32,3] * float32[3,3,3,8] → float32[2,32,32,8], padding ((1,"
        " 1), (1, 1)); use algorithm='auto', or one that can: naive, im2col, im2col_tiled,"
        " implicit, shift, slices, winograd, winograd4, fft, xla.",
    ),
    # lax's functions
    "channels last by lax's default": of_lax_channels(
        X, W, (1, 1), f"use dimension_numbers={LAST}"
    ),
    "depthwise without feature groups": of_lax_channels(
        kernel(2, 64, 8, 8),
        kernel(64, 1, 3, 3),
        (1, 1),
        "the kernel looks depthwise: use feature_group_count=64",
    ),
    "lax's operands swapped": of_lax_channels(
        W, X, (3, 2), "lhs and rhs look swapped: the image comes first", dimension_numbers=LAST
    ),
    "the kernel's channels swapped": of_lax_channels(
        WIDE,
        kernel(3, 3, 8, 64),
        (3, 2),
        "use dimension_numbers=('NHWC', 'HWOI', 'NHWC')",
        dimension_numbers=LAST,
    ),
    "letters of 2-D in 1-D": of_letters(
        X[0],
        W[0],
        ("NWC", "WIO", "NWC"),
        "use ('NWC', 'WIO', 'NWC'), or give lhs and rhs an axis for each letter.",
    ),
    "letters of 2-D in 3-D, channels first": of_letters(
        FIRST[..., None],
        OIHW[..., None],
        ("NCDHW", "OIDHW", "NCDHW"),
        "use ('NCDHW', 'OIDHW', 'NCDHW'), or give lhs and rhs an axis for each letter.",
        ("NCHW", "OIHW", "NCHW"),
    ),
    "letters of an image and a filter": of_letters(
        X[0, ..., 0],
        W[..., 0, 0],
        ("NC", "IO", "NC"),
        "add the two axes, lhs[None, ..., None] and rhs[..., None, None], or use ('NC', 'IO',"
        " 'NC').",
    ),
    **{
        f"letters {given!r}": type_error(
            "conv_general_dilated", X, W, (1, 1), "SAME", dimension_numbers=given
        )(f"{LETTERS_2D} {given!r} {LAX_GIVEN}; {remedy}")
        for given, remedy in {
            "NHWC": f"pass all three, such as {LAST}.",
            LAST[:2]: f"pass all three, such as {LAST}.",
            3: f"pass all three, such as {LAST}.",
            ("nhwc", "hwio", "nhwc"): f"did you mean {LAST}?",
            ("HWIO", "NHWC", "NHWC"): f"did you mean {LAST}?",
            ("NHWC", "HWCO", "NHWC"): NAME_ALL,
            ("NHWC", "HWIO", "HHNC"): NAME_ALL,
            ("NHWC", "XYIO", "NHWC"): NAME_ALL,
            ((0, 3, 1, 2),) * 3: (
                "for axes by number pass lax.ConvDimensionNumbers(*dimension_numbers)."
            ),
        }.items()
    },
    "an image and a filter for lax": value_error(
        "conv_general_dilated", X[0, ..., 0], W[..., 0, 0], (1, 1), "SAME"
    )(
        f"{BESIDES} window_strides, got window_strides (1, 1) for lhs of shape (32, 32) and rhs of"
        " shape (3, 3); add the two axes, lhs[None, None] and rhs[None, None]."
    ),
    "an image and a filter to transpose": value_error(
        "conv_transpose", X[0, ..., 0], W[..., 0, 0], (2, 2), "SAME"
    )(
        f"{BESIDES} strides, got strides (2, 2) for lhs of shape (32, 32) and rhs of shape (3, 3);"
        " add the two axes, lhs[None, ..., None] and rhs[..., None, None]."
    ),
    "a signal and a filter for lax": type_error(
        "conv_general_dilated", X[0, 0, :, 0], W[0, 0, :, 0], (1,), "SAME"
    )(
        "lhs and rhs must have at least a batch and a channel dimension, got lhs of shape (32,) and"
        " rhs of shape (3,); add the two axes, lhs[None, None] and rhs[None, None]."
    ),
    "one number for lax's strides": type_error("conv_general_dilated", FIRST, OIHW, 2, "SAME")(
        "window_strides must be 2 positive integers, got 2 for lhs of shape (2, 3, 32, 32) and"
        " rhs of shape (8, 3, 5, 5); use (2, 2)."
    ),
    **{
        name: type_error(
            "conv_general_dilated", lhs, rhs, (1, 1), "SAME", dimension_numbers=numbers
        )(
            f"{SAME_RANK} lhs of shape {lhs.shape} and rhs of shape {rhs.shape}; {remedy}.",
        )
        for name, (lhs, rhs, numbers, remedy) in {
            "no batch": (FIRST[0], OIHW, None, "lhs has no batch: pass lhs[None]"),
            "gray images, channels first": (FIRST[:, 0], OIHW[:, :1], None, f"{GRAY} lhs[:, None]"),
            "gray images, channels last": (X[..., 0], W[:, :, :1], LAST, f"{GRAY} lhs[..., None]"),
            "a matrix, channels first": (FIRST[0, 0], OIHW, None, f"{ADD} lhs[None, None]"),
            "a matrix, channels last": (X[0, ..., 0], W, LAST, f"{ADD} lhs[None, ..., None]"),
            "a filter": (FIRST, OIHW[0, 0], None, f"{ADD} rhs[None, None]"),
            "a filter, channels last": (X, W[..., 0, 0], LAST, f"{ADD} rhs[..., None, None]"),
            "an image without batch second": (OIHW, FIRST[0], None, f"lhs and rhs {SWAPPED}"),
            "a batch of batches": (X[None], OIHW, None, "make the leading axes of lhs one batch"),
            "a pixel": (X[0, 0, 0], OIHW[..., None], None, "add the missing axes"),
        }.items()
    },
    **{
        f"padding {given} of a transpose": value_error("conv_transpose", X, W, (2, 2), given)(
            "padding must be 'SAME', 'VALID', with strides of 1 'SAME_LOWER', or (low, high)"
            f" pairs, got {given!r} {LAX_GIVEN}; {remedy}",
        )
        for given, remedy in (
            ("SMAE", "did you mean 'SAME'?"),
            ("SAME_LOWER", "use one of these."),
        )
    },
    "a transpose channels first": of_transpose_channels(
        FIRST, W, "use dimension_numbers=('NCHW', 'HWIO', 'NCHW')"
    ),
    "a transpose by the forward kernel": of_transpose_channels(
        WIDE, kernel(4, 4, 3, 64), "use transpose_kernel=True"
    ),
    "a transpose of PyTorch": of_transpose_channels(
        WIDE,
        kernel(64, 8, 4, 4),
        "use dimension_numbers=('NHWC', 'OIHW', 'NHWC'); use transpose_kernel=True",
    ),
    "a transpose of swapped operands": of_transpose_channels(
        W, X, "lhs and rhs look swapped: the image comes first"
    ),
    # The channels-last others
    "a signal and a filter": type_error("conv", X[0, 0, :, 0], W[0, 0, :, 0])(
        f"{RANKS} x of shape (32,) and w of shape (3,); x and w have no channel axes: pass"
        " x[..., None] and w[..., None, None]."
    ),
    "strides of an image and a filter": value_error("conv", X[0, ..., 0], W[..., 0, 0], (1, 1))(
        "strides must be a positive integer or 0 of them, got (1, 1) for x of shape (32, 32) and w"
        f" of shape (3, 3); {EACH}, or add the axes that the operands lack."
    ),
    "an image without batch swapped": type_error("conv", W, X[0])(
        f"{RANKS} x of shape (3, 3, 3, 8) and w of shape (32, 32, 3); x and w look swapped: the"
        " image comes first."
    ),
    "pointwise swapped": type_error("pointwise", W[0, 0], X)(
        "x must be (…, C) and w (C, O), got x of shape (3, 8) and w of shape (2, 32, 32, 3); x and"
        " w look swapped: the image comes first."
    ),
    "pointwise by a vector": type_error("pointwise", X, W[0, 0, :, 0])(
        f"{FIT} w of shape (3,); w has no axis of output channels: pass w[:, None]."
    ),
    "pointwise by the kernel of a convolution": type_error("pointwise", X, kernel(1, 1, 3, 8))(
        f"{FIT} w of shape (1, 1, 3, 8); w has the axes of a kernel too: pass"
        " w.reshape(w.shape[-2:])."
    ),
    "pointwise by a kernel of PyTorch": type_error("pointwise", X, kernel(8, 3, 1, 1))(
        f"{FIT} w of shape (8, 3, 1, 1); w looks like (O, C, kernel…): pass"
        " w.reshape(w.shape[:2]).T."
    ),
    "pointwise by a transposed matrix": type_error("pointwise", X, kernel(8, 3))(
        f"{FIT} w of shape (8, 3); w looks like (O, C): pass w.T."
    ),
    "pointwise channels first": type_error("pointwise", FIRST, kernel(3, 8))(
        "x must be (…, C) and w (C, O), got x of shape (2, 3, 32, 32) and w of shape (3, 8);"
        f" {MOVE}."
    ),
    "im2col with a number": type_error("im2col", X, 3)(
        "kernel_shape must be a sequence of integers, got 3; pass one size for each spatial"
        " dimension: (3, 3)."
    ),
    "im2col with the kernel": type_error("im2col", X, W)(
        "kernel_shape must be a sequence of integers, got ndarray; pass the kernel's shape"
        " without its channels: (3, 3)."
    ),
    "im2col with the kernel's shape": value_error("im2col", X, W.shape)(
        f"{SIZES} kernel_shape (3, 3, 3, 8); leave out the kernel's channels: (3, 3)."
    ),
    "im2col with one size": value_error("im2col", X, (3,))(
        f"{SIZES} kernel_shape (3,); pass 2 sizes, or 3 if there is no batch."
    ),
    "im2col by misspelled padding": value_error("im2col", X, (3, 3), padding="vlaid")(
        f"padding must be {PADDINGS}, got 'vlaid' for x of shape (2, 32, 32, 3) and kernel_shape"
        " (3, 3); did you mean 'VALID'?"
    ),
    "col2im to an array": type_error("col2im", kernel(2, 30, 30, 27), X, (3, 3))(
        "x_shape must be a sequence of integers, got ndarray; pass x.shape."
    ),
    "col2im with another padding": value_error(
        "col2im", kernel(2, 30, 30, 27), X.shape, (3, 3), padding="SAME"
    )(
        "patches of x_shape (2, 32, 32, 3) must have the shape (2, 32, 32, 27), got patches of"
        " shape (2, 30, 30, 27), x_shape (2, 32, 32, 3) and kernel_shape (3, 3); pass the"
        " arguments that im2col had."
    ),
    "col2im to a matrix": value_error("col2im", kernel(2, 30, 30, 27), (32, 32), (3, 3))(
        "kernel_shape must have one size for each spatial dimension of x_shape, which is"
        " (N, spatial…, C) or (spatial…, C), got patches of shape (2, 30, 30, 27), x_shape (32, 32)"
        " and kernel_shape (3, 3); add a channel axis, (32, 32, 1), or pass fewer sizes."
    ),
    "col2im with shapes swapped": value_error("col2im", kernel(2, 30, 30, 27), (3, 3), X.shape)(
        "kernel_shape must have one size for each spatial dimension of x_shape, which is"
        " (N, spatial…, C) or (spatial…, C), got patches of shape (2, 30, 30, 27), x_shape (3, 3)"
        " and kernel_shape (2, 32, 32, 3); x_shape and kernel_shape look swapped: x_shape comes"
        " first."
    ),
    "col2im to an unknown size": value_error(
        "col2im", kernel(2, 30, 30, 27), (-1, 32, 32, 3), (3, 3)
    )("sizes in x_shape must be 0 or more, got (-1, 32, 32, 3); pass x.shape."),
    "im2col without taps": value_error("im2col", X, (0, 3))(
        "sizes in kernel_shape must be 1 or more, got (0, 3); use 1."
    ),
    # plan
    "plan by an unknown size": value_error("plan", (-1, 32, 32, 3), W.shape)(
        "the sizes of x must not be negative, got (-1, 32, 32, 3); pass the whole shape."
    ),
    "plan arrays of another dtype": value_error("plan", X, W, dtype="bfloat16")(
        "dtype is for operands given as shapes, got none of these; omit it, or pass shapes."
    ),
    "plan on CUDA": value_error("plan", X, W, platform="cuda")(
        "platform must be 'cpu', 'gpu' or 'tpu', got 'cuda'; use 'gpu'."
    ),
    # What takes functions, platforms and settings
    "explain a result": type_error("explain", X)(f"fn must be a function, got ndarray; {PASS_FN}"),
    "accelerate nothing": type_error("accelerate", fn=None)(
        f"fn must be a function, got NoneType; {PASS_FN}"
    ),
    "enable on CUDA": value_error("enable", "cuda")(
        "platforms must be among 'cpu', 'gpu' and 'tpu', got ('cuda',); use 'gpu'."
    ),
    "enable a function": value_error("enable", float)(
        "platforms must be among 'cpu', 'gpu' and 'tpu', got (<class 'float'>,); for one function"
        " use jaxconv.accelerate."
    ),
    "a misspelled setting": value_error("config.update", "workspace_limits", "1GB")(
        "name must be one of workspace_limit, cache_dir, use_cache, got 'workspace_limits'; did"
        " you mean 'workspace_limit'?"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as caught:
        mistake()
    assert caught.type is mistake.error
    assert str(caught.value) == f"jaxconv.{mistake.name}: {mistake.message}"
    if is_planned(mistake):
        names = dict(zip(("x", "w", "strides"), mistake.args, strict=False)) | mistake.kwargs
        with pytest.raises(mistake.error) as caught:
            jaxconv.plan(**names)
        assert str(caught.value) == f"jaxconv.plan: {mistake.message}"


def is_planned(mistake: Mistake) -> bool:
    """Whether ``plan`` takes the same arguments: not algorithms, and shapes rather than values."""
    others = {"algorithm", "spatial_axes"}
    return (
        mistake.name == "conv"
        and not others & {*mistake.kwargs}
        and hasattr(mistake.args[0], "shape")
    )


# Remedies as they are printed: what to pass for an operand, a keyword, or the argument in question.
OPERAND = re.compile(
    r"jnp\.\w+\((x|w)\b[^()]*\)|\b(x|w|lhs|rhs)(\.T|(\[[^]]*\]|\.\w+\([^()]*\))(\.T)?)"
)
KEYWORD = re.compile(r"\b(\w+)=(\([^()]*\)|'\w+'|\d+|True)")
ARGUMENT = re.compile(r"(?:dimension|channels|use):? (\(.*\))\.$")
SWAPPED_OPERANDS = re.compile(r"(\w+) and (\w+) look swapped")


# After which another mistake is left: of channels, of strides, of the batch.
FIRST_STEPS = (
    "strides 'SAME'",
    "letters of an image and a filter",
    "a matrix, channels first",
    "a matrix, channels last",
    "a filter",
    "a filter, channels last",
    "an image without batch second",
)


def has_remedy(name: str) -> bool:
    mistake, patterns = MISTAKES[name], (OPERAND, KEYWORD, ARGUMENT, SWAPPED_OPERANDS)
    of_arrays = mistake.args and hasattr(mistake.args[0], "ndim")
    found = any(pattern.search(mistake.message) for pattern in patterns)
    return bool(of_arrays and found and name not in FIRST_STEPS)


@pytest.mark.parametrize("name", [*filter(has_remedy, MISTAKES)])
def test_remedy_is_accepted(name: str) -> None:
    mistake = MISTAKES[name]
    called = function(mistake.name)
    given = inspect.signature(called).bind(*mistake.args, **mistake.kwargs).arguments
    changes = {}
    if swapped := SWAPPED_OPERANDS.search(mistake.message):
        changes = {swapped[1]: given[swapped[2]], swapped[2]: given[swapped[1]]}
    for text in OPERAND.finditer(mistake.message):
        changes[text[1] or text[2]] = eval(text[0], {"jnp": jnp, **given})
    changes |= {name: eval(text) for name, text in KEYWORD.findall(mistake.message)}
    if text := ARGUMENT.search(mistake.message):
        changes[mistake.message.partition(" ")[0]] = eval(text[1])
    assert jax.eval_shape(lambda: called(**given | changes)).size > 0


def test_operands_of_any_rank() -> None:
    """They are convolved or refused, always in our words."""
    refused = 0

    def tried(name: str, *args: Any, **kwargs: Any) -> None:
        nonlocal refused
        try:
            jax.eval_shape(partial(function(name), *args, **kwargs))
        except (TypeError, ValueError) as error:
            assert str(error).startswith(f"jaxconv.{name}: "), error  # noqa: PT017
            refused += 1

    operands = [np.ones((4, 3, 2, 5, 1)[:rank]) for rank in range(6)]
    for x, w in itertools.product(operands, repeat=2):
        tried("conv", x, w)
        tried("pointwise", x, w)
        tried("im2col", x, w.shape)
        for numbers in (None, LAST, lax.ConvDimensionNumbers(*((0, 3, 1, 2),) * 3)):
            tried("conv_transpose", x, w, (2, 2), "SAME", dimension_numbers=numbers)
            for n in {2, max(0, x.ndim - 2)}:
                tried("conv_general_dilated", x, w, (1,) * n, "SAME", dimension_numbers=numbers)
    assert refused > 200


def test_remedy_for_transposes_of_pytorch_is_its_convolution() -> None:
    """PyTorch's is the gradient of the convolution by its kernel as (O, I, kernel…)."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 5, 4)), rng.standard_normal((4, 3, 3, 3))

    def forward(image: jax.Array) -> jax.Array:
        return jaxconv.conv(image, jnp.asarray(w).transpose(2, 3, 1, 0), 2)

    _, gradient = jax.vjp(forward, np.zeros((2, 10, 10, 3)))
    out = jaxconv.conv_transpose(x, w.transpose(2, 3, 1, 0), (2, 2), "SAME", transpose_kernel=True)
    np.testing.assert_allclose(out, gradient(jnp.asarray(x))[0], 1e-12, 1e-12)


def test_remedy_for_kernels_of_tensorflow_keeps_each_channel() -> None:
    """Output c · multiplier + m is channel c by the kernel [..., c, m]."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 6, 6, 3)), rng.standard_normal((3, 3, 3, 2))
    out = jaxconv.conv(x, w.reshape(*w.shape[:-2], 1, -1), groups=3)
    for c in range(3):
        alone = jaxconv.conv(x[..., c : c + 1], w[:, :, c : c + 1])
        np.testing.assert_allclose(out[..., 2 * c : 2 * c + 2], alone, 1e-12, 1e-12)


def test_errors_of_the_users_function_pass_through_autotune() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        jaxconv.autotune(lambda x: x + None, X)
