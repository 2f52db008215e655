"""The time of each operation of a compiled program, by JAX's profiler."""

import dataclasses
import gzip
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxconv import tables
from jaxconv.planning.timing import Compiled

# Calls that are recorded, after as many that are not.
CALLS = 5
# Operations that a table lists.
LONGEST = 40
KINDS = 12
HEADER: tuple[str, ...] = ("time", "share", "calls", "kind", "result", "from")
FIGURES = range(3)
SPARE = (4, 2, 1)
# Longest text of a result's shape and of an origin.
WIDTH = 60


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program.

    Attributes:
      name: XLA's, unique in the program.
      kind: that name without its number.
      result: its shape in XLA's notation, and its order in memory; empty where unknown.
      origin: the functions and primitives that it comes from, as JAX names them.
      seconds: in a call of the program, without the operations inside (of a loop).
      calls: how often a call of the program runs it.
    """

    name: str
    kind: str
    result: str
    origin: str
    seconds: float
    calls: int


@dataclasses.dataclass(frozen=True, repr=False)
class Profile(tables.Report):
    """The operations of a program, the longest first. ``str()`` is a table; so is the value in a
    notebook.

    Attributes:
      name: of the program.
      seconds: of one call, the median.
    """

    name: str
    seconds: float
    operations: tuple[Operation, ...]

    @property
    def kinds(self) -> dict[str, float]:
        """Seconds of each kind of operation, the longest first."""
        kinds: dict[str, float] = {}
        for operation in self.operations:
            kinds[operation.kind] = kinds.get(operation.kind, 0.0) + operation.seconds
        return dict(sorted(kinds.items(), key=lambda kind: -kind[1]))

    def _contents(self) -> tables.Table:
        total = sum(operation.seconds for operation in self.operations)
        above = [
            f"{self.name}: {tables.milliseconds(self.seconds)} a call, its operations"
            f" {tables.milliseconds(total)} (those side by side count twice)"
        ]
        kinds = list(self.kinds.items())
        above += [
            f"  {seconds / total:6.1%}  {tables.milliseconds(seconds)}  {kind}"
            for kind, seconds in kinds[:KINDS]
        ]
        rows = [HEADER]
        for operation in self.operations[:LONGEST]:
            share = f"{operation.seconds / total:.1%}"
            time = tables.milliseconds(operation.seconds)
            what = (operation.kind, _short(operation.result), _short(operation.origin))
            rows.append((time, share, str(operation.calls), *what))
        left = self.operations[LONGEST:]
        rest = sum(operation.seconds for operation in left)
        below = [f"{len(left)} more, {tables.milliseconds(rest)} in all"] if left else []
        return tables.Table(above, rows, FIGURES, below=below, spare=SPARE, detail=True)


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else f"…{text[1 - WIDTH :]}"


def profile(name: str, function: Callable[..., Any], *args: Any) -> Profile:
    """The time of each operation of ``function``, compiled for these arguments."""
    compiled = Compiled(function, *args)
    for _ in range(CALLS):
        compiled.call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            times = [compiled.call() for _ in range(CALLS)]
        # Not by jax.profiler.ProfileData, which aborts the process on some events (JAX 0.12.0.1).
        (file,) = Path(folder).rglob("*.trace.json.gz")
        seconds, counts = own_times(json.loads(gzip.decompress(file.read_bytes()))["traceEvents"])
    facts = _facts(compiled.compiled.as_text() or "")
    operations = [
        Operation(
            op,
            re.sub(r"[.\d]+$", "", op),
            *facts.get(op, ("", "")),
            spent / CALLS,
            counts[op] // CALLS,
        )
        for op, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return Profile(name, sorted(times)[CALLS // 2], tuple(operations))


def own_times(events: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], Counter[str]]:
    """Seconds of each operation, without those that ran inside it, and how often it ran.

    Args:
      events: of Chrome's trace format: those with an argument "hlo_op" are operations.
    """
    threads: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        op = event.get("args", {}).get("hlo_op")
        if op and event["ph"] == "X":
            thread = threads.setdefault((event["pid"], event["tid"]), [])
            thread.append((event["ts"], -event["dur"], op))  # at the same time the longer first
    seconds, counts = defaultdict[str, float](float), Counter[str]()
    for thread in threads.values():
        around: list[tuple[float, str]] = []  # ends and names of what is running
        for start, minus, op in sorted(thread):
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                seconds[around[-1][1]] += minus / 1e6
            seconds[op] -= minus / 1e6
            counts[op] += 1
            around.append((start - minus, op))
    return seconds, counts


def _facts(text: str) -> dict[str, tuple[str, str]]:
    """Result and origin of each operation in a compiled program's text."""
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ", line)
        if match:
            origin = re.search(r'op_name="([^"]*)"', line)
            found[match[1]] = str(match[2]), str(origin[1]) if origin else ""
    return found
