"""``python -m jaxconv.bench [SUITE…]``: against lax, as a Markdown table on stdout.

Suites: layers (the default), gradients, programs, models.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxconv.bench import layers, programs

SUITES = {
    "layers": lambda: layers.run(layers.LAYERS),
    "gradients": lambda: layers.run(layers.GRADIENTS, seconds=2.0),
    "programs": lambda: programs.run(programs.PROGRAMS),
    "models": lambda: programs.run(programs.MODELS),
}


def described(results: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    """Each result with the first three cells of its row."""
    for result in results:
        if isinstance(result, layers.Result):
            algorithms = "`, `".join(result.algorithms)
            yield f"{result.layer.name} | {result.layer.direction} | `{algorithms}`", result
        else:
            yield f"{result.program.name} | | by `{result.how}`", result


def main(suites: list[str]) -> None:
    unknown = set(suites) - set(SUITES)
    if unknown:
        sys.exit(f"jaxconv.bench: no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    device = jax.devices()[0].device_kind
    print(f"JAX {jax.__version__}, {device}, {os.cpu_count()} cores\n")
    print("| what | direction | how | lax | jaxconv | times as fast (quartiles) | compiling |")
    print("|---|---|---|---:|---:|---:|---:|")
    for suite in suites or ["layers"]:
        for cells, result in described(SUITES[suite]()):
            lax_ms, own_ms = 1e3 * np.median(result.pairs, axis=0)
            low, median, high = np.quantile(result.ratios, (0.25, 0.5, 0.75))
            before, after = (f"{1e3 * seconds:.0f}" for seconds in result.compile_seconds)
            print(
                f"| {cells} | {lax_ms:.2f} ms | {own_ms:.2f} ms"
                f" | **{median:.3g}×** ({low:.3g}–{high:.3g}) | {before} → {after} ms |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
