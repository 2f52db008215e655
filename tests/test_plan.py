"""``plan``: a value that says what is chosen and why, and a table that teaches."""

import dataclasses
import html
import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import jax
import numpy as np
import pytest
from cases import CASES, LAST, Case
from jax import lax

import jaxconv
from jaxconv import ALGORITHMS
from jaxconv.algorithms.base import unsupported
from jaxconv.planning.choose import choose
from jaxconv.planning.plan import Plan, plan_spec


def struct(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def planned(
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    padding: Any = "SAME",
    dtype: str = "float32",
    platform: str | None = "cpu",
    **arguments: Any,
) -> Plan:
    """The plan of a channels-last convolution, of stride 1 unless told."""
    ndim = len(lhs) - 2
    arguments = {"window_strides": (1,) * ndim, "dimension_numbers": LAST[ndim]} | arguments
    operands = struct(*lhs, dtype=dtype), struct(*rhs, dtype=dtype)
    return jaxconv.plan(*operands, padding=padding, platform=platform, **arguments)


def case_plan(case: Case, platform: str = "cpu", dtype: str = "float32") -> Plan:
    operands = struct(*case.lhs_shape, dtype=dtype), struct(*case.rhs_shape, dtype=dtype)
    return jaxconv.plan(*operands, **case.arguments, platform=platform)


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


def test_arrays_and_structs_give_the_same_plan() -> None:
    case = CASES["grouped"]
    lhs, rhs = case.operands(np.float32)
    plans = {
        jaxconv.plan(lhs, rhs, **case.arguments),
        jaxconv.plan(jax.numpy.asarray(lhs), jax.numpy.asarray(rhs), **case.arguments),
        jaxconv.plan(struct(*lhs.shape), struct(*rhs.shape), **case.arguments),
    }
    assert len(plans) == 1


OF_CONV = {  # shapes of x and w, conv's arguments, lax's for (N, spatial…, C) and (spatial…, C, O)
    "defaults": ((2, 9, 8, 4), (3, 3, 4, 6), {}, {}),
    "strides and groups": (
        (2, 9, 8, 4),
        (3, 3, 1, 8),
        {"strides": 2, "groups": 4},
        {"window_strides": (2, 2), "feature_group_count": 4},
    ),
    "padding and dilation": (
        (2, 9, 8, 4),
        (3, 3, 4, 6),
        {"padding": 1, "dilation": (1, 2)},
        {"padding": ((1, 1), (1, 1)), "rhs_dilation": (1, 2)},
    ),
    "causal": ((2, 9, 4), (3, 4, 6), {"padding": "CAUSAL"}, {"padding": ((2, 0),)}),
    "precision": (
        (2, 5, 6, 7, 4),
        (3, 3, 3, 4, 6),
        {"precision": "highest", "padding": "VALID"},
        {"precision": "highest", "padding": "VALID"},
    ),
    "matrix product": ((5, 4), (4, 6), {}, {}),
}


@pytest.mark.parametrize("name", OF_CONV)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arguments_of_conv_give_the_plan_of_what_conv_runs(dtype: str, name: str) -> None:
    x_shape, w_shape, ours, laxs = OF_CONV[name]
    x, w = struct(*x_shape, dtype=dtype), struct(*w_shape, dtype=dtype)
    plan = jaxconv.plan(x, w, **ours, platform="cpu")
    assert plan == planned(x_shape, w_shape, dtype=dtype, **laxs)
    (row,) = jaxconv.explain(lambda x, w: jaxconv.conv(x, w, **ours), platform="cpu")(x, w).rows
    assert plan.spec == row.spec
    assert plan == jaxconv.plan(x=x_shape, w=list(w_shape), **ours, dtype=dtype, platform="cpu")
    assert plan == jaxconv.plan(x, w_shape, **ours, platform="cpu")
    assert plan == jaxconv.plan(x_shape, w, **ours, platform="cpu")


def test_an_image_without_a_batch_is_planned_as_one() -> None:
    kernel = (3, 3, 4, 6)
    assert jaxconv.plan((9, 8, 4), kernel) == jaxconv.plan((1, 9, 8, 4), kernel)


def test_shapes_are_of_float32_or_of_the_dtype_given() -> None:
    shapes = (2, 9, 8, 4), (3, 3, 4, 6)
    assert jaxconv.plan(*shapes).spec.dtype == np.float32
    assert jaxconv.plan(*shapes, dtype="int8").spec.dtype == np.int8
    assert jaxconv.plan(*shapes, dtype=np.float64).spec.dtype == np.float64


def test_a_third_position_or_a_name_of_laxs_alone_means_lax() -> None:
    """Channels first, by lax's default: the arguments of conv would not fit."""
    x, w, strides = (2, 4, 9, 8), (6, 4, 3, 3), (1, 1)
    plans = {
        jaxconv.plan(x, w, strides, "SAME"),
        jaxconv.plan(x, w, strides, padding="SAME"),
        jaxconv.plan(x, w, window_strides=strides, padding="SAME"),
        jaxconv.plan(lhs=x, rhs=w, window_strides=strides, padding="SAME"),
        jaxconv.plan(struct(*x), struct(*w), strides, "SAME"),
    }
    assert len(plans) == 1
    assert plans.pop().spec.channels_first


def test_layouts_of_one_convolution_differ_in_what_is_moved() -> None:
    last = planned((2, 9, 8, 16), (3, 3, 16, 24))
    first = jaxconv.plan(
        struct(2, 16, 9, 8), struct(24, 16, 3, 3), (1, 1), ((1, 1), (1, 1)), platform="cpu"
    )
    assert first.spec == last.spec.replace(channels_first=True, kernel_order="OIx")
    pairs = {c.name: [c.seconds] for c in last.candidates}
    for candidate in first.candidates:
        pairs[candidate.name].append(candidate.seconds)
    moving = {name for name, (of_last, of_first) in pairs.items() if of_first > of_last}
    assert {"xla", "implicit", "im2col"} <= moving
    assert pairs["winograd"][0] == pairs["winograd"][1]


def test_nothing_is_run() -> None:
    """An image of an exabyte has a plan, and tracers have one."""
    huge = planned((1 << 20, 1 << 20, 1 << 18, 64), (3, 3, 64, 64))
    assert huge.algorithm in ALGORITHMS
    plans = []

    @jax.jit
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        plans.append(jaxconv.plan(x, w, (1, 1), "SAME"))
        return x

    jaxpr = jax.make_jaxpr(f)(struct(1, 4, 8, 8), struct(5, 4, 3, 3))
    assert plans == [jaxconv.plan(struct(1, 4, 8, 8), struct(5, 4, 3, 3), (1, 1), "SAME")]
    assert "conv" not in str(jaxpr)


def test_platform_is_jaxs_default() -> None:
    default = planned((1, 8, 8, 3), (3, 3, 3, 4), platform=None)
    assert default.platform == jax.default_backend()
    assert default == planned((1, 8, 8, 3), (3, 3, 3, 4), platform=jax.default_backend())


@EVERY_CASE
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_algorithm_can_be_given_back(platform: str, case: Case) -> None:
    plan = case_plan(case, platform)
    spec = case.spec(np.float32)
    assert plan.spec == spec
    assert plan.algorithm in ALGORITHMS
    assert unsupported(ALGORITHMS[plan.algorithm], spec) is None
    lhs, rhs = (struct(*s) for s in (case.lhs_shape, case.rhs_shape))
    out = jax.eval_shape(
        lambda lhs, rhs: jaxconv.conv_general_dilated(
            lhs, rhs, **case.arguments, algorithm=plan.algorithm
        ),
        lhs,
        rhs,
    )
    assert out == jax.eval_shape(case.lax, lhs, rhs)


@EVERY_CASE
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_candidates_are_all_algorithms_with_reason_or_figures(platform: str, case: Case) -> None:
    plan = case_plan(case, platform)
    assert [c.name for c in plan.candidates] == list(ALGORITHMS)
    for candidate in plan.candidates:
        reason = unsupported(ALGORITHMS[candidate.name], plan.spec)
        assert candidate.reason == reason
        if reason is not None:
            assert candidate.name != plan.algorithm
        elif plan.spec.is_empty:
            assert (candidate.flops, candidate.workspace, candidate.seconds) == (0, 0, 0)
        else:
            assert candidate.flops > 0
            assert candidate.workspace >= 0
            assert candidate.seconds > 0


@EVERY_CASE
@pytest.mark.parametrize("name", ["im2col", "xla"])
def test_gemm_accounts_for_the_flops(name: str, case: Case) -> None:
    plan = case_plan(case)
    (candidate,) = (c for c in plan.candidates if c.name == name)
    if plan.spec.is_empty:
        assert candidate.gemm is None
        return
    count, m, n, k = candidate.gemm
    assert 2 * count * m * n * k == candidate.flops == plan.spec.flops
    # Counted from the shapes: every output element sums taps · channels of its group.
    lhs, rhs = (struct(*shape, dtype="float64") for shape in (case.lhs_shape, case.rhs_shape))
    dnums = lax.conv_dimension_numbers(
        case.lhs_shape, case.rhs_shape, case.arguments["dimension_numbers"]
    )
    outputs = np.prod(jax.eval_shape(case.lax, lhs, rhs).shape)
    terms = np.prod([rhs.shape[d] for d in dnums.rhs_spec[1:]])
    assert candidate.flops == 2 * outputs * terms


@pytest.mark.parametrize("stride", [2, 3])
def test_phase_multiplies_no_inserted_zeros(stride: int) -> None:
    plan = planned((8, 16, 16, 32), (6, 6, 32, 16), ((5, 5),) * 2, lhs_dilation=(stride, stride))
    flops = {c.name: c.flops for c in plan.candidates}
    # About one product in stride² meets an element; the phases' borders are not all of one size.
    assert 0.9 < flops["phase"] * stride**2 / flops["xla"] < 1.3


# What is chosen on a CPU, where the measured ratio is 2 and more


def forward(*arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, keywords


def depthwise(
    shape: tuple[int, ...], kernel: tuple[int, ...], **keywords: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    c = shape[-1]
    return (shape, (*kernel, 1, c)), {"feature_group_count": c, **keywords}


CHOICES = {
    "depthwise 3×3": (depthwise((1, 56, 56, 128), (3, 3)), "shift"),
    "depthwise 7×7": (depthwise((8, 56, 56, 96), (7, 7)), "shift"),
    "depthwise 3×3 of stride 2": (
        depthwise((1, 112, 112, 96), (3, 3), window_strides=(2, 2)),
        "shift",
    ),
    "causal depthwise": (depthwise((4, 4096, 512), (4,), padding=((3, 0),)), "shift"),
    "5×5 blur of RGB": (depthwise((1, 512, 512, 3), (5, 5)), "shift"),
    "input gradient of patches": (
        forward((8, 14, 14, 768), (16, 16, 768, 3), ((15, 15),) * 2, lhs_dilation=(16, 16)),
        "pointwise",
    ),
    "matrix product": (forward((64, 128), (128, 32), ()), "pointwise"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_on_cpu(name: str) -> None:
    (arguments, keywords), algorithm = CHOICES[name]
    plan = planned(*arguments, **keywords)
    assert plan.algorithm == algorithm
    assert len(plan.why.split()) > 3


XLA_IS_SLOW = {  # a scalar loop, or one thin GEMM per group
    "transposed in 3-D": forward(
        (1, 8, 8, 8, 32), (3, 3, 3, 32, 16), ((1, 2),) * 3, lhs_dilation=(2, 2, 2)
    ),
    "dense 3-D": forward((2, 8, 28, 28, 32), (3, 3, 3, 32, 32)),
    "int32": forward((1, 56, 56, 64), (3, 3, 64, 64), dtype="int32"),
    "11×11 blur": forward((1, 1024, 1024, 1), (11, 11, 1, 1)),
    "65×65": forward((1, 1024, 1024, 1), (65, 65, 1, 1)),
    "small image, many channels": forward((1, 7, 7, 512), (3, 3, 512, 512)),
    "weight gradient of groups": forward(
        (256, 28, 28, 4), (28, 28, 4, 256), ((1, 1), (1, 1)), batch_group_count=32
    ),
}


@pytest.mark.parametrize("name", XLA_IS_SLOW)
def test_choice_on_cpu_avoids_xlas_loops(name: str) -> None:
    arguments, keywords = XLA_IS_SLOW[name]
    assert planned(*arguments, **keywords).algorithm != "xla"


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_one_tap_is_pointwise_or_xlas(n: int) -> None:
    """The patch matrix of one tap is the image: im2col would be pointwise by another name."""
    assert planned((1, 16000, 64), (1, 64, n)).algorithm in ("pointwise", "implicit", "xla")


def test_many_channels_to_one_are_xlas() -> None:
    """The input gradient of a signal's first layer."""
    plan = planned((1, 3199, 512), (10, 512, 1), ((9, 9),), lhs_dilation=(5,))
    assert plan.algorithm == "xla"


@EVERY_CASE
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_highest_precision_keeps_the_products(dtype: str, case: Case) -> None:
    arguments = case.arguments | {"precision": "highest"}
    lhs, rhs = (struct(*s, dtype=dtype) for s in (case.lhs_shape, case.rhs_shape))
    plan = jaxconv.plan(lhs, rhs, **arguments, platform="cpu")
    assert not re.search("winograd|fft", plan.algorithm)


# What "auto" promises


ROUNDS_TOO_MUCH = {
    "5x5": ((8, 28, 28, 128), (5, 5, 128, 128)),
    "7x7": ((8, 28, 28, 64), (7, 7, 64, 64)),
    "2x2": ((8, 28, 28, 128), (2, 2, 128, 128)),
    "5 taps": ((8, 256, 128), (5, 128, 128)),
    "7x7x7": ((1, 12, 12, 12, 32), (7, 7, 7, 32, 32)),
}


@pytest.mark.parametrize("name", ROUNDS_TOO_MUCH)
def test_winograd_is_for_three_taps(name: str) -> None:
    """Of 5×5 its error is 4 times lax's, of 7×7 14 times."""
    lhs, rhs = (struct(*shape, dtype="float32") for shape in ROUNDS_TOO_MUCH[name])

    def both(lhs: Any, rhs: Any) -> Any:
        out, transpose = jax.vjp(jaxconv.conv, lhs, rhs)
        return transpose(out)

    for row in jaxconv.explain(both)(lhs, rhs).rows:
        assert row.algorithm != "winograd"
        plan = plan_spec(row.spec, "cpu")
        candidate = next(c for c in plan.candidates if c.name == "winograd")
        assert candidate.doubt == "it rounds too much with other than 3 taps along one or two axes"
        assert f"(left out: {candidate.doubt})" in plan.table()


@pytest.mark.parametrize(
    ("size", "taps", "dilation", "enough"),
    [(512, 31, 1, True), (512, 29, 1, False), (12, 31, 1, False), (64, 31, 2, False)],
)
def test_fft_is_for_many_products(size: int, taps: int, dilation: int, enough: bool) -> None:
    """31×31 taps on 12×12 elements meet 144 of them: by FFT 2.4 times lax's error."""
    plan = jaxconv.plan(
        struct(1, size, size, 2, dtype="float32"),
        struct(taps, taps, 1, 2, dtype="float32"),
        (1, 1),
        [(taps // 2, taps // 2)] * 2,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
        platform="cpu",
    )
    (candidate,) = (c for c in plan.candidates if c.name == "fft")
    assert (candidate.doubt is None) == enough
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
    assert choice == f"on cpu: {plan.algorithm}, since {plan.why}"
    assert {"algorithm", "MFLOP", "workspace", "time"} <= set(head.split())
    assert len(rows) == len(ALGORITHMS)
    for row, candidate in zip(rows, plan.candidates, strict=True):
        mark, name, *_ = ("", *row.split()) if row.startswith(" ") else row.split()
        assert name == candidate.name
        assert mark == ("▸" if name == plan.algorithm else "")
        if candidate.reason is not None:
            assert row.endswith(f"can't: {candidate.reason}")
        else:
            left = candidate.doubt and name != plan.algorithm
            left_out = f" (left out: {candidate.doubt})" if left else ""
            assert row.endswith(f"{ALGORITHMS[name].summary}{left_out}")
            assert f"{candidate.flops / 1e6:,.1f}" in row.split()
            if candidate.gemm is not None:
                count, *shape = candidate.gemm
                assert f"{count} × {'×'.join(map(str, shape))}" in row


class Table(HTMLParser):
    """The text of each cell by row, with a check that the tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.bold: list[bool] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.bold.append("bold" in (dict(attrs).get("style") or ""))
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data


def parsed(plan: Plan) -> Table:
    table = Table()
    table.feed(plan._repr_html_())
    table.close()
    assert not table.open
    return table


@pytest.mark.parametrize("name", ["3x3", "depthwise", "transposed", "no output"])
def test_html_is_the_same_table(name: str) -> None:
    plan = case_plan(CASES[name])
    table = parsed(plan)
    head, *body = table.rows
    assert {len(row) for row in table.rows} == {len(head)}
    assert [row[1] for row in body] == list(ALGORITHMS)
    chosen = [name == plan.algorithm for name in ALGORITHMS]
    assert [row[0] == "▸" for row in body] == table.bold[1:] == chosen
    for row, candidate in zip(body, plan.candidates, strict=True):
        assert candidate.reason is None or row[-1] == f"can't: {candidate.reason}"
    assert str(plan.spec) in table.text
    assert plan.why in table.text
    # Whatever is in a cell of one is in a line of the other.
    for row, line in zip(table.rows, plan.table().splitlines()[3:], strict=True):
        assert all(cell in line for cell in row)


def test_html_is_escaped() -> None:
    text = "a < b & <b>c</b>"
    plan = case_plan(CASES["3x3"])
    refused = dataclasses.replace(plan.candidates[0], reason=text, workspace=0)
    plan = dataclasses.replace(plan, why=text, candidates=(refused, *plan.candidates[1:]))
    assert text not in plan._repr_html_()
    assert plan._repr_html_().count(html.escape(text)) == 2
    assert parsed(plan).rows[1][-1] == f"can't: {text}"


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
    ndim = len(padding)
    arguments = {"window_strides": (stride,) * ndim, "padding": padding}
    case = Case(name, lhs, rhs, arguments | {"dimension_numbers": LAST[ndim]})
    spec = case.spec(np.dtype(dtype))
    if gradient:
        spec = spec.kernel_gradient
    refused = {
        name: unsupported(algorithm, spec) or "" for name, algorithm in jaxconv.ALGORITHMS.items()
    }
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


@pytest.mark.parametrize("name", ["naive", "im2col_tiled", "fft"])
def test_as_long_as_int32_is_taken(name: str) -> None:
    case = Case(
        name,
        (1, 2**31 - 1, 1),
        (3, 1, 1),
        {"window_strides": (2**20,), "padding": "VALID", "dimension_numbers": LAST[1]},
    )
    assert unsupported(jaxconv.ALGORITHMS[name], case.spec(np.dtype("float32"))) is None


def test_algorithms_is_read_only() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        ALGORITHMS["xla"] = ALGORITHMS["im2col"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(TypeError, match="does not support item deletion"):
        del ALGORITHMS["xla"]  # pyright: ignore[reportIndexIssue]


def test_algorithms_have_names_and_summaries() -> None:
    assert [algorithm.name for algorithm in ALGORITHMS.values()] == list(ALGORITHMS)
    summaries = {algorithm.summary for algorithm in ALGORITHMS.values()}
    assert len(summaries) == len(ALGORITHMS)
    assert all(0 < len(summary) <= 80 for summary in summaries)
