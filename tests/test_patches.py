"""``im2col`` and ``col2im``: against loops, lax, and each other."""

import math
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxconv import col2im, im2col, loops

UNROLL = 6  # instead of 64: loops of the same kind, whose programs are a tenth as large


@pytest.fixture(autouse=True)
def few_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "UNROLL", UNROLL)


OPTIONS = ("kernel_shape", "strides", "padding", "dilation")
gathered = jax.jit(im2col, static_argnames=OPTIONS)
scattered = jax.jit(col2im, static_argnames=("x_shape", *OPTIONS))


class Case(NamedTuple):
    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    strides: Any = 1
    padding: Any = "VALID"
    dilation: Any = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"strides": self.strides, "padding": self.padding, "dilation": self.dilation}

    def gather(self, x: Any) -> jax.Array:
        return gathered(x, self.kernel_shape, **self.options)

    def scatter(self, patches: Any) -> jax.Array:
        return scattered(patches, self.x_shape, self.kernel_shape, **self.options)

    def times(self, outputs: int) -> cases.Case:
        """The convolution that multiplies the patches by a matrix with so many columns."""
        n = len(self.kernel_shape)
        strides, dilation = (
            (v,) * n if isinstance(v, int) else v for v in (self.strides, self.dilation)
        )
        padding = self.padding
        if padding == "CAUSAL":
            padding = ((dilation[0] * (self.kernel_shape[0] - 1), 0),)
        elif isinstance(padding, int):
            padding = ((padding, padding),) * n
        kernel = *self.kernel_shape, self.x_shape[-1], outputs
        return cases.case_of(self.x_shape, kernel, strides, padding, rhs_dilation=dilation)

    def loop(self, x: np.ndarray) -> np.ndarray:
        """The patches: products with the unit matrix, by the oracle's loop."""
        size = math.prod(self.kernel_shape) * x.shape[-1]
        conv = self.times(size)
        return conv.loop(x, np.eye(size, dtype=x.dtype).reshape(conv.rhs_shape))


