"""What a benchmark prints and writes: tables as they grow, and JSON after every result."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxconv.bench.measure import Result
from jaxconv.bench.regret import Regret
from jaxconv.bench.scaling import Curve
from jaxconv.bench.suites import SUITES

AnyResult = Result | Regret | Curve


class Report:
    """Prints each result as it comes, on a terminal in columns, else as Markdown, and writes all
    that there are to ``file``.

    Attributes:
      results: by suite.
    """

    def __init__(self, console: Console, machine: dict[str, Any], file: Path | None) -> None:
        self.console = console
        self.machine = machine
        self.file = file
        self.results: dict[str, list[AnyResult]] = {}
        gflops, gigabytes = machine["gemm"] / 1e9, machine["bandwidth"] / 1e9
        self._print(
            f"jaxconv {machine['jaxconv']}, JAX {machine['jax']},"
            f" PyTorch {machine['torch'] or '–'}, {machine['cpu']},"
            f" {machine['cores']} cores, {gflops:.0f} GFLOP/s f32 GEMM,"
            f" {gigabytes:.1f} GB/s"
        )

    def begin(self, suite: str) -> None:
        """A suite starts: prints the head of its table."""
        self.results[suite] = []
        self._print(f"\n{suite}\n")
        self._row(suite, SUITES[suite].header)
        if not self.console.is_terminal:
            self._print("|" + "---|" * len(SUITES[suite].header))

    def add(self, suite: str, result: AnyResult) -> None:
        """Prints and keeps a result."""
        self.results[suite].append(result)
        self._row(suite, SUITES[suite].row(result))
        self.write()

    def end(self, suite: str) -> None:
        """A suite is over: prints what its results come to."""
        if self.results[suite]:
            self._print("\n" + "\n".join(SUITES[suite].summary(self.results[suite])))

    def close(self, written: list[Path], seconds: float) -> None:
        """All is over: prints what disagreed with lax, what was written, and how long it took."""
        files = [str(path) for path in (self.file, *written) if path is not None]
        lines = [f"WRONG: {text}" for text in self.wrong]
        if files:
            lines.append(f"Written: {', '.join(files)}")
        self._print("\n" + "\n".join([*lines, f"{seconds:.0f} s in all."]))

    @property
    def wrong(self) -> list[str]:
        """Which results disagree with lax's."""
        every = [result for found in self.results.values() for result in found]
        return [r.wrong for r in every if not isinstance(r, Curve) and r.wrong is not None]

    def write(self) -> None:
        """Rewrites the file; concurrent readers see the previous version, whole."""
        if self.file is None:
            return
        results = {
            suite: [as_json(result) for result in found] for suite, found in self.results.items()
        }
        document = {"machine": self.machine, "results": results}
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, self.file)

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _row(self, suite: str, cells: tuple[str, ...]) -> None:
        if not self.console.is_terminal:
            self._print(f"| {' | '.join(cells)} |")
            return
        table = Table.grid(padding=(0, 1), expand=True)
        for i in range(len(SUITES[suite].header)):
            table.add_column(ratio=3 if i == 0 else 1)  # the same widths in every row
        table.add_row(*map(Text, cells))
        self.console.print(table)


def as_json(result: AnyResult) -> dict[str, Any]:
    """A result's fields and what is computed from them."""
    found = dataclasses.asdict(result)
    if isinstance(result, Result):
        peers = [peer for peer in ("lax", "torch") if getattr(result, peer)]
        found["ratios"] = {peer: result.quartiles(peer) for peer in peers}
        found["error_ratio"] = result.error_ratio
        found["wrong"] = result.wrong
    if isinstance(result, Curve):
        found["slopes"] = result.slopes
    return found
