"""The time of each operation of a compiled program, by JAX's profiler."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxconv import tables
from jaxconv.planning.timing import Compiled

CALLS = 5  # that are recorded, after as many that are not
LONGEST, WIDTH = 40, 60  # operations that a table lists, and its longest text
HEADER: tuple[str, ...] = ("time", "share", "calls", "kind", "result", "from")
# In the text of a compiled program: name, result, and all else.
OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) (.*)", re.MULTILINE)


def profile(name: str, function: Callable[..., Any], *args: Any) -> tables.Table:
    """The longest operations of ``function``, compiled for these arguments.

    Each with its share, the calls of it in one of the program, its shape and order in memory in
    XLA's notation, and the functions and primitives that it comes from, as JAX names them.
    """
    compiled = Compiled(function, *args)
    for _ in range(CALLS):
        compiled.call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            times = [compiled.call() for _ in range(CALLS)]
        # Not by jax.profiler.ProfileData, which aborts the process on some events (JAX 0.12.0.1).
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    facts = {op: fact for op, *fact in OPERATION.findall(compiled.compiled.as_text() or "")}
    spent = sorted(own_times(events).items(), key=lambda item: -sum(item[1]))
    total, rows = sum(sum(each) for _, each in spent), [HEADER]
    for op, each in spent[:LONGEST]:
        result, rest = facts.get(op, ("", ""))
        origin = re.search(r'op_name="([^"]*)"', rest)
        calls = sum(seconds >= 0 for seconds in each) // CALLS
        figures = tables.milliseconds(sum(each) / CALLS), f"{sum(each) / total:.1%}", str(calls)
        what = re.sub(r"[.\d]+$", "", op), result[:WIDTH], origin[1][-WIDTH:] if origin else ""
        rows.append((*figures, *what))
    call, inside = map(tables.milliseconds, (sorted(times)[CALLS // 2], total / CALLS))
    above = f"{name}: {call} a call, its {len(spent)} operations {inside} (concurrent ones twice)"
    return tables.Table([above], rows, range(3), spare=(4, 2, 1), detail=True)


def own_times(events: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each operation: of each run of it, and less than zero what ran inside it.

    Args:
      events: of Chrome's trace format: those with an argument "hlo_op" are operations.
    """
    threads: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for event in events:
        op = event.get("args", {}).get("hlo_op")
        if op and event["ph"] == "X":  # at the same time the longer first
            threads[event["pid"], event["tid"]].append((event["ts"], -event["dur"], op))
    seconds: dict[str, list[float]] = defaultdict(list)
    for thread in threads.values():
        around: list[tuple[float, str]] = []  # ends and names of what is running
        for start, minus, op in sorted(thread):
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                seconds[around[-1][1]].append(minus / 1e6)
            seconds[op].append(-minus / 1e6)
            around.append((start - minus, op))
    return seconds
