"""What ``jaxconv compare`` and ``jaxconv bench`` do once their options are checked."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import jaxconv
from jaxconv import tables
from jaxconv.bench import compare as engine
from jaxconv.bench import draw, report, sharding
from jaxconv.bench.report import (
    PROFILED,
    SHARDING,
    SUITES,
    Selected,
    Selection,
    name_of,
    print_table,
)
from jaxconv.tools.progress import shown


class CommandError(Exception):
    """A message for who uses the command line, instead of a traceback."""


LEGEND = (
    "▸ what auto chose. × lax: lax's time over the algorithm's, the two called in turn; the median"
    " of the pairs and their quartiles, above 1 is faster; lax's own row shows the noise. = lax: it"
    " is lax's own program. error: root mean square against float64, over lax's."
)


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
    print_table(tables.Table([f"{caption}; {where}; float32", LEGEND]))
    comparisons: list[engine.Comparison] = []
    convolutions = engine.convolutions(photograph)
    steps = engine.compare(convolutions, algorithms, repeats)
    for comparison in shown(steps, len(convolutions) * (1 + len(algorithms))):
        comparisons.append(comparison)
        print_table(engine.table(comparison))
    figure = draw.picture(photograph, f"{caption}\n{where}", comparisons)
    try:
        figure.savefig(output, dpi=110)
    except OSError as error:
        raise CommandError(f"can't write {str(output)!r}: {error.strerror or error}") from None
    seconds = time.perf_counter() - start
    print_table(tables.Table(["", f"The picture: {output}. {seconds:.0f} s in all."]))


def bench(
    suites: Sequence[str], selection: Selection, file: Path | None, folder: Path | None
) -> bool:
    """Prints a table of each suite, and writes everything to ``file`` and pictures into ``folder``.

    Returns:
      Whether all results agree with lax's.
    """
    start = time.perf_counter()
    cases = _selected(suites, selection)
    _check_files(file, folder)
    if SHARDING in suites:
        if len(suites) > 1 or folder is not None:
            raise CommandError(
                "the suite sharding times nothing: it runs by itself, without --plots"
            )
        try:
            sharding.set_devices()
        except ValueError as error:
            raise CommandError(str(error).removeprefix("jaxconv.")) from None
    results = report.Report(report.machine(selection.against), file)
    for suite, selected in cases.items():
        try:
            for result in shown(SUITES[suite].run(selected, selection), len(selected)):
                results.add(suite, result)
        finally:  # also report partial results if the user interrupts
            results.end(suite)
    written = [] if folder is None else draw.draw(folder, results.results)
    results.close(written, time.perf_counter() - start)
    return not results.wrong


def profile(suites: Sequence[str], selection: Selection) -> None:
    """Prints the profile of each selected case."""
    for name in suites:
        if name not in PROFILED:
            raise CommandError(
                f"can't profile the suite {name!r}; possible are {', '.join(PROFILED)}"
            )
    for suite, selected in _selected(suites, selection).items():
        for found in shown(SUITES[suite].profiles(selected), len(selected)):
            print(f"{found}\n", flush=True)


def names(suites: Sequence[str], selection: Selection) -> None:
    """Prints the names of the selected cases."""
    for selected in _selected(suites, selection).values():
        for name in dict.fromkeys(name_of(case) for _, case, _ in selected):
            print(name)


def _selected(suites: Sequence[str], selection: Selection) -> dict[str, list[Selected]]:
    """The cases of each suite."""
    cases = {suite: list(SUITES[suite].selected(selection)) for suite in suites}
    if any(cases.values()):
        return cases
    every = f"jaxconv bench {' '.join(suites)} --list"
    raise CommandError(f"no case is selected; {every} prints the names of all")


def _check_files(file: Path | None, folder: Path | None) -> None:
    """Makes the folder, and fails where something can't be written, before any time is spent."""
    if file is not None and file.is_dir():
        raise CommandError(f"can't write {str(file)!r}: it is a folder")
    for parent, new in ((file and file.parent, False), (folder, True)):
        if parent is None:
            continue
        try:
            if new:
                parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            message = f"can't write into {str(parent)!r}: {error.strerror or error}"
            raise CommandError(message) from None
