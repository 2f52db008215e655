"""accelerate among the rest of JAX: arguments, effects, tracers, errors, settings, caches."""

import functools
import gc
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carriers import (
    POLICIES,
    PROGRAMS,
    WAYS,
    Fun,
    assert_close,
    conv,
    counts,
    custom_jvp,
    custom_vjp,
    deep,
    grad,
    operands,
)
from cases import LAST
from jax import Array, export, lax
from jax.experimental import io_callback, pallas
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P
from test_accelerate import expected_values

import jaxconv
from jaxconv import accelerate

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


def test_numbers_of_numpy_as_parameters() -> None:
    """lax keeps them as they are; int8 can't count the 200 rows."""

    def gradients(dtype: str, way: Callable[[Fun], Fun] = lambda f: f) -> Any:
        def fun(x: Any, w: Any) -> jax.Array:
            strides, pads, dilation = (np.array(n, dtype) for n in ((2, 1), (1, 1), (1, 2)))
            options = {"dimension_numbers": LAST[2], "feature_group_count": 2}
            return lax.conv_general_dilated(x, w, strides, [pads] * 2, None, dilation, **options)

        accelerated = way(fun)
        return jax.jit(jax.value_and_grad(lambda *args: accelerated(*args).sum(), (0, 1)))(x, w)

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape) for shape in ((1, 200, 9, 4), (3, 3, 2, 6)))
    expected = gradients("int64")
    assert_close(gradients("int8", accelerate), expected)
    with jaxconv.enabled():
        assert_close(gradients("int64"), expected)


def test_concrete_values_and_numpy() -> None:
    """Outside jit ``fn`` runs as Python: it may look at values and have arrays of NumPy."""
    x, w = map(np.asarray, operands())

    def fun(x: Any, w: Any) -> Any:
        y = conv(x, w)
        if float(jnp.sum(y)) > 1e9:
            return "large"
        return np.asarray(y), int(y.shape[0]), y.tolist()

    out, size, values = accelerate(fun)(x, w)
    assert (type(out), size) == (np.ndarray, 2)
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
    assert (accelerated.__name__, accelerated.__doc__) == ("fun", "Scaled.")
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
            record("pure", value)
            return 2 * value

        def step(x: Array, w: Array) -> Array:
            y = jnp.tanh(conv(x, w))
            total = jnp.sum(y)
            jax.debug.callback(functools.partial(record, "debug"), total, ordered=True)
            jax.debug.print("total {:.6f}", total, ordered=True)
            kind = jax.ShapeDtypeStruct((), np.float64)
            return y * jax.pure_callback(double, kind, total, vmap_method="sequential")

        def fun(x: Array, w: Array) -> Array:
            saved = functools.partial(record, "io")
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

    def fun(ref: Any, w: Array) -> None:
        ref[...] = conv(ref[...], w)

    for transform in WAYS:
        ref = jax.new_ref(x)
        assert transform(fun)(ref, w) is None
        assert_close(ref[...], conv(x, w))


def test_random_keys() -> None:
    def fun(key: Array, w: Array) -> Any:
        key, sub = jax.random.split(key)
        noise = jax.random.normal(sub, (2, 4, 5, 3))
        bits = jax.vmap(jax.random.bits)(jax.random.split(key))
        return conv(noise, w), jax.random.key_data(key), bits

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

    def results(fun: Fun) -> Any:
        batched = jax.vmap(fun, (0, None))(jnp.stack([x, -x]), w)
        return *jax.value_and_grad(fun, (0, 1))(x, w), batched

    by_lax, *ours = map(closing, (lambda fun: fun, *WAYS))
    expected, *found = jax.jit(lambda: [results(fun) for fun in (by_lax, *ours)])()
    for fun, out in zip(ours, found, strict=True):
        assert_close(out, expected)
        assert counts(jax.grad(fun, (0, 1)), x, w) == (0, 3)


