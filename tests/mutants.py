"""Would the tests notice? Changes a line of the package at a time and runs the tests of its file.

``pip install cosmic-ray``, then ``python tests/mutants.py [--count 20] [--seed 0] FILE…``, on a
clean checkout: each mutant is written to its file while the tests run. Survivors are printed with
their diffs; one that changes a value lacks a test. A file takes 5 to 15 minutes.
"""

import argparse
import ast
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB

SECONDS = 300  # after which a test run counts as hanging, and its mutant as killed
# Those that change type annotations, and what a decorator caches.
LEFT_OUT = ("BitOr", "RemoveDecorator", "ExceptionReplacer")
ESTIMATES = ("cost", "doubted", "moving")  # methods that change plans and no value
TESTS = {
    "fft": "test_fft.py test_algorithms.py -k fft",
    "blocks": "test_fft.py test_algorithms.py -k fft",
    "winograd": "test_winograd.py test_algorithms.py -k winograd",
    "cook_toom": "test_winograd.py test_algorithms.py -k winograd",
    "patches": "test_patches.py",
    "spec": "test_algorithms.py test_plan.py",
    **dict.fromkeys(("base", "gemm", "layout", "loops"), "test_algorithms.py"),
}


def of_estimates(path: Path) -> set[int]:
    """The lines of a file's methods that estimate."""
    found = (node for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name"))
    nodes = [node for node in found if node.name in ESTIMATES]
    return {n for node in nodes for n in range(node.lineno, node.end_lineno + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--count", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(__file__).parent
    # Most programs of a mutated file are as before: compiled once, they take half of the time.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutants-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for path in options.files:
        database = WorkDB(":memory:", WorkDB.Mode.create)
        init([path], database, {})
        mutations = [item.mutations for item in database.work_items]
        mutations = [m for m in mutations if not any(n in m[0].operator_name for n in LEFT_OUT)]
        estimates = of_estimates(path)
        mutations = [m for m in mutations if m[0].start_pos[0] not in estimates]
        drawn = random.Random(f"{options.seed} {path.name}")
        drawn = drawn.sample(mutations, min(options.count, len(mutations)))
        files, *names = TESTS.get(path.stem, f"test_algorithms.py -k {path.stem}").split(" -k ")
        tests = [str(folder / name) for name in files.split()]
        chosen = [f"-k {name}" for name in names]
        command = " ".join([sys.executable, "-m pytest -x -q", *chosen, *tests])
        outcomes = Counter[str]()
        for mutation in drawn:
            result = mutate_and_test(mutation, command, SECONDS)
            outcome = str(result.test_outcome and result.test_outcome.value)
            outcomes[outcome] += 1
            if outcome != "killed":
                print(f"{outcome}: {mutation[0].operator_name}\n{result.diff}", flush=True)
        print(f"{path} (seed {options.seed}): {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
