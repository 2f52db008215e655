"""Every algorithm on every case: values, derivatives, batches and loops, and what it refuses.

Expected is a loop in NumPy in float64, which agrees with lax and its derivatives.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import CASES, Case, case_of, make_case
from jax import Array, lax

import jaxconv
from jaxconv import loops
from jaxconv.algorithms import im2col_tiled, pointwise, shift
from jaxconv.algorithms.base import apply, prepared, unsupported
from jaxconv.planning.choose import run

Conv = Callable[[Any, Any], Array]


def named(names: str) -> set[str]:
    return set(names.split(", "))


WINOGRAD = named(
    "1d, 1d causal depthwise, 1d five taps, 3x3, whole image, depthwise, grouped, batch groups, "
    "negative padding, nchw, odd layout, weight gradient, 3d dense, no output, no channels"
)
# The cases that an algorithm takes; one that is not here takes all of them.
TAKES = {
    "im2col_tiled": CASES.keys() - {"matmul"},
    "pointwise": named(
        "matmul, 1x1, 1x1 on many positions, 1x1 stride 2, 1x1 padded, patchify, whole image, "
        "grouped 1x1, 3d transposed, patchify transposed, no output, no channels"
    ),
    "phase": named(
        "transposed, all dilations, 1d many phases, 3d transposed, patchify transposed, no output, "
        "no channels"
    ),
    "fft": CASES.keys() - {"matmul"},
    "slices": {name for name in CASES if name != "matmul" and not name.startswith("1d")},
    "winograd": WINOGRAD,
    "winograd4": WINOGRAD - {"odd layout"},  # a weight gradient in memory, of 5×6 taps
}
PAIRS = [(name, case) for name in ("auto", *jaxconv.ALGORITHMS) for case in CASES]
TAKEN = [(name, case) for name, case in PAIRS if case in TAKES.get(name, CASES)]
REFUSED = [pair for pair in PAIRS if pair not in TAKEN]


def conv_by(name: str, case: Case, **arguments: Any) -> Conv:
    arguments = case.arguments | arguments
    return lambda lhs, rhs: jaxconv.conv_general_dilated(lhs, rhs, **arguments, algorithm=name)


def derivatives(conv: Conv, forward_mode: bool = True) -> Callable[..., dict[str, Array]]:
    """The convolution and its derivatives: multilinear in five arguments, without a minus sign."""

    def fun(lhs: Any, rhs: Any, lhs_tangent: Any, rhs_tangent: Any, cotangent: Any) -> Any:
        out, transpose = jax.vjp(conv, lhs, rhs)
        outs = {"out": out}
        outs["lhs gradient"], outs["rhs gradient"] = transpose(cotangent)
        if forward_mode:
            outs["tangent"] = jax.jvp(conv, (lhs, rhs), (lhs_tangent, rhs_tangent))[1]
        return outs

    return fun


@dataclasses.dataclass(frozen=True)
class Expected:
    value: np.ndarray
    magnitude: np.ndarray  # the same of the arguments' absolute values
    length: int  # products that an element sums

    def check(self, out: Any, name: str = "") -> None:
        """Whether ``out`` is this within the rounding errors of the algorithm ``name``."""
        spread = oracles.SPREAD.get(name, 0)
        oracles.check(out, self.value, self.magnitude, self.length, np.float64, spread)


def by_loop(case: Case, args: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What ``derivatives`` gives."""
    lhs, rhs, lhs_tangent, rhs_tangent, cotangent = args
    gradients = case.loop_gradients(lhs, rhs, cotangent)
    tangent = case.loop(lhs_tangent, rhs) + case.loop(lhs, rhs_tangent)
    names = ("out", "tangent", "lhs gradient", "rhs gradient")
    return dict(zip(names, (case.loop(lhs, rhs), tangent, *gradients), strict=True))


def expected_of(case: Case) -> tuple[list[np.ndarray], dict[str, Expected]]:
    """Arguments for ``derivatives`` of a case, and what it must make of them."""
    rng = np.random.default_rng(1)
    out_shape = case.loop(*case.operands()).shape
    args = list(map(rng.standard_normal, (case.lhs_shape, case.rhs_shape) * 2 + (out_shape,)))
    # Of ones, a sum counts its products.
    kinds = [args, [np.abs(x) for x in args], [np.ones_like(x) for x in args]]
    values, magnitudes, lengths = (by_loop(case, kind) for kind in kinds)
    return args, {
        key: Expected(values[key], magnitudes[key], int(np.max(lengths[key], initial=0)))
        for key in values
    }


