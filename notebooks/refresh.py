"""Executes notebooks and stores their outputs: ``python notebooks/refresh.py``.

Names or their beginnings, such as 2, refresh these only. A cell whose text shows times, what is
planned by them, or last digits, has the tag "times" in its metadata: a run elsewhere must agree
with it in the kinds of its outputs, with all other cells word for word, pictures aside.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
LARGEST = 2 << 20  # bytes of a notebook
CELL_SECONDS = 300  # until a cell counts as stuck
# Folders of one computer.
LOCAL = re.compile(rf"/(home|Users|root|tmp)/|[A-Z]:\\Users|{re.escape(str(FOLDER.parent))}")


def paths(*names: str) -> list[Path]:
    """The notebooks whose names begin with one of ``names``; without names, all."""
    return sorted(path for path in FOLDER.glob("*.ipynb") if path.name.startswith(names or ""))


def read(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Fills in the outputs, by a kernel of this interpreter in ``folder``; returns ``notebook``.

    The user's kernels, settings and measured convolutions are not used.
    """
    metadata = notebook.metadata.copy()
    with TemporaryDirectory(prefix="notebook-") as own:
        write_kernel_spec(Path(own, "kernels", "python3"))
        specs = KernelSpecManager(kernel_dirs=[str(Path(own, "kernels"))])
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        manager.connection_file = str(Path(own, "kernel.json"))
        variables = {
            "IPYTHONDIR": str(Path(own, "ipython")),
            "JAXCONV_CACHE_DIR": str(Path(own, "cache")),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        # Without it, a manager that nbclient did not start keeps running.
        client.execute(cleanup_kc=True, env=os.environ | variables)
    notebook.metadata = metadata  # else it names the version of Python
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _texts(output: NotebookNode) -> dict[str, Any]:
    """The kinds of an output and the text of each; of a picture its kind alone."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": output.evalue}
    return {kind: text if "text" in kind else "" for kind, text in output.data.items()}


def problems(notebook: NotebookNode) -> Iterator[str]:
    """Why a notebook should not be stored so: a line for each reason."""
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield "its format is not 4.5"
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        yield f"it has {size:,} bytes, more than {LARGEST:,}"
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "its outputs are not those of one run from top to bottom"
    found = [(cell.id, _texts(output)) for cell in cells for output in cell.outputs]
    if not any("image/png" in texts for _, texts in found):
        yield "it has no picture"
    for name, texts in found:
        for kind in {"error", "stderr"} & set(texts):
            yield f"{name} has an output of kind {kind}: {texts[kind]}"
        for text in filter(LOCAL.search, texts.values()):
            yield f"{name} shows a path of one computer: {text}"


def differences(stored: NotebookNode, fresh: NotebookNode) -> Iterator[str]:
    """Where a run disagrees with the stored outputs: a line for each cell."""
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        before, after = (list(map(_texts, cell.outputs)) for cell in (old, new))
        if "times" in old.metadata.get("tags", ()):
            before, after = ([sorted(texts) for texts in found] for found in (before, after))
        if before != after:
            yield f"{old.id} has {before}, a run {after}"


def main(*names: str) -> None:
    for path in paths(*names):
        start = time.perf_counter()
        notebook = run(read(path), path.parent)
        if found := list(problems(notebook)):
            sys.exit("\n".join([f"{path.name} is not stored:", *found]))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
