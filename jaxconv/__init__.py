"""Convolution as matrix multiplication, in pure JAX."""

from jaxconv.acceleration import accelerate
from jaxconv.algorithms import ALGORITHMS, UnsupportedConvError
from jaxconv.api import conv, conv_general_dilated, conv_transpose, pointwise
from jaxconv.autotuning import autotune
from jaxconv.enabling import disable, enable, enabled
from jaxconv.explanation import explain
from jaxconv.patches import col2im, im2col
from jaxconv.planner import plan
from jaxconv.settings import config

__all__ = [
    "ALGORITHMS",
    "UnsupportedConvError",
    "accelerate",
    "autotune",
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
    "plan",
    "pointwise",
]
