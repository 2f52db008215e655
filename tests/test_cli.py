"""``jaxconv compare``: the engine on tiny photographs; and the command line from the outside."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import children
import jax
import numpy as np
import pytest
from PIL import Image

import jaxconv
from jaxconv import app as cli
from jaxconv.algorithms.base import prepared
from jaxconv.bench import compare, draw
from jaxconv.bench.cases import Layer
from jaxconv.cli import main
from jaxconv.config import notify
from jaxconv.planning.machine import here
from jaxconv.planning.rows import Timed, record
from jaxconv.tools import memory
from jaxconv.transforms import primitive

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
PLATFORM = jax.default_backend()
PNG = b"\x89PNG\r\n\x1a\n"
# The options that make a run short.
QUICK = ("--size", "32", "--repeats", "1", "-a", "auto", "-a", "pointwise")


def photograph(height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(1).random((height, width, 3), np.float32)


CONVOLUTIONS = compare.convolutions(photograph())
SHORT = tuple(c for c in CONVOLUTIONS if c.layer.name.startswith(("Sobel", "Transposed")))
ALL = ("auto", *jaxconv.ALGORITHMS)
CHOSEN = compare.plan_spec(SHORT[0].layer.spec, PLATFORM).algorithm


def png(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def comparison() -> compare.Comparison:
    """The first of the short list by all algorithms, two pairs each."""
    *announced, found = compare.compare(SHORT[0], ALL, repeats=2)
    assert [type(step) for step in announced] == [str] * (1 + len(ALL))
    assert isinstance(found, compare.Comparison)
    return found


def only(names: list[str], **options: Any) -> Any:
    """The first convolution of the short list by these algorithms."""
    *_, comparison = compare.compare(SHORT[0], names, **options)
    return comparison


def by_name(comparison: compare.Comparison) -> dict[str, Any]:
    return {result.name: result for result in comparison.results}


# The engine


def test_measures_every_algorithm(comparison: compare.Comparison) -> None:
    assert comparison.convolution == SHORT[0]
    results = by_name(comparison)
    assert {*results, *comparison.refused} == {"lax", *ALL}
    candidates = {c.name: c for c in comparison.plan.candidates}
    for name in ALL:
        candidate = candidates[comparison.plan.algorithm if name == "auto" else name]
        unsupported = candidate.status == "unsupported"
        assert comparison.refused.get(name) == (candidate.reason if unsupported else None)
        if not unsupported:
            assert results[name].gemm == candidate.gemm
    for result in comparison.results:
        assert len(result.lax) == 2
        low, ratio, high = result.quartiles()
        assert 0 < low <= ratio <= high
        assert min(result.compile_seconds) > 0
        assert all(size is None or size >= 0 for size in result.workspace)
        assert all(0 <= error < 1e-5 for error in result.errors or ())
        assert result.wrong is None


def test_what_is_slow_is_left_out_unless_asked_for(monkeypatch: Patch) -> None:
    monkeypatch.setattr(compare, "SLOW", 0.0)
    monkeypatch.setattr(compare, "BUDGET", 0.0)
    other = next(name for name in ("im2col", "implicit") if name != CHOSEN)
    comparison = only([CHOSEN, other])
    assert {result.name: len(result.lax) for result in comparison.results} == {"lax": 5, CHOSEN: 5}
    message = r"a call takes [\d.]+ s; with --repeats it is run"
    assert re.fullmatch(message, comparison.refused[other])
    assert not only([other], repeats=1).refused


def test_auto_and_what_it_takes_have_one_measurement(monkeypatch: Patch) -> None:
    asked: list[str] = []
    original = Layer.function

    def watched(self: Layer, *args: Any, algorithm: str = "lax", **options: Any) -> Any:
        asked.append(algorithm)
        options |= {} if algorithm == "lax" else {"algorithm": algorithm}
        return original(self, *args, **options)

    monkeypatch.setattr(Layer, "function", watched)
    results = by_name(only([CHOSEN, "auto"], repeats=2))
    assert asked == ["lax", "auto"]
    assert results["auto"].how == f"→ {CHOSEN}"
    assert results[CHOSEN] == dataclasses.replace(results["auto"], name=CHOSEN, how="▸")


def test_laxs_own_program_has_no_ratio(tmp_path: Path) -> None:
    """It would be noise: of the first runs it was 3.48 once."""
    spec = prepared(SHORT[0].layer.spec)
    with jaxconv.config.set(cache_dir=tmp_path, use_cache=True):
        record([Timed(spec, here(PLATFORM), {"xla": 1e-6, "im2col": 1.0})], PLATFORM)
        notify()
        comparison = only(["auto", "xla", "im2col"], repeats=3)
    results = by_name(comparison)
    assert {name for name, result in results.items() if result.is_lax} == {"auto", "xla"}
    lines = compare.table(comparison).text().splitlines()
    for name in ("auto", "xla"):
        assert results[name].lax == results["lax"].lax
        assert results[name].quartiles() == (1, 1, 1)
        (line,) = (line for line in lines if line.startswith(f"{name}  "))
        assert "  = lax  " in line
        assert "(" not in line
    picture = draw.picture(photograph(), "a caption", [comparison])
    labels = [label.get_text() for axes in picture.axes for label in axes.get_yticklabels()]
    assert {"auto → xla = lax", "xla ▸ = lax", "im2col"} <= set(labels)


def test_lax_is_measured_where_all_refuse(monkeypatch: Patch) -> None:
    monkeypatch.setattr(compare, "WORKSPACE_LIMIT", 1024)
    comparison = only(["pointwise", "im2col"])
    (result,) = comparison.results
    assert result.name == "lax"
    assert "windows overlap" in comparison.refused["pointwise"]
    assert "GiB of intermediate arrays" in comparison.refused["im2col"]
    assert draw.picture(photograph(), "all refuse", [comparison]).axes


def test_tables_mark_the_choice_sort_by_ratio_and_list_refusals(
    comparison: compare.Comparison,
) -> None:
    lines = compare.table(comparison).text().splitlines()
    chosen = comparison.plan.algorithm
    assert any(line.split()[:3] == ["auto", "→", chosen] for line in lines)
    assert [line.split()[0] for line in lines if " ▸ " in line] == [chosen]
    assert f"auto chose {chosen}: {comparison.plan.why}" in lines
    for name, reason in comparison.refused.items():
        assert f"  {name} not run: {reason}" in lines
    ratios = [result.quartiles()[1] for result in comparison.results]
    assert ratios == sorted(ratios, reverse=True)
    first_words = [line.partition("  ")[0] for line in lines]
    at = [first_words.index(result.name) for result in comparison.results]
    assert at == sorted(at)


# The photograph


def test_load_scales_down_only(tmp_path: Path) -> None:
    astronaut, caption = compare.load(None, 512)
    assert (astronaut.shape, astronaut.dtype) == ((512, 512, 3), np.float32)
    assert 0 <= astronaut.min() < 0.1 < 0.9 < astronaut.max() <= 1
    assert caption == "astronaut (from scikit-image), 512×512"
    path = png(tmp_path / "wide.png", np.zeros((50, 100, 3), np.uint8))
    pixels, caption = compare.load(path, 40)
    assert pixels.shape == (20, 40, 3)
    assert caption == "wide.png, 100×50 scaled to 40×20"
    pixels, caption = compare.load(path, 200)
    assert pixels.shape == (50, 100, 3)
    assert caption == "wide.png, 100×50"


@pytest.mark.parametrize(
    "pixels",
    [
        np.array([[0, 255]], np.uint8),
        np.array([[[0, 0, 0, 255], [255, 255, 255, 255]]], np.uint8),
        np.array([[1000, 30000]], np.uint16),
        np.array([[-7, 70000]], np.int32),
    ],
    ids=["grey", "rgba", "16 bit", "32 bit"],
)
def test_load_other_formats(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "image.tiff"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(compare.load(path, 64)[0], [[[0, 0, 0], [1, 1, 1]]])


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: Capture, monkeypatch: Patch) -> Run:
    """Exit code, stdout, stderr of ``jaxconv``, in this process and a wide terminal."""
    monkeypatch.setenv("COLUMNS", "500")
    return partial(children.command, capsys)


def test_compare_default_image(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "picture.png"
    code, out, err = run("compare", "-o", output, *QUICK)
    assert (code, err) == (0, "")
    assert "astronaut (from scikit-image), 512×512 scaled to 32×32" in out
    assert f"The picture: {output}. " in out
    assert all(convolution.layer.name in out for convolution in CONVOLUTIONS)
    assert len(re.findall("^auto +→ ", out, re.MULTILINE)) == len(CONVOLUTIONS)
    assert "naive" not in out  # not asked for
    assert output.read_bytes().startswith(PNG)
    with Image.open(output) as picture:
        assert min(picture.size) > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 1000


def test_compare_image(tmp_path: Path, run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setattr(compare, "convolutions", lambda _: SHORT[:1])
    # A name with the marks that rich and matplotlib would take for their own.
    image = png(tmp_path / "[red]$x.png", (255 * photograph()).astype(np.uint8))
    output = tmp_path / "picture.svg"
    code, out, err = run("compare", image, "--output", output, "--repeats", 1, "-a", "pointwise")
    assert (code, err) == (0, "")
    assert "[red]$x.png, 20×24; jaxconv" in out
    assert b"<svg" in output.read_bytes()


@pytest.mark.parametrize(
    ("image", "output", "message"),
    [
        ("missing.png", "x.png", "can't read the image '.*No such file or directory"),
        (".", "x.png", "can't read the image '.*Is a directory"),
        ("notes.png", "x.png", "can't read the image '.*cannot identify image file"),
        ("cut.png", "x.png", "can't read the image '.*cut.png'"),
        ("photograph.png", "nowhere/picture.png", "can't write '.*No such file or directory"),
        ("photograph.png", "folder.png", "can't write '.*Is a directory"),
        ("photograph.png", "photograph.png/picture.png", "can't write '.*Not a directory"),
        ("photograph.png", "picture.doc", "can't write '.*the name of a picture ends in one of"),
        ("photograph.png", "picture", "can't write '.*the name of a picture ends in one of"),
        ("photograph.png", "photograph.png", "can't write '.*it is the photograph"),
    ],
)
def test_unreadable_images_and_unwritable_pictures(
    tmp_path: Path, run: Run, monkeypatch: Patch, image: str, output: str, message: str
) -> None:
    (tmp_path / "notes.png").write_text("this is no picture")
    whole = png(tmp_path / "photograph.png", (255 * photograph()).astype(np.uint8)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(compare, "compare", lambda *_, **__: pytest.fail("it measured"))
    code, out, err = run("compare", tmp_path / image, "-o", tmp_path / output)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"jaxconv: {message}.*\n", err)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "photograph.png").read_bytes() == whole


def test_an_interrupt_loses_no_table(tmp_path: Path, run: Run, monkeypatch: Patch) -> None:
    measured = compare.compare

    def interrupted(convolution: Any, *args: Any) -> Iterator[Any]:
        if convolution.layer.name == SHORT[1].layer.name:
            print("and then")
            raise KeyboardInterrupt
        yield from measured(convolution, *args)

    monkeypatch.setattr(compare, "compare", interrupted)
    monkeypatch.setattr(compare, "convolutions", lambda _: SHORT)
    code, out, err = run("compare", "-o", tmp_path / "picture.png", *QUICK)
    assert (code, err) == (130, "")
    table, rest = out.split("and then")
    assert "Sobel pair" in table
    assert len(re.findall("^auto +→ ", table, re.MULTILINE)) == 1
    assert rest == "\n"
    assert not (tmp_path / "picture.png").exists()


def test_a_closed_pipe_ends_quietly(run: Run, monkeypatch: Patch) -> None:
    """As ``head`` closes it after some lines."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", closed)
    assert run("bench", "--list") == (1, "", "")
    sys.stdout.flush()  # as Python does when it ends
    with pytest.raises(BrokenPipeError):
        closed.close()


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"jaxconv {jaxconv.__version__}\n", "")


