"""The benchmark measures what it says, and notices a wrong result. Times are never asserted."""

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import params_of
from jax import lax

import jaxconv
from jaxconv import app
from jaxconv.bench import cases, measure, networks, programs
from jaxconv.bench.cases import Layer, Pool, layer_of
from jaxconv.bench.measure import Effort, Result, summary
from jaxconv.bench.programs import SUITES, Case, Selection, Suite
from jaxconv.compat import conv_general_dilated_p
from jaxconv.planning.timing import Call, Compiled, alternate
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

Patch = pytest.MonkeyPatch
HAS_TORCH = find_spec("torch") is not None
ONCE = Effort(1, 0.0, torch=HAS_TORCH)
TINY = layer_of("tiny", 2, 6, (4, 4), 3, 1, 4)
SPEC = TINY.spec
BFLOAT16, INT8 = jnp.dtype("bfloat16"), np.dtype("int8")
LAYERS = {
    "depthwise": TINY,
    "bfloat16": Layer("", SPEC.replace(dtype=BFLOAT16, out_dtype=BFLOAT16)),
    "int8": Layer("", SPEC.replace(dtype=INT8, out_dtype=np.dtype("int32")), ("forward",)),
    "causal": layer_of("", 1, 9, (2, 4), 3, ndim=1, causal=True, dilation=2),
    "groups": layer_of("", 2, (9, 8), (4, 6), 3, 2, 2),
    "transposed": layer_of("", 2, 4, (3, 5), 4, up=True),
    "volume": layer_of("", 1, 4, (2, 3), 3, ndim=3),
    "patches": layer_of("", 1, 8, (3, 5), 4, 4),
}
PEAK = measure.gemm_peak
STEADY: Any = SimpleNamespace(call=lambda: 1.0, output=None)


def each_of(*names: str) -> Any:
    """Some of the layers."""
    return pytest.mark.parametrize("layer", [LAYERS[name] for name in names], ids=names)


@pytest.fixture(autouse=True)
def _products_are_quick(monkeypatch: Patch) -> None:
    monkeypatch.setattr(measure, "gemm_peak", lambda: 1e11)
    monkeypatch.setattr(programs, "gemm_peak", lambda: 1e11)


@pytest.fixture
def wrong(monkeypatch: Patch) -> None:
    """Convolutions that are off by a thousandth."""
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)


# Timing


def noting(calls: list[str], seconds: float = 0.0) -> Any:
    """By name, what notes that it is called, and takes this long."""

    def subject(name: str) -> Any:
        def call() -> float:
            calls.append(name)
            time.sleep(seconds)
            return 1.0

        return SimpleNamespace(call=call, output=None)

    return subject


def test_calls_alternate_and_time_is_bounded() -> None:
    calls: list[str] = []
    subjects = list(map(noting(calls), "abc"))
    assert [len(times) for times in alternate(subjects, 2)] == [3, 3]
    assert "".join(calls) == "abc" + "abcabc"
    assert len(alternate(subjects, 100, seconds=0.0)) == 1
    assert len(alternate(subjects, 100, seconds=0.0, fewest=3)) == 3


def test_each_settles_before_it_is_timed() -> None:
    calls: list[str] = []
    alternate(tuple(map(noting(calls, 0.001), "ab")), 1, settle=0.01)
    first, *rest = (len(list(group)) for _, group in itertools.groupby(calls))
    assert first == 1
    assert all(1 < length <= 12 for length in rest[1:])


def test_measuring_ends_when_the_ratio_is_known() -> None:
    assert alternate((STEADY,), 7) == [(1.0,)] * 7  # one alone has no ratio
    assert len(alternate((STEADY, STEADY), 100, precision=0.01)) == 5
    times = iter(range(1, 1000))
    wild = SimpleNamespace(call=lambda: float(next(times) % 7 + 1), output=None)
    assert len(alternate((STEADY, wild), 20, precision=0.01)) == 20


# Layers


