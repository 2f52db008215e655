"""The benchmark measures what it says, and notices a wrong result. Times are never asserted."""

import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import params_of
from jax import lax

import jaxconv
from jaxconv import app as cli
from jaxconv.bench import cases, measure, networks, profile, programs, regret, report
from jaxconv.bench.cases import DIRECTIONS, Layer
from jaxconv.bench.measure import Effort, Result
from jaxconv.bench.report import SUITES, Selection, Suite, summary
from jaxconv.compat import conv_general_dilated_p
from jaxconv.planning.timing import Compiled, alternate
from jaxconv.spec import ConvSpec
from jaxconv.tools import autotune as autotuning

pytestmark = pytest.mark.usefixtures("compile_quickly")

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
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda one: f"{one.name} {one.dtype}")
STEADY: Any = SimpleNamespace(call=lambda: 1.0, output=None)


def run_layer(
    layer: Layer, directions: Sequence[str] = DIRECTIONS, effort: Effort = ONCE
) -> list[Result]:
    chosen = [direction for direction in layer.directions if direction in directions]
    return [programs.measure_layer(layer, direction, effort) for direction in chosen]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions that are off by a thousandth."""
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)


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


def test_measuring_ends_when_the_ratio_is_known() -> None:
    assert alternate((STEADY,), 7) == [(1.0,)] * 7  # one alone has no ratio
    assert len(alternate((STEADY, STEADY), 100, precision=0.01)) == 5
    times = iter(range(1, 1000))
    wild = SimpleNamespace(call=lambda: float(next(times) % 7 + 1), output=None)
    assert len(alternate((STEADY, wild), 20, precision=0.01)) == 20


# Layers


@each_layer
def test_layers_are_compared_with_lax_and_with_float64(layer: Layer) -> None:
    if layer.dtype == "int8" and jax.default_backend() == "gpu":
        pytest.skip("lax itself refuses integer convolutions on GPU")
    found = run_layer(layer)
    assert [result.direction for result in found] == list(layer.directions)
    for result in found:
        assert result.wrong is None
        assert (len(result.lax), result.peers) == (1, {})
        assert result.quartiles("lax")[0] > 0
        assert result.rate > 0
        assert result.peak > 0
        assert set(result.how.split(", ")) <= set(jaxconv.ALGORITHMS)
        exact = np.finfo(np.float32).eps if layer.dtype != "bfloat16" else 2**-8
        assert max(result.errors) <= (0 if layer.dtype == "int8" else 2 * exact)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_errors_are_those_of_the_outputs(direction: str) -> None:
    layer = dataclasses.replace(LAYERS[4], dtype="float64")
    operands = layer.operands()
    output = layer.function(lax.conv_general_dilated, direction)(*operands)
    exact = measure.reference(layer, direction, *operands)
    assert measure.error(output, exact) < 1e-14
    assert measure.error(output * 1.5, exact) == pytest.approx(0.5)


@pytest.mark.usefixtures("wrong")
def test_what_is_wrong_is_told() -> None:
    (result,) = run_layer(TINY, ("forward",))
    assert re.match(r"tiny, forward: jaxconv is off by 1.*e-03 of the larg.*1e-04", result.wrong)
    found = regret.measure_regret(TINY.spec, "", ONCE)
    assert re.search(r": \w+ is off by 1.*e-03 of", str(found.wrong))


def test_a_wrong_peer_is_told() -> None:
    subject = Compiled(jax.nn.relu, jnp.ones(3, jnp.float32))
    shape = {"as_jax": lambda x: np.full(3, x), "expected": lambda output: output}
    peer = SimpleNamespace(call=lambda: 1.0, output=2.0, **shape)
    facts = {"name": "a", "direction": "b", "how": "", "tolerance": 0.1}
    result = measure.measure(ONCE, subject, subject, {"torch": peer}, **facts)
    assert result.wrong == "a, b: PyTorch is off by 1.0e+00 of the largest value, more than 1e-01"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    ones = np.ones(3, np.float32)
    bad = np.array([1, value, 1], np.float32)
    for expected, found in ((ones, bad), ({"a": ones, "b": ones}, {"a": ones, "b": bad})):
        assert not measure.difference(expected, found) < 1e9


def test_cases_are_many_and_each_is_one() -> None:
    assert len(cases.LAYERS) >= 60
    assert len({layer.name for layer in cases.LAYERS}) == len(cases.LAYERS)
    for layer in cases.LAYERS:
        assert not layer.spec.is_empty
        assert layer.rhs_shape[-2] * layer.groups == layer.lhs_shape[-1]
        assert layer.spec.operand_bytes < 128 << 20


# Programs and networks


@pytest.mark.parametrize(
    "program",
    [*programs.LOOPS, *(one for one in programs.PROGRAMS if one.name.startswith("signal"))],
    ids=lambda program: program.name,
)
def test_programs_hold_convolutions(program: programs.Program) -> None:
    operands = jax.eval_shape(lambda: program.operands("forward"))
    with jax.numpy_rank_promotion("allow"):
        for direction in program.directions:
            function = program.function(direction)
            assert programs.convolutions(function, *operands)
            assert programs.flops(function, *operands) > 1e6


# Millions of weights, those of the normalisation left out
PUBLISHED = {"MobileNetV2": 3.5, "ResNet-50": 25.6, "ConvNeXt-T": 28.6}


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.name)
def test_networks_are_those_of_their_papers(network: networks.Network) -> None:
    network = dataclasses.replace(network, shape=(64, 64, 3))
    with jax.numpy_rank_promotion("allow"):  # users' models promote
        params = jax.eval_shape(network.init)
        x, labels = network.data(1)
        loss, updated = jax.eval_shape(network.step, params, x, labels)
        found = programs.convolutions(network.step, params, x, labels)
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    assert 0.98 < count / PUBLISHED[network.name] <= 1.0
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, params)
    # Forward, and both gradients, but for the input gradient of the first.
    assert len(found) == 3 * sum(layer[0].ndim > 2 for layer in params) - 1


def _layers(net: networks.Lax, x: Any) -> Any:
    return net.logits(net.max_pool(net.relu(net.conv(x, 4, 3, 2))))


SMALL = networks.Network("small", _layers, (9, 8, 2))


def test_networks_are_timed_forward_and_in_training() -> None:
    model = programs.Model(SMALL, 2)
    with jax.numpy_rank_promotion("allow"):
        found = [programs.measure_program(model, d, ONCE) for d in model.directions]
    assert [result.label for result in found] == [
        "small, batch 2, forward",
        "small, batch 2, training step",
    ]
    assert not any(result.wrong for result in found)


def test_channels_first_a_network_computes_the_same() -> None:
    first = dataclasses.replace(SMALL, first=True)
    assert programs.Model(first, 2).name == "small, channels first, batch 2"
    (x, labels), (moved, _) = SMALL.data(2), first.data(2)
    np.testing.assert_array_equal(np.moveaxis(moved, 1, -1), x)
    with jax.numpy_rank_promotion("allow"):
        losses = [
            jax.jit(one.step)(one.init(), images, labels)[0]
            for one, images in ((SMALL, x), (first, moved))
        ]
    assert measure.difference(*losses) < 1e-5


# Profiles


def test_a_profile_names_the_algorithm_and_the_convolution() -> None:
    conv = TINY.function(lax.conv_general_dilated, "forward")

    def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(carry @ carry), None

    def function(x: jax.Array, w: jax.Array, matrix: jax.Array) -> Any:
        return conv(x, w, x), lax.scan(step, matrix, None, length=30)[0]

    operands = *TINY.operands()[:2], jnp.eye(64, dtype=jnp.float32)
    table = profile.profile("a program", jaxconv.accelerate(function), *operands)
    assert re.match(r"a program: [\d.]+ ms a call, its \d+ operations [\d.]+ ms", table.above[0])
    assert len(table.rows) > 2
    # Of an operation in the scan, thirty steps; without those inside, the shares sum up.
    assert any(row[2] == "30" for row in table.rows)
    assert sum(float(row[1].rstrip("%")) for row in table.rows[1:]) < 101
    assert any(re.search(r"\w+ 2x6x6x4\*3x3x1x4", row[5]) for row in table.rows)


def test_of_nested_operations_each_has_its_own_time() -> None:
    def event(start: float, end: float, thread: int = 1, **args: str) -> dict[str, Any]:
        times = {"ph": "X", "ts": start, "dur": end - start}
        return {"pid": 1, "tid": thread, "args": args} | times

    found = profile.own_times(
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
    seconds = {op: round(1e6 * sum(each)) for op, each in found.items()}
    assert seconds == {"while": 300, "dot": 1300, "add": 700}
    counts = {op: sum(one > 0 for one in each) for op, each in found.items()}
    assert counts == {"while": 1, "dot": 3, "add": 2}


# Peers


@pytest.mark.parametrize("layer", [LAYERS[i] for i in (1, 2, 3, 4, 5)], ids=lambda one: one.name)
def test_torch_computes_the_same_layers(layer: Layer) -> None:
    pytest.importorskip("torch")
    for result in run_layer(layer, effort=dataclasses.replace(ONCE, against=("torch",))):
        # PyTorch has no convolution of int8.
        assert set(result.peers) == (set() if layer.dtype == "int8" else {"torch"})
        assert result.wrong is None


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize(
    "peer",
    # The others compile for seconds.
    [
        pytest.param(peer, marks=[pytest.mark.exhaustive] * (peer != "torch"))
        for peer in measure.PEERS
    ],
)
def test_peers_compute_the_same_networks(peer: str) -> None:
    for package in measure.PEERS[peer].packages:
        pytest.importorskip(package)
    effort = dataclasses.replace(ONCE, against=(peer,))
    model = programs.Model(SMALL, 2)
    with jax.numpy_rank_promotion("allow"):
        found = [programs.measure_program(model, d, effort) for d in model.directions]
    assert [result.wrong for result in found] == [None, None]
    trained = {peer} if peer == "torch" else set()
    assert [set(result.peers) for result in found] == [{peer}, trained]


# Regret


def as_called(spec: ConvSpec) -> ConvSpec:
    """The convolution that the benchmark's arguments for ``spec`` describe."""
    operands = jax.eval_shape(lambda: autotuning.operands(spec))
    lhs, rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
    return ConvSpec.from_params(lhs, rhs, params_of(lhs, rhs, **cases.arguments(spec)))


