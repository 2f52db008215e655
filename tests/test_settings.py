"""``config``: values, where they come from, what refuses, and what a change does to plans."""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest
from cases import CASES
from test_plan import struct

import jaxconv
from jaxconv.config import MEMORY_SHARE, SETTINGS, UNKNOWN_MEMORY, Config, config, variable
from jaxconv.planning import choose as choosing
from jaxconv.planning.choose import choose, workspace_limit
from jaxconv.planning.plan import plan_spec

MIB = 2**20


# Where a value comes from


def test_defaults() -> None:
    fresh = Config({})
    assert fresh.use_cache is True
    assert fresh.workspace_limit > 64 * MIB
    assert fresh.cache_dir is not None
    assert "jaxconv" in str(fresh.cache_dir).lower()


@pytest.mark.parametrize("found", [AttributeError, ValueError, OSError, [-1, -1]])
def test_defaults_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr(os, "sysconf", Mock(side_effect=found), raising=False)
    assert Config({}).workspace_limit == UNKNOWN_MEMORY // MEMORY_SHARE
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert Config({}).cache_dir is None
    assert Config({"JAXCONV_CACHE_DIR": "here"}).cache_dir == Path("here")


SIZES = {"4096": 4096, " 4096 B": 4096, "512MiB": 512 * MIB, "512 mib": 512 * MIB}
TEXTS = {
    "workspace_limit": SIZES | {"1.5KiB": 1536, "2GB": 2_000_000_000, "1tb": 10**12, "0": 0},
    "use_cache": {"0": False, "OFF": False, "yes": True},
    "cache_dir": {"~/x": Path("~/x").expanduser(), "a/b": Path("a") / "b"},
}


@pytest.mark.parametrize(("name", "text"), [(n, text) for n, of in TEXTS.items() for text in of])
def test_texts(name: str, text: str) -> None:
    value = TEXTS[name][text]
    fresh = Config({variable(name): text})
    assert getattr(fresh, name) == value
    for given in (value, text):
        fresh = Config({variable(name): ""})
        fresh.update(name, given)
        assert getattr(fresh, name) == value