@functools.cache
def expected_derivatives(name: str) -> tuple[list[np.ndarray], dict[str, Expected]]:
    return expected_of(CASES[name])


def assert_as_by_loop(name: str, case: Case, *, forward_mode: bool = False) -> None:
    args, expected = (
        expected_derivatives(case.name) if case in CASES.values() else expected_of(case)
    )
    outs = jax.jit(derivatives(conv_by(name, case), forward_mode))(*args)
    for key, out in outs.items():
        assert out.dtype == np.float64
        expected[key].check(out, name)


@pytest.mark.parametrize("name", CASES)
def test_the_loop_is_lax(name: str) -> None:
    args, expected = expected_derivatives(name)
    for key, out in jax.jit(derivatives(CASES[name].lax))(*args).items():
        expected[key].check(out)


@pytest.mark.parametrize(("name", "case"), TAKEN)
def test_values_and_derivatives(name: str, case: str) -> None:
    # Tangents are two convolutions more, by the same rule for every algorithm.
    assert_as_by_loop(name, CASES[case], forward_mode=TAKEN.index((name, case)) % 4 == 0)


def test_pointwise_multiplies_kernel_gradients_either_way() -> None:
    # That of each has the right value is what test_values_and_derivatives shows.
    assert pointwise.turned(CASES["1x1 on many positions"].spec())
    assert not pointwise.turned(CASES["1x1"].spec())


def test_errors_of_long_sums_stay_small() -> None:
    """1,024 terms in groups have 0.3 times the error of a sum one by one."""
    terms = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)

    def by_loop(terms: Array) -> Array:
        zero = jnp.zeros(terms.shape[1:], terms.dtype)
        return loops.sum_over(
            len(terms), zero, lambda i: lax.dynamic_index_in_dim(terms, i, 0, False)
        )

    error = np.asarray(jax.jit(by_loop)(terms)) - terms.sum(0, dtype=np.float64)
    one_by_one = np.cumsum(terms, 0)[-1] - terms.sum(0, dtype=np.float64)
    assert np.sqrt(np.mean(error**2)) < 0.5 * np.sqrt(np.mean(one_by_one**2))


MANY_TAPS = (
    make_case("one axis", (2, 140, 1), (131, 1, 1), padding=((3, 4),)),
    make_case("strided", (1, 90, 3), (64, 3, 2), (2,), "VALID"),
    make_case("rows", (2, 15, 17, 4), (9, 11, 1, 8), rhs_dilation=(1, 2), feature_group_count=4),
    make_case("columns", (1, 20, 9, 2), (19, 4, 2, 1), (2, 1)),
    make_case("3d", (1, 6, 7, 8, 4), (3, 4, 3, 4, 2)),
)


@pytest.mark.parametrize("case", MANY_TAPS, ids=lambda case: case.name)
def test_shift_sums_many_taps_by_blocks(case: Case) -> None:
    spec = case.spec()
    terms = spec.taps * spec.rhs_shape[-2]
    _, blocks = shift.blocks_of(spec)
    assert terms > shift.UNROLL
    assert all(math.prod(taps) * spec.rhs_shape[-2] <= shift.TERMS_OF_BLOCK for *_, taps in blocks)
    assert_as_by_loop("shift", case)


EVERYTHING = {"lhs_dilation": (1, 2), "rhs_dilation": (2, 1), "feature_group_count": 4}
PADS = ((1, -1), (2, 0))
PLANES = (
    make_case("2d", (3, 4, 9, 8), (4, 1, 3, 2), (2, 1), PADS, None, **EVERYTHING),
    make_case("1d", (2, 3, 9), (3, 1, 4), None, "SAME", None, feature_group_count=3),
    make_case("3d", (1, 2, 5, 4, 6), (2, 1, 2, 3, 2), None, "SAME", None, feature_group_count=2),
    make_case("in batch", (6, 3, 7, 6), (2, 3, 3, 3), None, "SAME", None, batch_group_count=2),
)


