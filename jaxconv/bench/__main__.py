"""``python -m jaxconv.bench``: layers against lax, as a Markdown table on stdout."""

import os

import jax
import numpy as np

from jaxconv.bench.layers import run


def main() -> None:
    device = jax.devices()[0].device_kind
    print(f"JAX {jax.__version__}, {device}, {os.cpu_count()} cores\n")
    print(
        "| layer | direction | algorithm | lax | jaxconv | times as fast (quartiles) | compiling |"
    )
    print("|---|---|---|---:|---:|---:|---:|")
    for result in run():
        layer = result.layer
        lax_ms, own_ms = 1e3 * np.median(result.pairs, axis=0)
        low, median, high = np.quantile(result.ratios, (0.25, 0.5, 0.75))
        before, after = (f"{1e3 * seconds:.0f}" for seconds in result.compile_seconds)
        print(
            f"| {layer.name} | {layer.direction} | `{'`, `'.join(result.algorithms)}`"
            f" | {lax_ms:.2f} ms | {own_ms:.2f} ms | **{median:.3g}×** ({low:.3g}–{high:.3g})"
            f" | {before} → {after} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
