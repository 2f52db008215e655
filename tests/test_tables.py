"""Reports fit a terminal: no line is longer, no figure is cut, and what is left out is named."""

import dataclasses
import html
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from test_bench import result
from test_plan import case_plan

import jaxconv
from jaxconv import tables
from jaxconv.algorithms import ALGORITHMS
from jaxconv.bench import calibrate, cases, networks
from jaxconv.bench.measure import Result, contents
from jaxconv.config import config
from jaxconv.tables import Table
from jaxconv.tools.autotune import Measurement, Tuning
from jaxconv.tools.explain import Compiled, Explanation
from jaxconv.tools.progress import shown
from jaxconv.transforms.primitive import Lowered

Patch = pytest.MonkeyPatch
FIT = pytest.mark.parametrize("width", [80, 100, 120])
NUMBERS = np.random.default_rng(0)


def check(table: Table, width: int) -> None:
    """No line is longer; the figures of a row are in one line; no text is lost."""
    text = table.text(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    side_by_side, below = table.fitted(width)
    shown = [i for i in table.columns if i in (*side_by_side, below)]
    left_out = [table.rows[0][i] for i in table.columns if i not in shown]
    assert {i for i in table.columns if i not in shown} <= set(table.spare)
    for row in table.rows:
        figures = [re.escape(row[i]) for i in side_by_side if i in table.right]
        assert any(re.search(r"\s.*".join(figures), line) for line in lines)
    whole = [*table.above, *table.below, *(row[i] for row in table.rows for i in shown)]
    if left_out:
        whole.append(f"Left out to fit {width} columns: {', '.join(left_out)}; {table.rest}.")
    assert Counter("".join(text.split())) == Counter("".join("".join(whole).split()))


# Reports of every kind, with the longest contents


def network(net: Any, x: Any) -> Any:
    return net.logits(net.relu(net.conv(net.conv(x, 8, 3, 2), 8, 3, groups=8)))


def explanation() -> Explanation:
    small = networks.Network("small", network, 4, shape=(32, 32, 3))
    with jax.numpy_rank_promotion("allow"):
        params, data = jax.eval_shape(small.init), jax.eval_shape(small.data)
        found = jaxconv.explain(small.step, params, *data, platform="cpu")
    where = "models/vision/mobile/inverted_residual.py:1234 (InvertedResidual.__call__)"
    long = dataclasses.replace(
        found.rows[0], where=where, count=123, within="while", seconds=12.3, lax_seconds=123.4
    )
    exchanged = "2 rows of the image from each neighbour; sums over 8 devices"
    return Explanation("cpu", (*found.rows, dataclasses.replace(long, exchanged=exchanged)))


def tuning() -> Tuning:
    seconds = tuple((name, 1.234 * 3**i) for i, name in enumerate(ALGORITHMS))
    specs = [CASES[name].spec("float32") for name in ("3x3", "transposed", "grouped")]
    rows = [
        Measurement(spec, "im2col_tiled", chosen, "why", seconds, ratio, known=known)
        for spec in specs
        for chosen, ratio, known in (("im2col_tiled", 12.3, False), ("winograd4", None, True))
    ]
    return Tuning("cpu", tuple(rows))


def tuned() -> calibrate.Tuned:
    ratios = dict.fromkeys(ALGORITHMS, (0.1, 12.3, 123.4))
    return calibrate.Tuned("cpu", 123, ratios, ratios, Path("/home/somebody/.cache/jaxconv/x.json"))


REPORTS: dict[str, Callable[[], tables.Report]] = {
    "plan": lambda: case_plan(CASES["3x3"]),
    "plan of groups": lambda: case_plan(CASES["depthwise"]),
    "plan of the largest": lambda: jaxconv.plan(
        (1024, 1024, 1024, 512), (11, 11, 512, 512), platform="cpu"
    ),
    "plan without output": lambda: case_plan(CASES["no output"]),
    "explain": explanation,
    "autotune": tuning,
    "tune": tuned,
}


def full(name: str, **changes: Any) -> Result:
    """One with every figure that there is."""
    pairs = tuple(map(tuple, NUMBERS.uniform(0.01, 12.3, (5, 2)).tolist()))
    facts = {
        "direction": "weight gradient",
        "how": "im2col_tiled, winograd4, pointwise",
        "lax": pairs,
        "compile_seconds": (12.34, 123.45),
        "workspace": (2**30, 2**33),
        "torch": pairs,
        "flops": 1e12,
        "peak": 1e11,
        "errors": (1e-7, 1.234e-6),
        "gemm": (401408, 1, 128, 1152),
        "best": "im2col_tiled",
        "regret": 1.23,
    }
    return result(name=name, **facts | changes)


def suite(items: Sequence[Any]) -> Table:
    """Of those with the longest names, with peers and without."""
    names = sorted((getattr(item, "name", str(item)) for item in items), key=len)[-4:]
    changes = {"torch": (), "gemm": None, "difference": 1.0}
    rows = [full(name, **more) for name in names for more in ({}, changes)]
    return contents(rows)


SUITES = {"layers": cases.LAYERS, "models": networks.NETWORKS, "regret": cases.random_specs(1, 20)}


@cache
def reported(name: str) -> tables.Report:
    return REPORTS[name]()


@FIT
@pytest.mark.parametrize("name", REPORTS)
def test_reports_fit(name: str, width: int) -> None:
    found = reported(name)
    table = found._contents()
    check(table, width)
    assert max(map(len, found.table(width).splitlines())) <= width
    narrow = width - 79  # too narrow a terminal keeps the figures: 1, 21 and 41 columns
    shown, _ = table.fitted(narrow)
    text = table.text(narrow)
    assert all(row[i] in text for row in table.rows[1:] for i in shown if i in table.right)


@FIT
@pytest.mark.parametrize("name", SUITES)
def test_suites_fit(name: str, width: int) -> None:
    table = suite(SUITES[name])
    check(table, width)
    # What they are about stays.
    titles = [table.rows[0][i] for i in table.fitted(width)[0]]
    assert {"what", "× lax (quartiles)"} <= {*titles}


# How they are displayed


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_displayed_as_its_table(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    found = reported(name)
    assert repr(found) == str(found) == f"{found}" == found.table(90)
    assert found == REPORTS[name]()


def test_without_a_terminal_there_are_80_columns(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    with (tmp_path / "file").open("w") as file:
        monkeypatch.setattr(sys, "__stdout__", file)
        assert tables.terminal_width() == 80


@pytest.mark.parametrize("name", REPORTS)
def test_the_whole_table_has_all_and_so_has_html(name: str) -> None:
    found = reported(name)
    table = found._contents()
    assert max(map(len, found.table().splitlines())) > 100 or name in (
        "tune",
        "plan without output",
    )
    head = found.table().splitlines()[len(table.above)]
    assert head.split() == " ".join(table.rows[0][i] for i in table.columns).split()
    page = ElementTree.fromstring(f"<div>{found._repr_html_().replace('<br>', ' ')}</div>")
    parsed = [[cell.text or "" for cell in row] for row in page.iter("tr")]
    assert parsed == [[row[i] for i in table.columns] for row in table.rows]


@FIT
def test_what_was_compiled_and_the_settings_fit(
    width: int, monkeypatch: Patch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    compiled = Compiled()
    compiled(Lowered(CASES["transposed"].spec("float32"), "im2col_tiled", "cpu"))
    compiled(Lowered(CASES["grouped"].spec("float32"), "auto", "gpu"))
    for text in (str(compiled), repr(config)):
        assert max(map(len, text.splitlines())) <= width
    assert "direction" not in str(compiled)


# The mechanism

WORDS = "several words that are too long for it"
ROWS = [("name", "n", "speed", "what it is"), ("one", "1", "12.5", WORDS), ("two", "", "3", "")]


def test_columns_are_left_out_in_order() -> None:
    figures = [row[:3] for row in ROWS]
    table = Table(rows=figures, right=(1, 2), spare=(1, 2), rest="others have")
    assert table.text(14) == table.text()
    assert table.text(13).splitlines() == [
        "name  speed",
        "one    12.5",
        "two       3",
        "Left out to",
        "  fit 13",
        "  columns: n;",
        "  others",
        "  have.",
    ]
    assert table.text(10).splitlines()[:3] == ["name", "one", "two"]


def test_long_text_goes_below() -> None:
    table = Table(["A line above it that is as long."], ROWS * 2, (1, 2), detail=True)
    assert f"one   1   12.5  {WORDS}" in table.text(54).splitlines()
    assert table.text(53).splitlines()[:5] == [
        "A line above it that is as long.",
        "name  n  speed",
        "    what it is",
        "one   1   12.5",
        f"    {WORDS}",
    ]


def test_the_widest_text_is_narrowed() -> None:
    table = Table(rows=[(row[0], row[3], row[3][:18], row[2]) for row in ROWS], right=(3,))
    assert table.text(59).splitlines() == [
        "name  what it is                  what it is          speed",
        "one   several words that are too  several words that   12.5",
        "      long for it",
        "two                                                       3",
    ]


def test_a_word_above_a_table_stays_whole() -> None:
    path = "/home/somebody/" + "x-" * 40
    text = Table([f"  It is kept in a file, {path}, for later."]).text(80)
    assert text.splitlines() == ["  It is kept in a file,", f"    {path},", "    for later."]


def test_columns_without_a_value_are_not_shown() -> None:
    table = Table(rows=[("a", "b", "c"), ("1", "", "–"), ("2", "", "–")])
    assert table.text().splitlines() == ["a", "1", "2"]
    assert "<th>b" not in table.html()
    assert Table(rows=[("a", "b")]).text() == "a  b"


def test_html_is_escaped() -> None:
    text = "a < b & <b>c</b>"
    page = Table([text], [("head",), (text,)], bold=[1], below=[text]).html()
    assert text not in page
    assert page.count(html.escape(text)) == 3
    assert f"<tr style='font-weight: bold'><td>{html.escape(text)}" in page


# Progress


def test_progress_shows_how_many_of_how_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    pytest.importorskip("rich")
    for variable, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(variable, value)
    seen = []
    for found in shown(iter(["[one]", 1, "two", 2, "w" * 100, 3]), 3, wanted=True):
        print(f"result {found}")
        seen.append(found)
    out, err = capsys.readouterr()
    assert seen == [1, 2, 3]
    assert out == "result 1\nresult 2\nresult 3\n"
    for text in ("0 of 3", "1 of 3", "2 of 3", "[one]", "two"):
        assert text in err
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", err)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80
    assert list(shown(iter(["one", jnp.pi]), 60, wanted=True, seconds=True)) == [jnp.pi]
    assert "0 of 60 s" in capsys.readouterr().err
    assert list(shown(iter(["one", 1]), 1)) == [1]
    assert capsys.readouterr() == ("", "")
