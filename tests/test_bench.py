"""The benchmark measures what it says, and notices a wrong result. Times are never asserted."""

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxconv
from jaxconv import app as cli
from jaxconv import layout
from jaxconv.arguments.parse import parse
from jaxconv.bench import cases, measure, networks, profile, programs, regret, report, sharding
from jaxconv.bench.cases import DIRECTIONS, Layer
from jaxconv.bench.measure import Effort, Result
from jaxconv.bench.report import SHARDING, SUITES, Selection, Suite, summary
from jaxconv.bench.sharding import Case, Moved
from jaxconv.compat import conv_general_dilated_p
from jaxconv.layout import forward_of
from jaxconv.planning.timing import Compiled, alternate
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

ONCE = Effort(1, 0.0)
TINY = Layer("tiny", (2, 6, 6, 4), (3, 3, 1, 4), (1, 1), groups=4)
LAYERS = (
    TINY,
    dataclasses.replace(TINY, dtype="bfloat16"),
    dataclasses.replace(TINY, dtype="int8", out_dtype="int32", directions=("forward",)),
    Layer("causal", (1, 9, 2), (3, 2, 4), (4, 0), rhs_dilation=2),
    Layer("groups", (2, 9, 8, 4), (3, 3, 2, 6), (1, 1), stride=2, groups=2),
    Layer("transposed", (2, 4, 4, 3), (4, 4, 3, 5), (2, 2), lhs_dilation=2),
    Layer("volume", (1, 4, 4, 4, 2), (3, 3, 3, 2, 3), (1, 1)),
    Layer("patches", (1, 8, 8, 3), (4, 4, 3, 5), stride=4),
)


def results(found: Iterator[Any]) -> list[Any]:
    """Without the names that come before them."""
    return list(found)[1::2]


def run_layers(
    layers: Sequence[Layer], directions: Sequence[str] = DIRECTIONS, effort: Effort = ONCE
) -> list[Result]:
    return [
        programs.measure_layer(layer, direction, effort)
        for layer in layers
        for direction in layer.directions
        if direction in directions
    ]


# Timing


def test_calls_alternate_and_time_is_bounded() -> None:
    calls = []

    def traced(name: str) -> Callable[[jax.Array], jax.Array]:
        def f(x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: calls.append(name), ordered=True)
            return x + 1

        return f

    subjects = [Compiled(traced(name), jnp.zeros(3)) for name in "abc"]
    assert [len(times) for times in alternate(subjects, 2)] == [3, 3]
    jax.effects_barrier()
    assert "".join(calls) == "abc" + "abcabc"
    assert len(alternate(subjects, 100, seconds=0.0)) == 1
    assert len(alternate(subjects, 100, seconds=0.0, fewest=3)) == 3


def test_each_settles_before_it_is_timed() -> None:
    calls = []

    def subject(name: str) -> Any:
        def call() -> float:
            calls.append(name)
            time.sleep(0.001)
            return 1.0

        return SimpleNamespace(call=call, output=None)

    alternate((subject("a"), subject("b")), 1, settle=0.01)
    first, *rest = (len(list(group)) for _, group in itertools.groupby(calls))
    assert first == 1
    assert all(1 < length <= 12 for length in rest[1:])


def test_one_alone_has_no_ratio() -> None:
    steady = SimpleNamespace(call=lambda: 1.0, output=None)
    assert alternate((steady,), 7) == [(1.0,)] * 7
    for effort in (report.QUICK, regret.ENOUGH):  # one algorithm may be left
        assert set(effort.times((steady,))) == {(1.0,)}


def test_measuring_ends_when_the_ratio_is_known() -> None:
    steady = SimpleNamespace(call=lambda: 1.0, output=None)
    assert len(alternate((steady, steady), 100, precision=0.01)) == 5
    times = iter(range(1, 1000))
    wild = SimpleNamespace(call=lambda: float(next(times) % 7 + 1), output=None)
    assert len(alternate((steady, wild), 20, precision=0.01)) == 20


