"""``ConvSpec``: the static facts of one convolution; parsing of lax-style arguments."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxconv import compat

Pads = tuple[tuple[int, int], ...]


def dilate(size: int, dilation: int) -> int:
    """Length of ``size`` elements with ``dilation - 1`` holes between neighbours."""
    return max(0, 1 + dilation * (size - 1))


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """The static facts of one convolution in the canonical, channels-last layout.

    ``lhs`` is (N, spatial…, C), ``rhs`` is (spatial…, C / feature groups, O), the output is
    (N / batch groups, spatial…, O). Instances are hashable values: equal convolutions have equal
    specs. They are made by ``parse`` + ``from_params`` and are then known to be valid.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: Pads
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dtype: np.dtype
    out_dtype: np.dtype
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None

    @classmethod
    def from_params(cls, lhs: Any, rhs: Any, params: Mapping[str, Any]) -> "ConvSpec":
        """The spec of a convolution primitive with these operands and parameters.

        Args:
          lhs, rhs: anything with a ``shape`` and a ``dtype``.
          params: the primitive's parameters, as ``parse`` gives them.
        """
        lhs_spec, rhs_spec, _ = params["dimension_numbers"]
        n, c, *lhs_spatial = (lhs.shape[d] for d in lhs_spec)
        o, i, *rhs_spatial = (rhs.shape[d] for d in rhs_spec)
        out_dtype = params["preferred_element_type"]
        return cls(
            lhs_shape=(n, *lhs_spatial, c),
            rhs_shape=(*rhs_spatial, i, o),
            window_strides=tuple(params["window_strides"]),
            padding=tuple(tuple(pads) for pads in params["padding"]),
            lhs_dilation=tuple(params["lhs_dilation"]),
            rhs_dilation=tuple(params["rhs_dilation"]),
            dtype=np.dtype(lhs.dtype),
            out_dtype=np.dtype(lhs.dtype if out_dtype is None else out_dtype),
            feature_group_count=params["feature_group_count"],
            batch_group_count=params["batch_group_count"],
            precision=params["precision"],
        )

    def replace(self, **changes: Any) -> "ConvSpec":
        return dataclasses.replace(self, **changes)

    @property
    def spatial_ndim(self) -> int:
        return len(self.lhs_shape) - 2

    @property
    def lhs_spatial(self) -> tuple[int, ...]:
        return self.lhs_shape[1:-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.rhs_shape[:-2]

    @property
    def out_channels(self) -> int:
        return self.rhs_shape[-1]

    @property
    def groups(self) -> int:
        """Independent convolutions side by side: feature groups or batch groups."""
        return self.feature_group_count * self.batch_group_count

    @cached_property
    def taps(self) -> int:
        return math.prod(self.kernel_shape)

    @cached_property
    def padded_spatial(self) -> tuple[int, ...]:
        """Spatial sizes of ``lhs`` after its dilation and padding."""
        return tuple(
            dilate(size, d) + lo + hi
            for size, d, (lo, hi) in zip(
                self.lhs_spatial, self.lhs_dilation, self.padding, strict=True
            )
        )

    @cached_property
    def out_spatial(self) -> tuple[int, ...]:
        return tuple(
            max(0, (size - dilate(k, d)) // stride + 1)
            for size, k, d, stride in zip(
                self.padded_spatial,
                self.kernel_shape,
                self.rhs_dilation,
                self.window_strides,
                strict=True,
            )
        )

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        return (self.lhs_shape[0] // self.batch_group_count, *self.out_spatial, self.out_channels)

    @cached_property
    def positions(self) -> int:
        """Output positions of one image."""
        return math.prod(self.out_spatial)

    @cached_property
    def gemm(self) -> tuple[int, int, int, int]:
        """(groups, m, n, k): the batched matrix product that this convolution is."""
        m = self.out_shape[0] * self.positions
        return self.groups, m, self.out_channels // self.groups, self.taps * self.rhs_shape[-2]

    @cached_property
    def flops(self) -> int:
        """Floating-point operations, a multiply and an add counted as two."""
        return 2 * math.prod(self.gemm)

    @cached_property
    def operand_bytes(self) -> int:
        """Bytes of both operands and the output: the least that any algorithm moves."""
        operands = math.prod(self.lhs_shape) + math.prod(self.rhs_shape)
        return operands * self.dtype.itemsize + math.prod(self.out_shape) * self.out_dtype.itemsize

    @property
    def is_empty(self) -> bool:
        """Whether nothing is summed: no output element, or no product for any of them."""
        return 0 in (*self.lhs_shape, *self.rhs_shape, *self.out_shape)

    @cached_property
    def accumulator_dtype(self) -> np.dtype:
        """Where sums are kept: at least 32 bits wide, so that only the end rounds or wraps."""
        if self.out_dtype.itemsize >= 4:
            return self.out_dtype
        if jnp.issubdtype(self.out_dtype, np.unsignedinteger):
            return np.dtype(np.uint32)
        if jnp.issubdtype(self.out_dtype, np.integer):
            return np.dtype(np.int32)
        return np.dtype(np.float32)

    def __str__(self) -> str:
        """The convolution in a line: ``f32[1,56,56,128] * [3,3,1,128] → …``."""

        def shape(dtype: np.dtype, dims: tuple[int, ...]) -> str:
            return f"{dtype.name}[{','.join(map(str, dims))}]"

        parts = [
            f"{shape(self.dtype, self.lhs_shape)} * {shape(self.dtype, self.rhs_shape)}"
            f" → {shape(self.out_dtype, self.out_shape)}"
        ]
        ones = (1,) * self.spatial_ndim
        if self.window_strides != ones:
            parts.append(f"strides {self.window_strides}")
        if any(pads != (0, 0) for pads in self.padding):
            parts.append(f"padding {self.padding}")
        if self.lhs_dilation != ones:
            parts.append(f"lhs_dilation {self.lhs_dilation}")
        if self.rhs_dilation != ones:
            parts.append(f"rhs_dilation {self.rhs_dilation}")
        if self.feature_group_count > 1:
            parts.append(f"{self.feature_group_count} feature groups")
        if self.batch_group_count > 1:
            parts.append(f"{self.batch_group_count} batch groups")
        return ", ".join(parts)


def fail(
    function: str, constraint: str, given: object, remedy: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises ``error`` with the message that every refusal in jaxconv has."""
    raise error(f"jaxconv.{function}: {constraint}, got {given}; {remedy}.")


def parse(
    function: str,
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> dict[str, Any]:
    """Checks the arguments of ``lax.conv_general_dilated`` and gives the primitive's parameters.

    Args:
      function: the public function whose name the errors carry.
      lhs, rhs: anything with a ``shape`` and a ``dtype``.

    Returns:
      The parameters of lax's convolution primitive, except ``out_sharding``: strides, dilations and
      pads as tuples of integers, ``dimension_numbers`` as ``lax.ConvDimensionNumbers``.

    Raises:
      TypeError: operands of different rank or dtype, malformed ``dimension_numbers``, pads or
        dilations, or an impossible ``preferred_element_type``.
      ValueError: everything else that ``lax.conv_general_dilated`` refuses.
    """
    if len(lhs.shape) != len(rhs.shape):
        fail(
            function,
            "lhs and rhs must have the same rank (batch, channels and the spatial dimensions)",
            f"shapes {lhs.shape} and {rhs.shape}",
            "add the missing dimensions",
            TypeError,
        )
    if len(lhs.shape) < 2:
        fail(
            function,
            "lhs and rhs must have at least a batch and a channel dimension",
            f"shapes {lhs.shape} and {rhs.shape}",
            "add them with x[None]",
            TypeError,
        )
    out_dtype = _out_dtype(function, lhs.dtype, rhs.dtype, preferred_element_type)
    dnums = _dimension_numbers(function, lhs.shape, rhs.shape, dimension_numbers)
    ndim = len(lhs.shape) - 2
    strides = _positive(function, "window_strides", window_strides, ndim, ValueError)
    lhs_dilation = _positive(function, "lhs_dilation", lhs_dilation, ndim, TypeError)
    rhs_dilation = _positive(function, "rhs_dilation", rhs_dilation, ndim, TypeError)
    feature_groups, batch_groups = (
        _positive(function, name, (count,), 1, ValueError)[0]
        for name, count in (
            ("feature_group_count", feature_group_count),
            ("batch_group_count", batch_group_count),
        )
    )

    n, c, *lhs_spatial = (lhs.shape[d] for d in dnums.lhs_spec)
    o, i, *kernel_shape = (rhs.shape[d] for d in dnums.rhs_spec)
    _check_groups(function, n, c, i, o, feature_groups, batch_groups)
    if 0 in kernel_shape:
        fail(
            function,
            "the kernel must have at least one tap in each spatial dimension",
            f"kernel shape {tuple(kernel_shape)}",
            "drop the convolution where there is no kernel",
        )
    window = tuple(map(dilate, kernel_shape, rhs_dilation))
    pads = _pads(function, padding, lhs_spatial, window, strides, lhs_dilation)
    return {
        "window_strides": strides,
        "padding": pads,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dnums,
        "feature_group_count": feature_groups,
        "batch_group_count": batch_groups,
        "precision": compat.canonicalize_precision(precision),
        "preferred_element_type": out_dtype,
    }


def _out_dtype(function: str, lhs: Any, rhs: Any, preferred: Any) -> np.dtype | None:
    if lhs != rhs:
        fail(
            function,
            "lhs and rhs must have the same dtype",
            f"{np.dtype(lhs).name} and {np.dtype(rhs).name}",
            "cast one of them with .astype",
            TypeError,
        )
    if preferred is None:
        return None
    preferred = np.dtype(compat.check_and_canonicalize_user_dtype(preferred, function))
    widens = preferred.itemsize >= np.dtype(lhs).itemsize
    issub = jnp.issubdtype
    if issub(lhs, np.integer) and issub(preferred, np.floating):
        compatible = True
    elif issub(lhs, np.signedinteger):
        compatible = issub(preferred, np.signedinteger)
    else:
        kinds = (np.integer, np.floating, np.complexfloating)
        compatible = all(issub(preferred, kind) for kind in kinds if issub(lhs, kind))
    if not (widens and compatible):
        fail(
            function,
            "preferred_element_type must be as wide as the operands and of their kind"
            " (integers may also become floats, unsigned integers signed ones)",
            f"{preferred.name} for {np.dtype(lhs).name} operands",
            "cast the operands before or the result after",
            TypeError,
        )
    return preferred


def _dimension_numbers(
    function: str, lhs_shape: Sequence[int], rhs_shape: Sequence[int], given: Any
) -> lax.ConvDimensionNumbers:
    try:
        dnums = lax.conv_dimension_numbers(lhs_shape, rhs_shape, given)
    except TypeError as error:
        fail(
            function,
            "dimension_numbers must be None, a ConvDimensionNumbers, or three strings such as"
            f" ('NHWC', 'HWIO', 'NHWC') of length {len(lhs_shape)}",
            repr(given),
            str(error),
            TypeError,
        )
    axes = list(range(len(lhs_shape)))
    if any(sorted(spec) != axes for spec in dnums):
        fail(
            function,
            f"each spec of dimension_numbers must be a permutation of 0…{axes[-1]}",
            dnums,
            "name every dimension once",
        )
    return lax.ConvDimensionNumbers(*(tuple(map(operator.index, spec)) for spec in dnums))


def _positive(
    function: str, name: str, given: Sequence[int] | None, length: int, error: type[Exception]
) -> tuple[int, ...]:
    """``given`` as ``length`` positive integers; None stands for ones."""
    if given is None:
        return (1,) * length
    try:
        values = tuple(map(operator.index, given))
    except TypeError:
        values = ()
    if len(values) != length or any(value < 1 for value in values):
        shown = given[0] if name.endswith("count") else given
        fail(
            function,
            f"{name} must be "
            + ("a positive integer" if name.endswith("count") else f"{length} positive integers"),
            repr(shown),
            "give 1 where there is nothing to do",
            error,
        )
    return values


def _check_groups(
    function: str, n: int, c: int, i: int, o: int, feature_groups: int, batch_groups: int
) -> None:
    if feature_groups > 1 and batch_groups > 1:
        fail(
            function,
            "at most one of feature_group_count and batch_group_count may be above 1",
            f"{feature_groups} and {batch_groups}",
            "split the batch by hand and use feature_group_count",
        )
    if c % feature_groups or c // feature_groups != i:
        fail(
            function,
            "the channels of lhs must be feature_group_count times the input channels of rhs",
            f"{c} channels, {feature_groups} groups, {i} input channels in rhs",
            "check dimension_numbers, whose default is channels first, and the group count",
        )
    for name, count in (("feature", feature_groups), ("batch", batch_groups)):
        if o % count:
            fail(
                function,
                f"{name}_group_count must divide the output channels of rhs",
                f"{o} output channels and {count} groups",
                "each group needs as many output channels as the next",
            )
    if n % batch_groups:
        fail(
            function,
            "batch_group_count must divide the batch of lhs",
            f"a batch of {n} and {batch_groups} groups",
            "each group needs as many images as the next",
        )


def _pads(
    function: str,
    padding: Any,
    lhs_spatial: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    lhs_dilation: Sequence[int],
) -> Pads:
    """Padding as (low, high) pairs; strings are resolved against the dilated window."""
    if isinstance(padding, str):
        if any(d > 1 for d in lhs_dilation):
            fail(
                function,
                "padding must be explicit (low, high) pairs where lhs_dilation is above 1",
                repr(padding),
                "give pairs, or use conv_transpose",
            )
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            fail(
                function,
                "padding must be 'SAME', 'SAME_LOWER', 'VALID' or (low, high) pairs",
                repr(padding),
                "use one of these",
            )
        return tuple(lax.padtype_to_pads(lhs_spatial, window, strides, padding))
    try:
        pads = tuple((operator.index(lo), operator.index(hi)) for lo, hi in padding)
    except (TypeError, ValueError):
        fail(
            function,
            "padding must be 'SAME', 'SAME_LOWER', 'VALID' or (low, high) pairs of integers",
            repr(padding),
            "give one pair for each spatial dimension",
        )
    if len(pads) != len(lhs_spatial):
        fail(
            function,
            f"padding must have one (low, high) pair for each of {len(lhs_spatial)} spatial"
            " dimensions",
            repr(padding),
            "add or drop pairs",
            TypeError,
        )
    for size, d, (lo, hi) in zip(lhs_spatial, lhs_dilation, pads, strict=True):
        if dilate(size, d) + lo + hi < 0:
            fail(
                function,
                "negative padding must not be larger than the dimension that it crops",
                f"padding {(lo, hi)} for {dilate(size, d)} elements",
                "crop less",
            )
    return pads
