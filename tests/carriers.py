"""Functions that carry a convolution of lax inside other programs, and what they run."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from cases import LAST, equations
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxconv import accelerate

Fun = Callable[..., Any]


def conv(x: Any, w: Any, **arguments: Any) -> Array:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAST[2], **arguments)


def operands(seed: int = 0) -> tuple[Array, Array]:
    """An image of three channels and a kernel that gives an image of its shape."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, 4, 5, 3))), jnp.asarray(rng.normal(size=(3, 3, 3, 3)))


# The order of jit and accelerate.
WAYS: tuple[Callable[[Fun], Fun], ...] = (
    accelerate,
    lambda f: accelerate(jax.jit(f)),
    lambda f: jax.jit(accelerate(f)),
)


# ---- what a function runs ----


def traced(fun: Fun, *args: Any) -> list[str]:
    """The names of the primitives of ``fun``, and of those inside them, in order."""
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fun)(*args))]


def counts(fun: Fun, *args: Any) -> tuple[int, int]:
    """How many convolutions of lax, and of jaxconv, ``fun`` has."""
    names = traced(fun, *args)
    return names.count("conv_general_dilated"), names.count("jaxconv")


def assert_close(outs: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_structs(outs, expected)
    for out, value in zip(jax.tree.leaves(outs), jax.tree.leaves(expected), strict=True):
        assert jax.typeof(out) == jax.typeof(value)
        if out.dtype == jax.dtypes.float0:  # the tangent of an integer
            continue
        scale = float(np.max(np.abs(value), initial=1.0))
        np.testing.assert_allclose(out, value, rtol=1e-10, atol=1e-12 * scale)


# ---- every primitive that carries a program ----


def nested_jit(x: Array, w: Array) -> Array:
    return jax.jit(lambda x: jnp.tanh(jax.jit(conv)(x, w)))(x)


def scanned(x: Array, w: Array) -> Any:
    return lax.scan(lambda c, k: (jnp.tanh(conv(c, w)), jnp.sum(k * c)), x, jnp.arange(3.0))


def looped(x: Array, w: Array) -> Array:
    return lax.fori_loop(0, 3, lambda _, c: jnp.tanh(conv(c, w)), x)


def relaxed(x: Array, w: Array) -> Any:
    """A while loop with a convolution in its condition too."""

    def go_on(state: tuple[Array, Array]) -> Array:
        return (state[0] < 3) & (jnp.sum(jnp.abs(conv(state[1], w))) > 1e-3)

    return lax.while_loop(go_on, lambda s: (s[0] + 1, jnp.tanh(conv(s[1], w))), (0, x))


def branched(x: Array, w: Array) -> Array:
    return lax.cond(jnp.sum(x) > 0, lambda x: conv(x, w), lambda x: conv(-x, 2 * w), x)


def switched(x: Array, w: Array) -> Array:
    branches = [lambda x: x, lambda x: conv(x, w), lambda x: conv(conv(x, w), w)]
    return lax.switch(jnp.int32(jnp.sum(x) > 0) + 1, branches, x)


def two_layers(x: Array, w: Array) -> Array:
    return jnp.tanh(conv(jnp.tanh(conv(x, w)), w))


def named_layers(x: Array, w: Array) -> Array:
    hidden = checkpoint_name(conv(x, w), "first")
    return jnp.tanh(conv(jnp.tanh(hidden), w))


POLICIES = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("first"),
    "anything but names": jax.checkpoint_policies.save_anything_except_these_names("first"),
    "both": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names("first"),
    ),
    "lax's convolution": lambda primitive, *_, **__: primitive is lax.conv_general_dilated_p,
}


def remat(policy: str) -> Fun:
    return jax.checkpoint(named_layers, policy=POLICIES[policy])


def custom_vjp(
    fun: Fun = conv, *, optimize_remat: bool = False, **rules: Fun
) -> Callable[[Any, Any], Any]:
    @jax.custom_vjp
    def call(x: Array, w: Array) -> Array:
        return fun(x, w)

    def forward(x: Array, w: Array) -> tuple[Array, Any]:
        return rules.get("forward", fun)(x, w), (x, w)

    def backward(saved: Any, cotangent: Array) -> Any:
        dx, dw = jax.vjp(conv, *saved)[1](cotangent)
        return 2 * dx, 3 * dw

    call.defvjp(forward, backward, optimize_remat=optimize_remat)
    return call


def custom_jvp(fun: Fun = conv) -> Callable[[Any, Any], Any]:
    @jax.custom_jvp
    def call(x: Array, w: Array) -> Array:
        return fun(x, w)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        (x, w), (dx, dw) = primals, tangents
        return call(x, w), 2 * conv(dx, w) + conv(x, dw)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def with_static(scale: float, x: Array, w: Array, act: Fun) -> Array:
    return act(scale * conv(x, w))


