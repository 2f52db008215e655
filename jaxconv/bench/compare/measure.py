"""Measuring each algorithm against lax, and against float64."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxconv
from jaxconv.bench.compare.photograph import CONVOLUTIONS, Convolution, sources
from jaxconv.planning.plan import Plan
from jaxconv.planning.timing import Compiled, alternate

# Seconds of measuring an algorithm on a convolution, and pairs that are enough, where the user
# doesn't say how many. All of them then take half a minute on two cores, half of it compiling.
BUDGET = 0.3
ENOUGH = 20
# An algorithm that needs more intermediate bytes than this is not run: it could bring down the
# machine. Only photographs larger than the default size meet it.
WORKSPACE_LIMIT = 4 << 30


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One algorithm on one convolution. Without ``reason``, the rest is set, but for "lax".

    Attributes:
      name: of the algorithm; "auto", or "lax" for what all are compared with.
      reason: why it was not run, in words; None where it was.
      gemm: (count, m, n, k) of its matrix products, None where it has none.
      seconds: median time of a call.
      ratios: lax's time over this one's, of each pair of calls: above 1 is faster than lax. Empty
        for lax itself.
      compile_seconds: of tracing, lowering and compiling.
      workspace: bytes of intermediate arrays as compiled; None where the backend doesn't tell.
      error: the largest absolute error against float64.
    """

    name: str
    reason: str | None = None
    gemm: tuple[int, int, int, int] | None = None
    seconds: float = float("nan")
    ratios: tuple[float, ...] = ()
    compile_seconds: float = float("nan")
    workspace: int | None = None
    error: float = float("nan")

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third of ``ratios``."""
        low, high = np.quantile(self.ratios, (0.25, 0.75))
        return float(low), float(high)

    @property
    def ratio(self) -> float:
        """The median of ``ratios``; 1 for lax itself."""
        return float(np.median(self.ratios)) if self.ratios else 1.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One convolution by all algorithms: lax's measurement, then one for each algorithm.

    ``output`` is the convolution in float64: (1, h, w, o).
    """

    convolution: Convolution
    plan: Plan
    output: np.ndarray
    measurements: tuple[Measurement, ...]

    def label(self, name: str) -> str:
        """An algorithm's name; of "auto", what it chose too."""
        return f"auto → {self.plan.algorithm}" if name == "auto" else name


# Output rows at a time: what they sum stays in cache.
REFERENCE_ROWS = 16


