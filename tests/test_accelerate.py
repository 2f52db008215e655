"""accelerate: jaxconv's convolutions where ``fn`` has lax's, and everything else as in ``fn``."""

import contextlib
import functools
import gc
import inspect
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LAST, equations
from jax import Array, export, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback, pallas
from jax.extend.core import Primitive, get_opaque_trace_state, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv import accelerate, compat

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
    "patches": lambda x, w: (
        lax.conv_general_dilated_patches(x, (2, 2), (1, 1), "SAME") * jnp.sum(w)
    ),
    "jnp.convolve": lambda x, w: jnp.convolve(x[0, 0, :, 0], w[0, 0, :, 0]),
    "scipy.signal": lambda x, w: jax.scipy.signal.convolve2d(x[0, :, :, 0], w[:, :, 0, 0]),
}


def grad(fun: Fun) -> Fun:
    """By the first argument; of all leaves of what ``fun`` returns."""

    def total(x: Array, w: Array) -> Array:
        leaves = [leaf for leaf in jax.tree.leaves(fun(x, w)) if leaf.dtype == np.float64]
        return functools.reduce(jnp.add, [jnp.sum(jnp.sin(leaf)) for leaf in leaves])

    return jax.grad(total, (0, 1))


def jvp(fun: Fun) -> Fun:
    return lambda x, w: jax.jvp(fun, (x, w), (jnp.cos(x), jnp.sin(w)))


TRANSFORMATIONS: dict[str, Callable[[Fun], Fun]] = {
    "accelerate": accelerate,
    "jit": jax.jit,
    "grad": grad,
    "jvp": jvp,
    "vmap": lambda fun: jax.vmap(fun, (0, None)),
}
# Outermost first.
ORDERS = (
    "accelerate",
    "jit accelerate",
    "accelerate jit",
    "accelerate accelerate",
    "accelerate jit accelerate",
    "grad accelerate",
    "accelerate grad",
    "jit accelerate grad",
    "accelerate jit grad",
    "accelerate grad jit",
    "grad accelerate jit",
    "grad jit accelerate",
    "accelerate grad accelerate",
    "jvp accelerate",
    "accelerate jvp",
    "jvp accelerate jit",
    "vmap accelerate",
    "accelerate vmap",
    "vmap accelerate jit",
    "accelerate jit vmap",
    "grad vmap accelerate",
    "vmap accelerate grad",
    "accelerate vmap grad",
    "jvp grad accelerate",
    "jvp accelerate grad",
    "accelerate jvp grad",
)
# The values of all orders would take minutes: where the primitives are the same, so are they.
VALUES_OF = ("accelerate", "accelerate jit", "grad accelerate", "accelerate grad jit")
VALUES_OF += ("jvp accelerate", "vmap accelerate")
ALIKE = tuple(f"remat, {policy} saved" for policy in POLICIES if policy not in ("dots", "names"))
# What JAX can't do with a program, whoever does its convolutions.
NOT_IN_JAX = {
    "fori_loop": ("grad",),
    "while": ("grad",),
    **{name: ("jvp",) for name in PROGRAMS if name.startswith(("custom_vjp", "deep"))},
    "custom_vmap": ("grad",),
    "linear_call": ("vmap",),
    "linear_call, only transpose": ("vmap",),
    "composite": ("grad", "jvp", "vmap"),
    "ref": ("jvp grad",),
}


def composed(order: str, fun: Fun) -> Fun:
    for name in reversed(order.split()):
        fun = TRANSFORMATIONS[name](fun)
    return fun


def by_lax(order: str) -> str:
    return " ".join(name for name in order.split() if name != "accelerate")


def arguments(order: str) -> tuple[Array, Array]:
    x, w = operands()
    return (jnp.stack([x, -x, 2 * x]) if "vmap" in order else x), w


def cases() -> list[tuple[str, str]]:
    return [
        (program, order)
        for program in PROGRAMS
        for order in ORDERS
        if not any(
            each in by_lax(order).replace("jit ", "") for each in NOT_IN_JAX.get(program, ())
        )
    ]


# All orders of a few programs, and a few orders of all.
SAMPLED = ("conv", "scan", "deep", "custom_jvp", "custom_vjp", "shard_map")
SAMPLE = ("accelerate", "accelerate grad jit", "grad accelerate jit", "accelerate vmap grad")
SAMPLE += ("vmap accelerate", "jvp accelerate", "accelerate jit accelerate")


@pytest.mark.parametrize(
    ("program", "order"),
    [
        pytest.param(*case, marks=[pytest.mark.exhaustive] * (case[0] not in SAMPLED))
        if case[1] not in SAMPLE
        else case
        for case in cases()
    ],
)
def test_every_convolution_is_jaxconvs(program: str, order: str) -> None:
    """And all other primitives, in every nested jaxpr, are those of the function itself."""
    fun, args = PROGRAMS[program], arguments(order)
    expected = traced(composed(by_lax(order), fun), *args)
    found = traced(composed(order, fun), *args)
    renamed = {"conv_general_dilated": "jaxconv"}
    assert found == [renamed.get(name, name) for name in expected]


