"""What is compiled: no convolution but XLA's own, few products, bounded memory and program text."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, case_of, equations
from jax import Array, lax

import jaxconv
from jaxconv import ALGORITHMS, layout
from jaxconv.algorithms import gemm, phase, shift, xla
from jaxconv.algorithms.base import apply, prepared, unsupported
from jaxconv.planning.choose import run, workspace
from jaxconv.spec import ConvSpec

Patch = pytest.MonkeyPatch
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="other backends rewrite products to library calls and plan memory in their own way",
)


TRANSPOSED = case_of(
    (1, 16, 16, 64),
    (3, 3, 64, 64),
    padding=((1, 2), (1, 2)),
    lhs_dilation=(2, 2),
)
LARGE = case_of((1, 224, 224, 64), (3, 3, 64, 64))
LARGE_KERNEL = case_of((1, 128, 128, 1), (65, 65, 1, 1))

# Forward and gradients stay with these algorithms for these; float32, where XLA's own
# convolution would be the choice for what they leave to "auto".
DENSE = {
    "naive": ("3x3 stride 2", "grouped"),
    "im2col": ("3x3 stride 2", "grouped", "1d", "3d", "nchw", "batch groups"),
    "im2col_tiled": ("3x3 stride 2", "grouped", "1d", "3d", "nchw", "batch groups"),
    "implicit": ("3x3 stride 2", "grouped", "1d", "3d", "nchw", "batch groups"),
    "pointwise": ("1x1", "1x1 stride 2", "1x1 padded", "grouped 1x1", "matmul"),
    "shift": ("3x3 stride 2", "depthwise", "1d causal depthwise", "grouped"),
    "fft": ("3x3 stride 2", "grouped", "1d", "nchw"),
    "winograd": ("3x3", "grouped", "1d", "3d dense", "nchw", "batch groups"),
    "winograd4": ("3x3", "grouped", "1d", "3d dense", "nchw", "batch groups"),
}
FORWARD = {
    # XLA would choose itself for dense phases; what is named is what runs.
    "phase": ("transposed", "all dilations", "3d transposed", "dense phases"),
    "pointwise": ("patchify",),
    "slices": ("3x3 stride 2", "grouped", "3d", "all dilations"),
}


def each_of(cases: dict[str, tuple[str, ...]]) -> Any:
    pairs = [(algorithm, name) for algorithm in cases for name in cases[algorithm]]
    return pytest.mark.parametrize(("algorithm", "name"), pairs)


def shapes(case: Case, dtype: Any = np.float32) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in (case.lhs_shape, case.rhs_shape)]


def compiled(lowered: Any) -> Any:
    """Nobody looks at the machine code: text and memory are the same and take half as long."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return lowered.compile(compiler_options=quickly)


def programs(fun: Any, *args: Any) -> tuple[str, str]:
    """As JAX gives it to XLA, and as XLA runs it."""
    lowered = jax.jit(fun).lower(*args)
    return lowered.as_text(), compiled(lowered).as_text()


def convolve(case: Case, algorithm: str, lhs: Any, rhs: Any) -> Array:
    return jaxconv.conv_general_dilated(lhs, rhs, **case.arguments, algorithm=algorithm)


def gradients(case: Case, algorithm: str, lhs: Any, rhs: Any) -> tuple[Array, Array, Array]:
    out, transpose = jax.vjp(functools.partial(convolve, case, algorithm), lhs, rhs)
    return out, *transpose(out)


def has_convolution(fun: Any, case: Case, algorithm: str) -> bool:
    before, after = programs(functools.partial(fun, case, algorithm), *shapes(case))
    found = "stablehlo.convolution" in before
    assert (" convolution(" in after) == found
    return found


def test_every_algorithm_is_checked() -> None:
    assert {*DENSE, *FORWARD, "xla"} == set(jaxconv.ALGORITHMS)


@on_cpu
def test_xla_compiles_to_a_convolution() -> None:
    """Else the tests below would look for a name that XLA no longer has."""
    for fun in (convolve, gradients):
        assert has_convolution(fun, CASES["grouped"], "xla")


@on_cpu
@pytest.mark.usefixtures("unrepaired")
@each_of(DENSE)
def test_no_convolution_forward_and_in_gradients(algorithm: str, name: str) -> None:
    assert not has_convolution(gradients, CASES[name], algorithm)


