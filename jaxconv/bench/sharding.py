"""What programs for several devices move between them, by lax and by jaxconv.

On eight devices of the host. What is counted is in the compiled programs: nothing is timed. Both
gather a result at their end that does not divide by its devices, such as 28 rows.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxconv
from jaxconv import tables
from jaxconv.arguments.errors import fail
from jaxconv.bench.cases import Layer, layer_of
from jaxconv.bench.measure import Effort, difference
from jaxconv.bench.networks import NETWORKS, Network
from jaxconv.bench.programs import convolutions
from jaxconv.planning.choose import choose
from jaxconv.planning.timing import Compiled
from jaxconv.spec import ConvSpec
from jaxconv.transforms.primitive import Lowered, observers

# A mesh of two axes: along both, or each along another dimension.
MESH = {"a": 4, "b": 2}
DEVICES = math.prod(MESH.values())
ALL = tuple(MESH)

# The axes of the mesh along dimensions: "n" batch, "h" rows, "i" input and "o" output channels.
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "batch": {"n": ALL},
    "inputs": {"i": ALL},
    "outputs": {"o": ALL},
    "rows": {"h": ALL},
    "batch, rows": {"n": "a", "h": "b"},
    "batch, outputs": {"n": "a", "o": "b"},
}

_layer = partial(layer_of, "", 16)
LAYERS = (
    _layer(56, (32, 32), 3, name="3×3, 56×56×32"),
    # A size that no number of devices divides.
    layer_of("", 12, 57, (30, 44), 3, name="3×3, 12×57×57×30→44"),
    _layer(56, (32, 32), 3, padding=(0, 0), name="3×3 unpadded, 56×56×32"),
    _layer(56, (32, 64), 3, 2, name="3×3 stride 2, 56×56×32→64"),
    _layer(64, (3, 64), 7, 2, name="7×7 stride 2, 64×64×3→64"),
    _layer(56, (64, 32), 1, name="1×1, 56×56×64→32"),
    _layer(56, (64, 128), 1, 2, name="1×1 stride 2, 56×56×64→128"),
    _layer(64, (8, 96), 4, 4, name="patches 4×4, 64×64×8→96"),
    _layer(56, (64, 64), 3, 1, 64, name="depthwise 3×3, 56×56×64"),
    _layer(57, (64, 64), 3, 2, 64, name="depthwise stride 2, 57×57×64"),
    _layer(32, (16, 16), 31, 1, 16, name="depthwise 31×31, 32×32×16"),
    _layer(28, (128, 128), 3, 1, 32, name="3×3 in 32 groups, 28×28×128"),
    _layer(56, (32, 32), 3, padding=(4, 4), rhs_dilation=4, name="3×3 dilation 4, 56×56×32"),
    _layer(28, (32, 32), 4, up=True, name="4×4 transposed, 28×28×32"),
    _layer(1024, (64, 64), 3, 2, ndim=1, name="3 taps stride 2, 1024×64"),
    _layer(1024, (64, 64), 4, 1, 64, ndim=1, causal=2, name="depthwise causal, 1024×64"),
    _layer(16, (16, 32), 3, ndim=3, name="3×3×3, 16×16×16×16→32"),
    _layer(17, (16, 16), 3, 2, ndim=3, name="3×3×3 stride 2, 17×17×17×16"),
    _layer(56, (32, 32), 3, dtype="bfloat16", name="bfloat16 3×3, 56×56×32"),
    _layer(
        56,
        (32, 32),
        3,
        dtype="int8",
        out_dtype="int32",
        directions=("forward",),
        name="int8 3×3, 56×56×32",
    ),
)
HUGE = layer_of("", 8, (8192, 1024), (64, 64), 3, dtype="bfloat16", name="8 GiB of bfloat16, 3×3")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, or a network's training step, in a layout.

    Attributes:
      layout: of ``LAYOUTS``.
      computed: whether the values are computed and compared; else the programs are only compiled.
    """

    what: Layer | Network
    layout: str
    computed: bool = True

    @property
    def name(self) -> str:
        return f"{self.what.name}, {self.layout}"

    @property
    def directions(self) -> tuple[str, ...]:
        return self.what.directions if isinstance(self.what, Layer) else ("training step",)

    @property
    def specs(self) -> list[PartitionSpec]:
        """How a layer's image, kernel and output lie on the mesh."""
        assert isinstance(self.what, Layer)
        axes = LAYOUTS[self.layout]
        inputs, outputs = axes.get("i"), axes.get("o")
        kernel = [None] * self.what.ndim
        image = [axes.get("n"), axes.get("h"), *kernel[1:]]
        if self.what.groups > 1:  # input channels are cut by groups, and with them the others
            kernel, outputs = [*kernel, None], inputs or outputs
        else:
            kernel = [*kernel, inputs]
        return [
            PartitionSpec(*image, inputs),
            PartitionSpec(*kernel, outputs),
            PartitionSpec(*image, outputs),
        ]


