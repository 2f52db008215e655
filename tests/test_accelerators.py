"""What "auto" takes on GPU and TPU, and how products are formed there."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, LAST, Case
from jax import export
from test_plan import EVERY_CASE, case_plan, struct

import jaxconv
from jaxconv.bench.cases import DIRECTIONS, Layer, layer_of


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
NONE, ALL = ("xla", "xla", "xla"), ("pointwise", "pointwise", "pointwise")
PATCHES, FILTER = partial(layer_of, "", 2, 32), partial(layer_of, "", 2, 64, ndim=1, causal=True)
VOLUME = partial(layer_of, "", 1, 4, (8, 2), 3, ndim=3, pads=(1, 2))
ON_GPU = [
    (PATCHES((3, 8), 16, 16), "float32", ALL),
    (PATCHES((3, 6), 16, 16, 3), "float32", NONE),
    (PATCHES((3, 8), 16, 8), "float32", NONE),
    (PATCHES((3, 8), 1), "float32", NONE),
    (FILTER((8, 8), 4, 1, 8), "float32", ("shift", "shift", "xla")),
    (FILTER((8, 8), 4, 1, 8), "bfloat16", ("shift", "shift", "im2col")),
    (FILTER((8, 8), 4, 1, 8), "float64", NONE),
    (FILTER((8, 8), 5, 1, 8), "bfloat16", ("shift", "shift", "xla")),
    (FILTER((8, 16), 4, 1, 8), "float32", NONE),
    (FILTER((8, 8), 4, 2, 8), "float32", NONE),
    (FILTER((8, 8), 4, 1, 8, dilation=4), "float32", ("shift", "shift", "im2col")),
    (VOLUME(up=True), "float32", ("xla", "xla", "phase")),
    (VOLUME(), "float32", NONE),
    (layer_of("", 1, 8, (8, 8), 3, 1, 8), "float32", NONE),
    (layer_of("", 1, 8, (8, 8), 3, up=True, pads=(1, 2)), "float32", NONE),
]


@pytest.mark.parametrize(("layer", "dtype", "names"), ON_GPU)
def test_blind_spots_of_cudnn(layer: Layer, dtype: str, names: tuple[str, str, str]) -> None:
    spec = layer.spec
    operands = [
        struct(*shape, dtype=dtype) for shape in (spec.lhs_shape, spec.rhs_shape, spec.out_shape)
    ]
    layer = Layer("", spec.replace(**dict.fromkeys(("dtype", "out_dtype"), jnp.dtype(dtype))))
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
    operands = struct(1, 6, 6, 4), struct(size, size, 4, 8)
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
