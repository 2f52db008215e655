"""Every notebook is stored with its outputs, which are those that it has today."""

from pathlib import Path

import jax
import pytest
import refresh
from nbformat import NotebookNode, v4

NOTEBOOKS = refresh.paths()
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert [path.name[0] for path in refresh.paths("2", "1")] == ["1", "2"]


@every_notebook
def test_is_stored_with_outputs(path: Path) -> None:
    assert not list(refresh.problems(refresh.read(path)))


@every_notebook
def test_runs_and_agrees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.config.jax_platforms:  # pytest --backend=…
        monkeypatch.setenv("JAX_PLATFORMS", jax.config.jax_platforms)
    fresh = refresh.run(refresh.read(path))
    assert not list(refresh.problems(fresh))
    assert not list(refresh.differences(refresh.read(path), fresh))


# Of what is stored and compared

PICTURE = v4.new_output("display_data", {"image/png": "abc=", "text/plain": "<Figure>"})


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return v4.new_output("stream", name=name, text=text)


def notebook(*outputs: NotebookNode, count: int = 1, tags: tuple[str, ...] = ()) -> NotebookNode:
    cell = v4.new_code_cell(
        "…", id="cell", execution_count=count, outputs=list(outputs), metadata={"tags": list(tags)}
    )
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title", id="title"), cell])


def test_a_sound_notebook_has_no_problems() -> None:
    assert not list(refresh.problems(notebook(printed("3 + 4 = 7\n"), PICTURE)))


ERROR = v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
LARGE = v4.new_output("display_data", {"image/png": "a" * refresh.LARGEST})
OLD = notebook(PICTURE)
OLD.nbformat_minor = 4


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (notebook(), "it has no picture"),
        (notebook(PICTURE, count=3), "its outputs are not those of one run from top to bottom"),
        (notebook(PICTURE, ERROR), "cell has an output of kind error: no"),
        (notebook(PICTURE, printed("W: …", "stderr")), "cell has an output of kind stderr: W: …"),
        (
            notebook(PICTURE, printed("in /home/me/jaxconv")),
            "cell tells a path of one computer: in /home/me/jaxconv",
        ),
        (notebook(LARGE), "bytes, more than 2,097,152"),
        (OLD, "its format is not 4.5"),
    ],
    ids=["picture", "run", "error", "stderr", "path", "size", "format"],
)
def test_problems(given: NotebookNode, problem: str) -> None:
    (found,) = refresh.problems(given)
    assert found.endswith(problem)


def test_a_run_must_agree_word_for_word_but_for_pictures() -> None:
    other = v4.new_output("display_data", {"image/png": "xyz=", "text/plain": "<Figure>"})
    stored = notebook(printed("7"), PICTURE)
    assert not list(refresh.differences(stored, notebook(printed("7"), other)))
    for fresh in (notebook(printed("8"), PICTURE), notebook(printed("7")), notebook(PICTURE)):
        (found,) = refresh.differences(stored, fresh)
        assert found.startswith("cell has [{'stdout': '7'}")


def test_times_must_agree_in_kind() -> None:
    stored = notebook(printed("7 ms"), PICTURE, tags=("times",))
    assert not list(refresh.differences(stored, notebook(printed("9 ms"), PICTURE)))
    (found,) = refresh.differences(stored, notebook(printed("7 ms")))
    assert found == "cell has [['stdout'], ['image/png', 'text/plain']], a run [['stdout']]"


def test_a_run_fills_in_outputs_and_nothing_else(tmp_path: Path) -> None:
    cells = [
        v4.new_code_cell("import os\nprint(1)\nprint(2, end='')", id="one"),
        v4.new_code_cell("os.path.basename(os.environ['JAXCONV_CACHE_DIR'])", id="two"),
    ]
    given = v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    fresh = refresh.run(given, tmp_path)
    assert fresh.metadata == {"language_info": {"name": "python"}}
    assert [cell.metadata for cell in fresh.cells] == [{}, {}]
    assert [cell.execution_count for cell in fresh.cells] == [1, 2]
    assert fresh.cells[0].outputs == [printed("1\n2")]
    assert fresh.cells[1].outputs[0].data == {"text/plain": "'cache'"}
    assert not list(tmp_path.iterdir())
