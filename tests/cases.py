"""Named convolutions that every algorithm is tried on: small, each with something of its own."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import oracles
from jax import lax
from jax.extend.core import jaxprs_in_params

from jaxconv.arguments.errors import Call
from jaxconv.arguments.parse import parameters
from jaxconv.spec import ConvSpec

LAST = {
    0: ("NC", "IO", "NC"),
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NHWDC", "HWDIO", "NHWDC"),
}


def params_of(lhs: Any, rhs: Any, **arguments: Any) -> dict[str, Any]:
    """The primitive's parameters for these arguments of lax's function."""
    call = Call("conv_general_dilated", {"lhs": lhs.shape, "rhs": rhs.shape})
    return parameters(call, lhs, rhs, **arguments)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    arguments: dict[str, Any]

    def operands(self, dtype: Any = np.float64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        return tuple(
            rng.standard_normal(shape).astype(dtype) for shape in (self.lhs_shape, self.rhs_shape)
        )

    def spec(self, dtype: Any = np.float64) -> ConvSpec:
        lhs, rhs = (jax.ShapeDtypeStruct(s, dtype) for s in (self.lhs_shape, self.rhs_shape))
        return ConvSpec.from_params(lhs, rhs, params_of(lhs, rhs, **self.arguments))

    def lax(self, lhs: Any, rhs: Any) -> jax.Array:
        return lax.conv_general_dilated(lhs, rhs, **self.arguments)

    @property
    def _explicit(self) -> tuple[Any, ...]:
        """The arguments of the oracles, which take explicit padding only."""
        spec = self.spec()
        windows = spec.window_strides, spec.padding, spec.lhs_dilation, spec.rhs_dilation
        groups = spec.feature_group_count, spec.batch_group_count
        return *windows, self.arguments["dimension_numbers"], *groups

    def loop(self, lhs: Any, rhs: Any) -> np.ndarray:
        return oracles.loop_conv(lhs, rhs, *self._explicit)

    def loop_gradients(self, lhs: Any, rhs: Any, cotangent: Any) -> tuple[np.ndarray, np.ndarray]:
        return oracles.loop_gradients(lhs, rhs, cotangent, *self._explicit)


def make_case(
    name: str,
    lhs_shape: tuple[int, ...],
    rhs_shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    padding: Any = "SAME",
    dimension_numbers: Any = "last",
    **arguments: Any,
) -> Case:
    ndim = len(lhs_shape) - 2
    arguments["window_strides"] = strides or (1,) * ndim
    arguments["padding"] = padding
    if dimension_numbers == "last":
        dimension_numbers = LAST[ndim]
    return Case(name, lhs_shape, rhs_shape, arguments | {"dimension_numbers": dimension_numbers})


case_of = functools.partial(make_case, "")
CASES = {
    case.name: case
    for case in (
        make_case("matmul", (3, 4), (4, 5)),
        make_case("1d", (2, 9, 3), (3, 3, 4)),
        make_case(
            "1d causal depthwise", (2, 9, 4), (4, 1, 4), padding=((3, 0),), feature_group_count=4
        ),
        make_case("1d long kernel", (1, 80, 2), (70, 2, 3), padding="VALID"),
        make_case("3x3", (2, 6, 7, 3), (3, 3, 3, 4)),
        make_case("3x3 stride 2", (2, 7, 8, 3), (3, 3, 3, 4), (2, 2)),
        make_case("5x4 lower", (1, 7, 6, 2), (5, 4, 2, 3), (2, 1), "SAME_LOWER"),
        make_case("1x1", (2, 5, 4, 6), (1, 1, 6, 3)),
        make_case("1x1 on many positions", (2, 8, 9, 16), (1, 1, 16, 5)),
        make_case("1x1 stride 2", (2, 5, 4, 6), (1, 1, 6, 3), (2, 2), "VALID"),
        make_case("1x1 padded", (2, 5, 4, 6), (1, 1, 6, 3), padding=((1, 0), (0, 2))),
        make_case("patchify", (2, 9, 8, 3), (4, 4, 3, 5), (4, 4), "VALID"),
        make_case("whole image", (2, 4, 5, 3), (4, 5, 3, 2), padding="VALID"),
        make_case("depthwise", (2, 6, 7, 4), (3, 3, 1, 4), feature_group_count=4),
        make_case(
            "depthwise multiplier", (1, 6, 7, 3), (3, 3, 1, 6), (2, 2), feature_group_count=3
        ),
        make_case("grouped", (2, 6, 5, 6), (3, 3, 3, 4), feature_group_count=2),
        make_case("grouped 1x1", (2, 6, 5, 6), (1, 1, 3, 4), feature_group_count=2),
        make_case("batch groups", (6, 5, 6, 3), (3, 3, 3, 4), batch_group_count=2),
        make_case("atrous", (1, 9, 9, 2), (3, 3, 2, 3), rhs_dilation=(2, 3)),
        make_case("negative padding", (1, 8, 7, 2), (3, 3, 2, 3), padding=((-1, 2), (0, -2))),
        make_case(
            "transposed", (2, 4, 5, 3), (3, 3, 3, 2), None, ((1, 2), (2, 2)), lhs_dilation=(2, 2)
        ),
        make_case(
            "all dilations",
            (2, 5, 4, 4),
            (3, 2, 2, 6),
            (2, 1),
            ((1, 2), (0, 1)),
            lhs_dilation=(2, 3),
            rhs_dilation=(3, 2),
            feature_group_count=2,
        ),
        make_case("nchw", (2, 3, 6, 5), (4, 3, 3, 3), dimension_numbers=None),
        make_case(
            "odd layout", (5, 2, 6, 3), (3, 3, 4, 3), dimension_numbers=("HNWC", "HIOW", "CWHN")
        ),
        make_case("weight gradient", (3, 6, 6, 4), (5, 5, 4, 2), padding=((1, 1), (0, 1))),
        make_case("3d", (1, 4, 5, 4, 2), (3, 2, 3, 2, 3), (1, 2, 1)),
        make_case(
            "3d transposed",
            (1, 3, 2, 3, 2),
            (2, 2, 2, 2, 2),
            padding=((1, 1),) * 3,
            lhs_dilation=(2,) * 3,
        ),
        make_case(
            "patchify transposed",
            (2, 3, 2, 4),
            (4, 2, 2, 6),
            padding=((2, 5), (-1, 1)),
            lhs_dilation=(4, 2),
            feature_group_count=2,
        ),
        make_case("1d many phases", (1, 4, 2), (140, 2, 2), None, ((17, 150),), lhs_dilation=(70,)),
        make_case("1d five taps", (3, 13, 3), (5, 3, 2)),
        make_case("3d dense", (1, 5, 4, 7, 2), (3, 1, 5, 2, 3), padding=((1, 1), (0, 1), (-1, 2))),
        make_case("9x9", (1, 12, 11, 1), (9, 9, 1, 2)),
        make_case("no output", (2, 2, 5, 3), (3, 3, 3, 4), padding="VALID"),
        make_case("no channels", (2, 5, 5, 0), (3, 3, 0, 4)),
    )
}


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those inside it, in order."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)