BAD = {
    "workspace_limit": ["lots", "5 apples", "-1", "1e9", "MiB", "512M", -1, 1.5, True, None],
    "use_cache": ["maybe", 1, None],
    "cache_dir": ["", 3, None],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_bad_values_are_refused(name: str, value: object) -> None:
    fresh = Config({})
    before = getattr(fresh, name)
    match = rf"^jaxconv\.config\.(update|set): {name} must be .*, got {value!r}; pass one\.$"
    with pytest.raises(ValueError, match=match):
        fresh.update(name, value)
    with pytest.raises(ValueError, match=match), fresh.set(**{name: value}):
        pass
    assert getattr(fresh, name) == before


@pytest.mark.parametrize("name", ["workspace_limit", "use_cache"])
def test_a_bad_environment_variable_is_refused_at_use(name: str) -> None:
    fresh = Config({variable(name): "lots"})
    of = rf"jaxconv\.config: the environment variable {variable(name)} must be a"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{of} .*, got 'lots'; pass one\.$"):
            getattr(fresh, name)
    fresh.update(name, "1")
    assert getattr(fresh, name) == 1


def test_unknown_settings_are_refused() -> None:
    match = r"^jaxconv\.config\.set: name must be one of workspace_limit, .*'workspace_limit'\?$"
    with pytest.raises(ValueError, match=match), config.set(workspace=1):
        pass
    with pytest.raises(AttributeError):
        config.workspace  # noqa: B018  # pyright: ignore
    for name in ("workspace", "workspace_limit"):
        with pytest.raises(AttributeError):
            setattr(config, name, 1)


def test_set_restores() -> None:
    fresh = Config({"JAXCONV_WORKSPACE_LIMIT": "7"})
    with fresh.set(workspace_limit=1, use_cache=False):
        assert (fresh.workspace_limit, fresh.use_cache) == (1, False)
        with fresh.set(workspace_limit=2):
            assert (fresh.workspace_limit, fresh.use_cache) == (2, False)
        assert fresh.workspace_limit == 1
    assert (fresh.workspace_limit, fresh.use_cache) == (7, True)
    fresh.update("workspace_limit", 3)
    with pytest.raises(KeyError), fresh.set(workspace_limit=1):
        raise KeyError
    assert fresh.workspace_limit == 3
    # What was changed meanwhile, and was not for the block, stays.
    with fresh.set(workspace_limit=1):
        fresh.update("use_cache", False)
    assert (fresh.workspace_limit, fresh.use_cache) == (3, False)


def test_blocks_may_overlap() -> None:
    """As those of two threads do: each takes back what it gave, and nothing else."""
    fresh = Config({})
    default = fresh.workspace_limit
    one, two = fresh.set(workspace_limit=1), fresh.set(workspace_limit=2)
    with one:
        two.__enter__()
    assert fresh.workspace_limit == 2
    fresh.update("workspace_limit", 3)
    assert fresh.workspace_limit == 3
    two.__exit__(None, None, None)
    assert fresh.workspace_limit == default


def test_repr_shows_all() -> None:
    text = repr(Config({"JAXCONV_WORKSPACE_LIMIT": "12345"}))
    assert "12345" in text
    for name in SETTINGS:
        assert name in text
        assert variable(name) in text
    assert "folder for measurements" in text


# What a limit does to plans

# im2col is the choice; its patch matrix has 7·7·9·512 elements.
SMALL_IMAGE = ((1, 7, 7, 512), (3, 3, 512, 512))


def test_an_algorithm_over_the_limit_is_not_chosen() -> None:
    with config.set(workspace_limit="1TB"):
        free = jaxconv.plan(*SMALL_IMAGE, platform="cpu")
    costs = {c.name: c.workspace for c in free.eligible}
    assert costs[free.algorithm] > 0
    with config.set(workspace_limit=costs[free.algorithm] - 1):
        held = jaxconv.plan(*SMALL_IMAGE, platform="cpu")
    assert held.algorithm != free.algorithm
    for candidate in held.candidates:
        over = costs.get(candidate.name, 0) >= costs[free.algorithm]
        assert (candidate not in held.eligible) == (over or candidate.name not in costs)
        if over:
            assert candidate.status == "excluded"
            assert candidate.workspace == costs[candidate.name]
            assert (candidate.seconds or 0) > 0
            reason = r"its workspace of [\d.]+ MiB is over the limit of [\d.]+ MiB"
            assert re.fullmatch(reason, candidate.reason or "")
            assert f"(left out: {candidate.reason})" in held.table()
    for limit in (costs[free.algorithm], "1TB"):
        with config.set(workspace_limit=limit):
            assert jaxconv.plan(*SMALL_IMAGE, platform="cpu").algorithm == free.algorithm


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_there_is_always_something_that_runs(platform: str, name: str) -> None:
    spec = CASES[name].spec("float32")
    with config.set(workspace_limit=0):
        plan = plan_spec(spec, platform)
        assert plan.chosen.name == plan.algorithm
        assert plan.algorithm == "xla" or plan.chosen.workspace == 0
        # What is asked for by name hands nothing on to XLA, whatever it takes.
        name, _ = choose(spec, platform, frozenset({"xla"}))
        assert name != "xla"


def test_the_default_limit_of_several_processes_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hosts may differ, their plans must not; a limit that is given counts."""
    for text, expected in (("", UNKNOWN_MEMORY // MEMORY_SHARE), ("17", 17)):
        fresh = Config({"JAXCONV_WORKSPACE_LIMIT": text})
        monkeypatch.setattr(choosing, "config", fresh)
        monkeypatch.setattr(os, "sysconf", lambda name: 2**25)  # of this host
        monkeypatch.setattr(jax, "process_count", lambda: 1)
        assert workspace_limit() == (17 if text else 2**50 // MEMORY_SHARE)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert workspace_limit() == expected
        with fresh.set(workspace_limit=5):
            assert workspace_limit() == 5


def test_by_name_there_is_no_limit() -> None:
    operands = [struct(*shape) for shape in SMALL_IMAGE]
    conv = partial(jaxconv.conv, algorithm="im2col")
    with config.set(workspace_limit=0):
        assert "stablehlo.convolution" not in jax.jit(conv).lower(*operands).as_text()
        (row,) = jaxconv.explain(conv, *operands).rows
    assert row.algorithm == "im2col"
    assert row.workspace > 0


def test_a_change_counts_for_what_is_compiled_next() -> None:
    operands = [struct(*shape, dtype="int32") for shape in ((1, 7, 7, 512), (3, 3, 512, 8))]
    for limit, held in (("1TB", False), (0, True)):
        with config.set(workspace_limit=limit):
            text = jax.jit(lambda *pair: jaxconv.conv(*pair)).lower(*operands).as_text()
            assert ("stablehlo.convolution" in text) == held
