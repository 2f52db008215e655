"""What a function leaves in its arguments counts as results; the arguments stay as they are."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
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
from jaxconv.transforms.jaxprs import over_arrays

X, W = np.ones((1, 2, 8, 8), "float32"), np.ones((2, 2, 3, 3), "float32")
STEP = ["forward", "weight gradient"]


def conv(x: Any, w: Any) -> Array:
    return lax.conv(x, w, (1, 1), "SAME")


def gradient(w: Any, x: Any) -> Array:
    return jax.grad(lambda w: jnp.sum(conv(x, w) ** 2))(w)


def directions(fn: Callable[..., Any], *args: Any) -> list[str]:
    return [row.direction for row in jaxconv.explain(fn, *args, platform="cpu").rows]


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


@pytest.mark.parametrize(
    ("closed", "jit"),
    [(False, lambda f: f), (True, lambda f: f), (False, jax.jit)],
    ids=["argument", "closed over", "jit"],
)
@pytest.mark.parametrize(
    "step", [descend, accumulate, in_scan, in_cond, in_nested_jit, and_dead_code]
)
def test_a_write_to_a_ref(step: Callable[..., None], jit: Any, closed: bool) -> None:
    ref = jax.new_ref(jnp.asarray(W))
    fn, args = (lambda x: step(ref, x), (X,)) if closed else (step, (ref, X))
    assert directions(jit(fn), *args) == STEP
    np.testing.assert_array_equal(ref[...], W)
    step(ref, jnp.asarray(X))
    assert not np.array_equal(ref[...], W)


def test_a_ref_inside_the_function() -> None:
    def step(w: Any, x: Any) -> Any:
        ref = jax.new_ref(w)
        descend(ref, x)
        return ref[...]

    assert directions(step, W, X) == directions(jax.jit(step), W, X) == STEP


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="it is kept up to JAX 0.10")
def test_a_ref_that_nothing_reads_is_dead() -> None:
    def step(w: Any, x: Any) -> Any:
        descend(jax.new_ref(w), x)
        return x.sum()

    assert directions(step, W, X) == []


# Python's objects


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    w: Any = dataclasses.field(default_factory=lambda: jnp.asarray(W))

    def step(self, x: Any) -> None:
        self.w = self.w - gradient(self.w, x)
        conv(x, self.w)  # dead


def item(held: Any, x: Any) -> None:
    held["w"] -= gradient(held["w"], x)


def new(found: Any, x: Any) -> None:
    found.append(gradient(W, x))


def fails(model: Any, x: Any) -> None:
    model.step(x)
    raise RuntimeError


# For each way to pass a model: a step of it, and the step's arguments.
WAYS: dict[str, Callable[[Model], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "argument": lambda model: (Model.step, (model, X)),
    "in a wrapper": lambda model: (jaxconv.accelerate(Model.step), (model, X)),
    "partial": lambda model: (partial(Model.step, model), (X,)),
    "keyword": lambda model: (partial(lambda x, model: model.step(x), model=model), (X,)),
    "method": lambda model: (model.step, (X,)),
    "item": lambda model: (item, (vars(model), X)),
    "in another": lambda model: (lambda all, x: all[0].step(x), ([model, None], X)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_argument(way: str) -> None:
    model = Model()
    step, args = WAYS[way](model)
    before = model.w
    assert directions(step, *args) == STEP
    assert model.w is before


def test_an_error_leaves_arguments_alone() -> None:
    model, found = Model(), []
    before = model.w
    with pytest.raises(RuntimeError):
        directions(fails, model, X)
    assert model.w is before
    assert directions(new, found, X) == STEP
    assert found == []


def test_what_is_not_changed_is_no_result() -> None:
    of_arrays, arrays = over_arrays(lambda x, unused: x.sum(), (X, {"w": W}), {})
    assert len(arrays) == 2
    assert len(jax.make_jaxpr(of_arrays)(arrays).out_avals) == 1


def test_dead_code_is_not_listed() -> None:
    assert directions(lambda model, x: (conv(x, model.w), x.sum())[1], Model(), X) == []


def closing(kind: str) -> Callable[..., Any]:
    """A function that changes what is none of its arguments."""
    w, held = jnp.asarray(W), [Model()]

    def rebinds(x: Any) -> None:
        nonlocal w
        w = w - gradient(w, x)

    closed_over = lambda x: held[0].step(x)  # noqa: E731
    return {"closed over": closed_over, "in jit": jax.jit(closed_over), "nonlocal": rebinds}[kind]


@pytest.fixture
def few_objects() -> Iterator[None]:
    """JAX looks for the tracer among all of Python's objects, but for frozen ones."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("kind", ["in jit", "closed over", "nonlocal"])
def test_what_is_no_argument_can_not_be_changed(kind: str) -> None:
    """JAX says at once where the tracer is, instead of at the next use; jax.jit does the latter."""
    with pytest.raises(Exception, match=r"Leaked trace(.|\n)*is referred to by"):
        directions(closing(kind), X)


def test_autotune_measures_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stub = Model(), SimpleNamespace(call=lambda: 1.0, compile_seconds=0.1)
    monkeypatch.setattr(autotuning, "_compiled", lambda spec, *_: stub)
    tuning = jaxconv.autotune(model.step, X)
    assert [row.spec.weight_gradient for row in tuning.rows] == [False, True]
    np.testing.assert_array_equal(model.w, W)
