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
PATCHES = np.zeros((2, 30, 30, 27), np.float32)
LAST = ("NHWC", "HWIO", "NHWC")
SAME, NHWC = ((1, 1), "SAME"), {"dimension_numbers": LAST}
NWC, NCDHW = ("NWC", "WIO", "NWC"), ("NCDHW", "OIDHW", "NCDHW")
NCHW = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}


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


RANKS = "TypeError: w must be (kernel…, C / groups, O) and x (N, spatial…, C) or (spatial…, C), got"
LAX_CHANNELS = (
    "ValueError: the channels of lhs (axis {0}: {{lhs.shape[{0}]}}) must be{2} the input channels"
    " of rhs (axis {1}: {{rhs.shape[{1}]}}), got {{shapes}}"
)
GROUPS = " feature_group_count (1) times"
BESIDES = (
    "ValueError: lhs and rhs must have batch and channels besides the spatial dimensions of {0},"
    " got {0} {{{0}}} for {{shapes}}"
)
SIZES = (
    "ValueError: kernel_shape must have one size for each spatial dimension of {}, which is"
    " (N, spatial…, C) or (spatial…, C), got"
)
OF_COL2IM = f"{SIZES.format('x_shape')} patches of shape (2, 30, 30, 27), x_shape"
NUMBERS = "must be a positive integer or 2 of them, got {given!r} for {shapes}"
NUMBER = "must be a positive integer, got {given!r} for {shapes}"
EACH, PAIR, SIZE = (f"pass one{what} for each spatial dimension" for what in ("", " pair", " size"))
LACKING = f"{EACH}, or add the axes that the operands lack"
NO_CHANNELS = "x and w have no channel axes: pass x[..., None] and w[..., None, None]"
OTHERS = "leave out batch and channels"
STATIC = "pass static Python integers; under jax.jit, name the argument in static_argnums"
PADDINGS = "'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (1-D), an integer, or (low, high) pairs"
PLATFORMS = "ValueError: platforms must be among 'cpu', 'gpu' and 'tpu', got"
MOVE = "x looks channels-first: move its channels to the end, jnp.moveaxis(x, 1, -1)"
OI = "w looks like (O, I, kernel…): pass w.transpose(2, 3, 1, 0)"
CAST = "cast one of them with .astype, for example w.astype(x.dtype)"
DEPTHWISE = "the kernel looks depthwise: use"
SWAPPED = "look swapped: the image comes first"
ADD_FIRST = "add the two axes, lhs[None, None] and rhs[None, None]"
ADD_LAST = "add the two axes, lhs[None, ..., None] and rhs[..., None, None]"
LETTERS = "use {}, or give lhs and rhs an axis for each letter"
NAME_ALL = "name 'N' and 'C', in the kernel 'O' and 'I', and in all three the same other letters"
PASS_FN = "pass the function itself, not what it returns"


def letters(rank: int, usual: tuple[str, ...]) -> str:
    return (
        "TypeError: dimension_numbers must be None, a lax.ConvDimensionNumbers, or three strings"
        f" of length {rank} such as {usual}, got {{given!r}} for {{shapes}}"
    )


