"""jaxconv under JAX's transformations gives what lax gives, and nothing is traced twice."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import CASES, LAST, Case, equations, make_case
from jax import Array, export, lax

import jaxconv

Conv = Callable[[Any, Any], Array]


def conv_by(case: Case, algorithm: str = "auto") -> Conv:
    return functools.partial(jaxconv.conv_general_dilated, **case.arguments, algorithm=algorithm)


def energy(conv: Conv) -> Conv:
    """A function of both operands that has derivatives of every order."""
    return lambda lhs, rhs: jnp.sum(jnp.sin(conv(lhs, rhs)))


def with_gradients(conv: Conv) -> Callable:
    return lambda *args: (conv(*args), jax.grad(energy(conv), (0, 1))(*args))


def pushed(conv: Conv) -> Conv:
    """jvp, linearize and linear_transpose."""

    def fun(lhs: Array, rhs: Array) -> Any:
        tangents = jnp.cos(lhs), jnp.sin(rhs)
        out, linear = jax.linearize(conv, lhs, rhs)
        transposed = jax.linear_transpose(lambda lhs: conv(lhs, rhs), lhs)
        one_sided = jax.jvp(lambda rhs: conv(lhs, rhs), (rhs,), tangents[1:])
        both = jax.jvp(conv, (lhs, rhs), tangents)
        return both, one_sided, linear(*tangents), transposed(out)

    return fun


def second(conv: Conv) -> Conv:
    """Hessian times vector, forward over reverse and reverse over reverse."""

    def fun(lhs: Array, rhs: Array) -> Any:
        gradient = jax.grad(energy(conv), (0, 1))
        vectors = jnp.cos(lhs), jnp.sin(rhs)
        _, forward = jax.jvp(gradient, (lhs, rhs), vectors)
        _, transpose = jax.vjp(gradient, lhs, rhs)
        return forward, transpose(vectors)

    return fun


def hessian(conv: Conv) -> Conv:
    """jacfwd over jacrev, of both operands: the batches of all derivatives' derivatives."""
    return lambda lhs, rhs: jax.jacfwd(jax.jacrev(energy(conv), 1), 0)(lhs, rhs)


def stacked(x: Array, axis: int, size: int = 3) -> Array:
    return jnp.stack([(1.0 + i) * x for i in range(size)], axis)


def batched(in_axes: tuple[int | None, ...], out_axes: int = 0, size: int = 3) -> Callable:
    """vmap, and its gradient, with operands stacked along ``in_axes``."""

    def transform(conv: Conv) -> Conv:
        vmapped = jax.vmap(conv, in_axes, out_axes)

        def fun(lhs: Array, rhs: Array) -> Any:
            operands = [
                x if axis is None else stacked(x, axis, size)
                for x, axis in zip((lhs, rhs), in_axes, strict=True)
            ]
            return with_gradients(vmapped)(*operands)

        return fun

    return transform


def nested(conv: Conv) -> Conv:
    """All pairs of three images and two kernels, and a batch of both inside one of images."""

    def fun(lhs: Array, rhs: Array) -> Any:
        pairs = jax.vmap(jax.vmap(conv, (None, 0)), (0, None))
        twice = jax.vmap(jax.vmap(conv, (1, 0)), (0, None))
        images, kernels = stacked(lhs, 0), stacked(rhs, 0, 2)
        return pairs(images, kernels), twice(stacked(images, 2, 2), kernels)

    return fun


def empty_batches(conv: Conv) -> Conv:
    def fun(lhs: Array, rhs: Array) -> Any:
        lhs0, rhs0 = (jnp.zeros((0, *x.shape)) for x in (lhs, rhs))
        cases = ((lhs0, rhs), (0, None)), ((lhs, rhs0), (None, 0)), ((lhs0, rhs0), 0)
        return [with_gradients(jax.vmap(conv, axes))(*args) for args, axes in cases]

    return fun