# Layers


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.name} {layer.dtype}")
def test_layers_are_compared_with_lax_and_with_float64(layer: Layer) -> None:
    if layer.dtype == "int8" and jax.default_backend() == "gpu":
        pytest.skip("lax itself refuses integer convolutions on GPU")
    found = run_layers((layer,), effort=Effort(3))
    assert [result.direction for result in found] == list(layer.directions)
    for result in found:
        assert result.wrong is None
        assert len(result.lax) == 3
        assert result.peers == {}
        assert result.quartiles("lax")[0] > 0
        assert result.rate > 0
        assert result.peak > 0
        assert set(result.how.split(", ")) <= set(jaxconv.ALGORITHMS)
        exact = np.finfo(np.float32).eps if layer.dtype != "bfloat16" else 2**-8
        assert max(result.errors) <= (0 if layer.dtype == "int8" else 2 * exact)


def test_errors_are_those_of_the_outputs() -> None:
    for direction in DIRECTIONS:
        layer = dataclasses.replace(LAYERS[4], dtype="float64")
        operands = layer.operands()
        output = layer.function(lax.conv_general_dilated, direction)(*operands)
        exact = measure.reference(layer, direction, *operands)
        assert measure.error(output, exact) < 1e-14
        assert measure.error(output * 1.5, exact) == pytest.approx(0.5)


def test_a_wrong_layer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)
    (result,) = run_layers((TINY,), ("forward",), ONCE)
    assert re.match(r"tiny, forward: jaxconv is off by 1.*e-03 of the larg.*1e-04", result.wrong)


def test_cases_are_many_and_each_is_one() -> None:
    assert len(cases.LAYERS) >= 60
    assert len({layer.name for layer in cases.LAYERS}) == len(cases.LAYERS)
    for layer in cases.LAYERS:
        assert not layer.spec.is_empty
        assert layer.rhs_shape[-2] * layer.groups == layer.lhs_shape[-1]
        assert layer.spec.operand_bytes < 128 << 20


# Loops and networks


def test_loops_are_timed_by_accelerate_and_by_enable() -> None:
    small = programs.Loop("small", jax.nn.relu, ((3,),))
    found = [
        programs.measure_loop(loop, how, ONCE)
        for loop in (small, programs.LOOPS[-1])
        for how in loop.directions
    ]
    assert [result.how for result in found] == ["accelerate", "enable"] * 2
    assert [result.difference for result in found[:2]] == [0, 0]
    assert not any(result.wrong for result in found)


# Millions of weights, those of the normalisation left out.
# The 3-D U-Net has half the widths of its paper.
PUBLISHED = {"MobileNetV2": 3.5, "ResNet-50": 25.6, "ConvNeXt-T": 28.6, "3-D U-Net": 1.29}


def small(network: networks.Network) -> networks.Network:
    shape = (64, 64, 3) if len(network.shape) == 3 else (8, 8, 8, 1)
    return dataclasses.replace(network, shape=shape)


# The smallest in 2-D and one in 3-D.
OFTEN = "MobileNetV2", "3-D U-Net"
each_network = pytest.mark.parametrize(
    "network",
    [
        pytest.param(one, marks=[pytest.mark.exhaustive] * (one.name not in OFTEN), id=one.name)
        for one in networks.NETWORKS
    ],
)


@each_network
def test_networks_are_those_of_their_papers(network: networks.Network) -> None:
    network = small(network)
    with jax.numpy_rank_promotion("allow"):  # users' models promote
        params = network.init()
        x, labels = network.data(1)
        loss, updated = jax.eval_shape(network.step, params, x, labels)
        found = jaxconv.explain(network.step, params, x, labels)
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert 0.98 < count / PUBLISHED[network.name] <= 1.0
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, params)
    # Forward, and both gradients, but for the input gradient of the first.
    convolutions = sum(layer[0].ndim > 2 for layer in params)
    assert found.count == 3 * convolutions - 1


def test_networks_are_timed_forward_and_in_training() -> None:
    def layer(net: networks.Lax, x: Any) -> Any:
        return net.logits(net.relu(net.conv(x, 4, 3)))

    network = networks.Network("one layer", layer, (6, 6, 2))
    with jax.numpy_rank_promotion("allow"):
        model = programs.Model(network, 2)
        found = [programs.measure_model(model, direction, ONCE) for direction in model.directions]
    assert [result.direction for result in found] == ["forward", "training step"]
    assert [result.name for result in found] == ["one layer, batch 2"] * 2
    assert not any(result.wrong for result in found)