CASES = (
    *(
        Case(layer, layout)
        for layer in LAYERS
        for layout, axes in LAYOUTS.items()
        # The three channels of a photograph are not cut.
        if "i" not in axes or layer.lhs_shape[-1] >= DEVICES
    ),
    *(Case(network, "batch", computed=False) for network in NETWORKS[:2]),
    *(Case(HUGE, layout, computed=False) for layout in ("batch", "rows")),
)

Collectives = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Moved:
    """One row of the suite.

    Attributes:
      name, layout, direction: the case.
      how: the algorithms planned for what a device computes, or "accelerate".
      lax, jaxconv: the collectives of each program and the bytes of their results on a device.
      workspace: bytes of intermediate arrays on a device, of lax and of jaxconv.
      differences: the largest of lax's and of jaxconv's result from lax's on one device, over the
        largest value; None if they are not computed.
      tolerance: their upper limit.
      failed: the error that jaxconv's program ended with; empty if there was none.
    """

    name: str
    layout: str
    direction: str
    how: str
    lax: Collectives
    jaxconv: Collectives
    workspace: tuple[int | None, int | None]
    differences: tuple[float, float] | None
    tolerance: float
    failed: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.layout}, {self.direction}"

    @property
    def more(self) -> tuple[int, int]:
        """Collectives and bytes of jaxconv beyond lax's."""
        if self.failed:
            return 0, 0
        return len(self.jaxconv) - len(self.lax), _bytes(self.jaxconv) - _bytes(self.lax)

    @property
    def lax_is_wrong(self) -> bool:
        return self.differences is not None and not self.differences[0] <= self.tolerance

    @property
    def wrong(self) -> str | None:
        """A message if jaxconv failed or its result disagrees with lax's on one device."""
        if self.failed:
            return f"{self.label}: {self.failed}"
        if self.differences is None or self.differences[1] <= self.tolerance:
            return None
        return (
            f"{self.label}: jaxconv is off by {self.differences[1]:.1e} of the largest value, more"
            f" than {self.tolerance:.0e}"
        )


def set_devices() -> None:
    """Makes this process have the devices.

    Raises:
      ValueError: JAX has started with fewer.
    """
    try:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    except RuntimeError:  # JAX has started
        found = len(jax.devices("cpu"))
        if found < DEVICES:
            fail(
                "bench",
                f"the suite sharding needs {DEVICES} CPU devices",
                f"{found} of a JAX that has started",
                "run it in a process of its own",
            )


def measure(case: Case, direction: str, effort: Effort) -> Moved:
    """Compiles both programs, and compares their results."""
    del effort  # nothing is timed
    devices = jax.devices("cpu")[:DEVICES]
    mesh = jax.make_mesh(tuple(MESH.values()), ALL, (AxisType.Auto,) * 2, devices=devices)
    by_lax, by_jaxconv, operands = _programs(case, direction, mesh)
    expected = _expected(case.what, direction) if case.computed else None
    baseline = Compiled(by_lax, *operands)
    planned: list[str] = []

    def observe(found: Lowered) -> None:
        auto = found.algorithm == "auto"
        planned.append(choose(found.spec, found.platform)[0] if auto else found.algorithm)

    subject, differences, failed = None, None, ""
    observers.append(observe)
    try:
        subject = Compiled(by_jaxconv, *operands)
        if case.computed:
            off = [difference(expected, program.run()) for program in (baseline, subject)]
            differences = off[0], off[1]
    except Exception as error:  # the other cases are still of interest
        failed = f"{type(error).__name__}: {error}"
    finally:
        observers.remove(observe)
    return Moved(
        case.what.name,
        case.layout,
        direction,
        "accelerate" if isinstance(case.what, Network) else ", ".join(sorted(set(planned))),
        collectives(baseline.compiled.as_text() or ""),
        collectives(subject.compiled.as_text() or "") if subject else (),
        (baseline.workspace, subject and subject.workspace),
        differences,
        _tolerance(convolutions(by_lax, *operands)),
        failed,
    )


@lru_cache(3)  # the directions of a layer, whose layouts follow each other
def _expected(layer: Layer, direction: str) -> Array:
    """The result on one device."""
    return jax.jit(layer.function(lax.conv_general_dilated, direction))(*layer.operands())


