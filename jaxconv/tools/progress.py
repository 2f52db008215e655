"""A line of progress on stderr: what is worked on, how many of how many, and the time left."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(
    steps: Iterable[str | T], total: float, wanted: bool | None = None, seconds: bool = False
) -> Iterator[T]:
    """The results among ``steps``; the names between them are shown.

    Nothing is drawn while a step is worked on, which may be timed, or while its result is used,
    which may be printed.

    Args:
      steps: a name before each piece of work, and results in between.
      total: the number of names; or the seconds after which no further one comes.
      wanted: whether to show anything, if the package rich is installed; default: if stderr is a
        terminal.
      seconds: whether ``total`` is in seconds.
    """
    if wanted is None:
        wanted = sys.stderr.isatty()
    if not total or not wanted or importlib.util.find_spec("rich") is None:
        yield from (step for step in steps if not isinstance(step, str))
        return
    from rich.console import Console  # optional
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    unit = " s" if seconds else ""
    name = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # it alone is shortened
    columns = (
        BarColumn(20),
        TextColumn(f"{{task.completed:.0f}} of {{task.total:.0f}}{unit},"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.description}", table_column=name),
    )
    start, done = time.perf_counter(), 0
    with Progress(
        *columns,
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=float("inf"),
    ) as bar:
        task = bar.add_task("", total=total)

        def show(name: str = "") -> None:
            completed = min(time.perf_counter() - start, total) if seconds else done
            bar.update(task, completed=completed, description=escape(name), refresh=True)

        for step in steps:
            if isinstance(step, str):
                show(step)
                done += 1
            else:
                bar.stop()
                yield step
                bar.start()
        show()