@functools.cache
def expected_values(program: str, order: str) -> Any:
    return jax.jit(composed(order, PROGRAMS[program]))(*arguments(order))


VALUED = [c for c in cases() if c[1] in VALUES_OF and c[0] not in ALIKE]


# Every second: of each program half of the orders, and of each order half of the programs.
@pytest.mark.parametrize(
    ("program", "order"),
    [
        pytest.param(program, order, marks=[pytest.mark.exhaustive] * (place % 2))
        for program, order in VALUED
        for place in [[*PROGRAMS].index(program) + VALUES_OF.index(order)]
    ],
)
def test_values(program: str, order: str) -> None:
    out = jax.jit(composed(order, PROGRAMS[program]))(*arguments(order))
    assert_close(out, expected_values(program, by_lax(order)))


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in ALIKE])
def test_values_without_jit(program: str) -> None:
    assert_close(accelerate(PROGRAMS[program])(*operands()), expected_values(program, ""))


@pytest.mark.parametrize("program", PROGRAMS)
def test_jaxprs_are_well_formed(program: str) -> None:
    """JAX's own checks pass, of the types in every equation among others."""
    orders = ("accelerate jit", "accelerate jit grad", "grad accelerate jit", "accelerate jit vmap")
    with jax.enable_checks(True):
        for order in orders:
            if (program, order) in cases():
                jax.make_jaxpr(composed(order, PROGRAMS[program]))(*arguments(order))


def test_accelerating_twice_is_accelerating_once() -> None:
    once, twice = (
        without_addresses(jax.make_jaxpr(fun)(*operands()))
        for fun in (accelerate(deep), accelerate(accelerate(accelerate(deep))))
    )
    assert once == twice


