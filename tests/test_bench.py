"""The benchmark measures what it says, and notices a wrong result. Times are never asserted."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import jaxconv
from jaxconv.bench import __main__ as command
from jaxconv.bench import layers, models, programs
from jaxconv.bench.layers import Layer
from jaxconv.bench.timing import Compiled, alternate

TINY = Layer("tiny", (2, 6, 6, 4), (3, 3, 1, 4), 4)


@pytest.mark.parametrize(
    "layer",
    [
        TINY,
        dataclasses.replace(TINY, direction="input gradient"),
        dataclasses.replace(TINY, direction="weight gradient"),
        dataclasses.replace(TINY, dtype="int32"),
        Layer("causal", (1, 9, 2), (3, 2, 4), padding=((2, 0),)),
    ],
    ids=lambda layer: f"{layer.name} {layer.direction} {layer.dtype}",
)
def test_a_layer_is_timed_in_pairs(layer: Layer) -> None:
    if layer.dtype == "int32" and jax.default_backend() == "gpu":
        pytest.skip("lax itself refuses integer convolutions on GPU")
    (result,) = layers.run((layer,), pairs=3)
    assert len(result.pairs) == len(result.ratios) == 3
    assert (result.ratios > 0).all()
    assert result.error < 1e-5
    assert len(result.algorithms) == 1
    assert result.algorithms[0] in jaxconv.ALGORITHMS


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jaxconv.conv_general_dilated
    monkeypatch.setattr(jaxconv, "conv_general_dilated", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(RuntimeError, match=r"off by 1.*e-03 of the largest value"):
        list(layers.run((TINY,), pairs=1))


def test_pairs_alternate_and_time_is_bounded() -> None:
    calls = []

    def traced(name: str) -> Callable[[jax.Array], jax.Array]:
        def f(x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: calls.append(name), ordered=True)
            return x + 1

        return f

    a, b = Compiled(traced("a"), jnp.zeros(3)), Compiled(traced("b"), jnp.zeros(3))
    assert len(alternate(a, b, pairs=2)) == 2
    jax.effects_barrier()
    assert "".join(calls) == "ab" + "abab"
    assert len(alternate(a, b, pairs=100, seconds=0.0)) == 1


def test_programs_are_timed_by_accelerate_and_by_enable() -> None:
    small = programs.Program("small", lambda: (jax.nn.relu, (jnp.ones(3),)))
    found = list(programs.run((small, programs.PROGRAMS[-1]), pairs=1))
    assert [result.how for result in found] == ["accelerate", "enable"] * 2
    assert [result.error for result in found[:2]] == [0, 0]


def test_a_wrong_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxconv, "accelerate", lambda f: lambda *args: f(*args) * 1.001)
    with pytest.raises(RuntimeError, match=r"vmap.*off by 1.*e-03 of the largest value"):
        list(programs.run(programs.PROGRAMS[-1:], pairs=1))


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_models_are_those_of_their_papers(model: models.Model) -> None:
    params = model.init(size=64)
    # Millions of weights, without normalisation: 3.5, 25.6 and 28.6 with it.
    published = {"MobileNetV2": 3.5, "ResNet-50": 25.6, "ConvNeXt-T": 28.6}
    count = sum(weights.size for weights, _ in params) / 1e6
    assert 0.98 < count / published[model.name] < 1.0
    images, labels = models.data(1, size=64)
    with jax.numpy_rank_promotion("allow"):  # users' models promote
        loss, updated = jax.eval_shape(model.step, params, images, labels)
        found = jaxconv.explain(model.step)(params, images, labels)
    assert loss.shape == ()
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(jnp.shape, params)
    # Forward, and both gradients, but for the input gradient of the first.
    assert found.count == 3 * (len(params) - 1) - 1


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = programs.Program("small", lambda: (jax.nn.relu, (jnp.ones(3),)))
    monkeypatch.setitem(command.SUITES, "layers", lambda: layers.run((TINY,), pairs=2))
    monkeypatch.setitem(command.SUITES, "programs", lambda: programs.run((small,), pairs=2))
    command.main([])
    assert capsys.readouterr().out.splitlines()[-1].startswith("| tiny | forward | ")
    command.main(["layers", "programs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| tiny", "| small", "| small"]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_the_command_names_its_suites() -> None:
    with pytest.raises(SystemExit, match=r"no suite speed; there are layers, gradients, programs"):
        command.main(["speed"])