with_static.defvjp(
    lambda scale, x, w, act: (with_static(scale, x, w, act), (x, w)),
    lambda scale, act, saved, cotangent: jax.vjp(lambda x, w: act(scale * conv(x, w)), *saved)[1](
        cotangent
    ),
)


def linear_call(fun: Fun = conv) -> Callable[[Any, Any], Any]:
    def transposed(w: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda x: conv(x, w), cotangent)(cotangent)[0]

    call = jax.custom_derivatives.linear_call
    return lambda x, w: call(lambda w, x: fun(x, w), transposed, lax.stop_gradient(w), x)


def solved(x: Array, w: Array) -> Array:
    def matvec(v: Array) -> Array:
        return v + 0.01 * conv(v, w)

    def solve(matvec: Fun, b: Array) -> Array:
        return 2 * b - matvec(b)

    return lax.custom_linear_solve(matvec, x, solve, transpose_solve=solve)


@jax.custom_batching.custom_vmap
def custom_vmap(x: Array, w: Array) -> Array:
    return conv(x, w)


@custom_vmap.def_vmap
def _custom_vmap_rule(size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
    assert batched == [True, False]
    flat = conv(lax.reshape(x, (size * x.shape[1], *x.shape[2:])), w)
    return lax.reshape(flat, (size, *x.shape[1:-1], w.shape[-1])), True


def sharded(x: Array, w: Array) -> Array:
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(conv, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))(x, w)


def traced_before(x: Array, w: Array) -> Array:
    """What jit has traced, called as a function: JAX has primitives of its own for that."""
    return jax.jit(conv).trace(*operands())(x, w)


def in_ref(x: Array, w: Array) -> Array:
    ref = jax.new_ref(x)
    ref[...] = jnp.tanh(conv(ref[...], w))
    return conv(ref[...], w)


def deep(x: Array, w: Array) -> Any:
    """A convolution five programs deep."""

    def step(c: Array, _: Any) -> tuple[Array, Array]:
        out = lax.cond(jnp.sum(c) > 0, jax.jit(jax.checkpoint(custom_vjp())), conv, c, w)
        return jnp.tanh(out), jnp.sum(out)

    return jax.jit(lambda x: lax.scan(step, x, None, length=2))(x)


def activated(x: Array, w: Array) -> Array:
    """Rules of JAX's own around it."""
    return jax.nn.silu(jax.nn.relu(conv(x, w)) + jax.scipy.special.logsumexp(x))


PROGRAMS: dict[str, Fun] = {
    "conv": conv,
    "jit": nested_jit,
    "scan": scanned,
    "fori_loop": looped,
    "while": relaxed,
    "cond": branched,
    "switch": switched,
    **{f"remat, {policy} saved": remat(policy) for policy in POLICIES},
    "custom_vjp": custom_vjp(),
    "custom_vjp, only forward": custom_vjp(lambda x, w: jnp.tanh(x) * jnp.sum(w), forward=conv),
    "custom_vjp, only backward": custom_vjp(lambda x, w: jnp.tanh(x) * jnp.sum(w)),
    "custom_vjp, optimised": custom_vjp(optimize_remat=True),
    "custom_vjp, static": lambda x, w: with_static(2.0, x, w, jnp.tanh),
    "custom_jvp": custom_jvp(),
    "custom_jvp, only rule": custom_jvp(lambda x, w: jnp.tanh(x) * jnp.sum(w)),
    "linear_call": linear_call(),
    "linear_call, only transpose": linear_call(lambda x, w: 2 * x),
    "custom_linear_solve": solved,
    "custom_vmap": custom_vmap,
    "shard_map": sharded,
    "composite": lax.composite(conv, name="test.conv"),
    "traced before": traced_before,
    "ref": in_ref,
    "deep": deep,
    "activations": activated,
    "transposed": lambda x, w: lax.conv_transpose(x, w, (1, 1), "SAME", dimension_numbers=LAST[2]),
    "scipy.signal": lambda x, w: jax.scipy.signal.convolve2d(x[0, :, :, 0], w[:, :, 0, 0]),
}


def grad(fun: Fun) -> Fun:
    """By the first argument; of all leaves of what ``fun`` returns."""

    def total(x: Array, w: Array) -> Array:
        leaves = [leaf for leaf in jax.tree.leaves(fun(x, w)) if leaf.dtype == np.float64]
        return functools.reduce(jnp.add, [jnp.sum(jnp.sin(leaf)) for leaf in leaves])

    return jax.grad(total, (0, 1))