@each_network
def test_channels_first_a_network_computes_the_same(network: networks.Network) -> None:
    last = small(network)
    first = dataclasses.replace(last, first=True)
    with jax.numpy_rank_promotion("allow"):
        logits = [jax.jit(one.forward)(one.init(), one.data(2)[0]) for one in (last, first)]
        (x, _), (moved, _) = last.data(2), first.data(2)
    assert logits[0].shape == logits[1].shape
    assert measure.difference(*logits) < 1e-5
    np.testing.assert_array_equal(np.moveaxis(moved, 1, -1), x)


def test_channels_first_a_network_is_timed_beside_channels_last() -> None:
    network = networks.Network("one", lambda net, x: net.logits(net.conv(x, 4, 3)), (6, 5, 2))
    models = [
        programs.Model(dataclasses.replace(network, first=first), 2) for first in (False, True)
    ]
    with jax.numpy_rank_promotion("allow"):
        last, first = (programs.measure_model(model, "forward", Effort(3)) for model in models)
    assert (last.name, first.name) == ("one, batch 2", "one, channels first, batch 2")
    assert (last.peers, len(first.peers[measure.CHANNELS_LAST])) == ({}, 3)
    assert first.wrong is None
    assert first.quartiles(measure.CHANNELS_LAST)[0] > 0
    assert "against the same channels last: " in "\n".join(summary([last, first]))
    assert "× channels last" in report.table([last, first]).text()


# Profiles


def test_a_profile_has_each_operation_of_the_program() -> None:
    def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(carry @ carry), None

    def function(x: jax.Array) -> jax.Array:
        with jax.named_scope("the loop"):
            return lax.scan(step, x, None, length=30)[0]

    found = profile.profile("thirty products", function, jnp.eye(64, dtype=jnp.float32))
    operations = found.operations
    assert [op.seconds for op in operations] == sorted(op.seconds for op in operations)[::-1]
    assert all(op.seconds >= 0 for op in operations)
    # Without the operations in the loop, which are listed themselves.
    assert sum(op.seconds for op in operations) < 1.5 * found.seconds
    inside = [op for op in operations if op.calls == 30]
    assert any(op.result.startswith("f32[64,64]") for op in inside)
    assert any("the loop" in op.origin for op in inside)
    assert found.kinds.keys() == {op.kind for op in operations}
    text = str(found)
    assert text.startswith("thirty products: ")
    assert all(op.kind in text for op in operations[:3])


def test_a_profile_names_the_algorithm_and_the_convolution() -> None:
    program = programs.Program(TINY, "alone", lambda conv: conv)
    found = programs.profile_of(program, "forward")
    algorithm = jaxconv.explain(program.function("forward"), *program.operands("forward"))
    scope = f"{algorithm.rows[0].algorithm} 2x6x6x4*3x3x1x4"
    assert any(scope in op.origin for op in found.operations)


