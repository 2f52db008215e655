"""``plan``: a value that says what is chosen and why, and a table that teaches."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from cases import CASES, Case, make_case
from jax import lax

import jaxconv
from jaxconv import ALGORITHMS
from jaxconv.algorithms.base import unsupported
from jaxconv.bench.programs import convolutions
from jaxconv.config import notify
from jaxconv.planning import rows
from jaxconv.planning.choose import choose
from jaxconv.planning.machine import here
from jaxconv.planning.plan import Candidate, Plan, plan_spec
from jaxconv.spec import ConvSpec


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def planned(*shapes: Any, dtype: str = "float32", platform: str = "cpu", **arguments: Any) -> Plan:
    """The plan of a channels-last convolution by lax's arguments, of stride 1 unless told."""
    return plan_spec(make_case("", *shapes, **arguments).spec(np.dtype(dtype)), platform)


def case_plan(case: Case, platform: str = "cpu", dtype: str = "float32") -> Plan:
    return plan_spec(case.spec(np.dtype(dtype)), platform)


def candidate(plan: Plan, name: str) -> Candidate:
    return next(c for c in plan.candidates if c.name == name)


EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# What a plan is


def test_plan_is_a_hashable_value() -> None:
    first, again, other = (planned((1, 8, 8, c), (3, 3, c, 4)) for c in (3, 3, 5))
    plan_spec.cache_clear()
    fresh = planned((1, 8, 8, 3), (3, 3, 3, 4))
    assert first == again == fresh
    assert first is not fresh
    assert hash(first) == hash(fresh)
    assert len({first, again, fresh, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.algorithm = "xla"  # pyright: ignore[reportAttributeAccessIssue]


HIGHEST = {"precision": "highest", "padding": "VALID"}
OF_CONV = {  # shapes of x and w, conv's arguments, lax's for (N, spatial…, C) and (spatial…, C, O)
    "defaults": ((2, 9, 8, 4), (3, 3, 4, 6), {}, {}),
    "strides": ((2, 9, 8, 4), (3, 3, 4, 6), {"strides": 2}, {"strides": (2, 2)}),
    "groups": ((2, 9, 8, 4), (3, 3, 1, 8), {"groups": 4}, {"feature_group_count": 4}),
    "padding": ((2, 9, 8, 4), (3, 3, 4, 6), {"padding": 1}, {"padding": ((1, 1), (1, 1))}),
    "dilation": ((2, 9, 8, 4), (3, 3, 4, 6), {"dilation": (1, 2)}, {"rhs_dilation": (1, 2)}),
    "causal": ((2, 9, 4), (3, 4, 6), {"padding": "CAUSAL"}, {"padding": ((2, 0),)}),
    "precision": ((2, 5, 6, 7, 4), (3, 3, 3, 4, 6), HIGHEST, HIGHEST),
    "matrix product": ((5, 4), (4, 6), {}, {}),
}


@pytest.mark.parametrize("name", OF_CONV)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_plan_of_what_conv_runs(dtype: str, name: str) -> None:
    x_shape, w_shape, ours, laxs = OF_CONV[name]
    x, w = struct(*x_shape, dtype=dtype), struct(*w_shape, dtype=dtype)
    plan = jaxconv.plan(x, w, **ours, platform="cpu")
    assert plan == planned(x_shape, w_shape, dtype=dtype, **laxs)
    (row,) = jaxconv.explain(lambda x, w: jaxconv.conv(x, w, **ours), x, w, platform="cpu").rows
    assert plan.spec == row.spec
    assert plan == jaxconv.plan(x=x_shape, w=list(w_shape), **ours, dtype=dtype, platform="cpu")
    assert plan == jaxconv.plan(x, w_shape, **ours, platform="cpu")
    assert plan == jaxconv.plan(x_shape, w, **ours, platform="cpu")
    arrays = [jax.numpy.zeros(s, dtype) for s in (x_shape, w_shape)]
    assert plan == jaxconv.plan(*arrays, **ours, platform="cpu")


def test_short_forms() -> None:
    shapes = x, w = (2, 9, 8, 4), (3, 3, 4, 6)
    assert jaxconv.plan(x, w, 2, "VALID") == jaxconv.plan(x, w, strides=2, padding="VALID")
    assert jaxconv.plan(x[1:], w) == jaxconv.plan((1, *x[1:]), w)  # an image without a batch
    assert jaxconv.plan(*shapes) == jaxconv.plan(*shapes, platform=jax.default_backend())
    assert jaxconv.plan(*shapes) == jaxconv.plan(*shapes, dtype=np.float32)
    for dtype in ("int8", np.float64):
        assert jaxconv.plan(*shapes, dtype=dtype).spec.dtype == dtype


def test_layouts_of_one_convolution_differ_in_what_is_moved() -> None:
    shapes = (2, 9, 8, 16), (3, 3, 16, 24)
    last = planned(*shapes)
    first = plan_spec(last.spec.replace(channels_first=True, kernel_order="OIx"), "cpu")
    pairs = zip(last.candidates, first.candidates, strict=True)
    moving = {a.name for a, b in pairs if (b.seconds or 0) > (a.seconds or 0)}
    assert {"xla", "implicit", "im2col"} <= moving
    assert candidate(first, "winograd").seconds == candidate(last, "winograd").seconds


def with_gradients(conv: Callable[..., jax.Array]) -> Callable[..., Any]:
    def fun(x: Any, w: Any) -> Any:
        out, transpose = jax.vjp(conv, x, w)
        return transpose(out)

    return fun


def in_order(order: str, kernel_order: str) -> list[ConvSpec]:
    """The convolutions of a 3×3 layer and both its gradients, its arrays' axes in this order."""
    image, kernel = {"N": 8, "H": 56, "W": 56, "C": 64}, {"H": 3, "W": 3, "I": 64, "O": 64}
    x = struct(*(image[axis] for axis in order))
    w = struct(*(kernel[axis] for axis in kernel_order))
    arguments = {"window_strides": (1, 1), "padding": "SAME"}
    numbers = order, kernel_order, order
    conv = partial(lax.conv_general_dilated, **arguments, dimension_numbers=numbers)
    return convolutions(with_gradients(conv), x, w)


@pytest.mark.parametrize("kernel_order", ["HWIO", "OIHW"])
def test_no_order_of_axes_changes_a_plan(kernel_order: str) -> None:
    """With the batch innermost a forward convolution looks like a weight gradient."""
    twins = in_order("NHWC", kernel_order)
    assert sorted(spec.weight_gradient for spec in twins) == [False, False, True]
    for order in map("".join, itertools.permutations("NHWC")):
        for twin, spec in zip(twins, in_order(order, kernel_order), strict=True):
            memory = {"channels_first": twin.channels_first, "kernel_order": twin.kernel_order}
            assert spec.replace(**memory) == twin, order
            plan, expected = plan_spec(spec, "cpu"), plan_spec(twin, "cpu")
            assert plan.algorithm == expected.algorithm, order
            reasons = ([(c.status, c.reason) for c in p.candidates] for p in (plan, expected))
            assert len(set(map(tuple, reasons))) == 1, order


def test_nothing_is_run() -> None:
    """An image of an exabyte has a plan, and tracers have one."""
    assert planned((1 << 20, 1 << 20, 1 << 18, 64), (3, 3, 64, 64)).algorithm in ALGORITHMS
    plans, shapes = [], ((1, 8, 8, 4), (3, 3, 4, 5))
    traced = jax.make_jaxpr(lambda *pair: plans.append(jaxconv.plan(*pair)))
    assert not traced(*(struct(*shape) for shape in shapes)).eqns
    assert plans == [jaxconv.plan(*shapes)]


@EVERY_CASE
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_candidates_are_all_algorithms_with_reason_or_figures(platform: str, case: Case) -> None:
    spec = case.spec(np.float32)
    plan = case_plan(case, platform)
    assert plan.spec == spec
    assert [c.name for c in plan.candidates] == list(ALGORITHMS)
    assert [c.name for c in plan.candidates if c.status == "chosen"] == [plan.algorithm]
    assert plan.chosen in plan.eligible
    measured = platform == "cpu" and not spec.is_empty
    for c in plan.candidates:
        reason = unsupported(ALGORITHMS[c.name], spec)
        assert (c.status == "unsupported") == (reason is not None)
        assert (c.status in ("excluded", "unsupported")) <= bool(c.reason)
        assert (c.flops > 0) == (reason is None and not spec.is_empty)
        assert (c.seconds is not None) == (c.sigma is not None)
        assert ((c.seconds or 0) > 0) == (measured and reason is None)
        if reason is not None:
            assert c.reason == reason
    # What is chosen can be asked for by name.
    operands = [struct(*s) for s in (case.lhs_shape, case.rhs_shape)]
    named = partial(jaxconv.conv_general_dilated, **case.arguments, algorithm=plan.algorithm)
    assert jax.eval_shape(named, *operands) == jax.eval_shape(case.lax, *operands)


def test_there_are_no_times_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (1, 8, 8, 16), (3, 3, 16, 16)
    for platform in {"gpu", "tpu"} - {jax.default_backend()}:
        plan = jaxconv.plan(*shapes, platform=platform)
        assert {(c.seconds, c.sigma, c.measured) for c in plan.candidates} == {(None, None, False)}
        *_, last = plan.table().splitlines()
        assert last == f"No times: nothing was measured on {platform}; jaxconv.autotune measures."
        assert " ms" not in plan.table()
        operands = [struct(*shape) for shape in shapes]
        (row,) = jaxconv.explain(jaxconv.conv, *operands, platform=platform).rows
        assert row.seconds is row.lax_seconds is None
    assert "No times" not in jaxconv.plan(*shapes, platform="cpu").table()
    # Those measured by the user are shown, and decide.
    times = {"xla": 2e-3, "implicit": 1e-3}
    own = {plan.spec: rows.Timed(plan.spec, here("tpu"), times)}
    for module in ("choose", "predict"):
        monkeypatch.setattr(f"jaxconv.planning.{module}.own_rows", lambda platform: own)
    notify()
    measured = jaxconv.plan(*shapes, platform="tpu")
    monkeypatch.undo()
    notify()
    assert measured.algorithm == "implicit"
    assert {c.name: c.seconds for c in measured.candidates if c.measured} == times
    assert candidate(measured, "im2col").seconds is None
    assert "1.000 ms, measured" in measured.table()
    assert "No times" not in measured.table()


@EVERY_CASE
@pytest.mark.parametrize("name", ["im2col", "xla"])
def test_gemm_accounts_for_the_flops(name: str, case: Case) -> None:
    plan = case_plan(case)
    found = candidate(plan, name)
    count, m, n, k = found.gemm or (0, 0, 0, 0)
    assert 2 * count * m * n * k == plan.spec.flops
    todo = plan.spec
    skips = name == "xla" and todo.groups == 1 and todo.spatial_ndim <= 2  # zeros between elements
    assert found.flops == todo.flops // (math.prod(todo.lhs_dilation) if skips else 1)
    # Counted from the shapes: every output element sums taps · channels of its group.
    shapes = case.lhs_shape, case.rhs_shape
    dnums = lax.conv_dimension_numbers(*shapes, case.arguments["dimension_numbers"])
    outputs = math.prod(jax.eval_shape(case.lax, *(struct(*shape) for shape in shapes)).shape)
    terms = math.prod(case.rhs_shape[d] for d in dnums.rhs_spec[1:])
    assert plan.spec.flops == 2 * outputs * terms


def test_phase_multiplies_no_inserted_zeros() -> None:
    for stride in (2, 3):
        shapes = (8, 16, 16, 32), (6, 6, 32, 16)
        plan = planned(*shapes, padding=((5, 5),) * 2, lhs_dilation=(stride, stride))
        # About one product in stride² meets an element; the phases' borders differ in size.
        assert 0.9 < candidate(plan, "phase").flops * stride**2 / plan.spec.flops < 1.3


# What is chosen on a CPU, where the measured ratio is 2 and more


NOT_XLA = set(ALGORITHMS) - {"xla"}
PATCHES = {"padding": ((15, 15),) * 2, "lhs_dilation": (16, 16)}
DOUBLED = {"padding": ((1, 2),) * 3, "lhs_dilation": (2, 2, 2)}
GROUPED = {"padding": ((1, 1), (1, 1)), "batch_group_count": 32}
SPARSE = {"padding": ((9, 9),), "lhs_dilation": (5,)}
# Shapes, how many groups, what else is unusual, and what may be chosen.
CHOICES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, dict[str, Any], set[str]]] = {
    "depthwise 3×3": ((1, 56, 56, 128), (3, 3, 1, 128), 128, {}, {"shift"}),
    "depthwise 7×7": ((8, 56, 56, 96), (7, 7, 1, 96), 96, {}, {"shift"}),
    "strided": ((1, 112, 112, 96), (3, 3, 1, 96), 96, {"strides": (2, 2)}, {"shift"}),
    "causal": ((4, 4096, 512), (4, 1, 512), 512, {"padding": ((3, 0),)}, {"shift"}),
    "5×5 blur of RGB": ((1, 512, 512, 3), (5, 5, 1, 3), 3, {}, {"shift"}),
    "input gradient of patches": ((8, 14, 14, 768), (16, 16, 768, 3), 1, PATCHES, {"pointwise"}),
    "matrix product": ((64, 128), (128, 32), 1, {"padding": ()}, {"pointwise"}),
    # XLA's is a scalar loop, or one thin GEMM per group.
    "transposed in 3-D": ((1, 8, 8, 8, 32), (3, 3, 3, 32, 16), 1, DOUBLED, NOT_XLA),
    "dense 3-D": ((2, 8, 28, 28, 32), (3, 3, 3, 32, 32), 1, {}, NOT_XLA),
    "int32": ((1, 56, 56, 64), (3, 3, 64, 64), 1, {"dtype": "int32"}, NOT_XLA),
    "11×11 blur": ((1, 1024, 1024, 1), (11, 11, 1, 1), 1, {}, NOT_XLA),
    "65×65": ((1, 1024, 1024, 1), (65, 65, 1, 1), 1, {}, NOT_XLA),
    "small image, many channels": ((1, 7, 7, 512), (3, 3, 512, 512), 1, {}, NOT_XLA),
    "weight gradient of groups": ((256, 28, 28, 4), (28, 28, 4, 256), 1, GROUPED, NOT_XLA),
    "input gradient of a signal's first layer": ((1, 3199, 512), (10, 512, 1), 1, SPARSE, {"xla"}),
    # The patch matrix of one tap is the image: im2col would be pointwise by another name.
    **{
        f"one tap to {n}": ((1, 16000, 64), (1, 64, n), 1, {}, {"pointwise", "implicit", "xla"})
        for n in (64, 256, 1024)
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_on_cpu(name: str) -> None:
    lhs, rhs, groups, arguments, may_be = CHOICES[name]
    plan = planned(lhs, rhs, feature_group_count=groups, **arguments)
    assert plan.algorithm in may_be
    assert len(plan.why.split()) > 2


# What "auto" promises


@pytest.mark.parametrize(
    ("ndim", "size", "taps"), [(2, 28, 5), (2, 28, 7), (2, 28, 2), (1, 256, 5), (3, 12, 7)]
)
def test_winograd_is_for_three_taps(ndim: int, size: int, taps: int) -> None:
    """Of 5×5 its error is 4 times lax's, of 7×7 14 times."""
    operands = struct(8, *(size,) * ndim, 64), struct(*(taps,) * ndim, 64, 64)
    for row in jaxconv.explain(with_gradients(jaxconv.conv), *operands).rows:
        assert row.algorithm != "winograd"
        plan = plan_spec(row.spec, "cpu")
        found = candidate(plan, "winograd")
        assert found.status == "excluded"
        assert found.reason == "it rounds too much with other than 3 taps along one or two axes"
        assert f"(left out: {found.reason})" in plan.table()


@pytest.mark.parametrize(
    ("size", "taps", "dilation", "enough"),
    [(512, 31, 1, True), (512, 29, 1, False), (12, 31, 1, False), (64, 31, 2, False)],
)
def test_fft_is_for_many_products(size: int, taps: int, dilation: int, enough: bool) -> None:
    """31×31 taps on 12×12 elements meet 144 of them: by FFT 2.4 times lax's error."""
    arguments = {"padding": ((taps // 2,) * 2,) * 2, "lhs_dilation": (dilation,) * 2}
    shapes = (1, size, size, 2), (taps, taps, 1, 2)
    plan = planned(*shapes, **arguments, feature_group_count=2)
    assert (candidate(plan, "fft").status != "excluded") == enough
    assert plan.algorithm != "fft" or enough


# How it prints


@pytest.mark.parametrize("name", ["3x3", "depthwise", "transposed", "no output", "matmul"])
def test_str_is_a_table(name: str) -> None:
    plan = case_plan(CASES[name])
    convolution, product, choice, head, *rows = plan.table().splitlines()
    groups, m, n, k = plan.spec.gemm
    assert convolution == str(plan.spec)
    assert f"{m}×{k} · {k}×{n}" in product
    assert (f"{groups} times" in product) == (groups > 1)
    assert choice == f"on cpu, {plan.algorithm}: {plan.why}"
    assert plan._contents().bold == [1 + list(ALGORITHMS).index(plan.algorithm)]
    times = set() if plan.spec.is_empty else {"time"}
    assert {"algorithm", "MFLOP", "workspace", *times} <= set(head.split())
    assert len(rows) == len(ALGORITHMS)
    for row, c in zip(rows, plan.candidates, strict=True):
        mark, name, *_ = ("", *row.split()) if row.startswith(" ") else row.split()
        assert name == c.name
        assert mark == ("▸" if c.status == "chosen" else "")
        if c.status == "unsupported":
            assert row.endswith(f"can't: {c.reason}")
        else:
            left_out = f" (left out: {c.reason})" if c.reason else ""
            assert row.endswith(f"{ALGORITHMS[name].summary}{left_out}")
            assert f"{c.flops / 1e6:,.1f}" in row.split()
            if c.gemm is not None:
                count, *shape = c.gemm
                assert f"{count} × {'×'.join(map(str, shape))}" in row


# The table of algorithms


LONG = {  # lhs shape, rhs shape, stride, padding, dtype: more elements than int32 counts
    "long stride": ((1, 2**31 + 2**23, 1), (3, 1, 1), 2**20 - 1, ((0, 0),), "int8"),
    "long image": ((1, 2**31 + 2**27, 1), (9, 1, 1), 100, ((0, 0),), "int8"),
    "long kernel": ((1, 2**31 + 2**27, 1), (1001, 1, 1), 1, ((0, 0),), "bfloat16"),
    "long padding": ((1, 100, 1), (70, 1, 1), 2**20, ((2**31, 0),), "float32"),
    "cropped": ((1, 2**31 + 2**27, 1), (70, 1, 1), 1, ((-(2**31), 0),), "float32"),
    "distant windows": ((1, 100, 1), (70, 1, 1), 2**31, ((0, 0),), "float32"),
    "many images": ((2**31, 9, 1), (3, 1, 1), 1, ((1, 1),), "int8"),
    "many taps": ((1, 2**16, 2**16, 1), (2**16, 2**15, 1, 1), 1, ((0, 0),) * 2, "float32"),
}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", LONG)
def test_nothing_indexes_beyond_int32(name: str, gradient: bool) -> None:
    lhs, rhs, stride, padding, dtype = LONG[name]
    case = make_case(name, lhs, rhs, (stride,) * len(padding), padding)
    spec = case.spec(np.dtype(dtype))
    if gradient:
        spec = spec.kernel_gradient
    refused = {name: unsupported(a, spec) or "" for name, a in ALGORITHMS.items()}
    along_axes = name != "many taps"  # what slices axis by axis has no index of all taps
    assert refused["winograd"]
    for indexing in ("fft", *(["shift"] if gradient else [])):
        assert refused[indexing] or not along_axes, indexing
    for indexing in ("im2col_tiled", "xla"):
        assert ("int32 does not hold" in refused[indexing]) == along_axes, indexing
    assert ("int32 does not hold" in refused["naive"]) == (along_axes or gradient)
    taps = math.prod(rhs[:-2])
    assert ("int32 does not hold" in refused["implicit"]) == (taps > (64 if gradient else 9))
    # A loop takes over beyond 1,024 taps; this kernel's other axis is as short as the image.
    assert ("int32 does not hold" in refused["im2col"]) == (along_axes and max(rhs) > 1024)
    for platform, without in itertools.product(("cpu", "gpu"), (frozenset(), frozenset({"xla"}))):
        chosen, _ = choose(spec, platform, without)
        assert not refused[chosen] or all(refused.values()), chosen


def test_as_long_as_int32_is_taken() -> None:
    plan = planned((1, 2**31 - 1, 1), (3, 1, 1), strides=(2**20,), padding="VALID")
    taken = {c.name for c in plan.candidates if c.status != "unsupported"}
    assert {"naive", "im2col_tiled", "fft"} <= taken


def test_algorithms_is_read_only_and_has_names_and_summaries() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        ALGORITHMS["xla"] = ALGORITHMS["im2col"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(TypeError, match="does not support item deletion"):
        del ALGORITHMS["xla"]  # pyright: ignore[reportIndexIssue]
    assert [algorithm.name for algorithm in ALGORITHMS.values()] == list(ALGORITHMS)
    summaries = {algorithm.summary for algorithm in ALGORITHMS.values()}
    assert len(summaries) == len(ALGORITHMS)
    assert all(0 < len(summary) <= 80 for summary in summaries)
