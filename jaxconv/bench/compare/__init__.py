"""Real convolutions of a photograph by every algorithm: what ``jaxconv compare`` shows.

The packages that this needs are in the extra ``cli``.
"""

from jaxconv.bench.compare.draw import picture
from jaxconv.bench.compare.measure import BUDGET, ENOUGH, Comparison, compare, reference, steps
from jaxconv.bench.compare.photograph import CONVOLUTIONS, Convolution, load
from jaxconv.bench.compare.table import tables

__all__ = [
    "BUDGET",
    "CONVOLUTIONS",
    "ENOUGH",
    "Comparison",
    "Convolution",
    "compare",
    "load",
    "picture",
    "reference",
    "steps",
    "tables",
]
