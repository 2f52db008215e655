"""Axes that are cut over devices, which ``vmap`` over a named axis stands for."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from jaxconv.sharding.borders import AxisCut, MeshLine, cut_axis, only_valid, sliced, window
from jaxconv.spec import ConvSpec, dilate


class VmappedLine(MeshLine):
    """As ``vmap`` has no permutation that leaves places out."""

    def permuted(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        every = lax.all_gather(x, "line")
        sources = np.full(len(every), -1)
        for source, place in pairs:
            sources[place] = source
        source = jnp.asarray(sources)[self.index()]
        return jnp.where(source < 0, 0, every[source])


LINE = VmappedLine(("line",))


def parts_of(x: np.ndarray, devices: int) -> np.ndarray:
    """What each device holds of the first axis; garbage after its end."""
    held = -(-len(x) // devices)
    rest = np.full((devices * held - len(x), *x.shape[1:]), np.nan)
    return np.concatenate([x, rest]).reshape(devices, held, *x.shape[1:])


def convolved(x: Any, w: Any, stride: int, pads: Any, holes: int, dilation: int) -> Array:
    """x: (size,), w: (taps,)."""
    axis = (stride,), [pads], (holes,), (dilation,)
    image, kernel, numbers = x[None, :, None], w[:, None, None], ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(image, kernel, *axis, numbers)[0, :, 0]


def cut_of(
    devices: int,
    size: int,
    taps: int,
    stride: int = 1,
    pads: tuple[int, int] = (0, 0),
    holes: int = 1,
    dilation: int = 1,
    sums: bool = False,
) -> AxisCut | None:
    double = np.dtype(np.float64)
    axis = (stride,), (pads,), (holes,), (dilation,)
    return cut_axis(ConvSpec((1, size, 1), (taps, 1, 1), *axis, double, double), 0, devices, sums)


PADS = (0, 0), (1, 1), (2, 0), (-1, 3)
AXES = [
    (devices, size, taps, stride, pads, holes, dilation)
    for devices, size, taps, stride, pads, holes, dilation in itertools.product(
        (2, 3, 4), (8, 13, 16, 21), (1, 2, 3, 7), (1, 2, 3), PADS, (1, 2, 3), (1, 3)
    )
    if dilate(size, holes) + sum(pads) >= dilate(taps, dilation)
]
sampled = pytest.mark.parametrize(
    "case", [AXES[i] for i in np.random.default_rng(0).permutation(len(AXES))[:32]], ids=str
)


@sampled
def test_outputs_of_each_device(case: Any) -> None:
    devices, size, taps, stride, pads, holes, dilation = case
    rng = np.random.default_rng(size)
    x, w = rng.standard_normal(size), rng.standard_normal(taps)
    expected = np.asarray(convolved(x, w, stride, pads, holes, dilation))
    cut = cut_of(*case)
    if cut is None:
        assert holes > 1
        return

    def part(x: Array) -> Array:
        given = window(x, 0, cut, LINE), jnp.asarray(w)
        out = convolved(*given, stride, cut.padding, holes, dilation)
        return sliced(out, 0, cut.surplus, cut.outputs, LINE)

    outs = np.asarray(jax.vmap(part, axis_name="line")(parts_of(x, devices)))
    assert outs.shape[1] == -(-len(expected) // devices)
    np.testing.assert_allclose(outs.ravel()[: len(expected)], expected, rtol=1e-12, atol=1e-12)


@sampled
def test_taps_of_each_device(case: Any) -> None:
    """As in a kernel's gradient: the taps are the cotangent's positions."""
    devices, size, out, dilation, pads, holes, stride = case
    taps = (dilate(size, holes) + sum(pads) - dilate(out, stride)) // dilation + 1
    rng = np.random.default_rng(size)
    x, w = rng.standard_normal(size), rng.standard_normal(taps)
    pads = pads[0], dilate(out, stride) - 1 + dilate(taps, dilation) - dilate(size, holes) - pads[0]
    expected = np.asarray(convolved(x, w, stride, pads, holes, dilation))
    assert len(expected) == out
    cut = cut_of(devices, size, taps, stride, pads, holes, dilation, sums=True)
    if cut is None:
        assert holes > 1
        return

    def part(x: Array, w: Array) -> Array:
        w = only_valid(w, 0, taps, devices, LINE)
        return convolved(window(x, 0, cut, LINE), w, stride, cut.padding, holes, dilation)

    outs = jax.vmap(part, axis_name="line")(parts_of(x, devices), parts_of(w, devices))
    np.testing.assert_allclose(np.asarray(outs).sum(0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("taps", "stride", "pads", "widths"),
    [(3, 1, (1, 1), (1, 1)), (3, 2, (1, 0), (1, 0)), (4, 4, (0, 0), (0, 0))],
)
def test_borders_are_as_narrow_as_they_can_be(
    taps: int, stride: int, pads: tuple[int, int], widths: tuple[int, int]
) -> None:
    cut = cut_of(4, 32, taps, stride, pads)
    assert cut is not None
    assert (cut.left, cut.right) == widths
    assert stride > 1 or (cut.before, cut.after) == (0, 0)


def test_a_border_from_several_neighbours() -> None:
    large = cut_of(4, 32, 13, pads=(1, 1))
    assert large is not None
    assert large.right > large.held