@on_cpu
@each_of(FORWARD)
def test_no_convolution_forward(algorithm: str, name: str) -> None:
    assert not has_convolution(convolve, CASES.get(name, TRANSPOSED), algorithm)


# ---- products ----


def products(fun: Any, *args: Any) -> list[Any]:
    """The dot_generals in ``fun``, which has no convolution."""
    eqns = list(equations(jax.make_jaxpr(fun)(*args)))
    assert not {"conv_general_dilated", "xla_conv"} & {eqn.primitive.name for eqn in eqns}
    return [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]


def canonical_products(case: Case, algorithm: str) -> list[Any]:
    """Of the function that ``algorithm`` is, on arrays in the canonical layout."""
    spec = case.spec(np.float32)

    def handed_on(lhs: Array, rhs: Array, part: ConvSpec) -> Array:
        return run(lhs, rhs, part, "implicit", "cpu")

    return products(
        lambda lhs, rhs: apply(jaxconv.ALGORITHMS[algorithm], lhs, rhs, spec, handed_on),
        *(jax.ShapeDtypeStruct(shape, spec.dtype) for shape in (spec.lhs_shape, spec.rhs_shape)),
    )


WITHOUT_OVERLAP = {
    "1x1": case_of((2, 5, 4, 64), (1, 1, 64, 32)),
    "1x1 stride 2": case_of((2, 5, 4, 64), (1, 1, 64, 32), strides=(2, 2)),
    "1x1 padded": case_of((2, 5, 4, 64), (1, 1, 64, 32), padding=((1, 0), (0, 2))),
    "1x1 in groups": case_of((2, 5, 4, 64), (1, 1, 32, 32), feature_group_count=2),
    "patchify": case_of((2, 8, 8, 3), (4, 4, 3, 64), strides=(4, 4)),
    "whole image": case_of((2, 4, 4, 32), (4, 4, 32, 64), padding="VALID"),
    "matmul": case_of((20, 32), (32, 64), padding="VALID"),
}


@pytest.mark.parametrize("name", WITHOUT_OVERLAP)
def test_windows_that_do_not_overlap_are_one_product(name: str) -> None:
    assert len(canonical_products(WITHOUT_OVERLAP[name], "pointwise")) == 1


PADDING = {
    "none": (case_of((4, 18, 18, 128), (3, 3, 128, 32), padding="VALID"), True),
    "some": (case_of((4, 18, 18, 128), (3, 3, 128, 32)), False),
    "small": (case_of((1, 18, 18, 128), (3, 3, 128, 32), padding="VALID"), False),
    "few channels": (case_of((64, 34, 34, 16), (3, 3, 16, 16), padding="VALID"), False),
    "1×1": (case_of((8, 64, 64, 32), (1, 1, 32, 32), padding="VALID"), False),
    "one output": (case_of((256, 14, 14, 32), (14, 14, 32, 32), padding="VALID"), False),
    "1-D": (case_of((4, 4096, 64), (3, 64, 32), padding="VALID"), False),
    "groups": (
        case_of((4, 18, 18, 256), (3, 3, 128, 32), padding="VALID", feature_group_count=2),
        False,
    ),
}


@on_cpu
@pytest.mark.parametrize(("name", "faster"), [*((name, True) for name in PADDING), ("none", False)])
def test_xla_gets_a_row_of_zeros_where_that_is_faster(
    monkeypatch: Patch, name: str, faster: bool
) -> None:
    monkeypatch.setattr(xla, "PADDED_IS_FASTER", faster)
    case, gains = PADDING[name]
    lhs, rhs = case.operands(np.float32)
    text, _ = programs(functools.partial(convolve, case, "xla"), lhs, rhs)
    assert ("pad = [[0, 1], [0, 0]]" in text) == (gains and faster)
    # A function of its own: jit does not know that the setting changed.
    found = jax.jit(lambda lhs, rhs: convolve(case, "xla", lhs, rhs))(lhs, rhs)
    np.testing.assert_allclose(found, case.lax(lhs, rhs), rtol=1e-5, atol=1e-4)


