"""A line of progress on stderr: how many of how many, the time left, what is worked on."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(
    steps: Iterable[str | T], total: float, wanted: bool | None = None, seconds: bool = False
) -> Iterator[T]:
    """The results among ``steps``; the names before them are shown if ``wanted``, by default if
    stderr is a terminal, and rich is installed. ``total``: the number of names or, with
    ``seconds``, the time after which no further one comes."""
    wanted = sys.stderr.isatty() if wanted is None else wanted
    if not total or not wanted or importlib.util.find_spec("rich") is None:
        yield from (step for step in steps if not isinstance(step, str))
        return
    from rich import markup, progress  # optional
    from rich.console import Console

    count = "{task.completed:.0f} of {task.total:.0f}" + " s" * seconds
    columns = progress.BarColumn(20), count, progress.TimeRemainingColumn(), "{task.description}"
    start, done = time.perf_counter(), -1
    stderr = Console(stderr=True)
    # Drawn between the steps only, which may be timed, and not while a result is printed.
    with progress.Progress(
        *columns, console=stderr, auto_refresh=False, transient=True, redirect_stdout=False
    ) as bar:
        task = bar.add_task("", total=total)
        for step in steps:
            if isinstance(step, str):
                done += 1
                completed = min(time.perf_counter() - start, total) if seconds else done
                name = markup.escape(step[:32])
                bar.update(task, completed=completed, description=name, refresh=True)
            else:
                bar.stop()
                yield step
                bar.start()
