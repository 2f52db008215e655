"""The commonest mistakes: what their messages say, word for word, and that the remedies are right.

A message names the function, its own argument, what was given with all shapes, and the remedy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxconv

X, W = np.zeros((2, 32, 32, 3), np.float32), np.zeros((3, 3, 3, 8), np.float32)
FIRST = np.zeros((2, 3, 32, 32), np.float32)  # an image channels first
OIHW = np.zeros((8, 3, 5, 5), np.float32)
WIDE = np.zeros((2, 32, 32, 64), np.float32)
GIVEN = "for x of shape (2, 32, 32, 3) and w of shape (3, 3, 3, 8)"
RANKS = (
    "w must be (kernel…, C / groups, O) and x (N, spatial…, C) or (spatial…, C), got x of shape {}"
    " and w of shape {}; "
)
STATIC = "give static Python integers; under jax.jit, name the argument in static_argnums."
PADDINGS = "'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (1-D), an integer, or (low, high) pairs"
MOVE = "x looks channels-first: move its channels to the end, jnp.moveaxis(x, 1, -1)"
OI = "w looks like (O, I, kernel…): give w.transpose(2, 3, 1, 0)"


def kernel(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def channels(x: Any, w: Any, groups: int, remedy: str) -> str:
    """What ``conv`` says where channels don't fit."""
    return (
        f"the channels of x (the last axis: {x.shape[-1]}) must be groups ({groups}) times the"
        f" input channels of w (the last axis but one: {w.shape[-2]}), got x of shape {x.shape} and"
        f" w of shape {w.shape}; {remedy}."
    )