def test_a_1x1_is_nothing_but_its_product() -> None:
    image, kernel = shapes(WITHOUT_OVERLAP["1x1"])
    spec = WITHOUT_OVERLAP["1x1"].spec(np.float32)
    matrix = jax.ShapeDtypeStruct(kernel.shape[-2:], kernel.dtype)
    for fun, rhs in (
        (lambda lhs, rhs: run(lhs, rhs, spec, "pointwise", "cpu"), kernel),
        (jaxconv.pointwise, matrix),
    ):
        names = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fun)(image, rhs))]
        assert names.count("dot_general") == 1
        # Slices of everything, reshapes and casts to the same type: nothing that runs.
        nothing = {"slice", "reshape", "squeeze", "transpose", "convert_element_type"}
        nothing |= {"gemm_operand", "jit", "pjit"}
        assert set(names) - nothing == {"dot_general"}


# How many products each algorithm makes of a 3×3 kernel on 5×6 outputs, of a 1×1 "pointwise".
PRODUCTS = dict.fromkeys(("pointwise", "naive", "im2col", "im2col_tiled"), 1)
PRODUCTS |= dict.fromkeys(("implicit", "phase", "slices"), 9)


@pytest.mark.parametrize("kind", ["feature_group_count", "batch_group_count"])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("algorithm", PRODUCTS)
def test_groups_are_a_batch_dimension(algorithm: str, groups: int, kind: str) -> None:
    arguments: dict[str, Any] = {kind: groups}
    if algorithm == "phase":
        arguments |= {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 2))}
    n, c = (6, 2 * groups) if kind == "feature_group_count" else (6, 2)
    taps = (1, 1) if algorithm == "pointwise" else (3, 3)
    case = case_of((n, 5, 6, c), (*taps, 2, 6), **arguments)
    found = canonical_products(case, algorithm)
    assert len(found) == PRODUCTS[algorithm]
    for eqn in found:
        (_, _), (batch, _) = eqn.params["dimension_numbers"]
        sizes = [eqn.invars[0].aval.shape[axis] for axis in batch]
        assert math.prod(sizes) == groups
        assert len(batch) == (groups > 1)


@pytest.mark.parametrize(
    ("shape", "o", "parts"),
    [
        ((1, 196, 36), 8, 2),
        ((8, 196, 36), 8, 2),
        ((8, 392, 36), 8, 4),
        ((8, 197, 36), 8, 1),  # a prime
        ((8, 128, 36), 8, 1),
        ((8, 1568, 36), 8, 1),
        ((1, 196, 1152), 128, 1),
    ],
)
def test_small_products_of_gradients_are_summed_in_parts(
    shape: tuple[int, int, int], o: int, parts: int
) -> None:
    """Integers, whose sums are exact in any order."""
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 4, shape).astype(np.float32)
    b = rng.integers(-4, 4, (*shape[:2], o)).astype(np.float32)
    product = functools.partial(gemm.gradient, spec=CASES["grouped"].spec(np.float32))
    np.testing.assert_array_equal(product(a, b), np.einsum("gmk,gmo->gko", a, b))
    (eqn,) = products(product, a, b)
    ((axis,), _), _ = eqn.params["dimension_numbers"]
    assert eqn.invars[0].aval.shape[axis] * parts == shape[1]


def upsampled(lhs: tuple[int, ...], rhs: tuple[int, ...], *padding: Any, **arguments: Any) -> Case:
    dilation = (2,) * len(padding)
    return case_of(lhs, rhs, padding=padding, lhs_dilation=dilation, **arguments)


IMAGE = (2, 4, 5, 6)


@pytest.mark.parametrize(
    ("case", "products"),
    [
        (upsampled(IMAGE, (2, 2, 6, 3), (1, 1), (1, 1)), 1),
        (upsampled((2, 9, 8), (4, 8, 2), (3, 3)), 1),
        (upsampled(IMAGE, (2, 2, 6, 3), (1, 2), (1, 2)), 1),
        # Phases of unlike numbers of taps, and groups, whose output channels would lie apart.
        (upsampled(IMAGE, (3, 3, 6, 3), (1, 2), (1, 2)), 4),
        (upsampled(IMAGE, (2, 2, 2, 3), (1, 1), (1, 1), feature_group_count=3), 4),
    ],
)
def test_phases_that_differ_in_nothing_are_one_convolution(case: Case, products: int) -> None:
    assert len(phase.PHASE.parts(case.spec())) == products
    lhs, rhs = case.operands()
    out = jax.jit(functools.partial(convolve, case, "phase"))(lhs, rhs)
    np.testing.assert_allclose(out, case.lax(lhs, rhs), rtol=1e-4, atol=1e-4)