TRANSFORMATIONS: dict[str, Callable[[Conv], Conv]] = {
    "value and grad": lambda conv: jax.value_and_grad(energy(conv), (0, 1)),
    "jvp, linearize, transpose": pushed,
    "second derivatives": second,
    "hessian": hessian,
    "vmap lhs": batched((0, None)),
    "vmap rhs": batched((None, 0)),
    "vmap both": batched((0, 0)),
    "vmap other axes": batched((2, 1), out_axes=1),
    "vmap last axes": batched((-1, -1), out_axes=-1),
    "vmap of one": batched((1, None), size=1),
    "vmap of none": empty_batches,
    "nested vmap": nested,
}
COMBINATIONS = [
    *(
        (transformation, case)
        for transformation in TRANSFORMATIONS
        if transformation != "hessian"
        for case in ("3x3 stride 2", "all dilations", "batch groups")
    ),
    ("value and grad", "nchw"),
    ("hessian", "1d causal depthwise"),  # of larger ones it has a million elements
]


def assert_same(fun: Callable, expected: Callable, *args: Any) -> None:
    oracles.assert_close(fun(*args), expected(*args), roundings=2**16)


@pytest.mark.parametrize(("transformation", "name"), COMBINATIONS)
def test_under_jit(transformation: str, name: str) -> None:
    case, transform = CASES[name], TRANSFORMATIONS[transformation]
    assert_same(jax.jit(transform(conv_by(case))), jax.jit(transform(case.lax)), *case.operands())


@pytest.mark.parametrize("transformation", ["value and grad", "vmap both"])
def test_without_jit(transformation: str) -> None:
    case, transform = CASES["grouped"], TRANSFORMATIONS[transformation]
    operands = map(jnp.asarray, case.operands())
    assert_same(transform(conv_by(case)), jax.jit(transform(case.lax)), *operands)


def test_gradients_keep_the_operands_dtype() -> None:
    """With preferred_element_type the cotangent is wider than the operands."""
    case = CASES["3x3 stride 2"]
    operands = case.operands(jnp.bfloat16)

    def gradients(conv: Callable[..., Array]) -> tuple[Array, Array]:
        wide = functools.partial(conv, **case.arguments, preferred_element_type=np.float32)
        return jax.jit(jax.grad(lambda *args: jnp.sum(wide(*args)), (0, 1)))(*operands)

    ours, by_lax = map(gradients, (jaxconv.conv_general_dilated, lax.conv_general_dilated))
    oracles.assert_close(ours, by_lax, roundings=2)
    assert {out.dtype for out in ours} == {jnp.dtype(jnp.bfloat16)}


# ---- export ----


def exported(fun: Callable, *args: Any, vjp_order: int = 1) -> export.Exported:
    """``fun`` exported and brought back from bytes."""
    pytest.importorskip("flatbuffers", reason="jax.export needs it to serialize")
    made = export.export(jax.jit(fun))(*args)
    return export.deserialize(made.serialize(vjp_order=vjp_order))


def exported_case(algorithm: str) -> Case:
    """A case that ``algorithm`` supports."""
    taken = {"pointwise": "1x1 stride 2", "winograd": "3x3", "winograd4": "3x3"}
    return CASES[taken.get(algorithm, "transposed")]


@functools.cache
def by_lax(name: str) -> Any:
    return jax.jit(with_gradients(CASES[name].lax))(*CASES[name].operands())


@pytest.mark.parametrize("algorithm", ["auto", *jaxconv.ALGORITHMS])
def test_export(algorithm: str) -> None:
    case = exported_case(algorithm)
    again = exported(conv_by(case, algorithm), *case.operands())
    assert_same(jax.jit(with_gradients(again.call)), lambda *_: by_lax(case.name), *case.operands())


def convolutions_elsewhere(
    fun: Callable, case: Case, platform: str, dtype: Any = np.float32
) -> int:
    """How many of XLA's own are in what is exported for a platform that may not be here."""
    made = export.export(jax.jit(fun), platforms=[platform])(*case.operands(dtype))
    assert made.platforms == (platform,)
    return made.mlir_module().count("stablehlo.convolution")


