"""The FFT algorithm: blocks equal the whole, good lengths, accuracy in float32, and refusals."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import LAST, Case
from jax import lax

import jaxconv
from jaxconv.algorithms import blocks, fft


def case(lhs_shape: Any, rhs_shape: Any, padding: Any = "SAME", **arguments: Any) -> Case:
    ndim = len(lhs_shape) - 2
    arguments = {"window_strides": (1,) * ndim, "padding": padding} | arguments
    return Case("", lhs_shape, rhs_shape, arguments | {"dimension_numbers": LAST[ndim]})


def by_fft(conv: Case, lhs: Any, rhs: Any) -> Any:
    return jaxconv.conv_general_dilated(lhs, rhs, **conv.arguments, algorithm="fft")


def test_good_lengths() -> None:
    assert [blocks.good_length(n) for n in (1, 13, 17, 542, 1088)] == [1, 14, 18, 550, 1089]
    rounded = [blocks.round_length(n) for n in (1, 5, 7, 9, 11, 4096, 4097, 24300)]
    assert rounded == [1, 5, 8, 10, 12, 4096, 5120, 24576]


def test_only_the_wrap_around_that_is_needed() -> None:
    """SAME padding on both sides shares one border of zeros."""
    (whole, *_) = blocks.axis_candidates(case((1, 512, 1), (31, 1, 1)).spec(), 0)
    assert whole.length == blocks.good_length(512 + 15)


ONLY_PADDING = [((5, -3),), ((-5, 6),), ((-3, 9),)]


@pytest.mark.parametrize("padding", ONLY_PADDING, ids=str)
def test_windows_in_the_padding_only(padding: Any) -> None:
    """Values and both gradients are zeros."""
    conv = case((2, 3, 1), (3, 1, 1), padding)
    lhs, rhs = (np.ones_like(x) for x in conv.operands())
    out, transpose = jax.vjp(partial(by_fft, conv), lhs, rhs)
    assert out.shape == conv.spec().out_shape
    for zeros in (out, *transpose(out + 1)):
        np.testing.assert_array_equal(zeros, 0)


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts even small convolutions into the shortest blocks, one at a time."""

    def shortest(spec: Any) -> blocks.Blocks:
        axes = [blocks.axis_candidates(spec, d) for d in range(spec.spatial_ndim)]
        return blocks.Blocks(tuple(min(axis, key=lambda a: a.length) for axis in axes), 1, 1)

    monkeypatch.setattr(fft, "blocks_of", shortest)


BLOCKED = [
    case((2, 100, 3), (9, 3, 2)),
    case((1, 131, 4), (17, 1, 4), feature_group_count=4),
    case((1, 131, 1), (8, 1, 1), ((20, 3),), window_strides=(3,), rhs_dilation=(2,)),
    case((1, 90, 2), (5, 2, 2), ((-3, 40),), lhs_dilation=(2,)),
    case((2, 50, 61, 1), (7, 9, 1, 2)),
    case((1, 64, 40, 4), (5, 3, 2, 4), "VALID", feature_group_count=2, window_strides=(2, 1)),
    case((1, 60, 20, 40, 1), (5, 3, 7, 1, 1)),
]
# Sizes around what a block holds.
BLOCKED += [case((1, size, 1), (12, 1, 1), "VALID") for size in (34, 35, 52, 53, 57, 74, 75)]


@pytest.mark.parametrize("conv", BLOCKED, ids=lambda conv: str(conv.spec()))
def test_blocks_equal_the_whole(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and both gradients, against lax."""
    lhs, rhs = conv.operands()
    small_steps(monkeypatch)
    assert fft.blocks_of(conv.spec()).chunks > 1 or conv.lhs_shape[1] < 30

    expected, transpose = jax.vjp(conv.lax, lhs, rhs)
    cotangent = np.random.default_rng(1).standard_normal(expected.shape)
    out = jax.jit(partial(by_fft, conv))(lhs, rhs)
    gradients = jax.jit(lambda *args: jax.vjp(partial(by_fft, conv), *args)[1](cotangent))(lhs, rhs)
    for got, want in zip((out, *gradients), (expected, *transpose(cotangent)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize(
    ("size", "taps"), [((512, 512), (31, 31)), ((1024, 1024), (65, 65)), ((1 << 20,), (4096,))]
)
def test_accuracy_of_large_kernels_in_float32(size: Any, taps: Any) -> None:
    """At most twice lax's error, relative to the largest output."""
    conv = case((1, *size, 1), (*taps, 1, 1))
    lhs, rhs = conv.operands(np.float32)
    exact = np.asarray(by_fft(conv, lhs.astype(np.float64), rhs.astype(np.float64)))
    errors = [
        np.max(np.abs(np.asarray(out) - exact))
        for out in (by_fft(conv, lhs, rhs), conv.lax(lhs, rhs))
    ]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_transformed_in_float32(dtype: str) -> None:
    conv = case((1, 200, 1), (33, 1, 1))
    lhs, rhs = conv.operands(dtype)
    out = by_fft(conv, lhs, rhs)
    assert out.dtype == dtype
    expected = oracles.lax_conv(lhs, rhs, **conv.arguments)
    magnitude = oracles.lax_conv(np.abs(lhs), np.abs(rhs), **conv.arguments)
    spread = oracles.SPREAD["fft"]
    oracles.check(out, expected, magnitude, 33, jnp.dtype(dtype), spread)


def test_refusals() -> None:
    integers = case((1, 8, 1), (3, 1, 1)).spec(np.int32)
    assert "int32 would not stay exact" in str(fft.supports(integers))
    spec = case((1, 8, 1), (3, 1, 1)).spec()
    highest = spec.replace(precision=(lax.Precision.HIGHEST,) * 2)
    assert "'highest'" in str(fft.supports(highest))
    x: Any = np.ones((1, 1, 2, 2, 2, 2))
    with pytest.raises(jaxconv.UnsupportedConvError, match="1 to 3 dimensions, this has 4"):
        jaxconv.conv_general_dilated(x, x, (1,) * 4, "VALID", algorithm="fft")


def test_workspace_is_bounded() -> None:
    """A long signal is not transformed all at once."""
    long = case((1, 1 << 22, 1), (513, 1, 1)).spec(np.float32)
    assert fft.blocks_of(long).chunks > 1
    assert fft.cost(long).workspace < 5 * blocks.STEP_BYTES