@pytest.mark.parametrize("case", PLANES, ids=lambda case: case.name)
@pytest.mark.parametrize("copied", [0, shift.COPIED], ids=["image by image", "at once"])
def test_shift_by_planes(case: Case, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "COPIED", copied)
    spec = prepared(case.spec())
    assert spec.channels_first
    assert shift.by_planes(spec) == (case.name != "in batch")
    assert_as_by_loop("shift", case)


# The kernel's spatial axes, input and output channels in the order of memory.
ORDERS = {"HWIO": "xIO", "OIHW": "OIx", "HWOI": "xOI", "IOHW": "IOx", "HIWO": "xIO"}
ORDERED = (
    ("winograd", (2, 8, 9, 17), (3, 3, 17, 19), 1),
    ("winograd", (1, 20, 6, 3), (3, 1, 3, 4), 1),
    ("im2col", (1, 4, 3, 5), (3, 2, 5, 30), 1),  # fewer positions than output channels
    ("im2col", (2, 8, 7, 5), (3, 2, 5, 4), 2),
    ("pointwise", (2, 5, 4, 7), (1, 1, 7, 9), 1),
    ("pointwise", (1, 6, 4, 5), (2, 2, 5, 20), 2),
    ("pointwise", (3, 6, 8, 5), (2, 2, 5, 4), 2),
    ("shift", (1, 6, 5, 2), (3, 3, 2, 4), 1),
    ("implicit", (1, 6, 5, 4), (3, 3, 4, 5), 1),
)
LAYOUTS = [("NCHW", "OIHW"), *(("NHWC", letters) for letters in ORDERS if letters != "OIHW")]


# By default each row once with a kernel that has its taps last, and a part of the others.
@pytest.mark.parametrize(
    ("image", "letters", "name", "lhs", "rhs", "stride"),
    [
        pytest.param(*order, *row, marks=[pytest.mark.exhaustive] * (i > 0 and (i + j) % 5 > 0))
        for i, order in enumerate([("NHWC", "OIHW"), *LAYOUTS])
        for j, row in enumerate(ORDERED)
    ],
)
def test_kernels_in_any_order_of_memory(
    name: str,
    lhs: tuple[int, ...],
    rhs: tuple[int, ...],
    stride: int,
    letters: str,
    image: str,
) -> None:
    shape = tuple(lhs["NHWC".index(letter)] for letter in image)
    kernel = tuple(rhs["HWIO".index(letter)] for letter in letters)
    numbers = (image, letters, image)
    case = make_case("", shape, kernel, (stride, stride), ((0, 0), (0, 0)), numbers)
    order = ORDERS[letters]
    if math.prod(rhs[:2]) == 1:
        order = "xIO" if letters.index("I") < letters.index("O") else "xOI"
    assert case.spec().kernel_order == order
    assert_as_by_loop(name, case)


# Batches of two images, of two of both operands, and of two kernels inside a loop over the images.
BATCHES: dict[str, Callable[[Conv], Conv]] = {
    "vmap lhs": lambda conv: lambda lhs, rhs: jax.vmap(conv, (0, None))(lhs, rhs[1]),
    "vmap both": jax.vmap,
    "vmap rhs in scan": lambda conv: (
        lambda lhs, rhs: lax.scan(
            lambda _, x: (None, jax.vmap(conv, (None, 0))(x, rhs)), None, lhs
        )[1]
    ),
}


@functools.cache
def expected_batches(name: str) -> tuple[np.ndarray, np.ndarray, list[list[Expected]]]:
    """Two of each operand of a case, and the convolution of each pair."""
    case = CASES[name]
    lhs, rhs = (np.stack(pair) for pair in zip(case.operands(), case.operands(seed=1), strict=True))
    length = expected_derivatives(name)[1]["out"].length

    def expected(x: np.ndarray, w: np.ndarray) -> Expected:
        return Expected(case.loop(x, w), case.loop(np.abs(x), np.abs(w)), length)

    return lhs, rhs, [[expected(x, w) for w in rhs] for x in lhs]