def without_addresses(jaxpr: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", re.sub(r"<function .*? at ", "", str(jaxpr)))


WITHOUT: dict[str, Fun] = {
    "activations": lambda x, w: jax.nn.silu(jax.nn.relu(x) + jax.nn.gelu(x)) @ w[0, 0],
    "programs": lambda x, w: jax.jit(
        lambda x: lax.scan(lambda c, _: (lax.cond(c.sum() > 0, jnp.sin, jnp.cos, c), None), x, w)
    )(x),
    "custom_vjp": lambda x, w: jax.checkpoint(custom_vjp(lambda x, w: jnp.sin(x)))(x, w),
    "gradient": lambda x, w: jax.grad(lambda x: jnp.sum(jax.nn.softmax(x @ w[0, 0])))(x),
    "linear algebra": lambda x, w: jnp.linalg.solve(w[0, 0], x[0, 0, :3]),
    "weak": lambda x, w: (2.0, jnp.sum(x) * 2.0, lax.full_like(x, 1)),
    "nothing": lambda x, w: (),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_convolutions_the_jaxpr_is_equal(name: str) -> None:
    args = operands()
    for fun in (WITHOUT[name], jax.jit(WITHOUT[name])):
        expected, found = (jax.make_jaxpr(f)(*args) for f in (fun, accelerate(fun)))
        assert without_addresses(found) == without_addresses(expected)


# ---- rematerialisation ----


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_recompute_as_many_convolutions(policy: str) -> None:
    """Two layers have two convolutions, four in their gradients, and what is recomputed."""
    found = counts(grad(accelerate(remat(policy))), *operands())
    recomputed = {"nothing": 2, "dots without batch": 2, "names": 1}
    assert found == (0, 6 + recomputed.get(policy, 0))


def offload_convolutions(primitive: Any, *_: Any, **__: Any) -> Any:
    offload = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    asked = lax.dot_general_p if primitive is lax.conv_general_dilated_p else primitive
    return offload(asked, dimension_numbers=(((), ()), ((), ())))


MORE_POLICIES = {
    "any name but": jax.checkpoint_policies.save_any_names_but_these("first"),
    "names offloaded": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["second"],
        names_which_can_be_offloaded=["first"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "convolutions offloaded": offload_convolutions,
}


@pytest.mark.parametrize("policy", [*POLICIES, *MORE_POLICIES])
@pytest.mark.parametrize("in_scan", [False, True])
@pytest.mark.parametrize("remat3", [False, True])
def test_policies_save_as_many_values_inside_a_checkpoint(
    policy: str, in_scan: bool, remat3: bool
) -> None:
    """There jaxconv's primitive is bound, and policies are asked about lax's."""
    if remat3 and lax.conv_general_dilated_p not in compat.remat_rules():
        pytest.skip("this JAX has no rules for convolutions there")
    rematerialized = functools.partial(jax.checkpoint, policy=(POLICIES | MORE_POLICIES)[policy])

    def loss(conv: Fun) -> Fun:
        def layers(x: Array, w: Array) -> Array:
            for name in ("first", "second", "third"):
                x = jnp.tanh(checkpoint_name(conv(x, w), name))
            return x

        def fun(x: Array, w: Array) -> Array:
            if in_scan:
                step = rematerialized(lambda c, _: (layers(c, w), None))
                return jnp.sum(lax.scan(step, x, length=2)[0])
            return jnp.sum(rematerialized(layers)(x, w))

        return fun

    def saved(fun: Fun) -> list[str]:
        found: list[str] = []

        def note(x: Array, w: Array) -> None:
            found.extend(str(jax.typeof(x)) for x in jax.tree.leaves(jax.vjp(fun, x, w)[1]))

        jax.make_jaxpr(note)(*operands())  # of the types alone: nothing is compiled
        return sorted(found)

    def called(x: Array, w: Array) -> Array:
        return jaxconv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAST[2])

    by_lax = loss(conv)
    jax.config.update("jax_remat3", remat3)
    try:
        expected = counts(grad(by_lax), *operands())[::-1], saved(by_lax)
        for fun in map(loss, (called, accelerate(conv))):
            assert (counts(grad(fun), *operands()), saved(fun)) == expected
            if policy == "convolutions offloaded" and not in_scan:
                assert_close(*(jax.jit(grad(f))(*operands()) for f in (fun, by_lax)))
    finally:
        jax.config.update("jax_remat3", False)


def test_a_named_algorithm_is_used_where_it_can_be() -> None:
    def algorithms(algorithm: str, fun: Fun) -> list[str]:
        jaxpr = jax.make_jaxpr(accelerate(fun, algorithm=algorithm))(*operands())
        return re.findall(r"algorithm=(\w+)", str(jaxpr))

    def strided(x: Array, w: Array) -> Array:
        return lax.conv_transpose(conv(x, w), w, (2, 2), "SAME", dimension_numbers=LAST[2])

    assert algorithms("im2col", two_layers) == ["im2col"] * 2
    assert algorithms("im2col", jax.jit(scanned)) == ["im2col"]
    assert algorithms("phase", strided) == ["auto", "phase"]
    assert set(algorithms("phase", grad(strided))) == {"phase", "auto"}
    assert algorithms("pointwise", two_layers) == ["auto"] * 2
    by_phase = accelerate(jax.jit(grad(strided)), algorithm="phase")
    assert_close(by_phase(*operands()), jax.jit(grad(strided))(*operands()))
    # The innermost of several says which.
    assert algorithms("naive", accelerate(conv, algorithm="im2col")) == ["im2col"]
    assert algorithms("naive", lambda x, w: jaxconv.conv(x, w, algorithm="im2col")) == ["im2col"]


# ---- arguments and results ----


class Layer(NamedTuple):
    kernel: Any
    scale: Any


def test_pytrees_and_keywords() -> None:
    x, w = operands()

    @accelerate
    def apply(params: dict[str, Layer], *images: Array, mode: str, bias: Any = None) -> Any:
        outs = [p.scale * conv(x, p.kernel) for p in params.values() for x in images]
        return {"outs": outs, mode: bias, "layer": params["a"]}

    params = {"a": Layer(w, 2.0), "b": Layer(-w, 1.0)}
    outs = apply(params, x, -x, mode="train")
    assert outs["train"] is None
    assert outs["layer"] is params["a"]
    assert_close(outs["outs"], [2 * conv(x, w), -2 * conv(x, w), -conv(x, w), conv(x, w)])


@pytest.mark.parametrize("inside", [True, False])
def test_static_arguments(inside: bool) -> None:
    def fun(x: Array, times: int, w: Array, *, name: str) -> Array:
        for _ in range(times):
            x = getattr(jnp, name)(conv(x, w))
        return x

    static = functools.partial(jax.jit, static_argnums=1, static_argnames="name")
    accelerated = accelerate(static(fun)) if inside else static(accelerate(fun))
    x, w = operands()
    for times, name in ((1, "tanh"), (2, "sin")):
        assert_close(accelerated(x, times, w, name=name), fun(x, times, w, name=name))
    text = str(jax.make_jaxpr(lambda x, w: accelerated(x, 2, w, name="sin"))(x, w))
    assert text.count("algorithm=auto") == 2


@pytest.mark.parametrize("inside", [True, False])
def test_donated_buffers(inside: bool) -> None:
    donate = functools.partial(jax.jit, donate_argnums=0)
    fun = accelerate(donate(conv)) if inside else donate(accelerate(conv))
    (x, w), (kept, _) = operands(), operands()
    assert_close(fun(x, w), conv(kept, w))
    assert x.is_deleted()
    assert not w.is_deleted()


@pytest.mark.parametrize(("way", "dtype"), [("accelerate", "int8"), ("enabled", "int64")])
def test_numbers_of_numpy_as_parameters(dtype: str, way: str) -> None:
    """lax keeps them as they are; int8 can't count the 200 rows."""

    def fun(x: Any, w: Any) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            np.array([2, 1], dtype),
            [np.array([1, 1], dtype)] * 2,
            rhs_dilation=np.array([1, 2], dtype),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape) for shape in ((1, 200, 9, 4), (3, 3, 2, 6)))
    expected = jax.value_and_grad(lambda *args: fun(*args).sum(), (0, 1))(x, w)
    with jaxconv.enabled() if way == "enabled" else contextlib.nullcontext():
        subject = fun if way == "enabled" else accelerate(fun)
        out = jax.jit(jax.value_and_grad(lambda *args: subject(*args).sum(), (0, 1)))(x, w)
    assert_close(out, expected)