def test_extras_are_optional(monkeypatch: Patch, capsys: Capture) -> None:
    """Until the command line is called."""
    monkeypatch.delitem(sys.modules, "jaxconv.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="2"):
        main()
    message = "jaxconv: the command line needs the package 'typer'; install its extra:"
    assert capsys.readouterr() == ("", f'{message} pip install "jaxconv[cli]"\n')


# Running scripts

CONVOLVES = "import jaxconv, numpy\njaxconv.conv(*[numpy.ones((1, 1, 1, 1), 'float32')] * 2)\n"
TRAIN = """
import argparse, sys
import beside
import jax, jax.numpy as jnp

parser = argparse.ArgumentParser()
parser.add_argument("-m", type=int)
parser.add_argument("-v", "--explain", action="store_true")
parser.add_argument("rest", nargs="*")
arguments = parser.parse_args()
print(__name__, parser.prog, arguments.m, arguments.explain, arguments.rest)


def loss(image, kernel):
    conv = jax.lax.conv_general_dilated
    return jnp.sum(conv(image, kernel, (1, 1), "SAME", feature_group_count=3) ** 2)


gradient = jax.jit(jax.grad(loss, argnums=1))
# Groups of this type are never left to XLA, which multiplies them by a kernel full of zeros.
image, kernel = jnp.ones((1, 3, 8, 8), "bfloat16"), jnp.ones((3, 1, 3, 3), "bfloat16")
text = gradient.lower(image, kernel).as_text()
print("convolutions left:", text.count("stablehlo.convolution"))
sys.exit(arguments.m)
"""


def test_run_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    (tmp_path / "beside.py").touch()
    arguments = (str(script), "-m", "7", "--explain", "--", "-x")
    done = subprocess.run(
        [sys.executable, "-m", "jaxconv", "run", "--explain", *arguments],
        env=children.environment(1) | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "300"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == ["__main__ train.py 7 True ['-x']", "convolutions left: 0"]
    above, head, *rows = done.stderr.splitlines()
    assert above.startswith("Compiled for cpu. ")
    assert head.split()[:2] == ["where", "algorithm"]
    assert len(rows) == 2
    line = 1 + TRAIN.splitlines().index(next(x for x in TRAIN.splitlines() if "SAME" in x))
    assert all(row.startswith(f"train.py:{line} (loss)  ") for row in rows)


Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: Patch) -> Iterator[Script]:
    """Writes a script; then this process is put back to what it was before one ran in it."""
    monkeypatch.setattr(primitive, "_planned_here", deque())
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(memory, "keep", lambda: None)  # too late in this process

    def written(text: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    yield written
    jaxconv.disable()


def test_run_module(script: Script, run: Run, monkeypatch: Patch) -> None:
    """From the folder that has it, as the installed command does."""
    folder = script("").parent
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "broken.py").write_text("import script, sys\n\nraise ValueError(sys.argv[1:])\n")
    monkeypatch.chdir(folder)
    code, out, err = run("run", "-m", "package.broken", "-m", "--help")
    assert (code, out) == (1, "")
    first, where, *_, last = err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert where == f'  File "{package / "broken.py"}", line 3, in <module>'
    assert last == "ValueError: ['-m', '--help']"


def test_run_and_measure(script: Script, run: Run) -> None:
    """What was compiled is measured once the script has ended, and is known to the next run."""
    path = script(CONVOLVES + "raise SystemExit(7)")
    with jaxconv.config.set(cache_dir=path.parent / "cache", use_cache=True):
        for when in ("  now  ", "  before  "):
            code, out, err = run("run", "--autotune", path)
            assert (code, out) == (7, "")
            above, head, row, *_ = err.splitlines()
            assert above.startswith("Measured on cpu: 1 different convolutions")
            assert head.split()[:2] == ["planned", "chosen"]
            assert when in row
    notify()
    (document,) = (path.parent / "cache").glob("rows-*.jsonl")
    assert len(document.read_text().splitlines()) == 1


def test_run_measures_nothing_where_nothing_was_compiled(script: Script, run: Run) -> None:
    code, out, err = run("run", "--autotune", script("raise SystemExit(3)"))
    assert (code, out) == (3, "")
    assert err.startswith("jaxconv.autotune: without fn, jaxconv must have planned convolutions")


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("raise EOFError('end')", 1, "EOFError: end"),
        ("x = (", 1, "SyntaxError: '(' was never closed"),
        ("import jax.nowhere", 1, "No module named 'jax.nowhere'"),
    ],
)
def test_run_ends_as_python_does(
    script: Script, run: Run, monkeypatch: Patch, text: str, code: int, message: str
) -> None:
    """And measures before, unless it was interrupted."""
    path = script(text)
    monkeypatch.setattr(cli, "tuned", lambda: "the table")
    for options, measured in (((), False), (("--autotune",), code != 130)):
        found, out, err = run("run", *options, path)
        assert (found, out) == (code, "")
        assert ("the table" in err) == measured
        assert message in err.partition("the table")[0]
        assert cli.__file__ not in err
        assert ("Traceback" in err) == (code in (1, 130) and "Syntax" not in err)
        assert sys.path[0] == str(path.parent)
        if not text:
            assert err == "the table\n" * measured
    if not text:
        monkeypatch.setattr(cli, "tuned", Mock(side_effect=KeyboardInterrupt))
        assert run("run", "--autotune", path) == (130, "", "")


