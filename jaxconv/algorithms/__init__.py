"""The table of all algorithms. To add one, write its module and list it here."""

from collections.abc import Iterator, Mapping

from jaxconv.algorithms.base import Algorithm, UnsupportedConvError
from jaxconv.algorithms.fft import FFT
from jaxconv.algorithms.im2col import IM2COL
from jaxconv.algorithms.im2col_tiled import IM2COL_TILED
from jaxconv.algorithms.implicit import IMPLICIT
from jaxconv.algorithms.naive import NAIVE
from jaxconv.algorithms.phase import PHASE
from jaxconv.algorithms.pointwise import POINTWISE
from jaxconv.algorithms.shift import SHIFT
from jaxconv.algorithms.slices import SLICES
from jaxconv.algorithms.winograd import WINOGRAD, WINOGRAD4
from jaxconv.algorithms.xla import XLA

__all__ = ["ALGORITHMS", "Algorithm", "UnsupportedConvError"]


class _Algorithms(Mapping[str, Algorithm]):
    """The algorithms by name, read-only. Copying and unpickling return this same table."""

    def __init__(self, *algorithms: Algorithm) -> None:
        self._records = {algorithm.name: algorithm for algorithm in algorithms}

    def __getitem__(self, name: str) -> Algorithm:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __reduce__(self) -> str:
        return "ALGORITHMS"

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values()))


ALGORITHMS: Mapping[str, Algorithm] = _Algorithms(
    NAIVE,
    IM2COL,
    IM2COL_TILED,
    IMPLICIT,
    POINTWISE,
    SHIFT,
    PHASE,
    SLICES,
    WINOGRAD,
    WINOGRAD4,
    FFT,
    XLA,
)