# For each constraint the calls that break it, and the remedies. In braces are arguments of the
# call, its operands' shapes, the last that is given, the channels of x and the inputs of w.
TABLE: dict[str, dict[str, str]] = {
    # Layouts
    "ValueError: the channels of x (the last axis: {channels}) must be groups ({groups}) times the"
    " input channels of w (the last axis but one: {inputs}), got {shapes}": {
        "conv(FIRST, W)": MOVE,
        "conv(FIRST[0], W)": MOVE.replace("(x, 1", "(x, 0"),
        "conv(X, OIHW)": OI,
        "conv(FIRST, OIHW)": f"{MOVE}; {OI}",
        "conv(WIDE, kernel(3, 3, 32, 64))": "w looks like (kernel…, O, I): pass w.swapaxes(-1, -2)",
        "conv(W, X)": f"x and w {SWAPPED}",
        "conv(WIDE, kernel(3, 3, 32, 128))": "w needs 64 input channels for this x",
        "conv(WIDE, kernel(3, 3, 1, 64))": f"{DEPTHWISE} groups=64",
        "conv(WIDE, kernel(64, 1, 3, 3))": f"{OI}; {DEPTHWISE} groups=64",
        "conv(WIDE, kernel(3, 3, 64, 1), groups=64)": (
            "w looks like TensorFlow's depthwise kernel (kernel…, C, multiplier): pass"
            " w.reshape(*w.shape[:-2], 1, -1)"
        ),
        "conv(WIDE, kernel(3, 3, 16, 64), groups=2)": "use groups=4",
        "conv(WIDE, kernel(3, 3, 24, 64), groups=5)": "groups must divide the channels of x",
        "conv(kernel(8, 28, 28), kernel(3, 3, 1, 8))": "x has no channel axis: pass x[..., None]",
        "conv(kernel(28, 28), kernel(3, 3))": NO_CHANNELS,
    },
    f"{RANKS} {{shapes}}": {
        "conv(X, kernel(3, 3))": (
            "w has no channel axes: pass jnp.tile(w[..., None, None], 3) and groups=3 for the same"
            " on each"
        ),
        "conv(X[..., :1], kernel(3, 3))": "w has no channel axes: pass w[..., None, None]",
        "conv(X[None], W)": "make the leading axes of x one batch, or add the missing axes of w",
        "conv(X[0, ..., 0], kernel(3, 3, 1, 8))": (
            "add the missing axes, such as x[..., None] for one channel"
        ),
        "conv(X[0, 0, :, 0], W[0, 0, :, 0])": NO_CHANNELS,
        "conv(W, X[0])": f"x and w {SWAPPED}",
    },
    "ValueError: strides must be a positive integer or 0 of them, got (1, 1) for {shapes}": {
        "conv(X[0, ..., 0], W[..., 0, 0], (1, 1))": LACKING
    },
    # Dtypes
    "TypeError: x and w must have the same dtype, got float32 and float64 for {shapes}": {
        "conv(X, W.astype('float64'))": CAST,
        "pointwise(X, kernel(3, 8, dtype='float64'))": CAST,
    },
    "TypeError: x must be an array of numbers, got dtype {x.dtype} and shape {x.shape}": {
        "conv(X.astype(object), W)": "convert it to numbers",
        "conv(jax.random.split(jax.random.key(0), (1, 8, 8, 3)), W)": (
            "draw numbers by it, for example jax.random.normal(key, shape)"
        ),
    },
    "TypeError: w must be an array of numbers, got dtype <U1 and shape (3, 8)": {
        "pointwise(X, np.full((3, 8), 'a'))": "convert it to numbers"
    },
    "TypeError: x must be an array, got tuple": {
        "conv(X.shape, W)": "convert it with jnp.asarray; shapes are for jaxconv.plan"
    },
    "TypeError: preferred_element_type must be a dtype of numbers, got {given!r} for {shapes}": {
        "conv(X, W, preferred_element_type='flaot32')": "did you mean 'float32'?",
        "conv(X, W, preferred_element_type='f32')": "did you mean 'float32'?",
        "conv(X, W, preferred_element_type='fp16')": "did you mean 'float16'?",
        "conv(X, W, preferred_element_type='bf16')": "did you mean 'bfloat16'?",
        "conv(X, W, preferred_element_type=object)": "use one such as jnp.float32",
        "conv(X, W, preferred_element_type=3)": "use one such as jnp.float32",
    },
    "TypeError: preferred_element_type must be a dtype of numbers, got ndarray for {shapes}": {
        "conv(X, W, preferred_element_type=X)": "use its .dtype"
    },
    "ValueError: precision must be None, a name such as 'highest', a lax.Precision, two of either,"
    " or a lax.DotAlgorithmPreset, got {given!r} for {shapes}": {
        "conv(X, W, precision='hihgest')": "did you mean 'highest'?",
        "conv(X, W, precision='BF16_BF16_F23')": "did you mean 'BF16_BF16_F32'?",
        "conv(X, W, precision='best')": "use a name",
        "conv(X, W, precision=3)": "use a name",
        "conv(X, W, precision=('high',) * 3)": "use a name",
    },
    "TypeError: out_sharding must be a jax.sharding.NamedSharding or PartitionSpec, got 'rows'": {
        "conv_general_dilated(FIRST, OIHW, *SAME, out_sharding='rows')": (
            "pass one such as jax.P('x')"
        )
    },
    "ValueError: spatial_axes must be 2 mesh axes or None, one for each spatial dimension, got"
    " {given!r}": {
        f"conv(X, W, spatial_axes={given!r})": "pass one for each, such as ('rows', None)"
        for given in (("rows",), "rows", 1, (0, 1))
    },
    # Strides, dilation, groups, padding
    **{
        f"{error}: {argument} {NUMBERS}": {
            f"{call}, {argument}={given})": remedy
            for call in ("conv(X, W", "im2col(X, (3, 3)")
            for given, remedy in remedies.items()
        }
        for argument in ("strides", "dilation")
        for error, remedies in {
            "TypeError": {1.5: STATIC, (1.0, 2): STATIC},
            "ValueError": {
                0: "use 1",
                (0, 1): "use 1",
                (2,): f"{EACH}: (2, 2)",
                (1, 2, 2, 1): f"{OTHERS}: (2, 2)",
                (1, 2, 3): LACKING,
            },
        }.items()
    },
    "TypeError: strides must be a positive integer or 2 of them, got 'SAME' for {shapes}": {
        "conv(X, W, strides='SAME')": "pass padding by name, padding='SAME'"
    },
    f"ValueError: groups {NUMBER}": {"conv(X, W, groups=0)": "use 1 without groups"},
    f"TypeError: groups {NUMBER}": {"conv(X, W, groups='depthwise')": STATIC},
    "ValueError: groups must divide the output channels of w, got 9 in 2 groups for {shapes}": {
        "conv(WIDE, kernel(3, 3, 32, 9), groups=2)": "use a multiple of 2, or change groups"
    },
    f"ValueError: padding must be {PADDINGS}, got {{given!r}} for {{shapes}}": {
        "conv(X, W, padding='SMAE')": "did you mean 'SAME'?",
        "im2col(X, (3, 3), padding='vlaid')": "did you mean 'VALID'?",
    },
    f"ValueError: padding must be {PADDINGS} of integers, got {{given!r}} for {{shapes}}": {
        "conv(X, W, padding=None)": "use 'VALID' for none",
        "conv(X, W, padding=1.5)": PAIR,
        "conv(X, W, padding=(1, 2))": f"{PAIR}: ((1, 1), (2, 2))",
        "conv(X[0], W[0], padding=(2, 0))": f"{PAIR}: ((2, 0),)",
    },
    "TypeError: padding must have one (low, high) pair for each of 2 spatial dimensions, got"
    " {given!r} for {shapes}": {
        "conv(X, W, padding=((1, 1),))": f"{EACH}: ((1, 1), (1, 1))",
        "conv(X, W, padding=((0, 0), (1, 1), (1, 1), (0, 0)))": f"{OTHERS}: ((1, 1), (1, 1))",
    },
    "ValueError: padding 'CAUSAL' is for one spatial dimension, got 2 of them for {shapes}": {
        "conv(X, W, padding='causal')": "pass (low, high) pairs",
        "im2col(X, (3, 3), padding='causal')": "pass (low, high) pairs",
    },
    "ValueError: negative padding must not be larger than the dimension that it crops, got padding"
    " (-20, -20) of 32 elements for {shapes}": {"conv(X, W, padding=-20)": "crop less"},
    # Algorithms
    "ValueError: algorithm must be 'auto' or one of naive, im2col, im2col_tiled, implicit,"
    " pointwise, shift, phase, slices, winograd, winograd4, fft, xla, got {given!r}": {
        "conv(X, W, algorithm='Winogard')": "did you mean 'winograd'?"
    },
    "UnsupportedConvError: algorithm 'pointwise' can't do this convolution (windows overlap: kernel"
    " (3, 3), strides (1, 1)), got float32[2,32,32,3] * float32[3,3,3,8] → float32[2,32,32,8],"
    " padding ((1, 1), (1, 1))": {
        "conv(X, W, algorithm='pointwise')": (
            "use algorithm='auto', or one that can: naive, im2col, im2col_tiled, implicit, shift,"
            " slices, winograd, winograd4, fft, xla"
        )
    },
    # lax's functions
    LAX_CHANNELS.format(1, 1, GROUPS): {
        "conv_general_dilated(X, W, *SAME)": f"use dimension_numbers={LAST}",
        "conv_general_dilated(kernel(2, 64, 8, 8), kernel(64, 1, 3, 3), *SAME)": (
            f"{DEPTHWISE} feature_group_count=64"
        ),
    },
    LAX_CHANNELS.format(3, 2, GROUPS): {
        "conv_general_dilated(W, X, *SAME, **NHWC)": f"lhs and rhs {SWAPPED}",
        "conv_general_dilated(WIDE, kernel(3, 3, 8, 64), *SAME, **NHWC)": (
            "use dimension_numbers=('NHWC', 'HWOI', 'NHWC')"
        ),
    },
    letters(3, NWC): {
        "conv_general_dilated(X[0], W[0], (1,), 'SAME', **NHWC)": LETTERS.format(NWC)
    },
    letters(5, NCDHW): {
        "conv_general_dilated(FIRST[..., None], OIHW[..., None], (1,) * 3, 'SAME',"
        " **NCHW)": LETTERS.format(NCDHW)
    },
    letters(2, ("NC", "IO", "NC")): {
        "conv_general_dilated(X[0, ..., 0], W[..., 0, 0], (), 'SAME', **NHWC)": (
            f"{ADD_LAST}, or use ('NC', 'IO', 'NC')"
        )
    },
    letters(4, LAST): {
        f"conv_general_dilated(X, W, *SAME, dimension_numbers={given!r})": remedy
        for given, remedy in {
            "NHWC": f"pass all three, such as {LAST}",
            LAST[:2]: f"pass all three, such as {LAST}",
            3: f"pass all three, such as {LAST}",
            ("nhwc", "hwio", "nhwc"): f"did you mean {LAST}?",
            ("HWIO", "NHWC", "NHWC"): f"did you mean {LAST}?",
            ("NHWC", "HWCO", "NHWC"): NAME_ALL,
            ("NHWC", "HWIO", "HHNC"): NAME_ALL,
            ("NHWC", "XYIO", "NHWC"): NAME_ALL,
            ((0, 3, 1, 2),) * 3: (
                "for axes by number pass lax.ConvDimensionNumbers(*dimension_numbers)"
            ),
        }.items()
    },
    BESIDES.format("window_strides"): {
        "conv_general_dilated(X[0, ..., 0], W[..., 0, 0], *SAME)": ADD_FIRST
    },
    BESIDES.format("strides"): {
        "conv_transpose(X[0, ..., 0], W[..., 0, 0], (2, 2), 'SAME')": ADD_LAST
    },
    "TypeError: lhs and rhs must have at least a batch and a channel dimension, got {shapes}": {
        "conv_general_dilated(X[0, 0, :, 0], W[0, 0, :, 0], (1,), 'SAME')": ADD_FIRST
    },
    "TypeError: window_strides must be 2 positive integers, got 2 for {shapes}": {
        "conv_general_dilated(FIRST, OIHW, 2, 'SAME')": "use (2, 2)"
    },
    "TypeError: lhs and rhs must have the same rank (batch, channels and the spatial dimensions),"
    " got {shapes}": {
        f"conv_general_dilated({operands})": remedy
        for operands, remedy in {
            "FIRST[0], OIHW, *SAME": "lhs has no batch: pass lhs[None]",
            "FIRST[:, 0], OIHW[:, :1], *SAME": "lhs has no channel axis: pass lhs[:, None]",
            "FIRST[0, 0], OIHW, *SAME": "add the two axes, lhs[None, None]",
            "FIRST, OIHW[0, 0], *SAME": "add the two axes, rhs[None, None]",
            "OIHW, FIRST[0], *SAME": f"lhs and rhs {SWAPPED}",
            "X[None], OIHW, *SAME": "make the leading axes of lhs one batch",
            "X[0, 0, 0], OIHW[..., None], *SAME": "add the missing axes",
            "X[..., 0], W[:, :, :1], *SAME, **NHWC": "lhs has no channel axis: pass lhs[..., None]",
            "X[0, ..., 0], W, *SAME, **NHWC": "add the two axes, lhs[None, ..., None]",
            "X, W[..., 0, 0], *SAME, **NHWC": "add the two axes, rhs[..., None, None]",
        }.items()
    },
    "ValueError: padding must be 'SAME', 'VALID', with strides of 1 'SAME_LOWER', or (low, high)"
    " pairs, got {padding!r} for {shapes}": {
        "conv_transpose(X, W, (2, 2), 'SMAE')": "did you mean 'SAME'?",
        "conv_transpose(X, W, (2, 2), 'SAME_LOWER')": "use one of these",
    },
    LAX_CHANNELS.format(3, 2, ""): {
        "conv_transpose(FIRST, W, (2, 2), 'SAME')": (
            "use dimension_numbers=('NCHW', 'HWIO', 'NCHW')"
        ),
        "conv_transpose(WIDE, kernel(4, 4, 3, 64), (2, 2), 'SAME')": "use transpose_kernel=True",
        "conv_transpose(WIDE, kernel(64, 8, 4, 4), (2, 2), 'SAME')": (
            "use dimension_numbers=('NHWC', 'OIHW', 'NHWC'); use transpose_kernel=True"
        ),
        "conv_transpose(W, X, (2, 2), 'SAME')": f"lhs and rhs {SWAPPED}",
    },
    # The channels-last others
    "TypeError: x must be (…, C) and w (C, O), got {shapes}": {
        "pointwise(W[0, 0], X)": f"x and w {SWAPPED}",
        "pointwise(X, W[0, 0, :, 0])": "w has no axis of output channels: pass w[:, None]",
        "pointwise(X, kernel(1, 1, 3, 8))": (
            "w has the axes of a kernel too: pass w.reshape(w.shape[-2:])"
        ),
        "pointwise(X, kernel(8, 3, 1, 1))": (
            "w looks like (O, C, kernel…): pass w.reshape(w.shape[:2]).T"
        ),
        "pointwise(X, kernel(8, 3))": "w looks like (O, C): pass w.T",
        "pointwise(FIRST, kernel(3, 8))": MOVE,
    },
    "TypeError: kernel_shape must be a sequence of integers, got {kernel_shape}": {
        "im2col(X, 3)": f"{SIZE}: (3, 3)",
        "im2col(X, (3.0, 3.0))": SIZE,
    },
    "TypeError: kernel_shape must be a sequence of integers, got ndarray": {
        "im2col(X, W)": "pass the kernel's shape without its channels: (3, 3)"
    },
    SIZES.format("x") + " {shapes}": {
        "im2col(X, W.shape)": "leave out the kernel's channels: (3, 3)",
        "im2col(X, (3,))": "pass 2 sizes, or 3 if there is no batch",
        "im2col(kernel(6), (3,))": "add a channel axis, x[..., None], or pass fewer sizes",
    },
    "TypeError: x_shape must be a sequence of integers, got ndarray": {
        "col2im(PATCHES, X, (3, 3))": "pass x.shape"
    },
    "ValueError: patches of x_shape (2, 32, 32, 3) must have the shape (2, 32, 32, 27), got patches"
    " of shape (2, 30, 30, 27), x_shape (2, 32, 32, 3) and kernel_shape (3, 3)": {
        "col2im(PATCHES, X.shape, (3, 3), padding='SAME')": "pass the arguments that im2col had"
    },
    f"{OF_COL2IM} (32, 32) and kernel_shape (3, 3)": {
        "col2im(PATCHES, (32, 32), (3, 3))": (
            "add a channel axis, (32, 32, 1), or pass fewer sizes"
        )
    },
    f"{OF_COL2IM} (3, 3) and kernel_shape (2, 32, 32, 3)": {
        "col2im(PATCHES, (3, 3), X.shape)": (
            "x_shape and kernel_shape look swapped: x_shape comes first"
        )
    },
    "ValueError: sizes in x_shape must be 0 or more, got (-1, 32, 32, 3)": {
        "col2im(PATCHES, (-1, 32, 32, 3), (3, 3))": "pass x.shape"
    },
    "ValueError: sizes in kernel_shape must be 1 or more, got (0, 3)": {
        "im2col(X, (0, 3))": "use 1"
    },
    # plan
    "ValueError: the sizes of x must not be negative, got (-1, 32, 32, 3)": {
        "plan((-1, 32, 32, 3), W.shape)": "pass the whole shape"
    },
    "ValueError: dtype is for operands given as shapes, got none of these": {
        "plan(X, W, dtype='bfloat16')": "omit it, or pass shapes"
    },
    "ValueError: platform must be 'cpu', 'gpu' or 'tpu', got {platform!r}": {
        "plan(X, W, platform='cuda')": "use 'gpu'",
        "plan(X, W, platform='CPU')": "did you mean 'cpu'?",
        "explain(jnp.sin, platform='CPU')": "did you mean 'cpu'?",
    },
    # What takes functions, platforms and settings
    "TypeError: fn must be a function, got ndarray": dict.fromkeys(
        ("explain(X)", "autotune(X)"), PASS_FN
    ),
    "TypeError: fn must be a function, got NoneType": dict.fromkeys(
        ("accelerate(fn=None)", "autotune(x=X)"), PASS_FN
    ),
    f"{PLATFORMS} ('cpu', 'quantum')": {"enable(('cpu', 'quantum'))": "use one of these"},
    f"{PLATFORMS} ('cuda',)": {"enable('cuda')": "use 'gpu'"},
    f"{PLATFORMS} (<class 'float'>,)": {"enable(float)": "for one function use jaxconv.accelerate"},
    "ValueError: name must be one of workspace_limit, cache_dir, use_cache, got {name!r}": {
        "config.update('workspace_limits', '1GB')": "did you mean 'workspace_limit'?",
        "config.update('limits', 1)": "use one of these",
    },
}


def arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def mistake(constraint: str, call: str, remedy: str) -> Mistake:
    name, _, rest = call.partition("(")
    args, kwargs = eval(f"arguments({rest}")
    bound = inspect.signature(function(name)).bind(*args, **kwargs)
    bound.apply_defaults()
    values = {**bound.arguments, "given": [*kwargs.values(), None][-1 - bool(kwargs)]}
    shapes = {name: getattr(values[name], "shape", None) for name in [*values][:2]}
    values["shapes"] = " and ".join(
        f"{name} {values[name]}" if shape is None else f"{name} of shape {shape}"
        for name, shape in shapes.items()
    )
    x, w = ((0, 0, *(shape or ())) for shape in shapes.values())
    values |= {"channels": x[-1], "inputs": w[-2]}
    error, _, must = constraint.partition(": ")
    message = f"{must.format_map(values)}; {remedy}{'' if remedy.endswith('?') else '.'}"
    return Mistake(name, args, kwargs, ERRORS[error], message)


ERRORS = {e.__name__: e for e in (TypeError, ValueError, jaxconv.UnsupportedConvError)}
MISTAKES = {
    call: mistake(constraint, call, remedy)
    for constraint, calls in TABLE.items()
    for call, remedy in calls.items()
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
    "conv(X, W, strides='SAME')",
    "conv_general_dilated(X[0, ..., 0], W[..., 0, 0], (), 'SAME', **NHWC)",
    "conv_general_dilated(FIRST[0, 0], OIHW, *SAME)",
    "conv_general_dilated(X[0, ..., 0], W, *SAME, **NHWC)",
    "conv_general_dilated(FIRST, OIHW[0, 0], *SAME)",
    "conv_general_dilated(X, W[..., 0, 0], *SAME, **NHWC)",
    "conv_general_dilated(OIHW, FIRST[0], *SAME)",
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

    (expected,) = jax.jit(jax.linear_transpose(forward, np.zeros((2, 10, 10, 3))))(x)
    out = jaxconv.conv_transpose(x, w.transpose(2, 3, 1, 0), (2, 2), "SAME", transpose_kernel=True)
    np.testing.assert_allclose(out, expected, 1e-12, 1e-12)


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