# JAX lowers for ROCm as for CUDA.
ELSEWHERE = pytest.mark.parametrize("platform", ["cuda", "tpu"])


@ELSEWHERE
@pytest.mark.usefixtures("unrepaired")
@pytest.mark.parametrize("algorithm", jaxconv.ALGORITHMS)
def test_export_for_another_platform(algorithm: str, platform: str) -> None:
    case = exported_case(algorithm)
    conv = conv_by(case, algorithm)
    assert convolutions_elsewhere(conv, case, platform) == (algorithm == "xla")
    # What an algorithm can't do is planned for that platform, where it is XLA's.
    gradients = jax.grad(energy(conv), (0, 1))
    assert convolutions_elsewhere(gradients, case, platform) <= 3


UP_3D = make_case(
    "3d up", (1, 8, 8, 8, 16), (2, 2, 2, 16, 16), None, ((1, 1),) * 3, lhs_dilation=(2,) * 3
)


@ELSEWHERE
@pytest.mark.parametrize(
    "case",
    [*(CASES[name] for name in ("3x3", "3x3 stride 2", "transposed", "nchw", "3d")), UP_3D],
    ids=lambda case: case.name,
)
def test_dense_convolutions_exported_for_accelerators_are_xlas(case: Case, platform: str) -> None:
    """But on GPU a transposed one of three dimensions, and its gradients."""
    for transform in (lambda conv: conv, lambda conv: jax.grad(energy(conv), (0, 1))):
        count, by_lax = (
            convolutions_elsewhere(transform(conv), case, platform)
            for conv in (conv_by(case), case.lax)
        )
        assert by_lax > 0
        assert count == (0 if case is UP_3D and platform != "tpu" else by_lax)


@ELSEWHERE
def test_integers_exported_for_gpus_are_not_xlas(platform: str) -> None:
    """XLA refuses them there."""
    case = CASES["3x3"]
    count = convolutions_elsewhere(conv_by(case), case, platform, np.int8)
    assert count == (platform == "tpu")


def same_2d(conv: Callable[..., Array], **arguments: Any) -> Conv:
    return functools.partial(
        conv, window_strides=(1, 1), padding="SAME", dimension_numbers=LAST[2], **arguments
    )


SYMBOLIC: dict[str, tuple[str, Callable[[Conv], Conv]]] = {
    "batch": ("b, 5, 6, 3", lambda conv: conv),
    "space": ("2, h, w, 3", lambda conv: conv),
    "grad of vmap": (
        "b, 2, h, 6, 3",
        lambda conv: jax.grad(energy(jax.vmap(conv, (0, None))), (0, 1)),
    ),
}


@pytest.mark.parametrize("what", SYMBOLIC)
def test_symbolic_shapes(what: str) -> None:
    shape, transform = SYMBOLIC[what]
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 4))
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), np.float64)
    conv, by_lax = (
        transform(same_2d(fun)) for fun in (jaxconv.conv_general_dilated, lax.conv_general_dilated)
    )
    made = exported(conv, symbolic, kernel, vjp_order=0)
    for batch in (1, 4):
        sizes = {"b": batch, "h": 3 + batch, "w": 7}
        image = np.random.default_rng(1).standard_normal(
            [sizes.get(size) or int(size) for size in shape.split(", ")]
        )
        assert_same(jax.jit(made.call), jax.jit(by_lax), image, kernel)


# ---- which primitives, and which algorithms, come out ----


def algorithms_in(fun: Callable, *args: Any) -> list[str]:
    """Of each convolution in ``fun``: its algorithm, "lax" where it is lax's own."""
    return [
        eqn.params.get("algorithm", "lax")
        for eqn in equations(jax.make_jaxpr(fun)(*args))
        if eqn.primitive.name in ("jaxconv", "conv_general_dilated")
    ]