def test_concrete_values_and_numpy() -> None:
    """Outside jit ``fn`` runs as Python: it may look at values and have arrays of NumPy."""
    x, w = map(np.asarray, operands())

    def fun(x: Any, w: Any) -> Any:
        y = conv(x, w)
        if float(jnp.sum(y)) > 1e9:
            return "large"
        return np.asarray(y), int(y.shape[0]), y.tolist()

    out, size, values = accelerate(fun)(x, w)
    assert isinstance(out, np.ndarray)
    assert size == 2
    assert_close(out, np.asarray(conv(x, w)))
    assert values == out.tolist()
    assert accelerate(fun)(1e9 * np.abs(x), np.abs(w)) == "large"


@pytest.mark.parametrize("value", [1, 2.0, 3j, np.float32(1), np.int8(3)])
def test_weak_types_are_kept(value: Any) -> None:
    def fun(x: Any) -> Any:
        return x, jnp.asarray(x), lax.mul(jnp.asarray(x), jnp.asarray(x)), jax.jit(jnp.sin)(x)

    assert list(map(jax.typeof, accelerate(fun)(value))) == list(map(jax.typeof, fun(value)))


def test_single_precision_of_64_bit_arrays() -> None:
    x, w = map(np.asarray, operands())
    with jax.enable_x64(False):
        out = accelerate(conv)(x, w)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, conv(x, w), rtol=1e-5, atol=1e-5)


def test_metadata() -> None:
    def fun(x: Array, *, scale: float = 1.0) -> Array:
        """Scaled."""
        return x

    accelerated = accelerate(fun)
    assert accelerated.__name__ == "fun"
    assert accelerated.__doc__ == "Scaled."
    assert inspect.signature(accelerated) == inspect.signature(fun)
    assert accelerated.__wrapped__ is fun


def test_what_can_be_called() -> None:
    x, w = operands()
    expected = conv(x, w)

    class Model:
        def __call__(self, x: Array) -> Array:
            return conv(x, w)

        def method(self, x: Array) -> Array:
            return self(x)

        @accelerate
        def decorated(self, x: Array) -> Array:
            return self(x)

    model = Model()
    for fun in (model, model.method, functools.partial(conv, w=w), functools.partial(model)):
        assert counts(accelerate(fun), x) == (0, 1)
        assert_close(accelerate(fun)(x), expected)
    assert counts(model.decorated, x) == (0, 1)


# ---- effects ----


def test_callbacks_run_as_often_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def program(events: list[Any]) -> Fun:
        def record(what: str, value: Any) -> None:
            events.append((what, round(float(value), 9)))

        def double(value: Any) -> Any:
            events.append(("pure", round(float(value), 9)))
            return 2 * value

        def step(x: Array, w: Array) -> Array:
            y = jnp.tanh(conv(x, w))
            total = jnp.sum(y)
            jax.debug.callback(functools.partial(record, "debug"), total, ordered=True)
            jax.debug.print("total {:.6f}", total, ordered=True)
            kind = jax.ShapeDtypeStruct((), np.float64)
            return y * jax.pure_callback(double, kind, total, vmap_method="sequential")

        def fun(x: Array, w: Array) -> Array:
            def saved(value: Any) -> None:
                record("io", value)

            io_callback(saved, None, jnp.sum(x), ordered=True)
            x = lax.fori_loop(0, 3, lambda _, x: step(x, w), x)
            io_callback(saved, None, jnp.sum(x), ordered=True)
            return x

        return fun

    runs = []
    for transform in (jax.jit, *WAYS):
        events: list[Any] = []
        out = transform(program(events))(*operands())
        jax.effects_barrier()
        runs.append((events, capsys.readouterr().out, np.asarray(out)))
    first, *others = runs
    assert [what for what, _ in first[0]].count("io") == 2
    assert len(first[0]) == 8
    for events, text, out in others:
        assert events == first[0]
        assert text == first[1]
        assert_close(out, first[2])


def test_refs_of_the_caller_are_changed() -> None:
    x, w = operands()
    for transform in WAYS:
        ref = jax.new_ref(x)

        def fun(ref: Any, w: Array) -> None:
            ref[...] = conv(ref[...], w)

        assert transform(fun)(ref, w) is None
        assert_close(ref[...], conv(x, w))


def test_random_keys() -> None:
    def fun(key: Array, w: Array) -> Any:
        key, sub = jax.random.split(key)
        noise = jax.random.normal(sub, (2, 4, 5, 3))
        return (
            conv(noise, w),
            jax.random.key_data(key),
            jax.vmap(jax.random.bits)(jax.random.split(key)),
        )

    key, w = jax.random.key(7), operands()[1]
    expected = jax.jit(fun)(key, w)
    with jax.debug_key_reuse(True):
        assert_close(accelerate(jax.jit(fun))(jax.random.clone(key), w), expected)
    assert accelerate(lambda key: key)(key).dtype == key.dtype


# ---- tracers from outside ----


