"""The FFT algorithm: blocks equal the whole, good lengths, accuracy in float32, and refusals."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case, case_of
from test_algorithms import conv_by

import jaxconv
from jaxconv.algorithms import blocks, fft

by_fft = partial(conv_by, "fft")


@partial(jax.jit, static_argnums=0)
def value_and_gradients(fun: Any, lhs: Any, rhs: Any, cotangent: Any) -> Any:
    out, transpose = jax.vjp(fun, lhs, rhs)
    return out, *transpose(cotangent)


def test_good_lengths() -> None:
    assert [blocks.good_length(n) for n in (1, 13, 17, 542, 1088)] == [1, 14, 18, 550, 1089]
    rounded = [blocks.round_length(n) for n in (1, 5, 7, 9, 11, 4096, 4097, 24300)]
    assert rounded == [1, 5, 8, 10, 12, 4096, 5120, 24576]


def test_only_the_wrap_around_that_is_needed() -> None:
    """SAME padding on both sides shares one border of zeros."""
    (whole, *_) = blocks.axis_candidates(case_of((1, 512, 1), (31, 1, 1)).spec(), 0)
    assert whole.length == blocks.good_length(512 + 15)


@pytest.mark.parametrize("padding", [((5, -3),), ((-5, 6),), ((-3, 9),)], ids=str)
def test_windows_in_the_padding_only(padding: Any) -> None:
    """Values and both gradients are zeros."""
    conv = case_of((2, 3, 1), (3, 1, 1), padding=padding)
    lhs, rhs = (np.ones_like(x) for x in conv.operands())
    cotangent = np.ones(conv.spec().out_shape)
    for zeros in value_and_gradients(by_fft(conv), lhs, rhs, cotangent):
        np.testing.assert_array_equal(zeros, 0)


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts even small convolutions into the shortest blocks, one at a time."""

    def shortest(spec: Any) -> blocks.Blocks:
        axes = [blocks.axis_candidates(spec, d) for d in range(spec.spatial_ndim)]
        return blocks.Blocks(tuple(min(axis, key=lambda a: a.length) for axis in axes), 1, 1)

    monkeypatch.setattr(fft, "blocks_of", shortest)


BLOCKED = [
    case_of((2, 100, 3), (9, 3, 2)),
    case_of((1, 131, 4), (17, 1, 4), feature_group_count=4),
    case_of((1, 131, 1), (8, 1, 1), padding=((20, 3),), strides=(3,), rhs_dilation=(2,)),
    case_of((1, 90, 2), (5, 2, 2), padding=((-3, 40),), lhs_dilation=(2,)),
    case_of((2, 50, 61, 1), (7, 9, 1, 2)),
    case_of((1, 64, 40, 4), (5, 3, 2, 4), padding="VALID", feature_group_count=2, strides=(2, 1)),
    case_of((1, 40, 12, 20, 1), (5, 3, 7, 1, 1)),
]
# Sizes around what a block holds.
BLOCKED += [
    case_of((1, size, 1), (12, 1, 1), padding="VALID") for size in (34, 35, 52, 53, 57, 74, 75)
]


@pytest.mark.parametrize("conv", BLOCKED, ids=lambda conv: str(conv.spec()))
def test_blocks_equal_the_whole(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and both gradients, against lax."""
    lhs, rhs = conv.operands()
    small_steps(monkeypatch)
    assert fft.row_blocks(conv.spec()).per_image > 1 or conv.lhs_shape[1] < 30

    cotangent = np.random.default_rng(1).standard_normal(conv.spec().out_shape)
    ours, by_lax = (
        value_and_gradients(fun, lhs, rhs, cotangent) for fun in (by_fft(conv), conv.lax)
    )
    for got, want in zip(ours, by_lax, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


def window_sums(conv: Case, lhs: Any, rhs: Any, positions: np.ndarray) -> np.ndarray:
    """Exact outputs of one channel at some positions: each the sum of its window's products."""
    image = np.pad(lhs[0, ..., 0].astype(float), conv.spec().padding)
    kernel = rhs[..., 0, 0].astype(float)
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    return np.array([np.sum(windows[tuple(at)] * kernel) for at in positions])


@pytest.mark.parametrize(
    ("size", "taps"), [((512, 512), (31, 31)), ((600, 600), (65, 65)), ((1 << 18,), (4096,))]
)
def test_accuracy_of_large_kernels_in_float32(size: Any, taps: Any) -> None:
    """At most twice lax's error in the mean, at some outputs, those of all corners among them."""
    conv = case_of((1, *size, 1), (*taps, 1, 1))
    lhs, rhs = conv.operands(np.float32)
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in size)), -1).reshape(-1, len(size))
    drawn = np.random.default_rng(1).integers(0, size, (300, len(size)))
    positions = np.concatenate([corners, drawn])
    exact = window_sums(conv, lhs, rhs, positions)
    errors = [
        np.linalg.norm(np.asarray(conv_by(lhs, rhs))[0, ..., 0][tuple(positions.T)] - exact)
        for conv_by in (by_fft(conv), conv.lax)
    ]
    assert errors[0] <= 2 * errors[1]


def test_four_dimensions_are_refused() -> None:
    x: Any = np.ones((1, 1, 2, 2, 2, 2))
    with pytest.raises(jaxconv.UnsupportedConvError, match="1 to 3 dimensions, this has 4"):
        jaxconv.conv_general_dilated(x, x, (1,) * 4, "VALID", algorithm="fft")