def reference(x: np.ndarray, convolution: Convolution) -> np.ndarray:
    """The convolution of (1, h, w, c) in float64, one product per tap, in NumPy: (1, h', w', o).

    Not by lax: its float64 convolutions are scalar loops on CPU, which would take longer than all
    the rest, and they need JAX's 64-bit mode. This one shares no code with what it judges.
    """
    kernel = convolution.kernel.astype(np.float64)
    kh, kw, c, o = kernel.shape
    pad, stride, hole = convolution.pad, convolution.stride, convolution.lhs_dilation
    h, w = ((size - 1) * hole + 1 for size in x.shape[1:3])
    image = np.zeros((h + 2 * pad, w + 2 * pad, x.shape[-1]))
    image[pad : pad + h : hole, pad : pad + w : hole] = x[0]
    rows, columns = (image.shape[0] - kh) // stride + 1, (image.shape[1] - kw) // stride + 1
    out = np.zeros((rows, columns, o))
    groups = convolution.groups
    for top in range(0, rows, REFERENCE_ROWS):
        block = out[top : top + REFERENCE_ROWS]
        count = len(block)
        for i, j in np.ndindex(kh, kw):
            first = top * stride + i
            view = image[first : first + count * stride : stride, j : j + columns * stride : stride]
            for g in range(groups):
                outputs = slice(g * o // groups, (g + 1) * o // groups)
                matrix = view[..., g * c : (g + 1) * c].reshape(-1, c)
                product = matrix @ kernel[i, j, :, outputs]
                block[..., outputs] += product.reshape(count, columns, -1)
    return out[None]


def compare(
    photograph: np.ndarray,
    convolutions: Sequence[Convolution] = CONVOLUTIONS,
    algorithms: Sequence[str] | None = None,
    repeats: int | None = None,
) -> Iterator[str | Comparison]:
    """Measures each convolution of a photograph by each algorithm, on JAX's default device.

    Args:
      photograph: (h, w, 3) float32 in 0…1.
      convolutions: which.
      algorithms: names in ``jaxconv.ALGORITHMS``, and "auto"; default: "auto" and all.
      repeats: pairs of calls, lax and the algorithm in turn; default: as many as fit ``BUDGET``,
        from 1 to ``ENOUGH``.

    Yields:
      Before each measurement what it is, in words (``steps`` tells how many there will be), and
      after those of a convolution its ``Comparison``.
    """
    algorithms = ("auto", *jaxconv.ALGORITHMS) if algorithms is None else algorithms
    inputs = sources(photograph)
    for convolution in convolutions:
        yield f"{convolution.name}: lax"
        lhs, rhs = inputs[convolution.source], jnp.asarray(convolution.kernel)
        plan = jaxconv.plan(lhs, rhs, *convolution.arguments)
        exact = reference(np.asarray(lhs), convolution)
        baseline = _compiled(lax.conv_general_dilated, convolution, lhs, rhs)
        lax_seconds: list[float] = []
        rows = []
        for name in algorithms:
            yield f"{convolution.name}: {name}"
            rows.append(_measure(name, convolution, plan, baseline, exact, repeats, lax_seconds))
        if not lax_seconds:  # every algorithm refused
            baseline.call()
            lax_seconds.append(baseline.call())
        first = _measurement("lax", baseline, plan.spec.gemm, lax_seconds, (), exact)
        yield Comparison(convolution, plan, exact, (first, *rows))


def steps(convolutions: Sequence[Convolution], algorithms: Sequence[str] | None = None) -> int:
    """How many measurements ``compare`` announces."""
    count = len(jaxconv.ALGORITHMS) + 1 if algorithms is None else len(algorithms)
    return len(convolutions) * (1 + count)


def _compiled(
    function: Callable[..., Array],
    convolution: Convolution,
    lhs: Array,
    rhs: Array,
    **options: str,
) -> Compiled:
    # The kernel is an argument: a constant would be folded into the compiled code.
    return Compiled(
        lambda lhs, rhs: function(lhs, rhs, *convolution.arguments, **options), lhs, rhs
    )


def _measurement(
    name: str,
    compiled: Compiled,
    gemm: tuple[int, int, int, int] | None,
    seconds: Sequence[float],
    ratios: Sequence[float],
    exact: np.ndarray,
) -> Measurement:
    return Measurement(
        name,
        gemm=gemm,
        seconds=float(np.median(seconds)),
        ratios=tuple(ratios),
        compile_seconds=compiled.compile_seconds,
        workspace=compiled.workspace,
        error=float(np.max(np.abs(np.asarray(compiled.output) - exact))),
    )


def _measure(
    name: str,
    convolution: Convolution,
    plan: Plan,
    baseline: Compiled,
    exact: np.ndarray,
    repeats: int | None,
    lax_seconds: list[float],
) -> Measurement:
    """Measures one algorithm against ``baseline``, whose times are added to ``lax_seconds``."""
    runs = plan.algorithm if name == "auto" else name
    candidate = next(c for c in plan.candidates if c.name == runs)
    if candidate.reason is not None:
        return Measurement(name, reason=candidate.reason)
    if candidate.workspace > WORKSPACE_LIMIT:
        needs = f"{candidate.workspace / 2**30:.1f} GiB"
        return Measurement(name, reason=f"it would need {needs} of intermediate arrays")
    function = jaxconv.conv_general_dilated
    try:
        subject = _compiled(function, convolution, *baseline.args, algorithm=name)
        if repeats is None:
            pairs = alternate((baseline, subject), ENOUGH, BUDGET)
        else:
            pairs = alternate((baseline, subject), repeats)
    except jax.errors.JaxRuntimeError as error:  # out of memory, most likely
        return Measurement(name, reason=f"it failed: {str(error).splitlines()[0]}")
    lax_seconds += [pair[0] for pair in pairs]
    ratios = [reference / own for reference, own in pairs]
    return _measurement(name, subject, candidate.gemm, [own for _, own in pairs], ratios, exact)