@each_of("bfloat16", "int8", "causal", "groups", "transposed", "volume")
def test_layers_are_compared_with_lax_pytorch_and_float64(layer: Layer) -> None:
    dtype = layer.spec.dtype.name
    if dtype == "int8" and jax.default_backend() == "gpu":
        pytest.skip("lax itself refuses integer convolutions on GPU")
    found = [programs.measure_layer(layer, direction, ONCE) for direction in layer.directions]
    assert [result.direction for result in found] == list(layer.directions)
    for result in found:
        assert result.wrong is None
        # PyTorch has no convolution of int8.
        assert (len(result.lax), len(result.torch)) == (1, HAS_TORCH and dtype != "int8")
        assert result.quartiles("lax")[0] > 0
        assert result.rate > 0
        assert result.peak > 0
        assert set(result.how.split(", ")) <= set(jaxconv.ALGORITHMS)
        assert (result.errors is None) == (result.direction != "forward")
        assert max(result.errors or (0,)) <= (0 if dtype == "int8" else 2 * jnp.finfo(dtype).eps)


@each_of("depthwise", "causal", "groups", "transposed", "volume", "patches")
def test_errors_are_those_of_the_outputs(layer: Layer) -> None:
    double = np.dtype("float64")
    layer = Layer("", layer.spec.replace(dtype=double, out_dtype=double))
    operands = layer.operands()
    output = layer.function(lax.conv_general_dilated, "forward")(*operands)
    exact = measure.reference(layer.spec, *operands[:2])
    assert exact.dtype == double
    assert measure.error(output, exact) < 1e-14
    assert measure.error(output * 1.5, exact) == pytest.approx(0.5)


@pytest.mark.usefixtures("wrong")
def test_what_is_wrong_is_told(monkeypatch: Patch) -> None:
    result = programs.measure_layer(TINY, "forward", ONCE)
    where = r"tiny: 3×3 .*, forward"
    assert re.match(where + r": jaxconv is off by 1.*e-03 of the larg.*1e-04", result.wrong)
    monkeypatch.setattr(programs, "candidates", lambda *_: ["xla"])
    found = programs.measure_regret(SPEC, ONCE)
    assert re.search(r": jaxconv is off by 1.*e-03 of", str(found.wrong))


def test_pytorch_s_wrong_result_is_told() -> None:
    subject = Compiled(jax.nn.relu, jnp.ones(3, jnp.float32))
    call = Call(lambda: 2.0, lambda x: np.full(3, x))
    facts = {"name": "a", "direction": "b", "how": "", "tolerance": 0.1}
    result = measure.measure(ONCE, subject, subject, call, **facts)
    assert result.wrong == "a, b: PyTorch is off by 1.0e+00 of the largest value, more than 1e-01"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    ones = np.ones(3, np.float32)
    bad = np.array([1, value, 1], np.float32)
    for expected, found in ((ones, bad), ({"a": ones, "b": ones}, {"a": ones, "b": bad})):
        assert not measure.difference(expected, found) < 1e9


def test_cases_are_many_and_each_is_one() -> None:
    assert len(cases.LAYERS) >= 60
    names = [case.name for case in (*cases.LAYERS, *cases.POOLS)]
    assert len(set(names)) == len(names)
    for layer in cases.LAYERS:
        assert not layer.spec.is_empty
        assert layer.spec.rhs_shape[-2] * layer.spec.groups == layer.spec.lhs_shape[-1]
        assert layer.spec.operand_bytes < 128 << 20


@pytest.mark.parametrize(
    ("kind", "pool"), [("max", jaxconv.max_pool), ("mean", jaxconv.avg_pool)], ids=["max", "mean"]
)
def test_poolings_are_compared_with_lax(kind: str, pool: Any) -> None:
    pooling = Pool(kind, (1, 5, 6, 2), 3, 2)
    function, (x,) = pooling.case("forward")
    np.testing.assert_allclose(function(x), pool(x, 3, 2, "SAME"), rtol=1e-6)
    found = [programs.measure_pool(pooling, direction, ONCE) for direction in pooling.directions]
    for result, direction in zip(found, ("forward", "gradient"), strict=True):
        assert result.label == f"{kind} pool: 3×3 stride 2, 1×5×6×2, {direction}"
        assert result.wrong is None
    assert {result.how for result in found} <= {"taps", "axes", "xla"}


# Networks

# Millions of weights, those of the normalisation left out; of VGG-11 with one dense layer.
PUBLISHED = {"MobileNetV2": 3.5, "ResNet-50": 25.6, "ConvNeXt-T": 28.6, "VGG-11": 9.74}
ONE_OF_EACH = {network.kind: network for network in networks.NETWORKS if network.kind in PUBLISHED}