def test_random_specs_are_those_of_their_seed() -> None:
    specs = regret.random_specs(1, 150)
    assert specs == regret.random_specs(1, 150)
    assert specs != regret.random_specs(2, 150)
    assert {spec.spatial_ndim for spec in specs} == {1, 2, 3}
    assert {spec.dtype.name for spec in specs} == {"float32", "float64", "bfloat16", "int8"}
    assert {spec.weight_gradient for spec in specs} == {True, False}
    assert max(spec.groups for spec in specs) > 8
    assert not any(spec.is_empty for spec in specs)
    assert all(as_called(spec) == spec for spec in specs[::3])


@pytest.mark.parametrize("layer", [LAYERS[i] for i in (0, 3, 4)], ids=lambda layer: layer.name)
def test_weight_gradients_are_those_that_jax_derives(layer: Layer) -> None:
    function = layer.function(lax.conv_general_dilated, "weight gradient")
    eqns = jax.make_jaxpr(function)(*layer.operands()).eqns
    (eqn,) = (eqn for eqn in eqns if eqn.primitive is conv_general_dilated_p)
    lhs, rhs = (v.aval for v in eqn.invars)
    spec = layer.spec.kernel_gradient
    derived = ConvSpec.from_params(lhs, rhs, eqn.params)
    assert spec.replace(precision=None) == derived.replace(precision=None)
    if layer.groups == 1:
        assert spec.forward.rhs_shape == layer.rhs_shape


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
    assert all(as_called(spec) == spec for spec in found[::3])


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