def test_of_nested_operations_each_has_its_own_time() -> None:
    def event(start: float, end: float, thread: int = 1, **args: str) -> dict[str, Any]:
        times = {"ph": "X", "ts": start, "dur": end - start}
        return {"pid": 1, "tid": thread, "args": args} | times

    seconds, counts = profile.own_times(
        [
            event(100, 400, hlo_op="dot"),
            event(0, 1000, hlo_op="while"),
            event(400, 600, hlo_op="add"),
            event(700, 900, hlo_op="dot"),
            event(0, 800, thread=2, hlo_op="dot"),
            event(0, 5000, other="not an operation"),
            event(1000, 1500, hlo_op="add"),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert {k: round(1e6 * v) for k, v in seconds.items()} == {
        "while": 300,
        "dot": 1300,
        "add": 700,
    }
    assert counts == {"while": 1, "dot": 3, "add": 2}


# Peers


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.name} {layer.dtype}")
def test_torch_computes_the_same_layers(layer: Layer) -> None:
    pytest.importorskip("torch")
    for result in run_layers((layer,), effort=dataclasses.replace(ONCE, against=("torch",))):
        if layer.dtype == "int8":  # PyTorch has no such convolution
            assert result.peers == {}
        else:
            assert len(result.peers["torch"]) == 1
            assert result.wrong is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile, of itself
@pytest.mark.parametrize("direction", ["forward", "training step"])
@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.name)
@pytest.mark.parametrize("peer", measure.PEERS)
def test_peers_compute_the_same_networks(
    peer: str, network: networks.Network, direction: str
) -> None:
    for package in measure.PEERS[peer].packages:
        pytest.importorskip(package)
    effort = dataclasses.replace(ONCE, against=(peer,))
    with jax.numpy_rank_promotion("allow"):
        result = programs.measure_model(programs.Model(small(network), 2), direction, effort)
    assert result.wrong is None
    assert set(result.peers) == ({peer} if direction == "forward" or peer == "torch" else set())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    ones = np.ones(3, np.float32)
    bad = np.array([1, value, 1], np.float32)
    for expected, found in ((ones, bad), ({"a": ones, "b": ones}, {"a": ones, "b": bad})):
        assert not measure.difference(expected, found) < 1e9


def test_a_wrong_peer_is_told() -> None:
    subject = Compiled(jax.nn.relu, jnp.ones(3, jnp.float32))
    shape = {"as_jax": lambda x: np.full(3, x), "expected": lambda output: output}
    peer = SimpleNamespace(call=lambda: 1.0, output=2.0, **shape)
    facts = {"name": "a", "direction": "b", "how": "", "tolerance": 0.1}
    result = measure.measure(ONCE, subject, subject, {"torch": peer}, **facts)
    assert result.wrong == "a, b: PyTorch is off by 1.0e+00 of the largest value, more than 1e-01"


# Regret


def as_called(spec: ConvSpec) -> ConvSpec:
    """The convolution that the benchmark's arguments for ``spec`` describe."""
    operands = jax.eval_shape(lambda: autotuning.operands(spec))
    lhs, rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
    return ConvSpec.from_params(lhs, rhs, parse("conv", lhs, rhs, **cases.arguments(spec)))


def test_random_specs_are_those_of_their_seed() -> None:
    specs = regret.random_specs(1, 150)
    assert specs == regret.random_specs(1, 150)
    assert specs != regret.random_specs(2, 150)
    assert {spec.spatial_ndim for spec in specs} == {1, 2, 3}
    assert {spec.dtype.name for spec in specs} == {"float32", "float64", "bfloat16", "int8"}
    assert {spec.weight_gradient for spec in specs} == {True, False}
    assert max(spec.groups for spec in specs) > 8
    assert not any(spec.is_empty for spec in specs)
    assert all(as_called(spec) == spec for spec in specs)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3], LAYERS[4]], ids=lambda layer: layer.name)
def test_weight_gradients_are_those_that_jax_derives(layer: Layer) -> None:
    function = layer.function(lax.conv_general_dilated, "weight gradient")
    eqns = jax.make_jaxpr(function)(*layer.operands()).eqns
    (eqn,) = (eqn for eqn in eqns if eqn.primitive is conv_general_dilated_p)
    lhs, rhs = (v.aval for v in eqn.invars)
    spec = layout.weight_gradient_of(layer.spec)
    derived = ConvSpec.from_params(lhs, rhs, eqn.params)
    assert spec.replace(precision=None) == derived.replace(precision=None)
    forward = forward_of(spec.replace(feature_group_count=1)) if layer.groups == 1 else None
    assert forward is None or forward.rhs_shape == layer.rhs_shape


@pytest.mark.parametrize(
    "program",
    {program.what: program for program in programs.PROGRAMS}.values(),
    ids=lambda program: program.what,
)
def test_programs_hold_their_layer(program: programs.Program) -> None:
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.layer.operands()[:2]]
    with jax.numpy_rank_promotion("allow"):
        (forward, *_) = programs.convolutions(program.function("forward"), *operands)
        both = programs.convolutions(program.function("gradients"), *operands)
    assert forward.rhs_shape[:-2] == program.layer.rhs_shape[:-2]
    assert len(both) >= 2


