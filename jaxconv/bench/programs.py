"""The suites of ``jaxconv bench``: layers, poolings, networks and random convolutions."""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

import jaxconv
from jaxconv.bench import draw
from jaxconv.bench.cases import COUNT, LAYERS, POOLS, SEED, Layer, Pool, arguments, random_specs
from jaxconv.bench.measure import Effort, Result, contents, gemm_peak, measure, reference, write
from jaxconv.bench.networks import NETWORKS, Network
from jaxconv.planning.choose import choose, worthwhile
from jaxconv.planning.machine import processor, version
from jaxconv.planning.timing import Call, Compiled
from jaxconv.pooling.choose import choose as choose_pooling
from jaxconv.spec import ConvSpec
from jaxconv.tables import Table
from jaxconv.tools.autotune import candidates, operands, timed
from jaxconv.tools.progress import shown
from jaxconv.transforms import jaxprs


def convolutions(function: Callable[..., Any], *args: Any) -> list[ConvSpec]:
    """The convolutions of a function with these arguments, in program order."""
    return [conv.spec("bench") for conv in jaxprs.convolutions("bench", function, args, {})]


def convolutions_of(layers: Iterable[Layer]) -> list[ConvSpec]:
    """The convolutions of layers, in all their directions."""
    found: list[ConvSpec] = []
    for layer in layers:
        args = jax.eval_shape(layer.operands)
        for direction in layer.directions:
            function = layer.function(lax.conv_general_dilated, direction)
            found += convolutions(function, *args)
    return found


def flops(specs: Iterable[ConvSpec]) -> float:
    """Floating-point operations of convolutions, inserted zeros left out."""
    return sum(spec.flops / math.prod(spec.lhs_dilation) for spec in specs)


def tolerance(spec: ConvSpec) -> float:
    """Of the difference from lax: both sum thousands of products, in different orders."""
    return 2e-2 if spec.dtype.name == "bfloat16" else 1e-4


def _by_torch(effort: Effort, kind: str, *args: Any) -> Call | None:
    """A call by the module that imports PyTorch."""
    if not effort.torch:
        return None
    return getattr(import_module("jaxconv.bench.torch_peer"), kind)(*args)


def measure_layer(layer: Layer, direction: str, effort: Effort) -> Result:
    args, platform = layer.operands(), jax.default_backend()
    by_lax = layer.function(lax.conv_general_dilated, direction)
    own = layer.function(jaxconv.conv_general_dilated, direction)
    specs = convolutions(by_lax, *args)
    facts = {"name": layer.name, "direction": direction, "tolerance": tolerance(layer.spec)}
    facts |= {"how": ", ".join(choose(spec, platform)[0] for spec in specs), "flops": flops(specs)}
    torch = _by_torch(effort, "layer", layer, direction, *args)
    exact = partial(reference, layer.spec, *args[:2]) if direction == "forward" else None
    return measure(effort, Compiled(by_lax, *args), Compiled(own, *args), torch, exact, **facts)


def measure_pool(pool: Pool, direction: str, effort: Effort) -> Result:
    function, args = pool.case(direction)
    by_lax, own = (Compiled(f, *args) for f in (function, jaxconv.accelerate(function)))
    found, platform = jaxprs.operations("bench", function, args, {}), jax.default_backend()
    how = ", ".join(choose_pooling(each.pooling, platform)[0] for each in found)
    facts = {"name": pool.name, "direction": direction, "how": how, "tolerance": 1e-4}
    return measure(effort, by_lax, own, **facts)


def measure_network(network: Network, direction: str, effort: Effort) -> Result:
    function: Callable[..., Any] = network.step
    args: tuple[Any, ...] = (network.init(), *network.data())
    if direction == "forward":
        function, args = network.forward, args[:-1]
    by_lax, own = (Compiled(f, *args) for f in (function, jaxconv.accelerate(function)))
    facts: dict[str, Any] = {"name": network.name, "direction": direction, "how": "accelerate"}
    # The smallest gradients of 50 layers suffer from cancellation.
    facts["tolerance"] = 1e-4 if direction == "forward" else 1e-2
    facts["flops"] = flops(convolutions(function, *args))
    return measure(effort, by_lax, own, _by_torch(effort, "network", network, *args), **facts)


def measure_regret(spec: ConvSpec, effort: Effort) -> Result:
    """The time of what "auto" chooses over that of the best algorithm. Times every candidate to
    find the best, then "auto" and the best in turn: judged by the times that chose it, the best
    would often be a lucky one, and its luck would count as regret."""
    platform = jax.default_backend()
    chosen, _ = choose(spec, platform)
    seconds = timed(spec, candidates(spec, platform), platform, effort.seconds).seconds
    best = min(worthwhile(seconds), key=lambda name: seconds[name])
    with jax.enable_x64(spec.dtype == np.float64):
        arrays = operands(spec)

        def compiled(conv: Callable[..., Any], **algorithm: str) -> Compiled:
            return Compiled(partial(conv, **arguments(spec), **algorithm), *arrays)

        by_lax, auto = map(compiled, (lax.conv_general_dilated, jaxconv.conv_general_dilated))
        facts = {"name": str(spec), "direction": "", "how": chosen, "tolerance": tolerance(spec)}
        result = measure(effort, by_lax, auto, **facts, best=best, regret=1.0)
        if best == chosen:
            return result
        fastest = compiled(jaxconv.conv_general_dilated, algorithm=best)
        own, least = np.median(effort.times((auto, fastest)), axis=0)
        return dataclasses.replace(result, regret=float(own / least))