@pytest.mark.usefixtures("loops_early")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(("name", "case"), TAKEN)
def test_vmap_and_scan(name: str, case: str, kind: str) -> None:
    lhs, rhs, expected = expected_batches(case)
    out = jax.jit(BATCHES[kind](conv_by(name, CASES[case])))(lhs, rhs)
    for i, j in itertools.product(range(2), range(2)):
        if kind == "vmap rhs in scan":
            expected[i][j].check(out[i, j], name)
        elif j == (1 if kind == "vmap lhs" else i):
            expected[i][j].check(out[i], name)


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_refuses_with_its_reason(name: str, case: str) -> None:
    spec = CASES[case].spec()
    reason = jaxconv.ALGORITHMS[name].unsupported(prepared(spec))
    assert reason
    operands = CASES[case].operands()
    with pytest.raises(jaxconv.UnsupportedConvError, match=re.escape(reason)) as raised:
        conv_by(name, CASES[case])(*operands)
    assert re.search(rf"conv_general_dilated.*'{name}'.*algorithm='auto'", str(raised.value))
    with pytest.raises(jaxconv.UnsupportedConvError, match=re.escape(reason)):
        jax.eval_shape(
            lambda *pair: apply(
                jaxconv.ALGORITHMS[name], *pair, spec, lambda *_: pytest.fail("it hands nothing on")
            ),
            *operands,
        )


@pytest.mark.parametrize("name", ["winograd", "winograd4", "fft"])
def test_transforms_refuse_what_must_be_exact(name: str) -> None:
    case = CASES["3x3"]
    for dtype, computed in (("int32", "int32"), ("bool", "int32"), ("complex64", "complex64")):
        reason = unsupported(jaxconv.ALGORITHMS[name], case.spec(jnp.dtype(dtype)))
        assert (name, dtype) == ("fft", "complex64") or computed in str(reason)
    operands = case.operands(np.float32)
    refused = pytest.raises(jaxconv.UnsupportedConvError, match="'highest'")
    for precision in ("highest", ("default", "highest"), lax.Precision.HIGHEST):
        with refused:
            conv_by(name, case, precision=precision)(*operands)
    with jax.default_matmul_precision("highest"), refused:
        conv_by(name, case)(*operands)