def test_vmap_with_an_axis_name() -> None:
    x, w = operands()

    def fun(x: Array, w: Array) -> Any:
        y = conv(x, w)
        return y - lax.pmean(y, "batch"), lax.axis_index("batch"), lax.psum(1, "batch")

    images, names = jnp.stack([x, -x, 2 * x]), {"axis_name": "batch", "spmd_axis_name": "batch"}
    batched = functools.partial(jax.vmap, in_axes=(0, None), **names)
    expected = jax.jit(batched(fun))(images, w)
    for transformed in (batched(accelerate(fun)), accelerate(batched(fun))):
        assert_close(jax.jit(transformed)(images, w), expected)
        assert counts(transformed, images, w) == (0, 1)


def test_pmap() -> None:
    x, w = operands()
    pmap = functools.partial(jax.pmap, in_axes=(0, None))
    for fun in (accelerate(pmap(conv)), pmap(accelerate(conv))):
        assert_close(np.asarray(fun(x[None], w)), np.asarray(conv(x, w)[None]))
        assert counts(fun, x[None], w) == (0, 1)


# ---- what stays with lax ----


def test_unknown_primitives_are_left_alone_and_warned_of_once() -> None:
    """Of the same call a second time, or of a program without convolutions, nothing is said."""
    opaque_p, (x, w) = Primitive("opaque"), operands()
    opaque_p.def_impl(lambda x, w, *, program: jaxpr_as_fun(program)(x, w)[0])
    opaque_p.def_abstract_eval(lambda x, w, *, program: program.out_avals[0])
    mlir.register_lowering(opaque_p, mlir.lower_fun(opaque_p.impl, multiple_results=False))
    program, harmless = (jax.make_jaxpr(f)(x, w) for f in (conv, lambda x, w: jax.nn.silu(x)))

    def fun(x: Array, w: Array) -> Array:
        return conv(opaque_p.bind(x, w, program=program), w)

    accelerate(lambda x, w: opaque_p.bind(x, w, program=harmless))(x, w)
    message = r"jaxconv\.accelerate: the convolutions inside 'opaque' stay with"
    with pytest.warns(match=message) as caught:
        accelerate(fun)(x, w)
    assert len(caught) == 1
    assert_close(accelerate(jax.jit(fun))(x, w), fun(x, w))
    assert counts(accelerate(fun), x, w) == (1, 1)


def test_pallas_kernels_are_left_alone() -> None:
    x, w = operands()

    def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        out_ref[...] = jax.nn.relu(conv(x_ref[...], w_ref[...]))

    def fun(x: Array, w: Array) -> Array:
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(kernel, out_shape=kind, interpret=True)(x, w)

    with pytest.warns(match="'pallas_call'") as caught:
        found = accelerate(fun)(x, w)
    assert len(caught) == 1
    assert_close(found, jax.nn.relu(conv(x, w)))
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

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = jax.jit(accelerate(fun)).lower(x, w).as_text()
    assert len(caught) == ("stablehlo.convolution" in text)
    assert all("'CustomRoot'" in str(warning.message) for warning in caught)
    assert_close(accelerate(fun)(x, w), fun(x, w))
    assert counts(accelerate(grad(fun)), x, w)[0] == 0


def test_shardings_in_types() -> None:
    x, w = operands()
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded, whole = jax.device_put(x, P("i")), jax.device_put(w, P())
        for fun in (*(way(conv) for way in WAYS), accelerate(conv, algorithm="winograd")):
            assert counts(fun, sharded, whole) == (0, 1)
            assert_close(fun(sharded, whole), conv(sharded, whole))
        gradients = (jax.jit(grad(f))(sharded, whole) for f in (fun, conv))
        assert_close(*gradients)


@pytest.mark.parametrize("algorithm", ["auto", "im2col"])
def test_symbolic_shapes_are_left_to_lax(algorithm: str) -> None:
    x, w = operands()
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, 5, 3"), np.float64)
    made = export.export(jax.jit(accelerate(jax.jit(conv), algorithm=algorithm)))(symbolic, w)
    assert "stablehlo.convolution" in made.mlir_module() or "dynamic_conv" in made.mlir_module()
    for fun in (made.call, accelerate(made.call)):  # what is exported is a program of its own
        assert_close(fun(x, w), conv(x, w))


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

    batched = lambda x, w: jax.vmap(fails, (0, None))(x[None], w)  # noqa: E731
    for fun in (fails, fails_deep, jax.jit(fails), grad(fails), batched):
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

    def waiting(x: Array, w: Array) -> Array:
        inside.set()
        assert done.wait(60)
        return conv(x, w)

    with ThreadPoolExecutor(1) as pool:
        accelerated = pool.submit(counts, accelerate(waiting), x, w)
        assert inside.wait(60)
        assert counts(conv, x, w) == counts(jax.jit(conv), x, w) == (1, 0)
        done.set()
        assert accelerated.result() == (0, 1)


