"""What "auto" takes on GPU and TPU, and how products are formed there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, LAST, Case
from jax import export

import jaxconv
from jaxconv.bench.cases import DIRECTIONS, Layer
from jaxconv.planning.plan import Plan, plan_spec

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def case_plan(case: Case, platform: str, dtype: str) -> Plan:
    return plan_spec(case.spec(jnp.dtype(dtype)), platform)


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_tpu_is_left_to_xla(dtype: str, case: Case) -> None:
    assert case_plan(case, "tpu", dtype).algorithm == "xla"


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["int32", "int8", "float8_e8m0fnu"])
def test_what_xla_refuses_on_gpu_is_a_matrix_product(dtype: str, case: Case) -> None:
    plan = case_plan(case, "gpu", dtype)
    if plan.spec.is_empty:
        assert plan.why == "there is nothing to compute"
    else:
        assert plan.algorithm != "xla"
        assert plan.chosen.gemm is not None
        assert "XLA refuses" in plan.why


@pytest.mark.parametrize("dtype", ["int32", "int8"])
def test_integers_on_gpu_never_go_to_xla(dtype: str) -> None:
    with jaxconv.config.set(workspace_limit=0):
        plan = case_plan(CASES["3x3"], "gpu", dtype)
    assert plan.algorithm == "im2col_tiled"


# Layers, and what "auto" takes for them forward and for both gradients.
PATCHES = Layer("patches", (2, 32, 32, 3), (16, 16, 3, 8), stride=16)
FILTER = Layer("filter", (2, 64, 8), (4, 1, 8), (3, 0), groups=8)
DILATED = Layer("dilated", (2, 64, 8), (4, 1, 8), (12, 0), groups=8, rhs_dilation=4)
VOLUME = Layer("volume", (1, 4, 4, 4, 8), (3, 3, 3, 8, 2), (1, 2), lhs_dilation=2)
ON_GPU = [
    (PATCHES, ("pointwise", "pointwise", "pointwise")),
    (dataclasses.replace(PATCHES, rhs_shape=(16, 16, 1, 6), groups=3), ("xla", "xla", "xla")),
    (dataclasses.replace(PATCHES, stride=8), ("xla", "xla", "xla")),
    (dataclasses.replace(PATCHES, rhs_shape=(1, 1, 3, 8), stride=1), ("xla", "xla", "xla")),
    (FILTER, ("shift", "shift", "xla")),
    (dataclasses.replace(FILTER, dtype="bfloat16"), ("shift", "shift", "im2col")),
    (dataclasses.replace(FILTER, dtype="float64"), ("xla", "xla", "xla")),
    (dataclasses.replace(FILTER, rhs_shape=(5, 1, 8), dtype="bfloat16"), ("shift", "shift", "xla")),
    (dataclasses.replace(FILTER, rhs_shape=(4, 1, 16)), ("xla", "xla", "xla")),
    (dataclasses.replace(FILTER, stride=2), ("xla", "xla", "xla")),
    (DILATED, ("shift", "shift", "im2col")),
    (VOLUME, ("xla", "xla", "phase")),
    (dataclasses.replace(VOLUME, lhs_dilation=1), ("xla", "xla", "xla")),
    (Layer("2-D", (1, 8, 8, 8), (3, 3, 1, 8), (1, 1), groups=8), ("xla", "xla", "xla")),
    (Layer("up", (1, 8, 8, 8), (3, 3, 8, 8), (1, 2), lhs_dilation=2), ("xla", "xla", "xla")),
]


@pytest.mark.parametrize(("layer", "names"), ON_GPU)
def test_blind_spots_of_cudnn(layer: Layer, names: tuple[str, str, str]) -> None:
    shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
    operands = [struct(shape, layer.dtype) for shape in shapes]
    for direction, name in zip(DIRECTIONS, names, strict=True):
        function = jax.jit(layer.function(jaxconv.conv_general_dilated, direction))
        (row,) = jaxconv.explain(function, *operands, platform="gpu").rows
        assert row.algorithm == name, direction
        (row,) = jaxconv.explain(function, *operands, platform="tpu").rows
        assert row.algorithm == "xla"


def conv(name: str, **arguments: Any) -> Any:
    return jax.jit(
        lambda x, w: jaxconv.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=LAST[2], algorithm=name, **arguments
        )
    )


@pytest.mark.parametrize("name", ["im2col", "im2col_tiled", "implicit", "pointwise", "winograd"])
def test_operands_of_products_are_kept_apart_on_gpu_only(name: str) -> None:
    size = 1 if name == "pointwise" else 3
    operands = struct((1, 6, 6, 4), "float32"), struct((size, size, 4, 8), "float32")
    barriers = {}
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        module = export.export(conv(name), platforms=[platform])(*operands).mlir_module()
        barriers[platform] = module.count("stablehlo.optimization_barrier")
        assert "dot_general" in module
    assert barriers["cuda"] == barriers["rocm"] > barriers["cpu"] == barriers["tpu"] == 0


@pytest.mark.parametrize(
    ("dtype", "channels", "preferred", "multiplied"),
    [
        ("int8", 3, "int32", "int32"),  # XLA:GPU doubles sums of few products
        ("int8", 32, "int32", "int8"),
        ("int8", 32, "float32", "float32"),
        ("int32", 32, "float32", "float32"),  # which it refuses to sum
        ("float32", 32, "float64", "float64"),  # which it sums in float32
        ("bfloat16", 32, "float32", "bfloat16"),
        ("float32", 3, None, "float32"),
    ],
)
def test_dtype_of_products(dtype: str, channels: int, preferred: Any, multiplied: str) -> None:
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.integers(-9, 9, shape), dtype)
        for shape in ((1, 4, 4, channels), (1, 1, channels, 4))
    )
    function = conv("implicit", preferred_element_type=preferred)
    module = export.export(function, platforms=["cuda"])(x, w).mlir_module()
    (line,) = (line for line in module.splitlines() if "stablehlo.dot_general" in line)
    short = {"int8": "i8", "int32": "i32", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
    assert f"x{channels}x{short[multiplied]}>" in line
    expected = np.einsum("nhwc,ijco->nhwo", np.asarray(x, float), np.asarray(w, float))
    np.testing.assert_array_equal(function(x, w), expected)