def test_multiply_add_has_no_product() -> None:
    assert canonical_products(CASES["depthwise"], "shift") == []


# ---- memory and program text ----


@on_cpu
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_tiles_bound_the_workspace(padding: str) -> None:
    """Above the output, 8 MiB; the whole patch matrix is 110 MiB."""

    def workspace(algorithm: str) -> int:
        case = case_of(LARGE.lhs_shape, LARGE.rhs_shape, padding=padding)
        lowered = jax.jit(functools.partial(convolve, case, algorithm)).lower(*shapes(case))
        return compiled(lowered).memory_analysis().temp_size_in_bytes

    assert workspace("im2col_tiled") <= 8 << 20
    assert workspace("im2col") > 100 << 20


# image, kernel, groups, weight gradient or forward
INTERMEDIATE = {
    "implicit, gradient": ("implicit", (8, 28, 28, 32), (7, 7, 32, 32), 1, 1, True),
    "slices": ("slices", (1, 24, 24, 24, 16), (7, 7, 7, 16, 16), 1, 1, False),
    "pointwise, patchify": ("pointwise", (8, 64, 64, 64), (4, 4, 64, 64), 4, 1, False),
    "pointwise, patchify, gradient": ("pointwise", (8, 64, 64, 64), (4, 4, 64, 64), 4, 1, True),
    "pointwise, groups": ("pointwise", (8, 64, 64, 64), (1, 1, 16, 64), 1, 4, False),
    "im2col": ("im2col", (8, 28, 28, 64), (3, 3, 64, 64), 1, 1, False),
    "shift, gradient": ("shift", (8, 56, 56, 64), (3, 3, 1, 64), 1, 64, True),
}


@on_cpu
@pytest.mark.parametrize("name", INTERMEDIATE)
def test_stated_workspace_is_what_is_taken(name: str) -> None:
    """Not much less, that is: it is held to a limit."""
    algorithm, lhs_shape, rhs_shape, stride, groups, gradient = INTERMEDIATE[name]
    lhs, rhs = (jax.ShapeDtypeStruct(shape, "float32") for shape in (lhs_shape, rhs_shape))

    def conv(lhs: Any, rhs: Any) -> Any:
        return jaxconv.conv(lhs, rhs, stride, "VALID", groups=groups, algorithm=algorithm)

    def derived(lhs: Any, cotangent: Any) -> Any:
        return jax.linear_transpose(functools.partial(conv, lhs), rhs)(cotangent)

    function, other = (derived, jax.eval_shape(conv, lhs, rhs)) if gradient else (conv, rhs)
    (row,) = jaxconv.explain(function, lhs, other).rows
    without = frozenset({"xla"})  # of an algorithm asked for by name no part is left to XLA
    stated = workspace(ALGORITHMS[algorithm], prepared(row.spec), "cpu", without)
    lowered = jax.jit(function).lower(lhs, other)
    taken = compiled(lowered).memory_analysis().temp_size_in_bytes
    assert taken <= 1.5 * stated + (64 << 10)


@pytest.mark.parametrize("lanes", [1, 1000])
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("case", ["depthwise", "grouped", "3x3 stride 2", "3d dense", "1d"])
def test_blocks_of_shifted_rows(case: str, rows: int, lanes: int, monkeypatch: Patch) -> None:
    """Several blocks of an image, rows that are left over, images by twos and at one time."""
    monkeypatch.setattr(shift, "ROWS", rows)
    monkeypatch.setattr(shift, "ROWS_OF_LINE", (rows,))
    monkeypatch.setattr(layout, "LANES", lanes)
    four = (4, *CASES[case].lhs_shape[1:])
    spec = CASES[case].spec().replace(lhs_shape=four)
    rng = np.random.default_rng(3)
    image, cotangent = (rng.standard_normal(shape) for shape in (four, spec.out_shape))
    kernel = jnp.zeros(spec.rhs_shape)
    forward = functools.partial(jax.lax.conv_general_dilated, image, **CASES[case].arguments)
    (expected,) = jax.linear_transpose(forward, kernel)(cotangent)

    def of_sizes(image: Array, cotangent: Array) -> list[Array]:
        found = []
        for size in (1, 10_000, 1 << 20):
            monkeypatch.setattr(shift, "IMAGE_BYTES", size)
            found.append(shift.SHIFT.gradient(image, cotangent, spec))
        return found

    for found in jax.jit(of_sizes)(image, cotangent):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_blocks_divide_rows_where_a_number_near_does() -> None:
    blocks = {
        height: shift.block_of(case_of((8, height, 14, 96), (3, 3, 96, 96)).spec(np.float32))
        for height in (7, 14, 29, 56, 112)
    }
    assert blocks == {7: (7, 8), 14: (14, 8), 29: (14, 1), 56: (14, 1), 112: (14, 1)}