def test_closures_over_tracers() -> None:
    x, w = operands()

    def closing(transform: Callable[[Fun], Fun]) -> Fun:
        return lambda x, w: jnp.sum(jnp.sin(transform(lambda w: jnp.tanh(conv(jnp.cos(x), w)))(w)))

    images = jnp.stack([x, -x])

    def results(fun: Fun) -> Any:
        batched = jax.vmap(fun, (0, None))
        return jax.jit(lambda: (fun(x, w), jax.grad(fun, (0, 1))(x, w), batched(images, w)))()

    expected = results(closing(lambda fun: fun))
    for transform in WAYS:
        fun = closing(transform)
        assert_close(results(fun), expected)
        assert counts(jax.grad(fun, (0, 1)), x, w) == (0, 3)


HIGHER: dict[str, Callable[[Fun], Fun]] = {
    "hessian": lambda f: jax.hessian(lambda w: jnp.sum(jnp.sin(f(w)))),
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "jacfwd of jacrev": lambda f: jax.jacfwd(jax.jacrev(lambda w: jnp.sum(jnp.sin(f(w))))),
    "linearize": lambda f: lambda w: jax.linearize(f, w)[1](jnp.cos(w)),
    "vjp": lambda f: lambda w: jax.vjp(f, w)[1](jnp.ones((1, 3, 2, 2))),
    "linear_transpose": lambda f: lambda w: jax.linear_transpose(f, w)(jnp.ones((1, 3, 2, 2))),
    "value_and_grad": lambda f: jax.value_and_grad(lambda w: jnp.sum(jnp.sin(f(w)))),
}


@pytest.mark.parametrize("name", HIGHER)
def test_derivatives(name: str) -> None:
    x, w = operands()
    x, w = x[:1, :3, :2], w[..., :2]

    def fun(w: Array) -> Array:
        return conv(x, w)

    expected = jax.jit(HIGHER[name](fun))(w)
    number = traced(HIGHER[name](fun), w).count("conv_general_dilated")
    for transformed in (HIGHER[name](accelerate(fun)), accelerate(HIGHER[name](jax.jit(fun)))):
        assert_close(jax.jit(transformed)(w), expected)
        assert counts(transformed, w) == (0, number)


class VmapWithAnAxisNameTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_is_laxs(self) -> None:
        x, w = operands()

        def fun(x: Array, w: Array) -> Any:
            y = conv(x, w)
            return y - lax.pmean(y, "batch"), lax.axis_index("batch"), lax.psum(1, "batch")

        images = jnp.stack([x, -x, 2 * x])
        kinds: list[dict[str, Any]] = [{"axis_name": "batch"}]
        kinds += [{"axis_name": "batch", "spmd_axis_name": "batch"}]
        for options in kinds:
            batched = functools.partial(jax.vmap, in_axes=(0, None), **options)
            expected = batched(fun)(images, w)
            for transformed in (batched(accelerate(fun)), accelerate(batched(fun))):
                assert_close(self.variant(transformed)(images, w), expected)
                assert counts(self.variant(transformed), images, w) == (0, 1)


def test_pmap() -> None:
    x, w = operands()
    pmap = functools.partial(jax.pmap, in_axes=(0, None))
    for fun in (accelerate(pmap(conv)), pmap(accelerate(conv))):
        assert_close(np.asarray(fun(x[None], w)), np.asarray(conv(x, w)[None]))
        assert counts(fun, x[None], w) == (0, 1)


# ---- what stays with lax ----


def opaque_primitive() -> Any:
    """A primitive that jaxconv does not know and that runs the jaxpr it carries."""
    opaque_p = Primitive("opaque")
    opaque_p.def_impl(lambda x, w, *, program: jaxpr_as_fun(program)(x, w)[0])
    opaque_p.def_abstract_eval(lambda x, w, *, program: program.out_avals[0])
    lowering = mlir.lower_fun(opaque_p.impl, multiple_results=False)
    mlir.register_lowering(opaque_p, lowering)
    return opaque_p


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def test_unknown_primitives_are_left_alone_and_warned_of_once() -> None:
    opaque_p, (x, w) = opaque_primitive(), operands()
    program, harmless = (jax.make_jaxpr(f)(x, w) for f in (conv, lambda x, w: jax.nn.silu(x)))
    fun = lambda x, w: conv(opaque_p.bind(x, w, program=program), w)  # noqa: E731
    quiet = lambda x, w: opaque_p.bind(x, w, program=harmless)  # noqa: E731

    assert warned(lambda: accelerate(quiet)(x, w)) == []
    first = warned(lambda: accelerate(fun)(x, w))
    again = warned(lambda: (accelerate(jax.jit(fun))(x, w), accelerate(fun)(x, w)))
    assert len(first) == 1
    assert re.search(r"jaxconv\.accelerate: the convolutions inside 'opaque' stay with", first[0])
    assert again == []
    assert counts(accelerate(fun), x, w) == (1, 1)
    assert_close(accelerate(jax.jit(fun))(x, w), fun(x, w))


def test_pallas_kernels_are_left_alone() -> None:
    x, w = operands()

    def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        out_ref[...] = jax.nn.relu(conv(x_ref[...], w_ref[...]))

    def fun(x: Array, w: Array) -> Array:
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(kernel, out_shape=kind, interpret=True)(x, w)

    messages = warned(lambda: accelerate(fun)(x, w))
    assert len(messages) == 1
    assert "'pallas_call'" in messages[0]
    assert_close(accelerate(fun)(x, w), jax.nn.relu(conv(x, w)))
    assert counts(accelerate(fun), x, w) == (1, 0)


