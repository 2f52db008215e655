"""Convolution as matrix multiplication, in pure JAX.

``conv``, ``conv_general_dilated``, ``conv_transpose`` and ``pointwise`` convolve, each by the
algorithm that is fastest for its shapes, dtype and platform, or by one of ``ALGORITHMS`` that is
named; ``im2col`` and ``col2im`` are the patch matrix and its adjoint. ``max_pool`` and ``avg_pool``
pool.

``accelerate`` does the same for the convolutions and poolings of a function that is written
already, ``enable`` for those of the whole process; ``keep_memory`` is for any JAX program on Linux.

``plan`` tells what is chosen for one convolution and why, ``explain`` for each convolution of a
function, forward and backward; ``autotune`` measures, and ``config`` has the settings.
"""

from jaxconv.algorithms import ALGORITHMS, UnsupportedConvError
from jaxconv.api import conv, conv_general_dilated, conv_transpose, pointwise
from jaxconv.config import config
from jaxconv.patches import col2im, im2col
from jaxconv.planning.machine import version as _version
from jaxconv.planning.plan import plan
from jaxconv.pools import avg_pool, max_pool
from jaxconv.tools.autotune import autotune
from jaxconv.tools.explain import explain
from jaxconv.tools.memory import keep_memory
from jaxconv.transforms.accelerate import accelerate
from jaxconv.transforms.enable import disable, enable, enabled

__all__ = [
    "ALGORITHMS",
    "UnsupportedConvError",
    "accelerate",
    "autotune",
    "avg_pool",
    "col2im",
    "config",
    "conv",
    "conv_general_dilated",
    "conv_transpose",
    "disable",
    "enable",
    "enabled",
    "explain",
    "im2col",
    "keep_memory",
    "max_pool",
    "plan",
    "pointwise",
]
__version__ = _version()
