"""What ``jaxconv compare`` and ``jaxconv bench`` do once their options are checked."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import jaxconv
from jaxconv.bench import compare as engine
from jaxconv.bench import draw, programs
from jaxconv.bench.measure import Result, contents, write
from jaxconv.bench.programs import SUITES, Case, Selection
from jaxconv.tables import Table, terminal_width
from jaxconv.tools.progress import shown


class CommandError(Exception):
    """A message for who uses the command line, instead of a traceback."""


LEGEND = (
    "▸ what auto chose. × lax: lax's time over the algorithm's, the two called in turn; the median"
    " of the pairs and their quartiles, above 1 is faster; lax's own row shows the noise. = lax: it"
    " is lax's own program. error: root mean square against float64, over lax's."
)


def _print(*lines: str, table: Table | None = None) -> None:
    """Prints lines or a table at once, no wider than the terminal."""
    print((table or Table(lines)).text(terminal_width()), flush=True)


def compare(
    photograph: np.ndarray,
    caption: str,
    output: Path,
    algorithms: Sequence[str],
    repeats: int | None,
) -> None:
    """Prints a table of each convolution as soon as it is measured, and writes the picture."""
    start = time.perf_counter()
    versions = f"jaxconv {jaxconv.__version__}, JAX {jax.__version__}"
    where = f"{versions}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    _print(f"{caption}; {where}; float32", LEGEND)
    comparisons: list[engine.Comparison] = []
    convolutions = engine.convolutions(photograph)
    steps = (engine.compare(convolution, algorithms, repeats) for convolution in convolutions)
    count = len(convolutions) * (1 + len(algorithms))
    for comparison in shown(itertools.chain.from_iterable(steps), count):
        comparisons.append(comparison)
        _print(table=engine.table(comparison))
    figure = draw.picture(photograph, f"{caption}\n{where}", comparisons)
    try:
        figure.savefig(output, dpi=110)
    except OSError as error:
        raise CommandError(f"can't write {str(output)!r}: {error.strerror or error}") from None
    _print("", f"The picture: {output}. {time.perf_counter() - start:.0f} s in all.")


def bench(
    suites: Sequence[str], selection: Selection, file: Path | None, folder: Path | None
) -> bool:
    """Prints a table of each suite, writes everything to ``file`` and pictures into ``folder``, and
    returns whether all results agree with lax's."""
    start = time.perf_counter()
    cases = _selected(suites, selection)
    _check_files(file, folder)
    machine = programs.machine(selection.torch)
    torch = f"PyTorch {machine['torch']}, " if selection.torch else ""
    _print(
        f"jaxconv {machine['jaxconv']}, JAX {machine['jax']}, {torch}{machine['cpu']},"
        f" {machine['cores']} cores, float32 GEMM {machine['gemm'] / 1e9:.0f} GFLOP/s"
    )
    results: dict[str, list[Result]] = {}
    for suite, selected in cases.items():
        try:
            for result in shown(SUITES[suite].run(selected, selection), len(selected)):
                results.setdefault(suite, []).append(result)
                if file is not None:
                    found = {name: [r.as_json() for r in rows] for name, rows in results.items()}
                    document = {"machine": machine, "results": found}
                    write(file, json.dumps(document, indent=1, ensure_ascii=False).encode())
        finally:  # also of those before an interrupt
            if suite in results:
                table = contents(results[suite])
                _print(table=dataclasses.replace(table, above=["", suite, ""]))
    written = [file] if file is not None else []
    if folder is not None:
        for suite, rows in results.items():
            written.append(folder / f"{suite}.png")
            draw.ratios(rows).savefig(written[-1], dpi=110)
    wrong = [result.wrong for rows in results.values() for result in rows if result.wrong]
    lines = [f"WRONG: {text}" for text in wrong]
    if written:
        lines.append(f"Written: {', '.join(map(str, written))}")
    _print("", *lines, f"{time.perf_counter() - start:.0f} s in all.")
    return not wrong


def names(suites: Sequence[str], selection: Selection) -> None:
    """Prints the names of the selected cases."""
    for selected in _selected(suites, selection).values():
        print(*dict.fromkeys(case.name for case in selected), sep="\n")


def _selected(suites: Sequence[str], selection: Selection) -> dict[str, list[Case]]:
    """The cases of each suite."""
    cases = {suite: SUITES[suite].selected(selection) for suite in suites}
    if any(cases.values()):
        return cases
    every = f"jaxconv bench {' '.join(suites)} --list"
    raise CommandError(f"no case is selected; {every} prints the names of all")


def _check_files(file: Path | None, folder: Path | None) -> None:
    """Makes the folder, and fails where something can't be written, before any time is spent."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"can't write into {str(folder)!r}: {error.strerror}") from None
    for path in filter(None, (file, folder and folder / "layers.png")):
        if problem := draw.unwritable(path):
            raise CommandError(f"can't write {str(path)!r}: {problem}")