def test_relatives_are_alike() -> None:
    specs = programs.convolutions_of(cases.FIELD)
    found = regret.relatives(specs, 1, 2 * len(specs))
    assert found == regret.relatives(specs, 1, 2 * len(specs))
    assert not set(found) & set(specs)
    assert {spec.spatial_ndim for spec in found} == {1, 2, 3}
    assert any(spec.weight_gradient for spec in found)
    assert any(spec.groups > 1 for spec in found)
    assert all(spec.operand_bytes <= regret.OPERANDS and not spec.is_empty for spec in found)
    assert any(spec.kernel_order != "xIO" for spec in found)
    assert all(as_called(spec) == spec for spec in found)


def test_regret_is_over_the_best_candidate() -> None:
    found = regret.measure_regret(TINY.spec, "", Effort(3))
    assert found.wrong is None
    assert found.regret > 0
    assert found.quartiles()[0] > 0
    assert found.how in jaxconv.ALGORITHMS
    assert found.best in set(jaxconv.ALGORITHMS) - {"naive"}


def test_the_best_is_not_judged_by_the_rounds_that_chose_it() -> None:
    auto, lucky = np.array([2.0, 2.0, 2.0, 2.0]), np.array([1.0, 4.0, 1.0, 4.0])
    assert regret.judged({"auto": auto, "shift": lucky}) == ("shift", 0.5)
    assert regret.judged({"auto": auto, "shift": 2 * auto}) == ("auto", 1)
    assert regret.judged({"auto": auto[:1], "shift": lucky[:1]}) == ("shift", 2)


def test_a_wrong_candidate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)
    assert re.search(
        r": \w+ is off by 1.*e-03 of", str(regret.measure_regret(TINY.spec, "", ONCE).wrong)
    )


# Sharding

PROGRAM = """
ENTRY %main (p: f32[2,4]) -> f32[2,4] {
  %all-gather = f32[16,4]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %all-reduce.1 = (f32[3,3]{1,0}, /*index=1*/bf16[8]{0}, s8[], pred[2]{0}) all-reduce(%a, %b, %c)
  %collective-permute-start = (f32[2]{0}, f32[2]{0}) collective-permute-start(%x)
  %collective-permute-done = f32[2]{0} collective-permute-done(%collective-permute-start)
  %copy.2 = f32[16,4]{0,1} copy(%all-gather), metadata={op_name="x = f32[2] all-gather(y)"}
  ROOT %reduce-scatter = c64[2,4]{1,0} reduce-scatter(%copy.2), to_apply=%add
}
"""


def test_collectives_are_found_in_a_program() -> None:
    assert sharding.collectives(PROGRAM) == (
        ("all-gather", 16 * 4 * 4),
        ("all-reduce", 9 * 4 + 8 * 2 + 1 + 2),
        ("collective-permute", 2 * 4),
        ("reduce-scatter", 8 * 8),
    )


def test_layouts_cut_dimensions() -> None:
    both = sharding.ALL
    dense = LAYERS[5]
    assert Case(dense, "batch").specs == [
        P(both, None, None, None),
        P(None, None, None, None),
        P(both, None, None, None),
    ]
    assert Case(dense, "inputs").specs == [
        P(None, None, None, both),
        P(None, None, both, None),
        P(None, None, None, None),
    ]
    assert Case(dense, "batch, outputs").specs == [
        P("a", None, None, None),
        P(None, None, None, "b"),
        P("a", None, None, "b"),
    ]
    assert Case(LAYERS[3], "batch, rows").specs == [
        P("a", "b", None),
        P(None, None, None),
        P("a", "b", None),
    ]
    # Groups are cut in all three.
    assert Case(TINY, "inputs").specs == [P(None, None, None, both)] * 3