CASES = {
    "0d": Case((2, 3), ()),
    "1d": Case((2, 9, 3), (3,)),
    "1d causal": Case((2, 9, 2), (3,), 1, "CAUSAL", 2),
    "1d loop": Case((1, 12, 2), (8,)),
    "1d loop of many": Case((2, 30, 1), (15,), 3, ((5, -2),)),
    "2d": Case((2, 6, 7, 3), (3, 2)),
    "2d same": Case((2, 6, 7, 3), (3, 3), 2, "SAME"),
    "2d same lower": Case((1, 7, 6, 2), (4, 3), (2, 1), "SAME_LOWER"),
    "2d padded": Case((1, 5, 6, 2), (3, 2), 1, 2, (2, 1)),
    "2d no stride divides": Case((1, 8, 9, 2), (2, 3), (3, 4), ((0, 1), (2, 0))),
    "2d negative padding": Case((1, 8, 7, 2), (3, 3), 1, ((-1, 2), (0, -2))),
    "2d patchify": Case((2, 8, 9, 3), (4, 4), 4),
    "3d": Case((1, 4, 5, 4, 2), (3, 2, 3), (1, 2, 1), "SAME", (1, 1, 2)),
    "no output": Case((2, 2, 5, 3), (3, 3)),
    "no channels": Case((2, 5, 5, 0), (3, 3)),
    "no batch": Case((0, 5, 5, 2), (3, 3)),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
assert CASES["1d loop"].kernel_shape[0] > UNROLL
assert CASES["1d loop of many"].kernel_shape[0] > 2 * UNROLL


def integers(shape: tuple[int, ...], dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    """Small enough for every dtype and sum to be exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


@EVERY_CASE
def test_im2col_is_the_loop(case: Case) -> None:
    x = integers(case.x_shape)
    out = case.gather(x)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, case.loop(x), strict=True)


def test_im2col_is_tap_major_then_channel() -> None:
    x = np.arange(12.0).reshape(1, 2, 3, 2)
    expected = [0, 1, 2, 3, 6, 7, 8, 9], [2, 3, 4, 5, 8, 9, 10, 11]
    np.testing.assert_array_equal(im2col(x, (2, 2)), np.reshape(expected, (1, 1, 2, 8)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", ["1d loop", "2d padded"])
def test_im2col_of_any_dtype(name: str, dtype: str) -> None:
    case, dtype = CASES[name], jnp.dtype(dtype)
    x = np.abs(integers(case.x_shape)).astype(dtype)
    out = case.gather(x)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, case.loop(x).astype(dtype))


@pytest.mark.parametrize("name", ["0d", "1d causal", "2d same", "3d", "no output"])
def test_unbatched_is_one_image_of_a_batch(name: str) -> None:
    case = CASES[name]
    x = integers(case.x_shape)
    p = case.gather(x)
    image = case._replace(x_shape=case.x_shape[1:])
    np.testing.assert_array_equal(image.gather(x[0]), p[0], strict=True)
    expected = case.scatter(p)[0]
    np.testing.assert_array_equal(image.scatter(p[0]), expected, strict=True)


def test_sequences_and_numpy_integers_are_accepted() -> None:
    x = integers((2, 6, 7, 3))
    options = {"strides": np.int64(2), "padding": np.int32(1), "dilation": [1, 2]}
    out = im2col(x, np.array([3, 2]), **options)
    expected = im2col(x, (3, 2), 2, ((1, 1), (1, 1)), (1, 2))
    np.testing.assert_array_equal(out, expected, strict=True)
    back = col2im(out, list(x.shape), [3, 2], **options)
    assert back.shape == x.shape


@EVERY_CASE
def test_col2im_is_the_adjoint(case: Case) -> None:
    x = integers(case.x_shape, np.int32)
    patches = case.gather(x)
    p = integers(patches.shape, np.int32, seed=1)
    back = case.scatter(p)
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    assert np.sum(patches * p) == np.sum(x * back)


@EVERY_CASE
def test_each_is_the_linear_transpose_of_the_other(case: Case) -> None:
    x = jnp.asarray(integers(case.x_shape))
    p = jnp.asarray(integers(jax.eval_shape(case.gather, x).shape, seed=1))

    (gather_t,) = jax.jit(jax.linear_transpose(case.scatter, p))(x)
    (scatter_t,) = jax.jit(jax.linear_transpose(case.gather, x))(p)
    np.testing.assert_array_equal(gather_t, case.gather(x), strict=True)
    np.testing.assert_array_equal(scatter_t, case.scatter(p), strict=True)


def test_more_taps_than_are_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case((1, 80, 2), (70,))
    assert max(case.kernel_shape) > loops.UNROLL > UNROLL
    x = integers(case.x_shape, np.int32)
    patches, sums = jax.jit(lambda x: (p := im2col(x, (70,)), col2im(p, case.x_shape, (70,))))(x)
    np.testing.assert_array_equal(patches, case.loop(x))
    counts = np.convolve(np.ones(11, np.int32), np.ones(70, np.int32))
    np.testing.assert_array_equal(sums, x * counts[:, None], strict=True)


@pytest.mark.parametrize(
    ("kernel", "stride", "rows", "columns"),
    [((3, 3), 1, [1, 2, 2, 1], [1, 2, 3, 2, 1]), ((2, 2), 2, [1, 1, 1, 1], [1, 1, 1, 1, 0])],
)
def test_col2im_counts_overlaps(kernel: Any, stride: int, rows: Any, columns: Any) -> None:
    case = Case((1, 4, 5, 1), kernel, stride)
    counts = case.scatter(case.gather(np.ones(case.x_shape)))[0, ..., 0]
    np.testing.assert_array_equal(counts, np.outer(rows, columns))


def test_col2im_wraps_integers() -> None:
    case = Case((1, 5, 1), (2,))
    back = case.scatter(case.gather(np.full(case.x_shape, 100, np.int8)))
    expected = np.array([100, -56, -56, -56, 100], np.int8)
    np.testing.assert_array_equal(np.ravel(back), expected, strict=True)


@pytest.mark.parametrize("name", ["1d loop", "2d padded", "3d"])
@pytest.mark.parametrize("direction", ["gather", "scatter"])
def test_jit_vmap_and_grad(direction: str, name: str) -> None:
    case = CASES[name]
    shape = jax.eval_shape(case.gather, jax.ShapeDtypeStruct(case.x_shape, np.float64)).shape
    fun, adjoint, given, returned = case.gather, case.scatter, case.x_shape, shape
    if direction == "scatter":
        fun, adjoint, given, returned = adjoint, fun, returned, given
    v = jnp.asarray(integers(given))
    c = jnp.asarray(integers(returned, seed=3))

    @jax.jit
    def transformed(v: jax.Array, c: jax.Array) -> Any:
        batch = jnp.stack([v, 2 * v, -v])
        gradient = jax.grad(lambda v: jnp.vdot(fun(v), c))(v)
        return jax.vmap(fun)(batch), jax.vmap(fun, 1, 1)(batch.swapaxes(0, 1)), gradient

    first, second, gradient = transformed(v, c)
    out = np.asarray(fun(v))
    np.testing.assert_array_equal(first, np.stack([out, 2 * out, -out]), strict=True)
    np.testing.assert_array_equal(second.swapaxes(0, 1), first, strict=True)
    # It is linear: the gradient of ⟨fun(v), c⟩ is the adjoint at c.
    np.testing.assert_array_equal(gradient, adjoint(c), strict=True)


@pytest.mark.parametrize("name", ["1d", "2d", "2d same", "2d negative padding", "3d"])
def test_relation_to_lax_patches(name: str) -> None:
    case = CASES[name]
    x = integers(case.x_shape)
    out = case.gather(x)
    by_channel = out.reshape(*out.shape[:-1], -1, x.shape[-1]).swapaxes(-1, -2).reshape(out.shape)
    expected = lax.conv_general_dilated_patches(x, case.kernel_shape, **case.times(1).arguments)
    np.testing.assert_array_equal(by_channel, expected, strict=True)


@pytest.mark.parametrize(
    ("x_shape", "kernel", "options"),
    [
        ((2, 6, 7, 3), (3, 2), {"dilation": 1, "padding": 0, "stride": 1}),
        ((1, 7, 6, 2), (2, 3), {"dilation": 2, "padding": 1, "stride": 2}),
    ],
)
def test_relation_to_unfold_and_fold(x_shape: Any, kernel: Any, options: dict[str, int]) -> None:
    torch = pytest.importorskip("torch")
    case = Case(x_shape, kernel, options["stride"], options["padding"], options["dilation"])
    x = integers(x_shape)
    n, *size, c = x_shape
    out = case.gather(x)
    p = out.reshape(n, -1, kernel[0] * kernel[1], c)
    channel_major = torch.tensor(np.array(p.transpose(0, 3, 2, 1).reshape(n, -1, p.shape[1])))
    unfolded = torch.nn.functional.unfold(torch.tensor(x).permute(0, 3, 1, 2), kernel, **options)
    np.testing.assert_array_equal(channel_major, unfolded)
    folded = torch.nn.functional.fold(channel_major, size, kernel, **options)
    np.testing.assert_array_equal(case.scatter(out), folded.permute(0, 2, 3, 1))