def test_many_phases_are_one_convolution() -> None:
    assert_as_by_loop(
        "phase",
        case_of((2, 3, 2, 2), (18, 16, 2, 3), None, ((4, 11), (9, 0)), lhs_dilation=(9, 8)),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernels_gradient_is_one_convolution(groups: int) -> None:
    """Of output and image exchanged; here with taps apart, and borders cut off."""
    arguments = {"lhs_dilation": (2, 3), "rhs_dilation": (1, 2), "feature_group_count": groups}
    case = case_of((2, 5, 6, 4), (3, 4, 4 // groups, 6), None, ((-1, 2), (2, -2)), **arguments)
    assert_as_by_loop("phase", case)
    phase = jaxconv.ALGORITHMS["phase"]
    assert len(phase.parts(prepared(case.spec().kernel_gradient))) == 1
    many = case.spec().replace(lhs_dilation=(9, 8))
    assert phase.unsupported(many)
    assert not phase.unsupported(prepared(many.kernel_gradient))


def test_phases_that_differ_are_limited() -> None:
    case = case_of((1, 4, 2), (141, 2, 2), None, ((17, 150),), lhs_dilation=(70,))
    reason = jaxconv.ALGORITHMS["phase"].unsupported(case.spec())
    assert reason == "70 phases to compile; it takes at most 64"


GROUPS = case_of((1, 9, 9, 9, 6), (3, 3, 3, 2, 3), feature_group_count=3)


@functools.cache
def compiled_groups(name: str) -> Conv:
    return jax.jit(conv_by(name, GROUPS))


@pytest.mark.parametrize("name", ["fft", "winograd4"])
@pytest.mark.parametrize("at", [(0, 0, 0, 0, 5), (0, 8, 8, 8, 4), (0, 8, 0, 4, 2), (0, 4, 4, 8, 0)])
def test_nan_in_any_group_and_at_any_end(name: str, at: tuple[int, ...]) -> None:
    """What an algorithm spreads is looked for in each group, at the end of each axis too."""
    lhs, rhs = GROUPS.operands(np.float32)
    lhs[at] = np.nan
    out = compiled_groups(name)(lhs, rhs)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(GROUPS.loop(lhs, rhs)))


@pytest.mark.usefixtures("loops_early")
@pytest.mark.parametrize("name", jaxconv.ALGORITHMS)
def test_an_algorithm_is_differentiable_jax(name: str) -> None:
    """Without the primitive, under JAX's own rules for what the function is made of."""
    case = {"pointwise": "patchify", "phase": "transposed"}.get(name, "grouped")
    args, expected = expected_derivatives(case)
    convolve = functools.partial(run, algorithm="im2col", platform="cpu")

    def conv(lhs: Any, rhs: Any) -> Array:
        return apply(jaxconv.ALGORITHMS[name], lhs, rhs, CASES[case].spec(), convolve)

    jaxpr = jax.make_jaxpr(conv)(*args[:2])
    assert "jaxconv" not in {eqn.primitive.name for eqn in jaxpr.eqns}
    for key, out in jax.jit(derivatives(conv))(*args).items():
        expected[key].check(out, name)


KEPT_APART = [
    (name, case)
    for name, case in TAKEN
    if name not in ("auto", "xla", "winograd", "winograd4", "fft")
    and case in ("1d", "1d long kernel", "3x3", "3x3 stride 2", "depthwise", "grouped", "3d dense")
]


# Bytes of a tile: of a row of an image, of some rows that don't divide it, of images.
TILES = 1, 10_000, 20_000


@pytest.mark.parametrize("size", TILES)
@pytest.mark.parametrize(
    "case", ["1d", "3x3", "5x4 lower", "atrous", "transposed", "grouped", "nchw", "3d"]
)
def test_gradients_in_tiles(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(im2col_tiled, "GRADIENT_BYTES", size)
    monkeypatch.setattr(im2col_tiled, "MOST", 9)
    args, expected = expected_derivatives(case)
    conv = conv_by("im2col_tiled", CASES[case])
    outs = jax.jit(lambda *args: derivatives(conv, False)(*args)["rhs gradient"])(*args)
    expected["rhs gradient"].check(outs)


def test_gradients_share_taps_where_it_gathers_less() -> None:
    def shared(*shapes: Any, **arguments: Any) -> int:
        return im2col_tiled.Tiles.of(case_of(*shapes, **arguments).spec(np.float32)).shared

    few = (4, 32, 32, 8), (5, 3, 8, 8)
    assert shared(*few) == 5
    assert shared(*few, precision="highest") == shared(*few, strides=(2, 1)) == 1
    assert shared((4, 32, 32, 2), (3, 3, 2, 16)) == 1  # many outputs
    assert shared((4, 4, 32, 8), (3, 3, 8, 8)) == 1  # few rows
    assert shared((4, 32, 32, 8), (3, 3, 4, 8), feature_group_count=2) == 1


@pytest.mark.parametrize(("name", "case"), KEPT_APART)
def test_inf_stays_where_it_belongs_in_gradients(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No zeros that fill a block or a tile meet it: their product would be NaN."""
    monkeypatch.setattr(shift, "ROWS", 2)
    monkeypatch.setattr(shift, "ROWS_OF_LINE", (2,))
    monkeypatch.setattr(im2col_tiled, "tile_rows", lambda spec: min(2, spec.out_spatial[0]))
    monkeypatch.setattr(im2col_tiled, "GRADIENT_BYTES", 1)
    highest = {"precision": "highest"} if name == "im2col_tiled" else {}
    conv = conv_by(name, CASES[case], **highest)
    lhs, rhs = CASES[case].operands(np.float64)
    cotangent = np.random.default_rng(1).standard_normal(CASES[case].spec().out_shape)

    @jax.jit
    def gradients(lhs: Any, cotangent: Any) -> Any:
        return jax.vjp(conv, lhs, rhs)[1](cotangent)

    # The image and the kernel's gradient, the cotangent and the image's.
    for operand, array in enumerate((lhs, cotangent)):
        rows = [(0, row, *(0 for _ in array.shape[2:])) for row in range(array.shape[1])]
        for at in (*rows, tuple(size - 1 for size in array.shape)):
            found = []
            for others, value in ((0, 1), (1, 0), (1, np.inf)):
                arrays = [lhs, cotangent]
                arrays[operand] = others * array
                arrays[operand][at] = value
                found.append(gradients(*arrays)[1 - operand])
            seen, clean, out = found
            expected = np.where(seen != 0, np.copysign(np.inf, seen), clean)
            np.testing.assert_allclose(out, expected, 1e-9, 1e-9)