# The command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a moment each."""
    tiny: dict[str, Sequence[object]] = {
        "layers": (TINY,) * 2,
        "loops": (programs.Program("relu", jax.nn.relu, ((3,),), ("forward",)),),
        "models": (programs.Model(SMALL, 1),),
        "programs": (programs.surrounded(TINY, "bias, ReLU"),),
        "regret": (TINY.spec,) * 2,
        "relatives": (TINY.spec,),
    }
    for name, few in tiny.items():
        suite = dataclasses.replace(SUITES[name], cases=lambda _, few=few: few, few=slice(None))
        monkeypatch.setitem(SUITES, name, suite)
    monkeypatch.setitem(measure.PEERS, "absent", measure.Peer("Absent", ("absent", "onnx")))
    known = {"cpu": "a CPU", "cores": 2, "gemm": 1e11, "peers": {}}
    versions = {"jaxconv": "1", "jax": jax.__version__}
    monkeypatch.setattr(report, "machine", lambda _: known | versions)
    monkeypatch.setenv("COLUMNS", "300")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of ``jaxconv bench`` with these arguments, in this process."""
    with pytest.raises(SystemExit) as exit_, jax.numpy_rank_promotion("allow"):
        cli.app(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    code = exit_.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.mark.usefixtures("tiny")
def test_bench_runs_all_suites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plots = tmp_path / "bench.json", tmp_path / "new" / "plots"
    options = ("--quick", "--specs", 2, "--json", file, "--plots", plots, "--against", "none")
    code, out, err = run(capsys, *SUITES, *options)
    assert (code, err) == (0, "")
    document = json.loads(file.read_text(encoding="utf-8"))
    lines = out.splitlines()
    for name in SUITES:
        head, *rows = lines[lines.index(name) + 2 :]
        assert head.startswith("what  ")
        assert rows[0].startswith(document["results"][name][0]["name"])
    assert document["machine"]["cores"] == 2
    assert list(document["results"]) == list(SUITES)
    (*_, row) = document["results"]["layers"]
    assert row["ratios"]["lax"][1] > 0
    assert row["wrong"] is None
    assert {path.name for path in plots.iterdir()} == {f"{name}.png" for name in SUITES}
    assert "below 0.95" in out
    assert "regret of 2: " in out


@pytest.mark.usefixtures("tiny")
def test_bench_fits_a_terminal_and_shows_how_many_of_how_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of other widths, see test_tables.py
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(capsys, "regret", "--quick", "--specs", "2")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "a wider terminal has all, or --json." in " ".join(out.split())
    assert "left" not in out.partition("Left out")[0]
    for text in ("0 of 2,", "1 of 2,", "2 of 2,", "left "):
        assert text in err


@pytest.mark.usefixtures("tiny")
def test_bench_lists_and_selects(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "layers", "models", "--list", "--direction", "forward")
    assert (code, err) == (0, "")
    assert out == "tiny\nsmall, batch 1\n"
    assert run(capsys, "profile", "--list", "--case", "batch") == (0, "small, batch 1\n", "")
    assert run(capsys, "--list", "--case", "batch")[0] == 2
    code, out, _ = run(capsys, "--quick", "--case", "^t.ny$", "--direction", "input gradient")
    assert code == 0
    assert len(re.findall("^tiny  +input gradient  ", out, re.MULTILINE)) == 2
    assert not re.search("^tiny  +forward", out, re.MULTILINE)


@pytest.mark.usefixtures("tiny")
def test_bench_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "profile", "programs", "models", "--direction", "forward")
    assert (code, err) == (0, "")
    assert re.search(r"^tiny, bias, ReLU, forward: [\d.]+ ms a call", out, re.MULTILINE)
    assert re.search(r"^small, batch 1, forward: [\d.]+ ms a call", out, re.MULTILINE)
    assert "2x6x6x4*3x3x1x4" in out


@pytest.mark.usefixtures("tiny", "wrong")
def test_bench_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--quick", "--direction", "forward", "--against", "none")
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
        (("loops", "--direction", "gradients"), "no case is selected; jaxconv bench loops --list"),
        (("profile", "--case", "nothing"), "no case is selected; jaxconv bench models --list"),
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


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_suite_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(layer: Layer, direction: str, effort: Effort) -> Result:
        if direction != "forward":
            raise KeyboardInterrupt
        return programs.measure_layer(layer, direction, effort)

    suite = dataclasses.replace(SUITES["layers"], measure=interrupted)
    monkeypatch.setitem(SUITES, "layers", suite)
    code, out, err = run(capsys, "--quick", "--against", "none")
    assert (code, err) == (130, "")
    assert re.search("^tiny  +forward  ", out, re.MULTILINE)


def result(**changes: Any) -> Result:
    """One with figures of lax alone."""
    facts = {"name": "one", "direction": "forward", "how": "im2col", "lax": ((2.0, 1.0),)}
    facts |= {"compile_seconds": (0.1, 0.2), "workspace": (0, 2**20), "differing": "jaxconv"}
    return Result(**facts | {"difference": 0.0, "tolerance": 1e-4} | changes)


def test_a_table_leaves_out_what_is_unknown_and_what_is_too_wide() -> None:
    table = report.table([result()])
    whole = table.text().splitlines()
    assert "PyTorch" not in whole[0]
    assert "regret" not in whole[0]
    assert "compile" in whole[0]
    assert "0.0 MiB → 1.0 MiB" in whole[1]
    head, *_ = table.text(max(map(len, whole)) - 10).splitlines()
    assert "compile" not in head
    assert "workspace" in head


def test_summary_ranks() -> None:
    rows = [
        result(
            name=name,
            lax=((ratio, 1.0),),
            peers={"torch": ((ratio / 2, 1.0),)},
            errors=(1.0, 3.0),
            regret=1 / ratio,
            best="shift",
        )
        for name, ratio in (("slow", 0.5), ("fast", 2.0))
    ]
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
    suite = Suite(lambda case, *_: case.upper(), lambda _: "abc", slice(1, 2), ONCE)
    few = Selection(quick=True)
    named = dataclasses.replace(few, case=re.compile("[ac]"))
    for selection, expected in ((few, ["b", "B"]), (named, ["a", "A", "c", "C"])):
        selected = list(suite.selected(selection))
        assert list(suite.run(selected, selection)) == expected


def test_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.gemm_peak(size=8) > 0
    monkeypatch.setattr(report, "gemm_peak", lambda: 1e11)
    monkeypatch.setitem(measure.PEERS, "torch", measure.Peer("JAX", ("jax",)))
    found = report.machine(("torch",))
    assert found["peers"] == {"torch": jax.__version__}
    assert found["jax"] == jax.__version__
    assert found["cpu"]
    assert found["cores"] >= 1