class Mistake(NamedTuple):
    """A call of the public function ``name``, and what it raises."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    message: str

    def __call__(self) -> Any:
        function = jaxconv
        for part in self.name.split("."):
            function = getattr(function, part)
        return function(*self.args, **self.kwargs)


def mistake(name: str, error: type[Exception], message: str, *args: Any, **kwargs: Any) -> Mistake:
    return Mistake(name, args, kwargs, error, message)


def of_channels(x: Any, w: Any, remedy: str, groups: int = 1) -> Mistake:
    message = channels(x, w, groups, remedy)
    return mistake("conv", ValueError, message, x, w, groups=groups)


MISTAKES = {
    # Layouts
    "an image channels first": of_channels(FIRST, W, MOVE),
    "one image channels first": of_channels(FIRST[0], W, MOVE.replace("x, 1", "x, 0")),
    "a kernel of PyTorch": of_channels(X, OIHW, OI),
    "both of PyTorch": of_channels(FIRST, OIHW, f"{MOVE}; {OI}"),
    "a kernel (kernel…, O, I)": of_channels(
        WIDE,
        kernel(3, 3, 32, 64),
        "w looks like (kernel…, O, I): give w.swapaxes(-1, -2)",
    ),
    "exchanged": of_channels(W, X, "x and w look exchanged: the image comes first"),
    "too few input channels": of_channels(
        WIDE, kernel(3, 3, 32, 128), "w needs 64 input channels for this x"
    ),
    "depthwise without groups": of_channels(
        WIDE, kernel(3, 3, 1, 64), "the kernel looks depthwise: give groups=64"
    ),
    "depthwise of PyTorch": of_channels(
        WIDE, kernel(64, 1, 3, 3), f"{OI}; the kernel looks depthwise: give groups=64"
    ),
    "depthwise of TensorFlow": of_channels(
        WIDE,
        kernel(3, 3, 64, 1),
        "w looks like TensorFlow's depthwise kernel (kernel…, C, multiplier): give"
        " w.reshape(*w.shape[:-2], 1, -1)",
        groups=64,
    ),
    "another number of groups": of_channels(WIDE, kernel(3, 3, 16, 64), "give groups=4", groups=2),
    "groups that don't divide": of_channels(
        WIDE, kernel(3, 3, 24, 64), "groups must divide the channels of x", groups=5
    ),
    "gray images": of_channels(
        kernel(8, 28, 28), kernel(3, 3, 1, 8), "x has no axis of channels: give x[..., None]"
    ),
    "a gray image and a filter": of_channels(
        kernel(28, 28),
        kernel(3, 3),
        "x and w have no axes of channels: give x[..., None] and w[..., None, None]",
    ),
    "a kernel without channels": mistake(
        "conv",
        TypeError,
        RANKS.format("(2, 32, 32, 3)", "(3, 3)")
        + "w has no axes of channels: give jnp.tile(w[..., None, None], 3) and groups=3 for the"
        " same on each.",
        X,
        kernel(3, 3),
    ),
    "a kernel without the one channel": mistake(
        "conv",
        TypeError,
        RANKS.format("(2, 32, 32, 1)", "(3, 3)")
        + "w has no axes of channels: give w[..., None, None].",
        X[..., :1],
        kernel(3, 3),
    ),
    "two leading axes": mistake(
        "conv",
        TypeError,
        RANKS.format("(1, 2, 32, 32, 3)", "(3, 3, 3, 8)")
        + "make the leading axes of x one batch, or add the missing axes of w.",
        X[None],
        W,
    ),
    "one gray image": mistake(
        "conv",
        TypeError,
        RANKS.format("(32, 32)", "(3, 3, 1, 8)")
        + "add the missing axes, such as x[..., None] for one channel.",
        X[0, ..., 0],
        kernel(3, 3, 1, 8),
    ),
    # Dtypes
    "dtypes": mistake(
        "conv",
        TypeError,
        f"x and w must have the same dtype, got float32 and float64 {GIVEN}; cast one of them with"
        " .astype, for example w.astype(x.dtype).",
        X,
        W.astype(np.float64),
    ),
    "an image of bytes": mistake(
        "conv",
        TypeError,
        f"x and w must have the same dtype, got uint8 and float32 {GIVEN}; cast one of them with"
        " .astype, for example x.astype(w.dtype).",
        X.astype(np.uint8),
        W,
    ),
    "an array of objects": mistake(
        "conv",
        TypeError,
        "x must be an array of numbers, got dtype object and shape (2, 32, 32, 3); convert it with"
        " .astype.",
        X.astype(object),
        W,
    ),
    "an array of strings": mistake(
        "pointwise",
        TypeError,
        "w must be an array of numbers, got dtype <U1 and shape (3, 8); convert it with .astype.",
        X,
        np.full((3, 8), "a"),
    ),
    "a list": mistake(
        "conv",
        TypeError,
        "x must be an array, got list; convert it with jnp.asarray.",
        [1.0],
        W,
    ),
    "a shape": mistake(
        "conv",
        TypeError,
        "x must be an array, got tuple; jaxconv.plan takes shapes; for values give"
        " jnp.zeros(shape), for example.",
        X.shape,
        W,
    ),
    # Strides, dilation, groups
    "a fractional stride": mistake(
        "conv",
        ValueError,
        "strides must be an integer or 2 of them, one for each spatial dimension, got 1.5"
        f" {GIVEN}; {STATIC}",
        X,
        W,
        1.5,
    ),
    "fractional strides": mistake(
        "conv",
        TypeError,
        f"strides must be 2 positive integers, got (1.0, 2.0) {GIVEN}; {STATIC}",
        X,
        W,
        strides=(1.0, 2.0),
    ),
    "padding in the place of strides": mistake(
        "conv",
        ValueError,
        "strides must be an integer or 2 of them, one for each spatial dimension, got 'SAME'"
        f" {GIVEN}; padding is given by name, padding='SAME'.",
        X,
        W,
        "SAME",
    ),
    "one stride for two axes": mistake(
        "conv",
        ValueError,
        "strides must be an integer or 2 of them, one for each spatial dimension, got (2,)"
        f" {GIVEN}; give one for each spatial dimension: (2, 2).",
        X,
        W,
        strides=(2,),
    ),
    "strides of TensorFlow": mistake(
        "conv",
        ValueError,
        "strides must be an integer or 2 of them, one for each spatial dimension, got (1, 2, 2, 1)"
        f" {GIVEN}; leave out batch and channels: (2, 2).",
        X,
        W,
        strides=(1, 2, 2, 1),
    ),
    "a stride of 0": mistake(
        "conv",
        ValueError,
        f"strides must be 2 positive integers, got (0, 0) {GIVEN}; give 1 where there is nothing to"
        " do.",
        X,
        W,
        strides=0,
    ),
    "dilations": mistake(
        "conv",
        ValueError,
        "dilation must be an integer or 2 of them, one for each spatial dimension, got (1, 2, 3)"
        f" {GIVEN}; give one for each spatial dimension.",
        X,
        W,
        dilation=(1, 2, 3),
    ),
    "no groups": mistake(
        "conv",
        ValueError,
        f"groups must be a positive integer, got 0 {GIVEN}; give 1 where there are no groups.",
        X,
        W,
        groups=0,
    ),
    # Padding and algorithm
    "misspelled padding": mistake(
        "conv",
        ValueError,
        f"padding must be {PADDINGS}, got 'SMAE' {GIVEN}; perhaps 'SAME' is meant.",
        X,
        W,
        padding="SMAE",
    ),
    "a pad for each axis": mistake(
        "conv",
        ValueError,
        f"padding must be {PADDINGS} of integers, got (1, 2) {GIVEN}; give one pair for each"
        " spatial dimension: ((1, 1), (2, 2)).",
        X,
        W,
        padding=(1, 2),
    ),
    "one pair": mistake(
        "conv",
        TypeError,
        "padding must have one (low, high) pair for each of 2 spatial dimensions, got [(1, 1)]"
        f" {GIVEN}; give one for each: ((1, 1), (1, 1)).",
        X,
        W,
        padding=[(1, 1)],
    ),
    "pads of TensorFlow": mistake(
        "conv",
        TypeError,
        "padding must have one (low, high) pair for each of 2 spatial dimensions, got"
        f" ((0, 0), (1, 1), (1, 1), (0, 0)) {GIVEN}; leave out batch and channels:"
        " ((1, 1), (1, 1)).",
        X,
        W,
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    ),
    "a pair in 1-D": mistake(
        "conv",
        ValueError,
        f"padding must be {PADDINGS} of integers, got (2, 0) for x of shape (32, 32, 3) and w of"
        " shape (3, 3, 8); give one pair for each spatial dimension: ((2, 0),).",
        X[0],
        W[0],
        padding=(2, 0),
    ),
    "cropped away": mistake(
        "conv",
        ValueError,
        "negative padding must not be larger than the dimension that it crops, got padding"
        f" (-20, -20) of 32 elements {GIVEN}; crop less.",
        X,
        W,
        padding=-20,
    ),
    "misspelled algorithm": mistake(
        "conv",
        ValueError,
        f"algorithm must be 'auto' or one of {', '.join(jaxconv.ALGORITHMS)}, got 'Winogard';"
        " perhaps 'winograd' is meant.",
        X,
        W,
        algorithm="Winogard",
    ),
    "algorithm that can't": mistake(
        "conv",
        jaxconv.UnsupportedConvError,
        "algorithm 'pointwise' can't do this convolution (windows overlap: kernel (3, 3), strides"
        " (1, 1)), got float32[2,32,32,3] * float32[3,3,3,8] → float32[2,32,32,8], padding"
        " ((1, 1), (1, 1)); use algorithm='auto', or one that can: naive, im2col, im2col_tiled,"
        " implicit, shift, slices, winograd, winograd4, fft, xla.",
        X,
        W,
        algorithm="pointwise",
    ),
    # lax's functions
    "channels last by lax's default": mistake(
        "conv_general_dilated",
        ValueError,
        "the channels of lhs (axis 1: 32) must be feature_group_count (1) times the input channels"
        " of rhs (axis 1: 3), got lhs of shape (2, 32, 32, 3) and rhs of shape (3, 3, 3, 8); give"
        " dimension_numbers=('NHWC', 'HWIO', 'NHWC').",
        X,
        W,
        (1, 1),
        "SAME",
    ),
    "depthwise without feature groups": mistake(
        "conv_general_dilated",
        ValueError,
        "the channels of lhs (axis 1: 64) must be feature_group_count (1) times the input channels"
        " of rhs (axis 1: 1), got lhs of shape (2, 64, 8, 8) and rhs of shape (64, 1, 3, 3); the"
        " kernel looks depthwise: give feature_group_count=64.",
        kernel(2, 64, 8, 8),
        kernel(64, 1, 3, 3),
        (1, 1),
        "SAME",
    ),
    "one number for lax's strides": mistake(
        "conv_general_dilated",
        TypeError,
        "window_strides must be 2 positive integers, got 2 for lhs of shape (2, 3, 32, 32) and rhs"
        " of shape (8, 3, 5, 5); give (2, 2).",
        FIRST,
        OIHW,
        2,
        "SAME",
    ),
    "no batch": mistake(
        "conv_general_dilated",
        TypeError,
        "lhs and rhs must have the same rank (batch, channels and the spatial dimensions), got lhs"
        " of shape (3, 32, 32) and rhs of shape (8, 3, 5, 5); add the missing dimensions; a batch"
        " is lhs[None].",
        FIRST[0],
        OIHW,
        (1, 1),
        "SAME",
    ),
    "misspelled padding of a transpose": mistake(
        "conv_transpose",
        ValueError,
        "padding must be 'SAME', 'VALID', with strides of 1 'SAME_LOWER', or (low, high) pairs, got"
        " 'SMAE' for lhs of shape (2, 32, 32, 3) and rhs of shape (3, 3, 3, 8); perhaps 'SAME' is"
        " meant.",
        X,
        W,
        (2, 2),
        "SMAE",
    ),
    "a transpose channels first": mistake(
        "conv_transpose",
        ValueError,
        "the channels of lhs (axis 3: 32) must be the input channels of rhs (axis 2: 3), got lhs of"
        " shape (2, 3, 32, 32) and rhs of shape (3, 3, 3, 8); lhs looks channels-first: move its"
        " channels to the end, jnp.moveaxis(lhs, 1, -1).",
        FIRST,
        W,
        (2, 2),
        "SAME",
    ),
    "a transpose by the forward kernel": mistake(
        "conv_transpose",
        ValueError,
        "the channels of lhs (axis 3: 64) must be the input channels of rhs (axis 2: 3), got lhs of"
        " shape (2, 32, 32, 64) and rhs of shape (4, 4, 3, 64); rhs looks like (kernel…, O, I):"
        " give transpose_kernel=True.",
        WIDE,
        kernel(4, 4, 3, 64),
        (2, 2),
        "SAME",
    ),
    "a transpose of PyTorch": mistake(
        "conv_transpose",
        ValueError,
        "the channels of lhs (axis 3: 64) must be the input channels of rhs (axis 2: 4), got lhs of"
        " shape (2, 32, 32, 64) and rhs of shape (64, 8, 4, 4); rhs looks like PyTorch's"
        " (I, O, kernel…): give rhs.transpose(2, 3, 1, 0) and transpose_kernel=True.",
        WIDE,
        kernel(64, 8, 4, 4),
        (2, 2),
        "SAME",
    ),
    "a transpose of too few channels": mistake(
        "conv_transpose",
        ValueError,
        "the channels of lhs (axis 3: 3) must be the input channels of rhs (axis 2: 4), got lhs of"
        " shape (2, 32, 32, 3) and rhs of shape (3, 3, 4, 8); rhs needs 3 input channels for this"
        " lhs.",
        X,
        kernel(3, 3, 4, 8),
        (2, 2),
        "SAME",
    ),
    # The channels-last others
    "pointwise by the kernel of a convolution": mistake(
        "pointwise",
        TypeError,
        "x must be (…, C) and w (C, O), got x of shape (2, 32, 32, 3) and w of shape (1, 1, 3, 8);"
        " w has the axes of a kernel too: give w.reshape(w.shape[-2:]).",
        X,
        kernel(1, 1, 3, 8),
    ),
    "pointwise by a kernel of PyTorch": mistake(
        "pointwise",
        TypeError,
        "x must be (…, C) and w (C, O), got x of shape (2, 32, 32, 3) and w of shape (8, 3, 1, 1);"
        " w looks like (O, C, kernel…): give w.reshape(w.shape[:2]).T.",
        X,
        kernel(8, 3, 1, 1),
    ),
    "pointwise by a transposed matrix": mistake(
        "pointwise",
        TypeError,
        "x must be (…, C) and w (C, O), got x of shape (2, 32, 32, 3) and w of shape (8, 3); w"
        " looks like (O, C): give w.T.",
        X,
        kernel(8, 3),
    ),
    "pointwise channels first": mistake(
        "pointwise",
        TypeError,
        "x must be (…, C) and w (C, O), got x of shape (2, 3, 32, 32) and w of shape (3, 8);"
        f" {MOVE}.",
        FIRST,
        kernel(3, 8),
    ),
    "im2col with a number": mistake(
        "im2col",
        TypeError,
        "kernel_shape must be a sequence of integers, got 3; give one size for each spatial"
        " dimension: (3, 3).",
        X,
        3,
    ),
    "im2col with the kernel": mistake(
        "im2col",
        TypeError,
        "kernel_shape must be a sequence of integers, got ndarray; give the kernel's shape without"
        " its channels: (3, 3).",
        X,
        W,
    ),
    "im2col with the kernel's shape": mistake(
        "im2col",
        ValueError,
        "kernel_shape must have one size for each spatial dimension of x, which is (N, spatial…, C)"
        " or (spatial…, C), got x of shape (2, 32, 32, 3) and kernel_shape (3, 3, 3, 8); leave out"
        " the kernel's channels: (3, 3).",
        X,
        W.shape,
    ),
    "im2col with one size": mistake(
        "im2col",
        ValueError,
        "kernel_shape must have one size for each spatial dimension of x, which is (N, spatial…, C)"
        " or (spatial…, C), got x of shape (2, 32, 32, 3) and kernel_shape (3,); give 2 sizes, or 3"
        " if x has no batch.",
        X,
        (3,),
    ),
    "im2col by misspelled padding": mistake(
        "im2col",
        ValueError,
        f"padding must be {PADDINGS}, got 'vlaid' for x of shape (2, 32, 32, 3) and kernel_shape"
        " (3, 3); perhaps 'VALID' is meant.",
        X,
        (3, 3),
        padding="vlaid",
    ),
    "col2im to an array": mistake(
        "col2im",
        TypeError,
        "x_shape must be a sequence of integers, got ndarray; give x.shape.",
        kernel(2, 30, 30, 27),
        X,
        (3, 3),
    ),
    "col2im with another padding": mistake(
        "col2im",
        ValueError,
        "patches of x_shape (2, 32, 32, 3) must have the shape (2, 32, 32, 27), got patches of"
        " shape (2, 30, 30, 27), x_shape (2, 32, 32, 3) and kernel_shape (3, 3); give the arguments"
        " passed to im2col.",
        kernel(2, 30, 30, 27),
        X.shape,
        (3, 3),
        padding="SAME",
    ),
    # plan
    "plan by shapes channels first": mistake(
        "plan", ValueError, channels(FIRST, W, 1, MOVE), FIRST.shape, W.shape
    ),
    "plan by an unknown size": mistake(
        "plan",
        ValueError,
        "the sizes of x must not be negative, got (-1, 32, 32, 3); pass the whole shape.",
        (-1, 32, 32, 3),
        W.shape,
    ),
    "plan arrays of another dtype": mistake(
        "plan",
        ValueError,
        "dtype is for operands given as shapes, got none of these; omit it, or pass shapes.",
        X,
        W,
        dtype="bfloat16",
    ),
    "plan on CUDA": mistake(
        "plan",
        ValueError,
        "platform must be 'cpu', 'gpu' or 'tpu', got 'cuda'; write 'gpu'.",
        X,
        W,
        platform="cuda",
    ),
    # What takes functions, platforms and settings
    "explain a result": mistake(
        "explain",
        TypeError,
        "fn must be a function, got ndarray; pass the function itself, not what it returns.",
        X,
    ),
    "explain with arguments": mistake(
        "explain",
        TypeError,
        "fn must be the only argument by position, got 3 arguments; give options by name, and"
        " arguments of fn to jaxconv.explain(fn).",
        jaxconv.conv,
        X,
        W,
    ),
    "accelerate by position": mistake(
        "accelerate",
        TypeError,
        "fn must be the only argument by position, got 2 arguments; give options by name, and"
        " arguments of fn to jaxconv.accelerate(fn).",
        jnp.sin,
        "xla",
    ),
    "accelerate nothing": mistake(
        "accelerate",
        TypeError,
        "fn must be a function, got NoneType; pass the function itself, not what it returns.",
        fn=None,
    ),
    "autotune without arguments": mistake(
        "autotune",
        TypeError,
        "fn's arguments must be given too, got none (conv() missing 2 required positional"
        " arguments: 'x' and 'w'); give them after it: jaxconv.autotune(fn, x, w).",
        jaxconv.conv,
    ),
    "enable on CUDA": mistake(
        "enable",
        ValueError,
        "platforms must be among 'cpu', 'gpu' and 'tpu', got ('cuda',); write 'gpu'.",
        "cuda",
    ),
    "enable a function": mistake(
        "enable",
        ValueError,
        "platforms must be among 'cpu', 'gpu' and 'tpu', got (<class 'float'>,); for one function"
        " use jaxconv.accelerate.",
        float,
    ),
    "a misspelled setting": mistake(
        "config.update",
        ValueError,
        "name must be one of workspace_limit, cache_dir, use_cache, got 'workspace_limits'; perhaps"
        " 'workspace_limit' is meant.",
        "workspace_limits",
        "1GB",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message(name: str) -> None:
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as caught:
        mistake()
    assert caught.type is mistake.error
    assert str(caught.value) == f"jaxconv.{mistake.name}: {mistake.message}"


@pytest.mark.parametrize("name", [n for n, m in MISTAKES.items() if m.name == "conv"])
def test_plan_speaks_as_conv_does(name: str) -> None:
    """Of shapes, dtypes and arguments; not of values and algorithms, of which it takes none."""
    mistake = MISTAKES[name]
    names = dict(zip(("x", "w", "strides"), mistake.args, strict=False)) | mistake.kwargs
    if "algorithm" in names or isinstance(names["x"], (list, tuple)):
        return
    with pytest.raises(mistake.error) as caught:
        jaxconv.plan(**names)
    assert str(caught.value) == f"jaxconv.plan: {mistake.message}"


Remedy = Callable[[Any, Any], dict[str, Any]]
REMEDIES: dict[str, Remedy] = {
    "an image channels first": lambda x, w: {"x": jnp.moveaxis(x, 1, -1)},
    "one image channels first": lambda x, w: {"x": jnp.moveaxis(x, 0, -1)},
    "a kernel of PyTorch": lambda x, w: {"w": w.transpose(2, 3, 1, 0)},
    "both of PyTorch": lambda x, w: {
        "x": jnp.moveaxis(x, 1, -1),
        "w": w.transpose(2, 3, 1, 0),
    },
    "a kernel (kernel…, O, I)": lambda x, w: {"w": w.swapaxes(-1, -2)},
    "exchanged": lambda x, w: {"x": w, "w": x},
    "depthwise without groups": lambda x, w: {"groups": 64},
    "depthwise of PyTorch": lambda x, w: {"w": w.transpose(2, 3, 1, 0), "groups": 64},
    "depthwise of TensorFlow": lambda x, w: {"w": w.reshape(*w.shape[:-2], 1, -1)},
    "another number of groups": lambda x, w: {"groups": 4},
    "gray images": lambda x, w: {"x": x[..., None]},
    "a gray image and a filter": lambda x, w: {"x": x[..., None], "w": w[..., None, None]},
    "a kernel without channels": lambda x, w: {
        "w": jnp.tile(w[..., None, None], 3),
        "groups": 3,
    },
    "a kernel without the one channel": lambda x, w: {"w": w[..., None, None]},
    "one gray image": lambda x, w: {"x": x[..., None]},
    "dtypes": lambda x, w: {"w": w.astype(x.dtype)},
    "an image of bytes": lambda x, w: {"x": x.astype(w.dtype)},
    "one stride for two axes": lambda x, w: {"strides": (2, 2)},
    "strides of TensorFlow": lambda x, w: {"strides": (2, 2)},
    "a pad for each axis": lambda x, w: {"padding": ((1, 1), (2, 2))},
    "one pair": lambda x, w: {"padding": ((1, 1), (1, 1))},
    "pads of TensorFlow": lambda x, w: {"padding": ((1, 1), (1, 1))},
    "a pair in 1-D": lambda x, w: {"padding": ((2, 0),)},
}


@pytest.mark.parametrize("name", REMEDIES)
def test_remedy_is_accepted(name: str) -> None:
    mistake = MISTAKES[name]
    given = dict(zip(("x", "w"), mistake.args, strict=True)) | mistake.kwargs
    given |= REMEDIES[name](given["x"], given["w"])
    assert jax.eval_shape(lambda: jaxconv.conv(**given)).size > 0


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