# Suites

QUICK = Effort(5, 0.05, precision=0.0)


class Case(NamedTuple):
    name: str
    direction: str
    measure: Callable[[Effort], Result]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of a suite to run, see the options of ``jaxconv bench``; None for all."""

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = COUNT
    torch: bool = False


class Suite(NamedTuple):
    cases: Callable[[int], Sequence[Case]]  # for a number of random ones
    few: slice  # those of a quick run
    effort: Effort  # of one case

    def selected(self, selection: Selection) -> list[Case]:
        """The cases of a selection; those selected by name also in a quick run."""
        cases = self.cases(selection.specs)
        if selection.case is not None:
            cases = [case for case in cases if selection.case.search(case.name)]
        elif selection.quick:
            cases = cases[self.few]
        return [case for case in cases if selection.direction in (None, case.direction)]

    def run(self, cases: Sequence[Case], selection: Selection) -> Iterator[str | Result]:
        """Measures cases. Yields the name of each, then its result."""
        effort = QUICK if selection.quick else self.effort
        for case in cases:
            yield ", ".join(filter(None, case[:2]))
            yield case.measure(dataclasses.replace(effort, torch=selection.torch))


def _all(measure: Callable[..., Result], subjects: Sequence[Any]) -> list[Case]:
    return [Case(x.name, d, partial(measure, x, d)) for x in subjects for d in x.directions]


def _random(count: int) -> list[Case]:
    specs = random_specs(SEED, count)
    return [Case(str(spec), "", partial(measure_regret, spec)) for spec in specs]


SINGLE = _all(measure_layer, LAYERS) + _all(measure_pool, POOLS)
SUITES = {
    "layers": Suite(lambda _: SINGLE, slice(3, None, 31), Effort()),
    # A call takes up to several seconds. For ResNet-50's step, batch 8, a single pair with PyTorch
    # gave a ratio of 1.02, seven pairs 0.88.
    "models": Suite(
        lambda _: _all(measure_network, NETWORKS), slice(2), Effort(seconds=8, fewest=5)
    ),
    "regret": Suite(_random, slice(4), Effort(16, precision=0.0)),
}
DIRECTIONS = tuple(dict.fromkeys(d for x in (*LAYERS, *POOLS, *NETWORKS) for d in x.directions))


def machine(torch: bool = False) -> dict[str, Any]:
    """What results depend on: CPU, cores, FLOP/s of its matrix products, versions."""
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "gemm": gemm_peak(),
        "jaxconv": version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "torch": version_of("torch") if torch else None,
    }


def run(
    cases: Mapping[str, Sequence[Case]],
    selection: Selection,
    file: Path | None,
    folder: Path | None,
) -> bool:
    """Prints a table of each suite, writes everything to ``file`` and pictures into ``folder``, and
    returns whether all results agree with lax's."""
    start, here = time.perf_counter(), machine(selection.torch)
    torch = f"PyTorch {here['torch']}, " if selection.torch else ""
    versions = f"jaxconv {here['jaxconv']}, JAX {here['jax']}, {torch}{here['cpu']}"
    peak = f"float32 GEMM {here['gemm'] / 1e9:.0f} GFLOP/s"
    print(Table([f"{versions}, {here['cores']} cores, {peak}"]), flush=True)
    results: dict[str, list[Result]] = {}
    for suite, selected in cases.items():
        try:
            for result in shown(SUITES[suite].run(selected, selection), len(selected)):
                results.setdefault(suite, []).append(result)
                if file is not None:
                    found = {name: [r.as_json() for r in rows] for name, rows in results.items()}
                    document = {"machine": here, "results": found}
                    write(file, json.dumps(document, indent=1, ensure_ascii=False).encode())
        finally:  # also of those before an interrupt
            if suite in results:
                table = dataclasses.replace(contents(results[suite]), above=["", suite, ""])
                print(table, flush=True)
    written = [file] if file is not None else []
    if folder is not None:
        for suite, rows in results.items():
            written.append(folder / f"{suite}.png")
            draw.ratios(rows).savefig(written[-1], dpi=110)
    wrong = [result.wrong for rows in results.values() for result in rows if result.wrong]
    lines = [f"WRONG: {text}" for text in wrong]
    lines += [f"Written: {', '.join(map(str, written))}"] if written else []
    print(Table(["", *lines, f"{time.perf_counter() - start:.0f} s in all."]), flush=True)
    return not wrong
