"""The table of all algorithms."""

from collections.abc import Mapping
from types import MappingProxyType

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

ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        algorithm.name: algorithm
        for algorithm in (
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
    }
)