def test_cases_of_sharding_are_many_and_cut_what_is_large_enough() -> None:
    assert len({case.name for case in sharding.CASES}) == len(sharding.CASES) > 100
    assert {case.layout for case in sharding.CASES} == set(sharding.LAYOUTS)
    assert {d for case in sharding.CASES for d in case.directions} <= set(report.DIRECTIONS)
    parts = {"a": 4, "b": 2, sharding.ALL: sharding.DEVICES, None: 1}
    for case in sharding.CASES:
        if isinstance(case.what, Layer):
            layer = case.what
            shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
            for shape, spec in zip(shapes, case.specs, strict=True):
                assert all(size >= parts[axes] for size, axes in zip(shape, spec, strict=True)), (
                    case.name
                )
    quick = sharding.CASES[SUITES[SHARDING].few]
    assert 1 < len(quick) < 6
    assert all(case.computed for case in quick)


def moved(**changes: Any) -> Moved:
    gathers = (("all-gather", 4096), ("all-reduce", 1024))
    facts: dict[str, Any] = {"lax": gathers, "jaxconv": gathers, "workspace": (8, 12)}
    facts |= {"name": "one", "layout": "rows", "direction": "forward", "how": "im2col"}
    facts |= {"differences": (0.0, 1e-7), "tolerance": 1e-6}
    return Moved(**facts | changes)


def test_what_is_moved_is_reported() -> None:
    permutes = (("collective-permute", 512),) * 3
    rows = [
        moved(),
        moved(name="two", jaxconv=permutes),
        moved(name="three", jaxconv=(("all-gather", 8192),)),
        moved(name="four", jaxconv=permutes[:1], differences=(1.0, 0.0)),
        moved(name="five", differences=(0.0, np.nan)),
        moved(name="six", jaxconv=(), differences=None, failed="ValueError: no"),
        moved(name="seven", direction="training step", differences=None),
    ]
    _, table, said = sharding.contents(rows).text().split("\n\n")
    head, *lines = table.splitlines()
    assert head.split()[:5] == ["what", "layout", "direction", "how", "lax"]
    assert [line.split("forward")[1].split()[1:] for line in lines[:-1]] == [
        ["2", "5.0", "2", "5.0"],
        ["2", "5.0", "3", "1.5", "above"],
        ["2", "5.0", "1", "8.0", "above"],
        ["2", "5.0", "1", "0.5", "lax", "wrong"],
        ["2", "5.0", "2", "5.0", "WRONG"],
        ["2", "5.0", "0", "0.0", "FAILED,", "memory", "1.50"],
    ]
    assert lines[-1].endswith("  5.0  memory 1.50")
    assert said == (
        "jaxconv moves more than lax in 2 of 7: two, rows, forward; three, rows, forward."
        " It moves less in 1. lax's own result is wrong in 1."
    )
    assert [row.wrong for row in rows if row.wrong] == [
        "five, rows, forward: jaxconv is off by nan of the largest value, more than 1e-06",
        "six, rows, forward: ValueError: no",
    ]
    assert report.as_json(rows[5])["wrong"] == rows[5].wrong