@pytest.mark.parametrize("network", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_networks_are_those_of_their_papers(network: networks.Network) -> None:
    network = network._replace(shape=(64, 64, 3))
    with jax.numpy_rank_promotion("allow"):  # users' models promote
        params = jax.eval_shape(network.init)
        found = programs.convolutions(network.step, params, *network.data())
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert 0.98 < count / PUBLISHED[network.kind] <= 1.0
    # Forward, and both gradients, but for the input gradient of the first.
    assert len(found) == 3 * sum(layer[0].ndim > 2 for layer in params) - 1


@pytest.mark.parametrize(
    "network", [n for n in networks.NETWORKS if n.batch == 64], ids=lambda n: n.kind
)
def test_small_networks_are_small(network: networks.Network) -> None:
    with jax.numpy_rank_promotion("allow"):
        params = jax.eval_shape(network.init)
        logits = jax.eval_shape(network.forward, params, network.data()[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1e6
    assert logits.shape == (64, networks.CLASSES)


def _layers(net: networks.Lax, x: Any) -> Any:
    x = net.leaky_relu(net.conv(x, 4, 4, 2))
    return net.logits(net.enlarged(net.max_pool(net.conv(x, 3, 3, bias=False), 2), x))


SMALL = networks.Network("small", _layers, 2, shape=(9, 8, 2))


def test_networks_are_timed_in_training() -> None:
    """And forward: see ``test_bench_runs_all_suites``."""
    assert SMALL.directions == ("forward", "training step")
    with jax.numpy_rank_promotion("allow"):
        result = programs.measure_network(SMALL, "training step", ONCE)
        forward = programs.convolutions(SMALL.forward, SMALL.init(), SMALL.data()[0])
    assert (result.wrong, len(result.torch)) == (None, HAS_TORCH)
    assert result.label == "small, batch 2, training step"
    assert result.flops > 2 * programs.flops(forward)


def test_channels_first_a_network_computes_the_same() -> None:
    first = SMALL._replace(first=True)
    assert first.name == "small, channels first, batch 2"
    (x, _), (moved, _) = SMALL.data(), first.data()
    np.testing.assert_array_equal(np.moveaxis(moved, 1, -1), x)
    with jax.numpy_rank_promotion("allow"):
        logits = [
            jax.jit(one.forward)(one.init(), images) for one, images in ((SMALL, x), (first, moved))
        ]
    assert measure.difference(*logits) < 1e-5


def test_a_compiled_program_names_the_algorithm_and_the_convolution() -> None:
    conv = jaxconv.accelerate(TINY.function(lax.conv_general_dilated, "forward"))
    text = jax.jit(conv).lower(*TINY.operands()).compile().as_text() or ""
    assert re.search(r'op_name="[^"]*\w+ 2x6x6x4\*3x3x1x4', text)


# Regret


def as_called(spec: ConvSpec) -> ConvSpec:
    """The convolution that the benchmark's arguments for ``spec`` describe."""
    operands = jax.eval_shape(lambda: autotuning.operands(spec))
    lhs, rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
    return ConvSpec.from_params(lhs, rhs, params_of(lhs, rhs, **cases.arguments(spec)))


def test_random_specs_are_those_of_their_seed() -> None:
    specs = cases.random_specs(1, 150)
    assert specs == cases.random_specs(1, 150)
    assert specs != cases.random_specs(2, 150)
    assert {spec.spatial_ndim for spec in specs} == {1, 2, 3}
    assert {spec.dtype.name for spec in specs} == {"float32", "float64", "bfloat16", "int8"}
    assert {spec.weight_gradient for spec in specs} == {True, False}
    assert max(spec.groups for spec in specs) > 8
    assert not any(spec.is_empty for spec in specs)
    assert all(as_called(spec) == spec for spec in specs[::10])


@each_of("depthwise", "causal", "groups")
def test_weight_gradients_are_those_that_jax_derives(layer: Layer) -> None:
    function = layer.function(lax.conv_general_dilated, "weight gradient")
    eqns = jax.make_jaxpr(function)(*layer.operands()).eqns
    (eqn,) = (eqn for eqn in eqns if eqn.primitive is conv_general_dilated_p)
    spec = layer.spec.kernel_gradient
    derived = ConvSpec.from_params(*(v.aval for v in eqn.invars), eqn.params)
    assert spec.replace(precision=None) == derived.replace(precision=None)
    if layer.spec.groups == 1:
        assert spec.forward.rhs_shape == layer.spec.rhs_shape


@pytest.mark.parametrize("best", ["shift", "im2col"])
def test_regret_is_over_the_best_candidate(monkeypatch: Patch, best: str) -> None:
    def timed(spec: ConvSpec, names: Sequence[str], *_: Any) -> Any:
        return SimpleNamespace(seconds={name: 1.0 + (name != best) for name in names})

    monkeypatch.setattr(programs, "timed", timed)
    monkeypatch.setattr(programs, "candidates", lambda *_: ["shift", "im2col", "xla"])
    monkeypatch.setattr(programs, "choose", lambda *_: ("shift", "why"))
    found = programs.measure_regret(SPEC, Effort(3))
    assert found.wrong is None
    assert (found.how, found.best, len(found.lax)) == ("shift", best, 3)
    assert (found.regret == 1) == (best == "shift")
    assert found.regret > 0
    assert found.quartiles()[0] > 0


# The command


@pytest.fixture
def tiny(monkeypatch: Patch) -> None:
    """Suites of a moment each."""
    tiny = {
        "layers": [
            Case("tiny", direction, partial(programs.measure_layer, TINY, direction))
            for direction in ("forward", "input gradient")
        ],
        "models": [Case("small", "forward", partial(programs.measure_network, SMALL, "forward"))],
        "regret": [Case("spec", "", lambda effort: result(regret=1.5, best="shift"))] * 2,
    }
    for name, few in tiny.items():
        suite = SUITES[name]._replace(cases=lambda _, few=few: few, few=slice(None))
        monkeypatch.setitem(SUITES, name, suite)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, stdout and stderr of ``jaxconv bench``, in this process."""

    def bench(*arguments: object) -> tuple[int, str, str]:
        with jax.numpy_rank_promotion("allow"):
            return children.command(capsys, "bench", *arguments)

    return bench


@pytest.mark.usefixtures("tiny")
def test_bench_runs_all_suites(tmp_path: Path, run: Any) -> None:
    file, plots = tmp_path / "bench.json", tmp_path / "new" / "plots"
    options = ("--quick", "--specs", 2, "--json", file, "--plots", plots, "--no-torch")
    code, out, err = run(*SUITES, *options)
    assert (code, err) == (0, "")
    document = json.loads(file.read_text(encoding="utf-8"))
    lines = out.splitlines()
    for name in SUITES:
        head, *rows = lines[lines.index(name) + 2 :]
        first, *_ = results = document["results"][name]
        assert head.startswith("what  ")
        assert rows[0].startswith(first["name"])
        assert [row["wrong"] for row in results] == [None] * len(results)
    assert document["machine"]["gemm"] == 1e11
    assert list(document["results"]) == list(SUITES)
    (*_, row) = document["results"]["layers"]
    assert row["ratios"]["lax"][1] > 0
    assert [row["direction"] for row in document["results"]["models"]] == ["forward"]
    assert {path.name for path in plots.iterdir()} == {f"{name}.png" for name in SUITES}
    assert "below 0.95" in out
    assert "regret of 2: " in out


@pytest.mark.usefixtures("tiny")
def test_bench_fits_a_terminal_and_shows_how_many_of_how_many(run: Any, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of other widths, see test_tables.py
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run("regret", "--quick", "--specs", "2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "a wider terminal has all, or --json." in " ".join(out.split())
    for text in ("0 of 2", "1 of 2", "spec"):
        assert text in err


@pytest.mark.usefixtures("tiny")
def test_bench_lists_and_selects(run: Any) -> None:
    code, out, err = run("layers", "models", "--list", "--direction", "forward")
    assert (code, err) == (0, "")
    assert out == "tiny\nsmall\n"
    assert run("--list", "--case", "batch")[0] == 2
    code, out, _ = run("--quick", "--case", "^t.ny$", "--direction", "input gradient")
    assert code == 0
    assert len(re.findall("^tiny: .*  input gradient  ", out, re.MULTILINE)) == 1
    assert not re.search("^tiny.*  forward", out, re.MULTILINE)


@pytest.mark.usefixtures("tiny", "wrong")
def test_bench_tells_what_is_wrong(run: Any) -> None:
    code, out, _ = run("--quick", "--direction", "forward", "--no-torch")
    assert code == 1
    assert re.search("WRONG: tiny.*, forward: jaxconv is off by", out)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), f"unknown suite 'speed'; known are {', '.join(SUITES)}"),
        (("--direction", "up"), "unknown direction 'up'; known are forward, input gradient, "),
        (("--case", "("), "--case '(' is no regular expression: "),
        (("--case", "nothing"), "no case is selected; jaxconv bench layers --list prints the"),
        (("models", "--direction", "input gradient"), "no case is selected; jaxconv bench models"),
        (("--torch",), "can't measure PyTorch: install it by pip install torch"),
        (("--json", "missing/x.json"), "can't write 'missing/x.json': No such file or directory"),
        (("--json", "."), "can't write '.': Is a directory"),
        (("--plots", "file"), "can't write into 'file': File exists"),
    ],
)
def test_bench_refuses(
    run: Any, monkeypatch: Patch, tmp_path: Path, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    (tmp_path / "file").touch()
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxconv: {message}")


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_suite_is_reported(run: Any, monkeypatch: Patch) -> None:
    def interrupted(effort: Effort) -> Result:
        raise KeyboardInterrupt

    few = [Case("tiny", "forward", lambda effort: result()), Case("tiny", "", interrupted)]
    suite = SUITES["layers"]._replace(cases=lambda _: few)
    monkeypatch.setitem(SUITES, "layers", suite)
    code, out, err = run("--quick", "--no-torch")
    assert (code, err) == (130, "")
    assert re.search("^one  +forward  ", out, re.MULTILINE)


def result(**changes: Any) -> Result:
    """One with figures of lax alone."""
    facts = {"name": "one", "direction": "forward", "how": "im2col", "lax": ((2.0, 1.0),)}
    facts |= {"compile_seconds": (0.1, 0.2), "workspace": (0, 2**20), "differing": "jaxconv"}
    return Result(**facts | {"difference": 0.0, "tolerance": 1e-4} | changes)


def test_a_table_leaves_out_what_is_unknown_and_what_is_too_wide() -> None:
    table = measure.table([result()])
    whole = table.text().splitlines()
    assert [title in whole[0] for title in ("PyTorch", "regret", "compile")] == [False, False, True]
    assert "0.0 MiB → 1.0 MiB" in whole[1]
    head, *_ = table.text(max(map(len, whole)) - 10).splitlines()
    assert [title in head for title in ("compile", "workspace")] == [False, True]


def test_summary_ranks() -> None:
    def row(name: str, ratio: float) -> Result:
        pairs = {"lax": ((ratio, 1.0),), "torch": ((ratio / 2, 1.0),), "errors": (1.0, 3.0)}
        return result(name=name, **pairs, regret=1 / ratio, best="shift")

    rows = [row("slow", 0.5), row("fast", 2.0)]
    assert summary(rows) == [
        "against lax: 1 times as fast in the geometric mean of 2, 0.5 at worst; 1 below 0.95",
        "  0.5: slow, forward (im2col)",
        "against PyTorch: 0.5 times as fast in the geometric mean of 2, 0.25 at worst;"
        " 1 below 0.95",
        "  0.25: slow, forward (im2col)",
        "errors against float64: 2 of 2 above 2 × lax's; at worst 3: slow, forward",
        "regret of 2: 1.000 in the geometric mean, 1.92 at the 95th percentile, 2 at worst",
        "  2.00: slow, forward: im2col, best shift",
        "  0.50: fast, forward: im2col, best shift",
    ]


def test_quick_is_a_few() -> None:
    few = [Case(name, "", lambda _, name=name: name.upper()) for name in "abc"]
    suite, quick = Suite(lambda _: few, slice(1, 2), ONCE), Selection(quick=True)
    named = dataclasses.replace(quick, case=re.compile("[ac]"))
    for selection, expected in ((quick, ["b", "B"]), (named, ["a", "A", "c", "C"])):
        assert list(suite.run(suite.selected(selection), selection)) == expected
    for name, suite in SUITES.items():
        assert 2 <= len(suite.selected(quick)) < 10, name


def test_machine_is_described(monkeypatch: Patch) -> None:
    monkeypatch.setattr(programs, "version_of", lambda name: f"version of {name}")
    found = programs.machine(torch=True)
    assert found["torch"] == "version of torch"
    assert found["jax"] == jax.__version__
    assert found["cpu"]
    assert found["cores"] >= 1
    assert programs.machine()["torch"] is None
    assert PEAK() > 0
