"""Every notebook runs from top to bottom, has pictures, and is stored without outputs."""

import sys
from pathlib import Path

import jax
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
def test_is_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


@every_notebook
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel of this interpreter, whichever kernels the user has installed.
    write_kernel_spec(tmp_path / "kernels" / "python3")
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    assert specs.get_kernel_spec("python3").argv[0] == sys.executable
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    if jax.config.jax_platforms:  # pytest --backend=…
        monkeypatch.setenv("JAX_PLATFORMS", jax.config.jax_platforms)

    notebook = read(path)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    folder = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, km=manager, timeout=300, resources=folder)
    client.execute(cleanup_kc=True)  # a manager from outside would else be left running

    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    warnings = [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text]
    assert not warnings
    assert any("image/png" in output.get("data", {}) for output in outputs)