@pytest.mark.parametrize("platforms", [(), ("cpu",), ("gpu", "tpu")])
@pytest.mark.parametrize("kept", [True, False])
def test_run_enables_on_platforms_and_keeps_memory(
    script: Script, run: Run, monkeypatch: Patch, platforms: Any, kept: bool
) -> None:
    done: list[str] = []
    monkeypatch.setattr(cli, "enable", done.extend)
    monkeypatch.setattr(memory, "keep", lambda: done.append("kept"))
    options = [text for name in platforms for text in ("--platform", name)]
    options += [] if kept else ["--no-keep-memory"]
    assert run("run", *options, script("")) == (0, "", "")
    assert done == ["kept"] * kept + list(platforms or ("cpu",))


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("-m nowhere.module", 1, "No module named 'nowhere'"),
        ("--explain", 2, "Missing argument 'SCRIPT'"),
    ],
)
def test_run_needs_a_script(run: Run, arguments: str, code: int, message: str) -> None:
    found, out, err = run("run", *arguments.split())
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.usefixtures("script")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare -a auto -a magic", f"unknown algorithm 'magic'; known are {', '.join(ALL)}"),
        ("run missing.py", "can't run 'missing.py': there is no such file"),
        ("run .", "can't run '.': there is no such file"),
        ("run --platform abacus x.py", "unknown platform 'abacus'; known are cpu, gpu, tpu"),
    ],
)
def test_refusals(run: Run, arguments: str, message: str) -> None:
    assert run(*arguments.split()) == (2, "", f"jaxconv: {message}\n")
