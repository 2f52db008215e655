"""Winograd's matrices, exactly; its accuracy; what it refuses; blocks of every size."""

import itertools
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, case_of
from test_algorithms import conv_by
from test_fft import value_and_gradients

import jaxconv
from jaxconv.algorithms import winograd
from jaxconv.algorithms.base import apply
from jaxconv.algorithms.cook_toom import transforms

NAMES = ("winograd", "winograd4")


@pytest.mark.parametrize(
    ("m", "r"), [(m, r) for m, r in itertools.product((1, 2, 3, 4), range(1, 8)) if m + r <= 9]
)
def test_the_matrices_make_a_correlation(m: int, r: int) -> None:
    """Aᵀ[(G g) ⊙ (Bᵀ d)] for all unit vectors g and d, which are linear in both."""
    a, g, b = (np.array(matrix, object) for matrix in transforms(m, r))
    assert a.shape == (m, m + r - 1)
    assert g.shape == (m + r - 1, r)
    assert b.shape == (m + r - 1,) * 2
    assert all(isinstance(x, Fraction) for matrix in (a, g, b) for x in matrix.flat)
    products = np.einsum("if,fk,fj->ikj", a, g, b)
    for i, k, j in itertools.product(range(m), range(r), range(m + r - 1)):
        assert products[i, k, j] == (j == i + k)


def test_the_matrices_of_lavin_and_gray() -> None:
    """F(2, 3) is the paper's but for the sign of a row of Bᵀ, which Aᵀ or G has too."""
    a, g, b = transforms(2, 3)
    assert np.abs(np.array(a, float)).tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert np.abs(np.array(g, float)).tolist() == [[1, 0, 0], [0.5] * 3, [0.5] * 3, [0, 0, 1]]
    rows = [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert np.abs(np.array(b, float)).tolist() == rows


def large(channels: int) -> Case:
    return case_of((1, 15, 14, channels), (3, 3, channels, channels))


where_auto_takes_it = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason='"auto" takes Winograd on CPU only'
)


@where_auto_takes_it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels", [16, 64])
def test_accuracy(channels: int, dtype: str) -> None:
    """F(2, 3) has at most twice the error of lax in the same dtype, forward and backward."""
    case = large(channels)
    lhs, rhs = (jnp.asarray(x, dtype) for x in case.operands())
    out = jnp.asarray(case.operands(seed=1)[0], dtype)

    def computed(conv: Any, *args: Any) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) for x in value_and_gradients(conv, *args)]

    exact = computed(case.lax, *(np.asarray(x, np.float64) for x in (lhs, rhs, out)))
    ours, theirs = (computed(f, lhs, rhs, out) for f in (conv_by("winograd", case), case.lax))
    for x, y, reference in zip(ours, theirs, exact, strict=True):
        assert np.linalg.norm(x - reference) <= 2 * np.linalg.norm(y - reference)


def test_blocks_of_few_channels_are_larger() -> None:
    """So that their products are large enough for all cores."""
    cases = [case_of((8, 28, 28, c), (3, 3, c, c)) for c in (128, 256)]
    few, many = (winograd.tiling(2, case.spec(jnp.dtype("float32"))) for case in cases)
    assert (few.images, many.images) == (4, 1)
    assert few.block_bytes <= winograd.BLOCK_BYTES_OF_FEW
    assert many.block_bytes <= max(winograd.BLOCK_BYTES, many.kernel_bytes)


@pytest.mark.parametrize("limit", [1, 3000, 12000])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["3x3", "grouped", "1d five taps", "negative padding", "3d dense"])
def test_blocks(case: str, name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an image, one image, several: values and weight gradients are the same."""
    monkeypatch.setattr(winograd, "BLOCK_BYTES_OF_FEW", limit)
    monkeypatch.setattr(winograd.Tiling, "kernel_bytes", 0)
    algorithm, spec = jaxconv.ALGORITHMS[name], CASES[case].spec()
    lhs, rhs = CASES[case].operands()
    out = np.random.default_rng(2).standard_normal(spec.out_shape)
    gradient = algorithm.gradient
    assert gradient is not None
    found = jax.jit(
        lambda lhs, rhs, out: (
            apply(algorithm, lhs, rhs, spec, lambda *_: pytest.fail("hands nothing on")),
            gradient(lhs, out, spec),
        )
    )(lhs, rhs, out)
    expected = CASES[case].loop(lhs, rhs), CASES[case].loop_gradients(lhs, rhs, out)[1]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)
    cost = algorithm.cost(spec)
    assert cost.steps == winograd.tiling(2 if name == "winograd" else 4, spec).blocks.steps


@pytest.mark.parametrize("exponent", [-90, 60, 118])
@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_change_nothing_else(name: str, exponent: int) -> None:
    """No sum of elements overflows below a quarter of the largest number."""
    case = CASES["3x3"]
    lhs, rhs = (np.asarray(x, np.float32) for x in case.operands())
    lhs[0, :2] = 0
    conv = jax.jit(conv_by(name, case))
    out = conv(lhs, rhs)
    np.testing.assert_array_equal(conv(np.ldexp(lhs, exponent), rhs), np.ldexp(out, exponent))
    np.testing.assert_array_equal(conv(0 * lhs, rhs), 0 * out)


@where_auto_takes_it
def test_accuracy_where_magnitudes_range_widely() -> None:
    """Rows from 1e-8 to 1: each has at most twice the error of lax."""
    case = large(16)
    lhs, rhs = (np.asarray(x, np.float32) for x in case.operands())
    lhs = lhs * np.geomspace(1e-8, 1, lhs.shape[1], dtype=np.float32).reshape(1, -1, 1, 1)
    exact = np.asarray(case.lax(lhs.astype(np.float64), rhs.astype(np.float64)))
    errors = [
        np.sum((np.asarray(conv(lhs, rhs)) - exact) ** 2, axis=(0, 2, 3))
        for conv in (conv_by("winograd", case), case.lax)
    ]
    assert (errors[0] <= 2**2 * errors[1]).all()


@pytest.mark.parametrize("at", [(0, 0), (3, 3), (6, 13), (13, 0), (13, 13)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stands_where_lax_has_it(name: str, padding: str, at: tuple[int, int]) -> None:
    """In the image, the kernel and the cotangent; infinity too, but by F(2, 3) it becomes NaN."""
    case = case_of((2, 14, 14, 16), (3, 3, 16, 17), padding=padding)
    lhs, rhs = case.operands()
    cotangent = np.random.default_rng(1).standard_normal(case.spec().out_shape)

    def values(conv: Any, lhs: Any, rhs: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(conv, lhs, rhs)
        return out, pull(cotangent)[0]

    ours, by_lax = (jax.jit(partial(values, conv)) for conv in (conv_by(name, case), case.lax))
    for value in (np.nan, np.inf):
        image, other = lhs.copy(), cotangent.copy()
        image[(1, *at, 7)] = other[1, at[0] % 12, at[1] % 12, 5] = value
        kernel = rhs.copy()
        kernel[1, 2, 3, 4] = value
        for arrays in ((image, rhs, other), (lhs, kernel, cotangent)):
            for out, expected in zip(ours(*arrays), by_lax(*arrays), strict=True):
                if name == "winograd" and arrays[1] is kernel:
                    # lax multiplies padding by NaN in some of its loops only.
                    out, expected = out[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2]
                if name == "winograd":
                    expected = np.where(np.isfinite(expected), expected, np.nan)
                    out = np.where(np.isfinite(out), out, np.nan)
                np.testing.assert_allclose(out, expected, rtol=0, atol=1e-10)
