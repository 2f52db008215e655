"""``explain`` and ``autotune`` count what a function changes as results, and leave it unchanged."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

import jaxconv
from jaxconv.tools import autotune as autotuning
from jaxconv.transforms.state import results_and_changes

X, W = np.ones((1, 2, 8, 8), "float32"), np.ones((2, 2, 3, 3), "float32")
STEP = ["forward", "weight gradient"]


def conv(x: Any, w: Any) -> Array:
    return lax.conv(x, w, (1, 1), "SAME")


def gradient(w: Any, x: Any) -> Array:
    return jax.grad(lambda w: jnp.sum(conv(x, w) ** 2))(w)


def directions(fn: Callable[..., Any], *args: Any) -> list[str]:
    return [row.direction for row in jaxconv.explain(fn, platform="cpu")(*args).rows]


# jax.Ref


def descend(ref: Any, x: Any) -> None:
    ref[...] -= gradient(ref[...], x)


def accumulate(ref: Any, x: Any) -> None:
    jax.ref.addupdate(ref, ..., gradient(W, x))


def in_scan(ref: Any, x: Any) -> None:
    lax.scan(lambda carry, _: (carry, descend(ref, x)), None, None, length=3)


def in_cond(ref: Any, x: Any) -> None:
    lax.cond(x.sum() > 0, lambda: descend(ref, x), lambda: None)


def in_nested_jit(ref: Any, x: Any) -> None:
    jax.jit(lambda x: jax.jit(descend)(ref, x))(x)


def and_dead_code(ref: Any, x: Any) -> None:
    descend(ref, x)
    conv(conv(x, ref[...]), W)


REFS: list[Callable[..., None]] = [
    descend,
    accumulate,
    in_scan,
    in_cond,
    in_nested_jit,
    and_dead_code,
]


@pytest.mark.parametrize("closed", [False, True], ids=["argument", "closed over"])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["", "jit"])
@pytest.mark.parametrize("step", REFS)
def test_a_write_to_a_ref(step: Callable[..., None], jit: Any, closed: bool) -> None:
    ref = jax.new_ref(jnp.asarray(W))
    fn, args = (lambda x: step(ref, x), (X,)) if closed else (step, (ref, X))
    assert directions(jit(fn), *args) == STEP
    np.testing.assert_array_equal(ref[...], W)
    step(ref, jnp.asarray(X))
    assert not np.array_equal(ref[...], W)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["", "jit"])
def test_a_ref_inside_the_function(jit: Any) -> None:
    def step(w: Any, x: Any) -> Any:
        ref = jax.new_ref(w)
        descend(ref, x)
        return ref[...]

    assert directions(jit(step), W, X) == STEP


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="it is kept up to JAX 0.10")
def test_a_ref_that_nothing_reads_is_dead() -> None:
    def step(w: Any, x: Any) -> Any:
        descend(jax.new_ref(w), x)
        return x.sum()

    assert directions(step, W, X) == []


# Python's objects


class Model:
    """Not a pytree."""

    def __init__(self) -> None:
        self.w = jnp.asarray(W)

    def step(self, x: Any) -> None:
        self.w = self.w - gradient(self.w, x)
        conv(x, self.w)  # dead


@jax.tree_util.register_pytree_node_class
class Tree(Model):
    def tree_flatten(self) -> Any:
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> Any:
        self = object.__new__(cls)
        (self.w,) = leaves
        return self


model = Tree()


def changes_a_global(x: Any) -> None:
    def inner() -> None:
        model.step(x)

    inner()


def rebinds_a_global(x: Any) -> None:
    global model
    changed = Tree()
    changed.w = model.w - gradient(model.w, x)
    model = changed


def steps() -> dict[str, tuple[Callable[..., Any], Callable[[], Any], tuple[Any, ...]]]:
    """For each way to hold a model: a step, what gives its kernel, arguments of the step."""
    tree, plain, held = Tree(), Model(), {"w": jnp.asarray(W)}
    w = held["w"]

    def rebinds(x: Any) -> None:
        nonlocal w
        w = w - gradient(w, x)

    def item(held: Any, x: Any) -> None:
        held["w"] -= gradient(held["w"], x)

    def new(found: Any, x: Any) -> None:
        found.append(gradient(W, x))

    found: list[Any] = []
    return {
        "argument": (Tree.step, lambda: tree.w, (tree, X)),
        "item of an argument": (item, lambda: held["w"], (held, X)),
        "item of one closed over": (lambda x: item(held, x), lambda: held["w"], (X,)),
        "new item": (lambda x: new(found, x), lambda: [W, *found][-1], (X,)),
        "closed over": (lambda x: tree.step(x), lambda: tree.w, (X,)),
        "closed over in two places": (
            lambda x: (tree.step(x), (lambda: tree.w)()),
            lambda: tree.w,
            (X,),
        ),
        "in a wrapper": (jaxconv.accelerate(lambda x: tree.step(x)), lambda: tree.w, (X,)),
        "partial": (partial(Tree.step, tree), lambda: tree.w, (X,)),
        "keyword": (partial(lambda x, tree: tree.step(x), tree=tree), lambda: tree.w, (X,)),
        "method of a pytree": (tree.step, lambda: tree.w, (X,)),
        "method of another object": (plain.step, lambda: plain.w, (X,)),
        "nonlocal": (rebinds, lambda: w, (X,)),
        "global": (changes_a_global, lambda: model.w, (X,)),
        "global rebound": (rebinds_a_global, lambda: model.w, (X,)),
    }


@pytest.mark.parametrize("way", steps())
def test_a_changed_object(way: str) -> None:
    step, kernel, args = steps()[way]
    before = kernel()
    assert directions(step, *args) == STEP
    assert kernel() is before


def test_what_is_not_changed_is_no_result() -> None:
    unused = {"w": jnp.asarray(W)}

    def total(x: Any) -> Array:
        return x.sum() + 0 * len(unused)

    jaxpr = jax.make_jaxpr(lambda x: results_and_changes(total, (x,), {}))(X)
    assert len(jaxpr.out_avals) == 1


def test_dead_code_is_not_listed() -> None:
    tree = Tree()

    def step(x: Any) -> Array:
        conv(x, tree.w)
        return x.sum()

    assert directions(step, X) == []


def test_what_cannot_be_copied() -> None:
    unsorted = {1: W, "w": W}

    def calls_itself(x: Any, n: int = 2, *, unset: bool = False) -> Any:
        if unset:
            return later
        return x if n == 0 else calls_itself(conv(x, unsorted[1]), n - 1)

    assert directions(calls_itself, X) == ["forward"]
    later = None


def test_an_error_leaves_objects_alone() -> None:
    tree = Tree()
    before = tree.w

    def step(x: Any) -> None:
        tree.step(x)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        directions(step, X)
    assert tree.w is before


def test_autotune_measures_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree()
    monkeypatch.setattr(
        autotuning,
        "_compiled",
        lambda spec, *_: SimpleNamespace(call=lambda: 1.0, compile_seconds=0.1),
    )
    tuning = jaxconv.autotune(tree.step, X)
    assert [row.spec.weight_gradient for row in tuning.rows] == [False, True]
    np.testing.assert_array_equal(tree.w, W)