@pytest.mark.parametrize("case", ["depthwise", "grouped", "3x3 stride 2", "all dilations"])
def test_large_batches_are_shifted_image_by_image(case: str, monkeypatch: Patch) -> None:
    """So that the padded copy is one image's, with the same values."""
    spec = CASES[case].spec()
    lhs, rhs = map(jnp.asarray, CASES[case].operands())
    at_once = shift.SHIFT.cost(prepared(spec)).workspace
    monkeypatch.setattr(shift, "COPIED", 0)
    monkeypatch.setattr(shift, "LIGHT", 1e9)
    assert shift.SHIFT.cost(prepared(spec)).workspace == at_once // len(lhs) > 0

    def by_shift(lhs: Array, rhs: Array) -> Array:
        return apply(shift.SHIFT, lhs, rhs, spec, lambda *_: pytest.fail("hands nothing on"))

    assert "scan" in str(jax.make_jaxpr(by_shift)(lhs, rhs))
    np.testing.assert_allclose(by_shift(lhs, rhs), CASES[case].lax(lhs, rhs), rtol=1e-4, atol=1e-4)


@on_cpu
@pytest.mark.parametrize(
    "algorithm",
    [a.name for a in jaxconv.ALGORITHMS.values() if unsupported(a, LARGE_KERNEL.spec()) is None],
)
def test_a_large_kernel_compiles_by_loops(algorithm: str) -> None:
    """Written out, 4225 taps are megabytes of program and minutes of compiling."""

    def lengths(size: int) -> tuple[int, ...]:
        case = case_of(LARGE_KERNEL.lhs_shape, (size, size, 1, 1))
        texts = programs(functools.partial(convolve, case, algorithm), *shapes(case))
        return tuple(map(len, texts))

    # Of both, 17 taps of a row or 1 are left over from steps of 48 or 16.
    for large, smaller in zip(lengths(113), lengths(65), strict=True):
        assert large < min(1.1 * smaller, 1_000_000)


FIRST = ("NCHW", "OIHW", "NCHW")


def moved_sizes(function: Any, *shapes: tuple[int, ...]) -> list[int]:
    """Elements of each array that the compiled program writes in another order than it read it."""
    _, text = programs(function, *(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes))
    entry = text[text.index("ENTRY") :]
    found = re.findall(r"%\S*(?:copy|transpose)\S* = f32\[([\d,]+)\]", entry)
    return [math.prod(map(int, sizes.split(","))) for sizes in found]


@on_cpu
@pytest.mark.parametrize(
    ("name", "image", "kernel"),
    [
        ("winograd", (1, 32, 8, 8), (64, 32, 3, 3)),
        ("im2col", (1, 64, 4, 4), (256, 64, 3, 3)),
        ("pointwise", (1, 64, 4, 4), (256, 64, 1, 1)),
        ("pointwise", (1, 64, 8, 8), (256, 64, 2, 2)),
    ],
)
def test_kernels_output_channels_first_are_not_moved(
    name: str, image: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    stride = 2 if kernel[2] == 2 else 1

    def conv(x: Array, w: Array) -> Array:
        return jaxconv.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=FIRST, algorithm=name
        )

    assert math.prod(kernel) not in moved_sizes(conv, image, kernel)
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in (image, kernel)]
    (row,) = jaxconv.explain(conv, *arrays).rows
    assert ALGORITHMS[name].moving(row.spec) == 0
    assert ALGORITHMS["xla"].moving(row.spec) > 0