def test_workspace_is_bounded() -> None:
    """A long signal is not transformed all at once."""
    long = case_of((1, 1 << 22, 1), (513, 1, 1)).spec(np.float32)
    assert fft.row_blocks(long).per_image > 1
    assert fft.FFT.cost(long).workspace < 5 * blocks.STEP_BYTES


def moderately(conv: Case, seed: int = 0) -> list[np.ndarray]:
    """float32 operands and a cotangent, all of magnitudes near 1."""
    cotangent = np.random.default_rng(seed + 100).standard_normal(conv.spec().out_shape)
    return [*conv.operands(np.float32, seed), cotangent.astype(np.float32)]


@pytest.mark.parametrize(("size", "taps"), [((128, 128), (31, 31)), ((1500,), (1001,))])
def test_error_over_seeds(size: Any, taps: Any) -> None:
    """On magnitudes that are alike the mean square error is about twice lax's: 2.1 at most in eight
    seeds of eleven convolutions."""
    conv = case_of((1, *size, 1), (*taps, 1, 1))
    for seed in range(4):
        operands = moderately(conv, seed)[:2]
        exact = np.asarray(conv.lax(*(x.astype(np.float64) for x in operands)))
        ours, theirs = (
            np.linalg.norm(np.asarray(f(*operands)) - exact) for f in (by_fft(conv), conv.lax)
        )
        assert ours <= 2.2 * theirs, seed


SCALES = [(60, 60), (112, 0), (0, 100), (-50, -50), (-100, 40), (100, -100)]
WIDE = case_of((2, 64, 64, 1), (31, 31, 1, 1))
WIDE_BY_FFT = by_fft(WIDE)  # one object, which is compiled once


@pytest.mark.parametrize(("image", "kernel"), SCALES)
def test_very_large_and_very_small_numbers(image: int, kernel: int) -> None:
    """Powers of two change nothing but the exponent: no spectrum overflows, nothing is rounded."""
    lhs, rhs, cotangent = moderately(WIDE)
    plain = value_and_gradients(WIDE_BY_FFT, lhs, rhs, cotangent)
    exponents = (lhs, image), (rhs, kernel), (cotangent, -kernel)
    scaled = value_and_gradients(WIDE_BY_FFT, *(np.ldexp(*pair) for pair in exponents))
    for x, y, exponent in zip(plain, scaled, (image + kernel, 0, image - kernel), strict=True):
        if -60 <= exponent <= 120:
            np.testing.assert_array_equal(y, np.ldexp(x, exponent))


def test_each_image_has_a_scale_of_its_own() -> None:
    lhs, rhs, _ = moderately(WIDE)
    plain = np.asarray(WIDE_BY_FFT(lhs, rhs))
    lhs[1] = np.ldexp(lhs[1], 110)
    np.testing.assert_array_equal(WIDE_BY_FFT(lhs, rhs)[0], plain[0])
    lhs[1] = 0
    out = np.asarray(WIDE_BY_FFT(lhs, rhs))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(out[0], plain[0])


def test_errors_are_relative_to_the_norm_of_a_block() -> None:
    """Not to each output, where magnitudes range widely: here from 1e-8 to 1."""
    lhs, rhs, cotangent = moderately(WIDE)
    lhs = lhs * np.geomspace(1e-8, 1, lhs.shape[1], dtype=np.float32).reshape(1, -1, 1, 1)
    ours = value_and_gradients(WIDE_BY_FFT, lhs, rhs, cotangent)
    exact = value_and_gradients(WIDE.lax, *(x.astype(np.float64) for x in (lhs, rhs, cotangent)))
    for x, reference in zip(ours, map(np.asarray, exact), strict=True):
        error = np.max(np.abs(np.asarray(x) - reference))
        assert error <= 16 * np.finfo(np.float32).eps * np.max(np.abs(reference))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("conv", BLOCKED[:7:2], ids=lambda conv: str(conv.spec()))
def test_what_is_not_finite_stands_where_lax_has_it(
    conv: Case, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the image, the kernel and the cotangent, at both ends and within; all else stays right."""
    small_steps(monkeypatch)
    lhs, rhs = conv.operands()
    cotangent = np.random.default_rng(1).standard_normal(conv.spec().out_shape)
    ours, by_lax = (partial(value_and_gradients, f) for f in (by_fft(conv), conv.lax))
    for operand, array in enumerate((lhs, rhs, cotangent)):
        for share in (0, 0.4, 1):
            at = tuple(int(share * (size - 1)) for size in array.shape)
            arrays = [lhs, rhs, cotangent]
            arrays[operand] = array.copy()
            arrays[operand][at] = value
            for out, expected in zip(ours(*arrays), by_lax(*arrays), strict=True):
                np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)


def test_one_missing_pixel_does_not_spread_over_its_block() -> None:
    lhs, rhs, _ = moderately(WIDE)
    lhs[0, 40, 20] = np.nan
    for algorithm in ("auto", "fft"):
        out = jaxconv.conv(lhs, rhs, algorithm=algorithm)
        seen = np.zeros(out.shape, bool)
        seen[0, 25:56, 5:36] = True
        np.testing.assert_array_equal(np.isnan(out), seen)
    batched = jax.vmap(jaxconv.conv, (0, None))(lhs[:, None], rhs)
    np.testing.assert_array_equal(np.isnan(batched[:, 0]), seen)
