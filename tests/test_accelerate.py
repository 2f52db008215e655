"""accelerate: jaxconv's convolutions where ``fn`` has lax's, for all programs that carry them."""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from carriers import (
    POLICIES,
    PROGRAMS,
    Fun,
    assert_close,
    conv,
    counts,
    custom_vjp,
    deep,
    grad,
    operands,
    remat,
    scanned,
    traced,
    two_layers,
)
from cases import LAST
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

import jaxconv
from jaxconv import accelerate, compat


def jvp(fun: Fun) -> Fun:
    return lambda x, w: jax.jvp(fun, (x, w), (jnp.cos(x), jnp.sin(w)))


TRANSFORMATIONS: dict[str, Callable[[Fun], Fun]] = {
    "accelerate": accelerate,
    "jit": jax.jit,
    "grad": grad,
    "jvp": jvp,
    "vmap": lambda fun: jax.vmap(fun, (0, None)),
}
_NAMES = (  # outermost first
    "accelerate, jit accelerate, accelerate jit, accelerate accelerate, "
    "accelerate jit accelerate, grad accelerate, accelerate grad, jit accelerate grad, "
    "accelerate jit grad, accelerate grad jit, grad accelerate jit, grad jit accelerate, "
    "accelerate grad accelerate, jvp accelerate, accelerate jvp, jvp accelerate jit, "
    "vmap accelerate, accelerate vmap, vmap accelerate jit, accelerate jit vmap, "
    "grad vmap accelerate, vmap accelerate grad, accelerate vmap grad, jvp grad accelerate, "
    "jvp accelerate grad, accelerate jvp grad"
)
ORDERS = _NAMES.split(", ")
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


def possible(program: str, order: str) -> bool:
    alone = by_lax(order).replace("jit ", "")
    return not any(each in alone for each in NOT_IN_JAX.get(program, ()))


CASES = [pair for pair in itertools.product(PROGRAMS, ORDERS) if possible(*pair)]


@pytest.mark.parametrize(("program", "order"), CASES)
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


@pytest.mark.parametrize(
    ("program", "order"), [c for c in CASES if c[1] in VALUES_OF and c[0] not in ALIKE]
)
def test_values(program: str, order: str) -> None:
    """Without jit around it where nothing but accelerate is."""
    fun = composed(order, PROGRAMS[program])
    out = (fun if order == "accelerate" else jax.jit(fun))(*arguments(order))
    assert_close(out, expected_values(program, by_lax(order)))


@pytest.mark.parametrize("program", PROGRAMS)
def test_jaxprs_are_well_formed(program: str) -> None:
    """JAX's own checks pass, of the types in every equation among others."""
    orders = ("accelerate jit", "accelerate jit grad", "grad accelerate jit", "accelerate jit vmap")
    with jax.enable_checks(True):
        for order in orders:
            if possible(program, order):
                jax.make_jaxpr(composed(order, PROGRAMS[program]))(*arguments(order))


def test_accelerating_twice_is_accelerating_once() -> None:
    once, twice = (
        without_addresses(jax.make_jaxpr(fun)(*operands()))
        for fun in (accelerate(deep), accelerate(accelerate(accelerate(deep))))
    )
    assert once == twice


def without_addresses(jaxpr: Any) -> str:
    return re.sub(r"<function .*? at |0x[0-9a-f]+", "", str(jaxpr))


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

    by_lax = loss(conv)
    jax.config.update("jax_remat3", remat3)
    try:
        expected = counts(grad(by_lax), *operands())[::-1], saved(by_lax)
        for fun in map(loss, (jaxconv.conv, accelerate(conv))):
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
