"""The benchmark measures what it says, and notices a wrong result. Times are never asserted."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import jaxconv
from jaxconv.bench import __main__ as command
from jaxconv.bench import layers
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


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run", lambda: layers.run((TINY,), pairs=2))
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| tiny | forward | ")
    assert len({line.count("|") for line in lines[2:]}) == 1
