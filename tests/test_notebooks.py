"""Every notebook is stored with its outputs, which are those that it has today.

What it says is checked always, what it computes by ``pytest -m exhaustive``.
"""

import ast
import re
from pathlib import Path
from types import ModuleType

import jax
import nbformat
import pytest
import refresh
from nbformat import NotebookNode, v4

import jaxconv

Patch = pytest.MonkeyPatch
NOTEBOOKS = refresh.paths()
INNER = {"5": {"algorithms", "planning"}}  # notebooks that look inside, and where
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def test_notebooks_are_found_by_their_beginnings() -> None:
    assert len(NOTEBOOKS) == 5
    assert [path.name[0] for path in refresh.paths("2", "1")] == ["1", "2"]


@every_notebook
def test_is_stored_with_outputs(path: Path) -> None:
    assert not list(refresh.problems(refresh.read(path)))


@every_notebook
def test_names_that_exist_and_are_public(path: Path) -> None:
    notebook = refresh.read(path)
    text = "\n".join(cell.source for cell in notebook.cells)
    public = {*jaxconv.__all__, *INNER.get(path.name[0], ())}
    assert set(re.findall(r"\bjaxconv\.(\w+)", text)) <= public
    for target in re.findall(r"\]\((\S+\.ipynb)\)", text):
        assert (path.parent / target).is_file(), target

    tree = ast.parse("\n".join(cell.source for cell in refresh.code_cells(notebook)))
    ours: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"jaxconv|helpers", node.module or ""):
            exec(ast.unparse(node), ours)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = ours.get(node.value.id)
            assert not isinstance(module, ModuleType) or hasattr(module, node.attr), node.attr


@pytest.mark.exhaustive
@every_notebook
def test_runs_and_agrees(path: Path, monkeypatch: Patch) -> None:
    if jax.config.jax_platforms:  # pytest --backend=…
        monkeypatch.setenv("JAX_PLATFORMS", jax.config.jax_platforms)
    fresh = refresh.run(refresh.read(path), path.parent)
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
            "cell shows a path of one computer: in /home/me/jaxconv",
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


def test_refresh_fills_in_outputs_and_nothing_else(tmp_path: Path, monkeypatch: Patch) -> None:
    sources = (
        "import os\nprint(1)\nprint(2, end='')",
        "os.path.basename(os.environ['JAXCONV_CACHE_DIR'])",
        "display({'image/png': 'abc='}, raw=True)",
    )
    cells = [v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    given = v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    path = tmp_path / "1-sound.ipynb"
    nbformat.write(given, path)
    monkeypatch.setattr(refresh, "FOLDER", tmp_path)
    refresh.main("1")

    stored = refresh.read(path)
    assert stored.metadata == given.metadata
    assert [cell.metadata for cell in stored.cells] == [{}, {}, {}]
    assert [cell.execution_count for cell in stored.cells] == [1, 2, 3]
    texts, value, picture = (cell.outputs for cell in stored.cells)
    assert texts == [printed("1\n2")]
    assert value[0].data == {"text/plain": "'cache'"}
    assert picture[0].data == {"image/png": "abc="}


def test_refresh_leaves_a_notebook_with_problems_as_it_was(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    path = tmp_path / "1-plain.ipynb"
    nbformat.write(notebook(printed("1")), path)
    before = path.read_text()
    monkeypatch.setattr(refresh, "run", lambda *_: notebook(printed("2")))
    monkeypatch.setattr(refresh, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"1-plain\.ipynb is not stored:\nit has no picture"):
        refresh.main()
    assert path.read_text() == before
