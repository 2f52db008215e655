"""Where values cross from one convolution to the next, XLA computes none of them again."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import jaxconv
from jaxconv import loops
from jaxconv.algorithms import shift

IMAGE = jax.random.normal(jax.random.key(0), (2, 20, 8), jnp.float32)
KERNEL = jax.random.normal(jax.random.key(1), (3, 2, 8), jnp.float32)
dense = partial(jaxconv.conv, w=jnp.eye(8, dtype=np.float32)[None], algorithm="pointwise")


def lax_conv(x: Array, w: Array) -> Array:
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=4
    )


def conv(x: Array, w: Array) -> Array:
    return jaxconv.conv(x, w, groups=4, algorithm="shift")


def stored(function: Callable[..., Array], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many operands are stored before they are convolved; the values are checked."""
    found: list[Array] = []
    store = loops.stored
    monkeypatch.setattr(loops, "stored", lambda x: (found.append(x), store(x))[1])
    out = jax.jit(function)(IMAGE, KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "conv", lax_conv)
        expected = function(IMAGE, KERNEL)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    return len(found)


def jitted(x: Array, w: Array) -> Array:
    block = jax.jit(lambda x: jax.nn.relu(conv(x, w)))
    return block(block(x))


def scanned(x: Array, w: Array) -> Array:
    return lax.scan(lambda x, _: (conv(jax.nn.relu(conv(x, w)), w), None), x, None, length=2)[0]


MANY = {
    "one after another": lambda x, w: conv(conv(x, w), w),
    "an activation between": lambda x, w: conv(jax.nn.gelu(conv(x, w)), w),
    "padded between": lambda x, w: conv(jnp.pad(conv(x, w), ((0, 0), (2, 2), (0, 0))), w),
    "a residual sum": lambda x, w: conv(x + conv(x, w), w),
    "in a scan": scanned,
    "a jitted block": jitted,
}
FEW = {
    "alone": conv,
    "an activation": lambda x, w: conv(jax.nn.gelu(x), w),
    "a normalisation": lambda x, w: conv(jax.nn.standardize(x), w),
    "a product": lambda x, w: conv(jax.nn.relu(x @ w[0].repeat(4, 0)), w),
    "a product of the first's": lambda x, w: conv(dense(conv(x, w)), w),
}


@pytest.mark.parametrize("function", MANY.values(), ids=MANY)
def test_the_second_reads_what_the_first_stored(
    function: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored(function, monkeypatch) >= 1


def test_blocks_of_taps_that_are_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of one step: 3×3 in groups of 8 of 64 channels, 4×28×28, took 76 ms, so 2."""
    monkeypatch.setattr(shift, "UNROLL", 4)
    monkeypatch.setattr(shift, "TERMS_OF_BLOCK", 5)
    assert stored(lambda x, w: conv(conv(x, w), w), monkeypatch) == 1


@pytest.mark.parametrize("function", FEW.values(), ids=FEW)
def test_what_is_cheap_is_made_where_it_is_read(
    function: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored(function, monkeypatch) == 0


def test_what_is_stored_lies_as_in_the_program() -> None:
    """Image and cotangent of a kernel's gradient too: moved, they took half of a step's time."""

    def loss(w: Array, x: Array) -> Array:
        by_winograd = partial(jaxconv.conv, padding=1, algorithm="winograd")
        y = jnp.tanh(jaxconv.conv(jnp.tanh(by_winograd(x, w)), w, padding=1, algorithm="im2col"))
        return by_winograd(y, w).sum()

    x, w = (jnp.zeros(shape, jnp.float32) for shape in ((2, 12, 10, 8), (3, 3, 8, 8)))
    text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text() or ""
    assert set(re.findall(r"f32\[2,12,10,8\]\{([\d,]+)", text)) == {"3,2,1,0"}


def test_equal_convolutions_are_one_function() -> None:
    def three(x: Array, w: Array) -> Array:
        return conv(x, w) + conv(2 * x, w) + conv(x, 2 * w)

    text = jax.jit(three).lower(IMAGE, KERNEL).as_text()
    assert text.count("func.func private @jaxconv_lowered") == 1
    assert text.count("call @jaxconv_lowered") == 3