def test_no_convolution_is_left_in_silence() -> None:
    """Newer JAX hides programs in objects: lax.custom_root's, for one."""
    x, w = operands()

    def fun(x: Array, w: Array) -> Array:
        def residual(v: Array) -> Array:
            # Groups of this type are never left to XLA.
            return v + 0.01 * conv(v, w[:, :, :1], feature_group_count=3) - x

        solve = lambda f, guess: guess - f(guess)  # noqa: E731
        return lax.custom_root(residual, x, solve, lambda g, y: 2 * y - g(y))

    texts = []
    messages = warned(lambda: texts.append(jax.jit(accelerate(fun)).lower(x, w).as_text()))
    assert len(messages) == ("stablehlo.convolution" in texts[0])
    assert all("'CustomRoot'" in message for message in messages)
    assert_close(accelerate(fun)(x, w), fun(x, w))
    assert counts(accelerate(grad(fun)), x, w)[0] == 0


def test_shardings_in_types() -> None:
    x, w = operands()
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded, whole = jax.device_put(x, P("i")), jax.device_put(w, P())
        for fun in (*(way(conv) for way in WAYS), accelerate(conv, algorithm="im2col")):
            assert counts(fun, sharded, whole) == (0, 1)
            assert jax.typeof(fun(sharded, whole)) == jax.typeof(conv(sharded, whole))
            assert_close(np.asarray(fun(sharded, whole)), np.asarray(conv(x, w)))


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_symbolic_shapes_are_left_to_lax(algorithm: str) -> None:
    x, w = operands()
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, 5, 3"), np.float64)
    made = export.export(jax.jit(accelerate(jax.jit(conv), algorithm=algorithm)))(symbolic, w)
    assert "stablehlo.convolution" in made.mlir_module() or "dynamic_conv" in made.mlir_module()
    assert_close(made.call(x, w), conv(x, w))


def test_export() -> None:
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialize")
    x, w = operands()
    made = export.export(jax.jit(accelerate(two_layers)), platforms=("cpu", "tpu"))(x, w)
    again = export.deserialize(made.serialize(vjp_order=1))
    assert_close(again.call(x, w), two_layers(x, w))
    assert_close(grad(again.call)(x, w), grad(two_layers)(x, w))
    # What was exported is a program of its own.
    assert_close(accelerate(again.call)(x, w), two_layers(x, w))


def test_training_steps_are_exported_for_accelerators() -> None:
    """With as many convolutions as by lax, but on GPU the transposed ones and their kernels'
    gradients."""

    def step(kernels: list[Array], x: Array) -> Any:
        def loss(kernels: list[Array]) -> Array:
            y, numbers = x, {"dimension_numbers": LAST[3]}
            for kernel, up in zip(kernels[::2], kernels[1::2], strict=True):
                y = lax.conv_general_dilated(y, kernel, (1, 1, 1), "SAME", **numbers)
                y = lax.conv_general_dilated(y, up, (1, 1, 1), ((1, 1),) * 3, (2, 2, 2), **numbers)
            return jnp.square(y).mean()

        return jax.value_and_grad(loss)(kernels)

    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((*(size,) * 3, 16, 16), np.float32) for size in (3, 2, 3, 2)]
    args = kernels, rng.standard_normal((1, 8, 8, 8, 16), np.float32)
    for platform in ("cuda", "rocm", "tpu"):
        found, by_lax = (
            export.export(jax.jit(one), platforms=[platform])(*args).mlir_module()
            for one in (accelerate(step), step)
        )
        convolutions = by_lax.count("stablehlo.convolution")
        fewer = 0 if platform == "tpu" else 4
        assert found.count("stablehlo.convolution") + fewer == convolutions > 0


# ---- the state of JAX ----


def test_an_error_in_fn_leaves_nothing_behind() -> None:
    x, w = operands()

    class Stop(Exception):
        pass

    def fails(x: Array, w: Array) -> Array:
        conv(x, w)
        raise Stop

    def fails_deep(x: Array, w: Array) -> Any:
        return lax.scan(lambda c, _: (jax.jit(custom_vjp(fails))(c, w), None), x, None, length=2)

    def fails_batched(x: Array, w: Array) -> Any:
        return jax.vmap(fails, (0, None))(x[None], w)

    for fun in (fails, fails_deep, jax.jit(fails), grad(fails), fails_batched):
        for transformed in (accelerate(fun), jax.jit(accelerate(fun)), grad(accelerate(fun))):
            with pytest.raises(Stop):
                transformed(x, w)
        assert counts(conv, x, w) == (1, 0)
        assert "jaxconv" not in jax.jit(conv).lower(x, w).as_text()
    with pytest.raises(TypeError, match="conv_general_dilated"):
        accelerate(conv)(x, w.astype(np.float32))
    assert counts(conv, x, w) == (1, 0)