def test_the_table_of_sharding_fits() -> None:
    rows = [
        moved(
            name=case.what.name,
            layout=case.layout,
            direction=direction,
            how="im2col_tiled",
            lax=(("all-reduce", 10_200_000),) * 10,
            jaxconv=(("all-reduce", 10_200_000),) * (10 + case.computed),
            differences=(0.0, 0.0) if case.computed else None,
        )
        for case in sharding.CASES
        for direction in case.directions
    ]
    for width in (80, 100, 120):
        text = sharding.contents(rows).text(width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("99,609") == sharding.contents(rows).text().count("99,609")
    assert "Left out" not in sharding.contents(rows).text(120)


# The command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a moment each."""
    model = programs.Model(networks.Network("one", lambda net, x: net.conv(x, 3, 1), (4, 4, 2)), 1)
    tiny: dict[str, Sequence[object]] = {
        "layers": (TINY,) * 7,
        "loops": programs.LOOPS[-1:] * 3,
        "models": (model,),
        "programs": programs.PROGRAMS[-1:],
        "regret": (TINY.spec,) * 2,
        "relatives": (TINY.spec,) * 2,
    }
    for name, few in tiny.items():
        suite = dataclasses.replace(SUITES[name], cases=lambda _, few=few: few, few=slice(None))
        monkeypatch.setitem(SUITES, name, suite)
    absent = measure.Peer("Absent", "onnx_peer", ("absent", "onnx"))
    monkeypatch.setitem(measure.PEERS, "absent", absent)
    known = {"cpu": "a CPU", "cores": 2, "gemm": 1e11, "peers": {}}
    versions = {"jaxconv": "1", "jax": jax.__version__}
    monkeypatch.setattr(report, "machine", lambda _: known | versions)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of ``jaxconv bench`` with these arguments, in this process."""
    with pytest.raises(SystemExit) as exit_, jax.numpy_rank_promotion("allow"):
        cli.app(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    code = exit_.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.mark.usefixtures("tiny")
def test_bench_runs_all_suites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    file, plots = tmp_path / "bench.json", tmp_path / "new" / "plots"
    options = ("--quick", "--specs", 2, "--json", file, "--plots", plots)
    suites = [name for name in SUITES if name != SHARDING]
    code, out, err = run(capsys, *suites, *options)
    assert (code, err) == (0, "")
    document = json.loads(file.read_text(encoding="utf-8"))
    lines = out.splitlines()
    for name in suites:
        head, *rows = lines[lines.index(name) + 2 :]
        assert head.startswith("what  ")
        assert rows[0].startswith(document["results"][name][0]["name"])
    assert document["machine"]["cores"] == 2
    assert list(document["results"]) == suites
    (*_, row) = document["results"]["layers"]
    assert row["ratios"]["lax"][1] > 0
    assert row["wrong"] is None
    assert {path.name for path in plots.iterdir()} == {f"{name}.png" for name in suites}
    assert "below 0.95" in out
    assert "regret of 2: " in out


@pytest.mark.usefixtures("tiny")
def test_bench_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of other widths, see test_tables.py
    code, out, _ = run(capsys, "layers", "regret", "--quick")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "a wider terminal has all, or --json." in " ".join(out.split())


@pytest.mark.usefixtures("tiny")
def test_bench_shows_how_many_of_how_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(capsys, "regret", "--quick", "--specs", "2")
    assert code == 0
    assert "left" not in out.partition("Left out")[0]
    for text in ("0 of 2,", "1 of 2,", "2 of 2,", "left "):
        assert text in err


@pytest.mark.usefixtures("tiny")
def test_bench_lists_names(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "layers", "models", "--list", "--direction", "forward")
    assert (code, err) == (0, "")
    assert out == "tiny\none, batch 1\n"
    assert run(capsys, "profile", "--list", "--case", "batch") == (0, "one, batch 1\n", "")
    assert run(capsys, "--list", "--case", "batch")[0] == 2


@pytest.mark.usefixtures("tiny")
def test_bench_selects(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--quick", "--case", "^t.ny$", "--direction", "input gradient")
    assert code == 0
    assert len(re.findall("^tiny  +input gradient  ", out, re.MULTILINE)) == 7
    assert not re.search("^tiny  +forward", out, re.MULTILINE)


@pytest.mark.usefixtures("tiny")
def test_bench_profiles(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(capsys, "profile", "--direction", "forward")
    assert (code, err) == (0, "")
    assert re.match(r"one, batch 1, forward: [\d.]+ ms a call", out)
    assert "1x4x4x2*1x1x2x3" in out
    code, out, _ = run(capsys, "profile", "programs", "models", "--direction", "gradients")
    assert code == 0
    assert out.count(" a call, its operations ") == 1


@pytest.mark.usefixtures("tiny")
def test_bench_tells_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)
    code, out, _ = run(capsys, "--quick", "--direction", "forward")
    assert code == 1
    assert "WRONG: tiny, forward: jaxconv is off by" in out


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), f"unknown suite 'speed'; known are {', '.join(SUITES)}"),
        (
            ("--direction", "up"),
            f"unknown direction 'up'; known are {', '.join(report.DIRECTIONS)}",
        ),
        (("--case", "("), "--case '(' is no regular expression: "),
        (
            ("--quick", "--case", "nothing"),
            "no case is selected; jaxconv bench layers --list prints the names of all",
        ),
        (("loops", "--direction", "forward"), "no case is selected; jaxconv bench loops --list"),
        (("profile", "--case", "nothing"), "no case is selected; jaxconv bench models --list"),
        (("sharding", "--case", "nothing"), "no case is selected; jaxconv bench sharding --list"),
        (
            ("profile", "layers"),
            "can't profile the suite 'layers'; possible are models, programs",
        ),
        (("profile", "--plots", "."), "profile only prints: it takes neither --json nor --plots"),
        (("--against", "tf,torch"), "unknown runtime 'tf' in --against; known are torch, "),
        (
            ("--against", "absent"),
            "can't measure against 'absent': install it by pip install absent onnx",
        ),
        (("--json", "missing/x.json"), "can't write into 'missing': No such file or directory"),
        (("--json", "."), "can't write '.': it is a folder"),
        (("--plots", "file"), "can't write into 'file': File exists"),
        (("loops", "sharding"), "the suite sharding times nothing: it runs by itself, without"),
        (("sharding", "--plots", "."), "the suite sharding times nothing: it runs by itself,"),
        # This process has started JAX.
        (
            ("sharding", "--case", "3×3"),
            "bench: the suite sharding needs 8 CPU devices, got 1 of a JAX that has started;"
            " run it in a process of its own.",
        ),
    ],
)
def test_bench_refuses(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxconv: {message}")


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "machine", interrupted)
    assert run(capsys) == (130, "", "")


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_suite_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = programs.measure_layer

    def interrupted(layer: Layer, direction: str, effort: Effort) -> Result:
        if direction != "forward":
            raise KeyboardInterrupt
        return right(layer, direction, effort)

    monkeypatch.setitem(
        SUITES, "layers", dataclasses.replace(SUITES["layers"], measure=interrupted)
    )
    code, out, _ = run(capsys)
    assert code == 130
    assert re.search("^tiny  +forward  ", out, re.MULTILINE)


def test_a_table_leaves_out_what_is_unknown_and_what_is_too_wide() -> None:
    (result,) = run_layers((TINY,), ("forward",), ONCE)
    result = dataclasses.replace(result, peers={})
    table = report.table([result])
    whole = table.text().splitlines()
    assert "PyTorch" not in whole[0]
    assert "regret" not in whole[0]
    assert "compile" in whole[0]
    head, _, note = table.text(max(map(len, whole)) - 10).splitlines()
    assert "compile" not in head
    assert "workspace" in head
    assert note.startswith("Left out to fit ")
    assert " columns: compile; " in note


def test_summary_ranks() -> None:
    (result,) = run_layers((TINY,), ("forward",), ONCE)
    rows = [
        dataclasses.replace(
            result,
            name=name,
            lax=((ratio, 1.0),),
            peers={"torch": ((ratio / 2, 1.0),)},
            errors=(1.0, 3.0),
        )
        for name, ratio in (("slow", 0.5), ("fast", 2.0))
    ]
    assert isinstance(rows[0], Result)
    lines = summary(rows)
    assert lines[0] == (
        "against lax: 1 times as fast in the geometric mean of 2, 0.5 at worst; 1 below 0.95"
    )
    assert lines[1].startswith("  0.5: slow, forward (")
    assert lines[2].startswith(
        "against PyTorch: 0.5 times as fast in the geometric mean of 2, 0.25 at"
    )
    assert lines[-1].startswith("errors against float64: 2 of 2 above 2 × lax's; at worst 3: ")


def test_quick_is_a_few() -> None:
    def measured(case: str, *_: object) -> Any:
        return case.upper()

    suite = Suite(measured, lambda _: "abc", slice(1, 2), ONCE)
    few = Selection(quick=True)
    named = dataclasses.replace(few, case=re.compile("[ac]"))
    for selection, expected in ((few, ["B"]), (named, ["A", "C"])):
        selected = list(suite.selected(selection))
        assert results(suite.run(selected, selection)) == expected


def test_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.gemm_peak(size=8) > 0
    monkeypatch.setattr(report, "gemm_peak", lambda: 1e11)
    monkeypatch.setitem(measure.PEERS, "torch", measure.Peer("JAX", "torch_peer", ("jax",)))
    found = report.machine(("torch",))
    assert found["peers"] == {"torch": jax.__version__}
    assert found["jax"] == jax.__version__
    assert found["cpu"]
    assert found["cores"] >= 1
