"""``by_blocks``: the same values, chains as loops, and nothing changed where they don't pay."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import jaxconv
from jaxconv.transforms import by_blocks as module

pytestmark = pytest.mark.skipif(
    "jax.default_backend() != 'cpu'", reason="on other platforms it is the function itself"
)

RNG = np.random.default_rng(0)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def random(*shape: int) -> Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


IMAGES, WIDE, DEPTHWISE, NARROW = (
    random(6, 8, 8, 4),
    random(4, 12),
    random(3, 3, 1, 12),
    random(12, 4),
)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of what is 4 KiB or more, blocks of two images of 3 to 4 KiB."""
    monkeypatch.setattr(module, "OUTGROWN", 4 << 10)
    monkeypatch.setattr(module, "BLOCK", 17 << 9)


def block_of_network(x: Array) -> Array:
    """1×1, activation, depthwise, activation, 1×1, sum."""
    y = jax.nn.relu6(x @ WIDE + 0.5)
    y = lax.conv_general_dilated(
        y, DEPTHWISE, (1, 1), "SAME", dimension_numbers=LAYOUT, feature_group_count=12
    )
    return x + jax.nn.gelu(y) @ NARROW


def pooled(x: Array) -> Array:
    y = lax.reduce_window(x @ WIDE, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return jnp.concatenate([y, jnp.flip(y, 1)], -1).mean((1, 2))


def cut(x: Array) -> Array:
    y = jnp.pad(jnp.tanh(x @ WIDE), ((0, 0), (1, 2), (0, 0), (0, 0)))[:, 2:, ::2]
    return jnp.cumsum(jnp.moveaxis(y, -1, 1).reshape(len(x), 12, -1), -1).argmax(-1)


CHAINS = {"block of a network": block_of_network, "pooled": pooled, "cut": cut}


def scans(fn: Callable[..., Any], *args: Any) -> list[int]:
    """The lengths of the loops in a function's program, those of inner functions included."""
    return [int(n) for n in re.findall(r"length=(\d+)", str(jax.make_jaxpr(fn)(*args)))]


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_chains_run_by_blocks(chain: Callable[[Array], Array]) -> None:
    blocked = jaxconv.by_blocks(chain)
    assert scans(blocked, IMAGES) == [3]
    assert scans(chain, IMAGES) == []
    np.testing.assert_allclose(jax.jit(blocked)(IMAGES), chain(IMAGES), rtol=1e-5, atol=1e-5)


MIXING: dict[str, Callable[[Array], Array]] = {
    "batch norm": lambda x: (
        (x - x.mean((0, 1, 2), keepdims=True)) / x.std((0, 1, 2), keepdims=True)
    ),
    "softmax": lambda x: jax.nn.softmax(x, 0),
    "flip": lambda x: jnp.flip(x, 0),
    "roll": lambda x: jnp.roll(x, 1, 0),
    "running sum": lambda x: jnp.cumsum(x, 0),
    "sort": lambda x: jnp.sort(x, 0),
    "window": lambda x: lax.reduce_window(x, 0.0, lax.add, (3, 1, 1, 1), (1, 1, 1, 1), "SAME"),
    "one image": lambda x: x + x[3:4],
    "gather": lambda x: x[np.array([3, 1, 0, 5, 2, 4])],
    "number of images": lambda x: (
        x / len(x) + jnp.arange(len(x), dtype=x.dtype).reshape(-1, 1, 1, 1)
    ),
    "images as channels": lambda x: lax.conv_general_dilated(
        x,
        jnp.ones((1, 1, 6, 6), x.dtype),
        (1, 1),
        "VALID",
        dimension_numbers=("CHWN", "HWIO", "CHWN"),
    ),
    "images squared": lambda x: jnp.einsum("nhwc,mhwc->nm", x, x)[..., None, None] * x[:, :1, :1],
    "transposed": lambda x: jnp.swapaxes(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 2))), 0, 3) + 1.0,
    "regrouped": lambda x: (
        x.reshape(3, 2, 8, 8, -1).sum(1, keepdims=True).repeat(2, 1).reshape(x.shape)
    ),
    "in a loop": lambda x: lax.fori_loop(0, 2, lambda _, x: jnp.flip(x, 0) * 2, x),
    "by a condition": lambda x: lax.cond(x.sum() > 0, jnp.flip, lambda x: x, x),
}


# Those that have other operations, or none, with fewer images.
COUNTING = [MIXING[name] for name in ("one image", "gather", "number of images")]
COUNTING += [MIXING[name] for name in ("images as channels", "regrouped")]


