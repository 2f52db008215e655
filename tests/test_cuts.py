"""How convolutions are cut, from how their arrays lie on eight devices."""

from typing import Any

import jax
import numpy as np
import pytest
from cases import params_of
from jax import lax

from jaxconv.sharding.cuts import Cut, Dimensions, cut_of, dimensions

DEVICES = 8
HERE = (0,) * DEVICES
EIGHTHS = tuple(range(DEVICES))
HALVES, QUARTERS = (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 3, 0, 1, 2, 3)


def found(lhs: Any, rhs: Any, numbers: Any = ("NHWC", "HWIO", "NHWC"), **arguments: Any) -> Any:
    arguments = {"window_strides": (1, 1), "padding": "SAME"} | arguments
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (lhs, rhs)]
    return dimensions(*arrays, params_of(*arrays, dimension_numbers=numbers, **arguments))


def cut(of: Dimensions, *given: dict[int, Any]) -> Cut:
    """``given``: the places of lhs, rhs and output along the dimensions that are cut."""
    return cut_of(of, [[each.get(d, HERE) for d in range(4)] for each in given], DEVICES)


DENSE = found((16, 56, 56, 64), (3, 3, 64, 32))
GROUPED = found((16, 56, 56, 8), (3, 3, 2, 12), feature_group_count=4)


def test_what_lies_alike_stays() -> None:
    assert cut(DENSE, {0: EIGHTHS}, {}, {0: EIGHTHS}).places == {"n": EIGHTHS}
    assert cut(DENSE, {}, {3: EIGHTHS}, {}).places == {"o": EIGHTHS}
    assert cut(DENSE, {3: EIGHTHS}, {2: EIGHTHS}, {}).places == {"c": EIGHTHS}
    both = cut(DENSE, {0: HALVES}, {3: QUARTERS}, {0: HALVES, 3: QUARTERS})
    assert both.places == {"n": HALVES, "o": QUARTERS}
    rows = cut(DENSE, {1: EIGHTHS}, {}, {1: EIGHTHS})
    assert (rows.places, rows.axes[0].left, rows.axes[0].right) == ({"x0": EIGHTHS}, 1, 1)


def test_the_smaller_array_moves() -> None:
    """The same devices can't cut the batch and the output channels: the kernel is moved."""
    assert cut(DENSE, {0: EIGHTHS}, {3: EIGHTHS}, {}).places == {"n": EIGHTHS}


def test_groups() -> None:
    assert cut(GROUPED, {3: QUARTERS}, {3: QUARTERS}, {}).places == {"g": QUARTERS}
    # Eight parts of four groups: the halves of a group's two inputs.
    places = cut(GROUPED, {3: EIGHTHS}, {}, {}).places
    assert places == {"g": (0, 0, 1, 1, 2, 2, 3, 3), "c": (0, 1) * 4}
    # Inputs of groups that aren't apart are moved.
    assert cut(GROUPED, {}, {2: HALVES}, {}).places == {}
    # So are three outputs of a group over two devices, while each group is on two.
    assert cut(GROUPED, {3: QUARTERS}, {}, {3: EIGHTHS}).places == {"g": QUARTERS}


def test_gradients_of_kernels_sum() -> None:
    """Batch and rows of image and cotangent, which are its lhs and rhs."""
    numbers = lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
    of = found((16, 56, 56, 64), (16, 56, 56, 32), numbers, padding=((1, 1), (1, 1)))
    assert [of.sums(d) for d in (0, 1)] == [True, True]
    assert cut(of, {0: EIGHTHS}, {0: EIGHTHS}, {}).places == {"c": EIGHTHS}
    made = cut(of, {1: EIGHTHS}, {1: EIGHTHS}, {})
    assert made.places == {"x0": EIGHTHS}
    assert made.axes[0].outputs == 3


def test_batch_behind_rows_is_no_gradient() -> None:
    of = found((56, 56, 16, 64), (3, 3, 64, 32), ("HWNC", "HWIO", "HWNC"))
    assert not of.sums(0)
    assert cut(of, {0: EIGHTHS}, {}, {}).axes[0].left == 1


def test_lines() -> None:
    """Devices that differ in one place only, in the order of that place."""
    made = Cut(DEVICES, {"n": HALVES, "o": (3, 2, 1, 0, 3, 2, 1, 0)}, {})
    assert made.lines(["o"]) == [[3, 2, 1, 0], [7, 6, 5, 4]]
    assert made.lines(["n"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    copies = Cut(DEVICES, {"n": HALVES}, {})
    assert copies.lines(["n"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("letters", [("n",), ("g", "n")])
def test_places_of_a_dimension(letters: tuple[str, ...]) -> None:
    made = Cut(DEVICES, {"n": QUARTERS, "g": HALVES}, {})
    assert made.of_dimension(letters) == (QUARTERS if letters == ("n",) else EIGHTHS)