@on_cpu
def test_between_products_a_depthwise_image_stays_channels_last() -> None:
    def conv(x: Array, w: Array, groups: int = 1) -> Array:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=FIRST, feature_group_count=groups
        )

    def block(x: Array, expand: Array, depthwise: Array, project: Array) -> Array:
        y = jax.nn.relu6(conv(x, expand))
        y = jax.nn.relu6(conv(y, depthwise, 96))
        return conv(y, project)

    shapes = (2, 16, 20, 20), (96, 16, 1, 1), (96, 1, 3, 3), (16, 96, 1, 1)
    both = jax.value_and_grad(lambda *args: block(*args).sum(), (0, 1, 2, 3))
    assert 2 * 96 * 20 * 20 not in moved_sizes(jaxconv.accelerate(both), *shapes)
    # Alone it is convolved as it lies.
    alone = jaxconv.accelerate(lambda x, w: conv(x, w, 96))
    assert 2 * 96 * 20 * 20 not in moved_sizes(alone, (2, 96, 20, 20), (96, 1, 3, 3))


POOLED = {
    "max 3x3 step 2": ("max", (2, 12, 12, 4), (1, 3, 3, 1), (1, 2, 2, 1)),
    "max 2x2 step 2": ("max", (2, 12, 12, 4), (1, 2, 2, 1), (1, 2, 2, 1)),
    "max 3x3": ("max", (2, 8, 8, 4), (1, 3, 3, 1), (1, 1, 1, 1)),
    "mean 2x2 step 2": ("sum", (2, 12, 12, 4), (1, 2, 2, 1), (1, 2, 2, 1)),
    "mean 3x3": ("sum", (2, 8, 8, 4), (1, 3, 3, 1), (1, 1, 1, 1)),
    "1d": ("max", (2, 40, 4), (1, 3, 1), (1, 2, 1)),
    "3d": ("max", (2, 8, 8, 8, 4), (1, 2, 2, 2, 1), (1, 2, 2, 2, 1)),
    "filter": ("max", (30, 30), (13, 13), (1, 1)),
}


@on_cpu
@pytest.mark.parametrize("name", POOLED)
def test_xla_pools_nothing_by_its_own_loops(name: str) -> None:
    kind, shape, window, strides = POOLED[name]
    operation, init = {"max": (lax.max, -np.inf), "sum": (lax.add, 0.0)}[kind]

    def pool(x: Array) -> Array:
        return lax.reduce_window(x, np.float32(init), operation, window, strides, "SAME")

    x = jax.ShapeDtypeStruct(shape, np.float32)
    for fun in (pool, jax.grad(lambda x: jnp.sum(pool(x) ** 2))):
        after, text = programs(jaxconv.accelerate(fun), x)
        assert "reduce_window" in jax.jit(fun).lower(x).as_text()
        assert not re.search("reduce_window|scatter", after)
        assert not re.search(r" (reduce-window|scatter|select-and-scatter)\(", text)


@on_cpu
def test_what_reads_a_pooling_does_not_pool_again() -> None:
    def pool(x: Array) -> Array:
        window = (1, 3, 3, 1), (1, 2, 2, 1)
        return lax.reduce_window(x, np.float32(-np.inf), lax.max, *window, "SAME")

    def maxima(fun: Any) -> int:
        x = jax.ShapeDtypeStruct((2, 33, 33, 4), np.float32)
        return programs(jaxconv.accelerate(fun), x)[1].count(" maximum(")

    once = maxima(pool)
    assert maxima(lambda x: pool(pool(x))) <= 2 * once
    assert maxima(lambda x: pool(jnp.tanh(x)) * 2 + jnp.tanh(pool(jnp.tanh(x)))) <= once


# A process of a user: a step with a convolution and a pool.
PROGRAM = """
import jax, jax.numpy as jnp, jaxconv
from jax import lax, monitoring

found = []
monitoring.register_event_listener(lambda event, **_: found.append(event))

def loss(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers)
    return lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").max()

step = jax.grad(loss)
for f in (jaxconv.accelerate(step), step):
    jaxconv.enable() if f is step else None
    jax.jit(f).lower(jnp.ones((3, 3, 16, 16)), jnp.ones((2, 9, 8, 16))).compile()
print([found.count(f"/jax/compilation_cache/cache_{what}") for what in ("hits", "misses")])
"""


def test_a_second_process_compiles_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    """It finds the very same programs in JAX's cache on disk."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    counts = []
    for seed in "12":
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        counts.append(json.loads(children.output(1, "-c", PROGRAM)))
    (_, compiled), (found, again) = counts
    assert found >= compiled >= 2
    assert again == 0