@pytest.mark.parametrize("mixing", MIXING.values(), ids=MIXING)
def test_what_mixes_images_sees_them_all(mixing: Callable[[Array], Array]) -> None:
    """Between two chains."""

    def network(x: Array) -> Array:
        y = mixing(block_of_network(x))
        return block_of_network(y) if y.shape == x.shape else y

    expected = network(IMAGES)
    found = jax.jit(jaxconv.by_blocks(network))(IMAGES)
    assert (3 in scans(jaxconv.by_blocks(network), IMAGES)) != (mixing in COUNTING)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_parameters_and_batches_are_pytrees() -> None:
    def network(params: dict[str, Array], batch: dict[str, Array]) -> dict[str, Any]:
        y = jnp.tanh(batch["image"] @ params["wide"]) * batch["mask"][:, None, None, None]
        return {
            "out": (jnp.exp(y) @ params["narrow"], params["narrow"].sum()),
            "mask": batch["mask"],
        }

    args = (
        {"wide": WIDE, "narrow": NARROW},
        {"image": IMAGES, "mask": jnp.arange(6, dtype=jnp.float32)},
    )
    for argnum in (1, -1):
        blocked = jaxconv.by_blocks(network, argnum=argnum)
        assert scans(blocked, *args) == [3]
        for a, b in zip(*map(jax.tree.leaves, (blocked(*args), network(*args))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_numbers_stay_weakly_typed() -> None:
    def scaled(x: Array, scale: float) -> Array:
        return (jnp.tanh(x @ WIDE.astype(x.dtype)) * scale) @ NARROW.astype(x.dtype)

    images = IMAGES.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        blocked = jaxconv.by_blocks(scaled)
        assert scans(blocked, images, 2.0) == [2]  # blocks of three, half as large
        assert blocked(images, 2.0).dtype == images.dtype


def test_derivatives_are_those_of_the_whole() -> None:
    blocked = jaxconv.by_blocks(block_of_network)
    for transform, arg in (
        (lambda f: jax.grad(lambda x: f(x).sum()), IMAGES),
        (lambda f: lambda x: jax.jvp(f, (x,), (x,))[1], IMAGES),
        (lambda f: jax.jacfwd(lambda scale: f(scale * IMAGES).sum()), jnp.float32(2)),
    ):
        assert scans(transform(blocked), arg) == []
        expected = transform(block_of_network)(arg)
        np.testing.assert_allclose(transform(blocked)(arg), expected, rtol=1e-5)


@pytest.mark.parametrize("order", ["outside", "inside", "enabled"])
def test_convolutions_of_chains_are_planned(order: str) -> None:
    blocked = jaxconv.by_blocks(
        jaxconv.accelerate(block_of_network) if order == "inside" else block_of_network
    )
    if order == "outside":
        blocked = jaxconv.accelerate(blocked)
    with jaxconv.enabled() if order == "enabled" else jax.named_scope("plain"):
        text = jax.jit(blocked).lower(IMAGES).as_text()
        out = jax.jit(blocked)(IMAGES)
    assert "stablehlo.while" in text
    assert "stablehlo.convolution" not in text
    np.testing.assert_allclose(out, block_of_network(IMAGES), rtol=1e-5, atol=1e-5)


def test_it_composes_with_vmap() -> None:
    many = jnp.stack([IMAGES, 2 * IMAGES])
    found = jax.jit(jax.vmap(jaxconv.by_blocks(block_of_network)))(many)
    expected = jax.vmap(block_of_network)(many)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_nothing_changes_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = jaxconv.by_blocks(block_of_network)
    assert scans(blocked, IMAGES[:1]) == []  # a single image
    monkeypatch.setattr(module, "BLOCK", 1 << 20)  # all fit a block
    assert scans(jaxconv.by_blocks(block_of_network), IMAGES) == []
    monkeypatch.undo()  # all fit the cache
    assert scans(jaxconv.by_blocks(block_of_network), IMAGES) == []


def test_blocks_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    image = 8 * 8 * 12 * 4
    for fit, loop in ((0.5, 6), (1.9, 6), (2, 3), (3, 2), (5, 2)):
        monkeypatch.setattr(module, "BLOCK", int(fit * image))
        assert scans(jaxconv.by_blocks(block_of_network), IMAGES) == [loop]


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"by_blocks: fn must be a function, got int"):
        jaxconv.by_blocks(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"argnum must be an argument's position, got 2 of 1"):
        jaxconv.by_blocks(block_of_network, argnum=2)(IMAGES)
    with pytest.raises(ValueError, match=r"same number of images .* got \(6, 8, 8, 4\), \(4, 12\)"):
        jaxconv.by_blocks(lambda batch: batch[0])((IMAGES, WIDE))
    with pytest.raises(ValueError, match=r"same number of images .* got \(\)"):
        jaxconv.by_blocks(lambda x: x)(jnp.float32(1))