# Algorithm and case; what does the convolution, its gradients by lhs and rhs, its vmaps by lhs, by
# rhs and by both, as far as another algorithm than the named one does.
SURVIVAL = {
    ("im2col", "3x3 stride 2"): {},
    ("im2col_tiled", "grouped"): {},
    ("naive", "batch groups"): {},
    ("implicit", "all dilations"): {},
    ("xla", "nchw"): {},
    ("shift", "depthwise"): {},
    ("shift", "many outputs"): {"lhs gradient": "auto", "rhs gradient": "auto"},
    ("pointwise", "1x1 stride 2"): {},
    ("pointwise", "patchify"): {},
    ("phase", "transposed"): {"lhs gradient": "auto"},
    ("auto", "3x3 stride 2"): {},
}
MANY_OUTPUTS = Case("many outputs", (1, 5, 5, 2), (3, 3, 2, 20), CASES["3x3"].arguments)


@pytest.mark.parametrize(("algorithm", "name"), SURVIVAL)
def test_a_named_algorithm_survives_where_it_can(algorithm: str, name: str) -> None:
    case = CASES.get(name, MANY_OUTPUTS)
    lhs, rhs = case.operands()
    conv = conv_by(case, algorithm)
    lhs2, rhs2 = np.stack([lhs] * 2), np.stack([rhs] * 2)
    cotangent = np.zeros(jax.eval_shape(conv, lhs, rhs).shape)
    found = {
        "conv": algorithms_in(conv, lhs, rhs),
        "lhs gradient": algorithms_in(jax.linear_transpose(lambda x: conv(x, rhs), lhs), cotangent),
        "rhs gradient": algorithms_in(jax.linear_transpose(lambda w: conv(lhs, w), rhs), cotangent),
        "vmap lhs": algorithms_in(jax.vmap(conv, (0, None)), lhs2, rhs),
        "vmap rhs": algorithms_in(jax.vmap(conv, (None, 0)), lhs, rhs2),
        "vmap both": algorithms_in(jax.vmap(conv), lhs2, rhs2),
    }
    others = SURVIVAL[algorithm, name]
    assert found == {what: [others.get(what, algorithm)] for what in found}


# ---- nothing twice ----


REPEATED: dict[str, Callable[[Conv], Callable]] = {
    "eager": lambda conv: conv,
    "eager grad": lambda conv: jax.grad(energy(conv), (0, 1)),
    "eager vmap": lambda conv: jax.vmap(conv, (0, None)),
    "eager vmap both": lambda conv: jax.vmap(conv),
    "jit": jax.jit,
    "jit grad": lambda conv: jax.jit(jax.grad(energy(conv), (0, 1))),
    "jit vmap both": lambda conv: jax.jit(jax.vmap(conv)),
}


@pytest.mark.parametrize(
    ("how", "algorithm"), [*zip(REPEATED, 3 * ["auto", "im2col_tiled", "xla"], strict=False)]
)
def test_a_second_call_traces_and_compiles_nothing(
    how: str, algorithm: str, compiled: list[str]
) -> None:
    # A shape of its own, since JAX's caches live as long as the process.
    size = 5 + list(REPEATED).index(how)
    rng = np.random.default_rng(0)
    lhs_shape, rhs_shape = (2, size, 6, 3), (3, 3, 3, 4)
    if "vmap" in how:
        lhs_shape = (2, *lhs_shape)
    if "both" in how:
        rhs_shape = (2, *rhs_shape)

    def operands() -> list[Array]:
        return [jax.device_put(rng.standard_normal(shape)) for shape in (lhs_shape, rhs_shape)]

    fun = REPEATED[how](same_2d(jaxconv.conv_general_dilated, algorithm=algorithm))
    first, second = operands(), operands()
    compiled.clear()
    jax.block_until_ready(fun(*first))
    assert "backend_compile_duration" in compiled
    compiled.clear()
    jax.block_until_ready(fun(*second))
    assert compiled == []