def test_a_jitted_function_has_a_program_for_each(lowered: list[str], compiled: list[str]) -> None:
    """Whoever calls it first: lax's for itself, jaxconv's for each algorithm of accelerate."""
    (x, w), calls = operands(), {}
    expected = conv(x, w)
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
            assert_close(calls[name](x, w), expected)
        assert lowered == compiled == []
    batched = jax.vmap(fun, (0, None))
    for _ in range(2):
        assert counts(batched, x[None], w) == (1, 0)
        assert counts(accelerate(batched), x[None], w) == (0, 1)
        assert counts(grad(fun), x, w) == (3, 0)
        assert counts(accelerate(grad(fun)), x, w) == (0, 3)


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
    expected = expected_values("deep", "grad")
    with SETTINGS[name]():
        out = accelerate(jax.jit(grad(deep)))(*operands())
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


custom_jvp_conv = custom_jvp()


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


def test_a_second_eager_call_compiles_nothing(compiled: list[str]) -> None:
    fun = accelerate(grad(conv))
    fun(*operands())
    compiled.clear()
    fun(*operands(1))
    assert compiled == []


# Of accelerate, or of what leaves a function as it is.
HOLDING: dict[str, Callable[[Fun, Fun], Fun]] = {
    "eager": lambda way, f: way(f),
    "jit accelerate": lambda way, f: jax.jit(way(f)),
    "accelerate jit": lambda way, f: way(jax.jit(f)),
    "accelerate grad jit": lambda way, f: way(grad(jax.jit(f))),
    "custom_vjp": lambda way, f: way(grad(jax.jit(custom_vjp(f)))),
    "remat": lambda way, f: jax.jit(way(grad(jax.checkpoint(f, policy=POLICIES["dots"])))),
    "vmap": lambda way, f: lambda x, w: way(jax.vmap(jax.jit(f), (0, None)))(x[None], w),
}


def test_functions_are_freed_as_by_jax() -> None:
    """Nothing holds a function, or a constant in it, once nobody has it any more."""

    class Token:
        pass

    def called(how: str, way: Fun) -> list[weakref.ref]:
        token, constant = Token(), jnp.full((3, 3, 3, 3), 0.5)

        def fun(x: Array, w: Array) -> Array:
            assert token
            return conv(x, w + constant)

        HOLDING[how](way, fun)(*operands())
        return [weakref.ref(token), weakref.ref(constant)]

    def held(ways: Collection[str], way: Fun) -> set[str]:
        refs = {how: called(how, way) for how in ways}
        gc.collect()
        return {how for how in ways if any(ref() is not None for ref in refs[how])}

    by_us = held(HOLDING, accelerate)
    assert by_us <= held(by_us, lambda fun: fun)


# ---- convolutions that lax's rules of shape accept and lax can't compile ----


def axes(lhs: Any = (0, 1, 2, 3), rhs: Any = (0, 1, 2, 3), out: Any = (0, 1, 2, 3)) -> Any:
    return {"dimension_numbers": lax.ConvDimensionNumbers(lhs, rhs, out)}


MALFORMED: dict[str, dict[str, Any]] = {
    "negative strides": {"window_strides": (-1, -1)},
    "a stride of 0": {"window_strides": (0, 1)},
    "one lhs_dilation": {"lhs_dilation": (2,)},
    "one rhs_dilation": {"rhs_dilation": (2,)},
    "no taps": {"taps": (0, 3)},
    "duplicate axes of lhs": axes(lhs=(0, 1, 1, 3)),
    "duplicate axes of the output": axes(out=(0, 1, 2, 2)),
    "negative axes of rhs": axes(rhs=(0, 1, -2, -1)),
    "negative axes of the output": axes(out=(0, 1, -2, -1)),
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