def _programs(
    case: Case, direction: str, mesh: Mesh
) -> tuple[Callable[..., Any], Callable[..., Any], Sequence[Any]]:
    """lax's, jaxconv's, and their operands."""

    def laid(x: Any, spec: PartitionSpec) -> Any:
        """An operand, laid as ``spec`` says where that cuts it evenly, else on each device."""
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(x.shape)
        except ValueError:
            sharding = NamedSharding(mesh, PartitionSpec())
        if case.computed:
            return jax.device_put(x, sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if isinstance(case.what, Network):
        network = case.what
        params = jax.eval_shape(network.init)
        images, labels = jax.eval_shape(lambda: network.data(4 * DEVICES))
        batch = PartitionSpec(ALL)
        operands = (
            jax.tree.map(lambda x: laid(x, PartitionSpec()), params),
            laid(images, batch),
            laid(labels, batch),
        )
        return network.step, jaxconv.accelerate(network.step), operands
    layer, specs = case.what, case.specs

    def within(conv: Callable[..., Array]) -> Callable[..., Array]:
        function = layer.function(conv, direction)

        def program(*operands: Array) -> Array:
            # Inside of a program arrays may be cut unevenly.
            shardings = [NamedSharding(mesh, spec) for spec in specs]
            return function(*map(lax.with_sharding_constraint, operands, shardings))

        return program

    shapes = layer.lhs_shape, layer.rhs_shape, layer.spec.out_shape
    operands = [jax.ShapeDtypeStruct(shape, layer.dtype) for shape in shapes]
    operands = layer.operands() if case.computed else operands
    by_lax, by_jaxconv = within(lax.conv_general_dilated), within(jaxconv.conv_general_dilated)
    return by_lax, by_jaxconv, tuple(map(laid, operands, specs))


def _tolerance(specs: Sequence[ConvSpec]) -> float:
    """What rounding explains: of sums in float32, and of results, or parts of them, that are
    narrower."""
    terms = max(spec.gemm[-1] for spec in specs)
    dtype = specs[0].out_dtype
    if not jnp.issubdtype(dtype, np.floating):
        return 0.0
    return 4 * float(jnp.finfo(np.float32).eps * math.sqrt(terms) + jnp.finfo(dtype).eps)


KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Of an operation that runs beside others, its end: the beginning's result has the operand in it.
COLLECTIVE = re.compile(rf"^\s*[^=]* = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE)


def collectives(text: str) -> Collectives:
    """Those in the text of a compiled program, and the bytes of their results.

    Those in a loop are counted once.
    """
    return tuple((kind, _size(result)) for result, kind in COLLECTIVE.findall(text))


def _size(result: str) -> int:
    """Bytes of an array, or of a tuple of them, in XLA's notation."""
    size = 0
    for bits, shape in re.findall(r"\b(?:[a-z]+(\d+)\w*|pred)\[([\d,]*)\]", result):
        size += int(bits or 8) * math.prod(map(int, filter(None, shape.split(",")))) // 8
    return size


def _bytes(moved: Collectives) -> int:
    return sum(size for _, size in moved)


HEADER = ("what", "layout", "direction", "how", "lax", "KiB", "jaxconv", "KiB", "")
FIGURES = range(4, 8)
SPARE = (3, 4, 6)
ABOVE = (
    "Collectives and the size of their results on a device, of lax's program and of jaxconv's.",
    "memory: of jaxconv's intermediate arrays, over lax's.",
    "",
)


def contents(rows: Sequence[Moved]) -> tables.Table:
    """A line for each row, and what they say."""
    above = [row.label for row in rows if max(row.more) > 0]
    below = [row for row in rows if max(row.more) <= 0 > min(row.more)]
    which = f": {'; '.join(above)}" if above else ""
    said = f"jaxconv moves more than lax in {len(above)} of {len(rows)}{which}."
    said += f" It moves less in {len(below)}."
    if wrong := sum(row.lax_is_wrong for row in rows):
        said += f" lax's own result is wrong in {wrong}."
    table = [HEADER, *map(_cells, rows)]
    return tables.Table(ABOVE, table, FIGURES, below=["", said], spare=SPARE)


def _cells(row: Moved) -> tuple[str, ...]:
    figures: list[str] = []
    for moved in (row.lax, row.jaxconv):
        size = _bytes(moved) / 1024
        figures += [str(len(moved)), f"{size:,.0f}" if size >= 100 else f"{size:.1f}"]
    by_lax, own = row.workspace
    remarks = {
        "FAILED": row.failed,
        "WRONG": row.wrong and not row.failed,
        "above": max(row.more) > 0,
        "lax wrong": row.lax_is_wrong,
    }
    shown = [remark for remark, applies in remarks.items() if applies]
    # What is computed is small, and free to take more.
    if row.differences is None and by_lax and own is not None:
        shown.append(f"memory {own / by_lax:.2f}")
    return row.name, row.layout, row.direction, row.how, *figures, ", ".join(shown)