def test_only_the_thread_that_accelerates_does() -> None:
    x, w = operands()
    inside, done = threading.Event(), threading.Event()
    found = {}

    def waiting(x: Array, w: Array) -> Array:
        inside.set()
        assert done.wait(60)
        return conv(x, w)

    def accelerating() -> None:
        found["accelerated"] = counts(accelerate(waiting), x, w)

    def plain() -> None:
        assert inside.wait(60)
        found["plain"] = counts(conv, x, w), counts(jax.jit(conv), x, w)
        done.set()

    threads = [threading.Thread(target=target) for target in (accelerating, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"accelerated": (0, 1), "plain": ((1, 0), (1, 0))}


def test_a_jitted_function_has_a_program_for_each(lowered: list[str], compiled: list[str]) -> None:
    """Whoever calls it first: lax's for itself, jaxconv's for each algorithm of accelerate."""
    (x, w), calls = operands(), {}
    for order in (("plain", "auto", "im2col"), ("im2col", "auto", "plain")):
        fun = jax.jit(lambda x, w: conv(x, w))
        calls["plain"] = fun
        for algorithm in ("auto", "im2col"):
            calls[algorithm] = accelerate(fun, algorithm=algorithm)
        jax.clear_caches()
        for name in order:
            del lowered[:], compiled[:]
            calls[name](x, w)
            assert lowered == ([] if name == "plain" else [name])
            assert "backend_compile_duration" in compiled
        del lowered[:], compiled[:]
        for name in order:
            calls[name](x, w)
        assert lowered == compiled == []


def test_what_lax_has_compiled_stays_laxs() -> None:
    """One jitted function, called with and without accelerate in turn, also under vmap and grad."""
    x, w = operands()
    fun = jax.jit(conv)
    expected = fun(x, w)
    for _ in range(2):
        assert_close(accelerate(fun)(x, w), expected)
        assert_close(fun(x, w), expected)
        assert counts(fun, x, w) == (1, 0)
        assert counts(accelerate(fun), x, w) == (0, 1)
        assert counts(jax.vmap(fun, (0, None)), x[None], w) == (1, 0)
        assert counts(accelerate(jax.vmap(fun, (0, None))), x[None], w) == (0, 1)
        assert counts(grad(fun), x, w) == (3, 0)
        assert counts(accelerate(grad(fun)), x, w) == (0, 3)
    assert "stablehlo.convolution" in fun.lower(x, w).as_text()


def test_no_transformation_is_seen_from_inside() -> None:
    """Libraries ask for JAX's state to know whether an object was made inside a transformation."""
    outside = get_opaque_trace_state(convention="flax")
    assert accelerate(lambda: get_opaque_trace_state(convention="flax"))() == outside

    def inside_jit(x: Array) -> Array:
        state = get_opaque_trace_state(convention="flax")
        assert state != outside
        assert accelerate(lambda: get_opaque_trace_state(convention="flax"))() == state
        return x

    jax.jit(inside_jit)(1.0)


SETTINGS: dict[str, Callable[[], Any]] = {
    "checking_leaks": jax.checking_leaks,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "standard promotion": lambda: jax.numpy_dtype_promotion("standard"),
    "highest precision": lambda: jax.default_matmul_precision("highest"),
    "checks": lambda: jax.enable_checks(True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_under_settings_of_jax(name: str) -> None:
    x, w = operands()
    expected = jax.jit(grad(deep))(x, w)
    with SETTINGS[name]():
        out = accelerate(jax.jit(grad(deep)))(x, w)
    assert_close(out, expected)


def test_debug_nans_raises_as_without() -> None:
    x, w = operands()
    x = x.at[0, 0, 0, 0].set(np.nan)
    with jax.debug_nans(True):
        for way in (lambda f: f, *WAYS):
            with pytest.raises(FloatingPointError, match="nan"):
                way(conv)(x, w)


@pytest.mark.parametrize("program", ["jit", "scan", "while", "cond", "switch", "remat, dots saved"])
def test_without_any_jit(program: str) -> None:
    expected = expected_values(program, "")
    with jax.disable_jit():
        assert_close(accelerate(PROGRAMS[program])(*operands()), expected)


def test_compile_time_values() -> None:
    x, w = operands()

    def fun(x: Array, w: Array) -> Array:
        with jax.ensure_compile_time_eval():
            known = conv(*operands())
            assert not isinstance(known, jax.core.Tracer)
            times = 1 + int(jnp.sum(known) > 1e9)
        return times * conv(x, w)

    for way in WAYS:
        assert_close(way(fun)(x, w), conv(x, w))


# ---- nothing twice, nothing for ever ----


AGAIN: dict[str, Callable[[Fun], Fun]] = {
    "accelerate jit": accelerate,
    "jit accelerate": lambda f: jax.jit(accelerate(f)),
    "accelerate accelerate": lambda f: accelerate(accelerate(f)),
    "two algorithms": lambda f: accelerate(accelerate(f, algorithm="im2col"), algorithm="naive"),
    "new each time": lambda f: lambda x, w: accelerate(f)(x, w),
    "grad": lambda f: grad(accelerate(f)),
    "accelerate grad": lambda f: accelerate(grad(f)),
    "vmap": lambda f: jax.vmap(accelerate(f), (None, 3)),
    "accelerate vmap": lambda f: accelerate(jax.vmap(f, (None, 3))),
    "jit in jit": lambda f: accelerate(jax.jit(lambda x, w: f(x, w) + 1)),
}


@pytest.mark.parametrize("how", AGAIN)
def test_a_second_call_traces_and_compiles_nothing(how: str, compiled: list[str]) -> None:
    traces = []  # accelerate traces without an event

    @jax.jit
    def fun(x: Array, w: Array) -> Array:
        traces.append(how)
        w = w if w.ndim == 4 else jnp.stack([w] * 3, 3)
        return jnp.tanh(custom_jvp_conv(jax.nn.relu(conv(x, w)), w))

    (x, w), others = operands(), operands(1)
    transformed = AGAIN[how](fun)
    jax.block_until_ready(transformed(x, w))
    assert "backend_compile_duration" in compiled
    number = len(traces)
    compiled.clear()
    jax.block_until_ready(transformed(*others))
    jax.block_until_ready(transformed(x, w))
    assert compiled == []
    assert len(traces) == number <= 2


custom_jvp_conv = custom_jvp()


def test_a_second_eager_call_compiles_nothing(compiled: list[str]) -> None:
    x, w = operands()
    fun = accelerate(grad(conv))
    fun(x, w)
    compiled.clear()
    fun(*operands(1))
    assert compiled == []


def freed(make: Callable[[Fun], Fun]) -> bool:
    """Whether nothing holds a function, and a constant in it, once nobody has it any more."""

    class Token:
        pass

    def outer() -> list[weakref.ref]:
        token, constant = Token(), jnp.full((3, 3, 3, 3), 0.5)

        def fun(x: Array, w: Array) -> Array:
            assert token
            return jnp.tanh(conv(x, constant)) + conv(x, w)

        make(fun)(*operands())
        return [weakref.ref(token), weakref.ref(constant)]

    refs = outer()
    gc.collect()
    return all(ref() is None for ref in refs)


HOLDING: dict[str, Callable[[Fun], Fun]] = {
    "eager": accelerate,
    "jit accelerate": lambda f: jax.jit(accelerate(f)),
    "accelerate jit": lambda f: accelerate(jax.jit(f)),
    "accelerate grad jit": lambda f: accelerate(grad(jax.jit(f))),
    "custom_vjp": lambda f: accelerate(grad(jax.jit(custom_vjp(f)))),
    "remat": lambda f: jax.jit(accelerate(grad(jax.checkpoint(f, policy=POLICIES["dots"])))),
    "vmap": lambda f: lambda x, w: accelerate(jax.vmap(jax.jit(f), (0, None)))(x[None], w),
}


@pytest.mark.parametrize("how", HOLDING)
def test_functions_are_freed_as_by_jax(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = freed(HOLDING[how])
    monkeypatch.setitem(globals(), "accelerate", lambda fun: fun)
    assert found or not freed(HOLDING[how])


# ---- convolutions that lax's rules of shape accept and lax can't compile ----


def axes(**specs: tuple[int, ...]) -> dict[str, Any]:
    names = ("lhs_spec", "rhs_spec", "out_spec")
    return {
        "dimension_numbers": lax.ConvDimensionNumbers(**dict.fromkeys(names, (0, 1, 2, 3)) | specs)
    }


MALFORMED: dict[str, dict[str, Any]] = {
    "negative strides": {"window_strides": (-1, -1)},
    "a stride of 0": {"window_strides": (0, 1)},
    "one lhs_dilation": {"lhs_dilation": (2,)},
    "one rhs_dilation": {"rhs_dilation": (2,)},
    "no taps": {"taps": (0, 3)},
    "duplicate axes of lhs": axes(lhs_spec=(0, 1, 1, 3)),
    "duplicate axes of the output": axes(out_spec=(0, 1, 2, 2)),
    "negative axes of rhs": axes(rhs_spec=(0, 1, -2, -1)),
    "negative axes of the output": axes(out_spec=(0, 1, -2, -1)),
}


def enabled(fun: Fun) -> Fun:
    def within(*args: Any) -> Any:
        with jaxconv.enabled():
            return jax.jit(fun)(*args)

    return within


@pytest.mark.parametrize(
    "way",
    [*WAYS, lambda f: jax.grad(lambda *args: jnp.sum(accelerate(f)(*args))), enabled],
    ids=["accelerate", "accelerate jit", "jit accelerate", "grad accelerate", "enabled"],
)
@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.filterwarnings("ignore:divide by zero")  # lax's own rule of shape, for a stride of 0
def test_what_lax_cannot_compile_is_refused_as_by_lax(name: str, way: Callable[[Fun], Fun]) -> None:
    arguments = {"window_strides": (1, 1), "padding": ((1, 1),) * 2} | MALFORMED[name]
    x, w = np.ones((1, 2, 6, 6)), np.ones((2, 2, *arguments.pop("taps", (3, 3))))

    def fun(x: Any, w: Any) -> Array:
        return lax.conv_general_dilated(x, w, **arguments)

    with pytest.raises(ValueError, match="Cannot lower jaxpr with verifier errors"):
        fun(x, w)
    with pytest.raises(ValueError, match="Cannot lower jaxpr with verifier errors"):
        way(fun)(x, w)
