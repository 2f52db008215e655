"""The backend that the tests run on, and strict settings for all of them."""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import pytest

PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=sorted(PLATFORMS),
        help="run every test on this backend's devices (default: JAX's default backend)",
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        help="with -m exhaustive: of grids of more than 20 tests run every N-th only",
    )


# Of these wide grids the default run has every N-th test, the others are exhaustive.
WIDE = {
    "test_a_large_kernel_compiles_by_loops": 2,
    "test_a_layer_alone": 5,
    "test_a_second_call_traces_and_compiles_nothing": 2,
    "test_a_weight_gradient_is_run_as_it_arrives": 2,
    "test_a_write_to_a_ref": 2,
    "test_accelerated_training": 10,
    "test_accepts_precisions": 3,
    "test_accepts_what_lax_accepts": 2,
    "test_accuracy": 2,
    "test_accuracy_of_large_kernels_in_float32": 2,
    "test_an_algorithm_is_differentiable_jax": 3,
    "test_blocks": 7,
    "test_blocks_equal_the_whole": 5,
    "test_blocks_of_shifted_rows": 7,
    "test_both_ways_compile_the_same": 5,
    "test_candidates": 3,
    "test_col2im_is_the_adjoint": 2,
    "test_conv_has_the_kernels_dimensions": 2,
    "test_conv_is_lax_channels_last": 2,
    "test_conv_transpose_by_each_algorithm": 5,
    "test_conv_transpose_has_defaults_up_to_3d": 2,
    "test_conv_transpose_is_lax": 7,
    "test_directions": 5,
    "test_dtypes": 4,
    "test_each_is_the_linear_transpose_of_the_other": 3,
    "test_every_convolution_is_jaxconvs": 11,
    "test_every_dtype": 10,
    "test_explain_lists_what_accelerate_plans": 5,
    "test_export": 5,
    "test_export_for_another_platform": 4,
    "test_gradients_in_tiles": 2,
    "test_im2col_of_any_dtype": 3,
    "test_inf_stays_where_it_belongs_in_gradients": 5,
    "test_integers_are_exact_and_wrap_around": 3,
    "test_integers_with_the_batch_innermost": 2,
    "test_jit_vmap_and_grad": 2,
    "test_lax_trains_all_of_it": 8,
    "test_layers_are_compared_with_lax_pytorch_and_float64": 3,
    "test_memory_is_taken_from_the_system_once": 3,
    "test_nan_and_inf_stay_where_they_belong": 3,
    "test_nan_stands_where_lax_has_it": 6,
    "test_narrow_dtypes": 4,
    "test_networks_are_those_of_their_papers": 3,
    "test_nnx_objects_are_left_alone": 2,
    "test_no_convolution_forward": 2,
    "test_no_convolution_forward_and_in_gradients": 9,
    "test_outputs_of_each_device": 8,
    "test_policies_save_as_many_values_inside_a_checkpoint": 4,
    "test_programs": 4,
    "test_relation_to_lax_patches": 2,
    "test_sampled": 4,
    "test_shapes_and_dtypes": 2,
    "test_shift_by_planes": 3,
    "test_shift_sums_many_taps_by_blocks": 2,
    "test_stated_workspace_is_what_is_taken": 2,
    "test_symbolic_shapes": 2,
    "test_taps_of_each_device": 8,
    "test_the_loop_is_lax": 4,
    "test_there_is_always_something_that_runs": 3,
    "test_tpu_is_left_to_xla": 2,
    "test_transformed_poolings": 7,
    "test_unbatched_is_one_image_of_a_batch": 2,
    "test_under_jit": 5,
    "test_under_settings_of_jax": 3,
    "test_values": 6,
    "test_values_and_derivatives": 11,
    "test_vmap_and_scan": 22,
    "test_what_is_not_finite_stands_where_lax_has_it": 5,
    "test_what_lax_cannot_compile_is_refused_as_by_lax": 3,
    "test_what_xla_refuses_on_gpu_is_a_matrix_product": 2,
    "test_without_any_jit": 2,
}
_met: Counter[str] = Counter()


def pytest_itemcollected(item: pytest.Item) -> None:
    grid = item.nodeid.partition("[")[0]
    if not item.get_closest_marker("exhaustive"):
        if _met[grid] % WIDE.get(grid.rpartition("::")[2], 1):
            item.add_marker(pytest.mark.exhaustive)
        _met[grid] += 1


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if every > 1 and item.get_closest_marker("exhaustive"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    large = (grid for grid in grids.values() if len(grid) > 20)
    left_out = {item for grid in large for i, item in enumerate(grid) if i % every}
    config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    gc.freeze()  # what modules made stays: a collection, as JAX's check for leaks has, skips it


def pytest_configure(config: pytest.Config) -> None:
    # No test reads or writes the developer's own cache, and none that it starts as a process.
    folder = tempfile.TemporaryDirectory(prefix="jaxconv-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAXCONV_CACHE_DIR"] = folder.name
    os.environ["JAXCONV_USE_CACHE"] = "1"
    os.environ.pop("JAXCONV_WORKSPACE_LIMIT", None)
    # One thread for the code of each of these small programs: a tenth less work.
    flags = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
    os.environ["XLA_FLAGS"] = flags
    gc.set_threshold(100_000, 20, 100)  # tracing makes many objects, all of them in use
    backend = config.getoption("--backend")
    if backend is not None:
        jax.config.update("jax_platforms", PLATFORMS[backend])
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise pytest.UsageError(
            f"--backend={backend}: JAX has no such backend here: {error}"
        ) from None
    if backend not in (None, found):
        raise pytest.UsageError(f"--backend={backend}: JAX has only {found!r} here")
    jax.config.update("jax_disable_most_optimizations", True)  # until a module's tests run
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


# Modules whose tests look at compiled programs, their memory or their times.
OPTIMISED = ("autotune", "calibrate", "compiled", "memory")


@pytest.fixture(scope="module", autouse=True)
def compile_quickly(request: pytest.FixtureRequest) -> None:
    """Thousands of tiny programs run once each: optimising them takes longer than running them."""
    optimised = request.module.__name__.removeprefix("test_") in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", not optimised)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of JAX's tracing, lowering and compiling events, as they happen."""
    events: list[str] = []

    def record(event: str, duration: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event.removeprefix("/jax/core/compile/"))

    jax.monitoring.register_event_duration_secs_listener(record)
    yield events
    jax.monitoring.unregister_event_duration_listener(record)


@pytest.fixture
def lowered() -> Iterator[list[str]]:
    """The algorithm asked for of each convolution that jaxconv lowers, as it happens."""
    from jaxconv.transforms import primitive

    found: list[str] = []

    def observe(lowered: primitive.Lowered) -> None:
        found.append(lowered.algorithm)

    primitive.observers.append(observe)
    yield found
    primitive.observers.remove(observe)


@pytest.fixture
def unrepaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without XLA's convolution for NaN that algorithms spread."""
    from jaxconv.algorithms import base

    monkeypatch.setattr(base, "repaired", lambda out, *_: out)


@pytest.fixture
def loops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops take over from what is written out after four terms, so that small cases meet them."""
    from jaxconv import loops
    from jaxconv.algorithms import shift

    monkeypatch.setattr(loops, "UNROLL", 4)
    monkeypatch.setattr(shift, "UNROLL", 4)
    monkeypatch.setattr(shift, "TERMS_OF_BLOCK", 4)


def pytest_report_header() -> str:
    return f"jax {jax.__version__} on {jax.default_backend()}"
