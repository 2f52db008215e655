"""Real convolutions of a photograph by every algorithm, for ``jaxconv compare``."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from PIL import Image, ImageOps

import jaxconv
from jaxconv import tables
from jaxconv.bench.cases import Layer, alike
from jaxconv.bench.measure import Effort, Result, measure, reference
from jaxconv.bench.measure import table as results_table
from jaxconv.planning.plan import Candidate, Plan, plan_spec
from jaxconv.planning.timing import Compiled

# Seconds for an algorithm on a convolution, and the numbers of pairs that are needed and that are
# enough, unless the user says how many. In total this takes a minute on two cores.
BUDGET, FEWEST, ENOUGH = 0.3, 5, 20
SLOW = 1.0  # seconds of a call above which an algorithm is not measured, unless the user says so
# Intermediate bytes above which it is not run: only large photographs could exhaust memory.
WORKSPACE_LIMIT = 4 << 30


class Convolution(NamedTuple):
    layer: Layer
    image: Array
    kernel: Array


def load(path: Path | None, size: int) -> tuple[np.ndarray, str]:
    """A photograph (h, w, 3) in 0…1, scaled down to ``size`` pixels of the long side, and its
    caption; None for the portrait of scikit-image. OSError where it can't be read."""
    if path is None:
        from skimage.data import astronaut

        photograph, name = Image.fromarray(astronaut()), "astronaut (from scikit-image)"
    else:
        photograph, name = _open(path), path.name
    width, height = photograph.size
    photograph.thumbnail((size, size), Image.Resampling.LANCZOS)  # shrinks only, keeps the aspect
    caption = f"{name}, {width}×{height}"
    if photograph.size != (width, height):
        caption += " scaled to {}×{}".format(*photograph.size)
    return np.asarray(photograph, np.float32) / np.float32(255), caption


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as photograph:
            photograph = ImageOps.exif_transpose(photograph)
            if photograph.mode.startswith(("I", "F")):  # more than 8 bits, which "RGB" would clip
                grey = np.asarray(photograph, np.float32)
                grey = 255 * (grey - grey.min()) / max(float(np.ptp(grey)), 1e-9)
                photograph = Image.fromarray(np.rint(grey).astype(np.uint8))
            return photograph.convert("RGB")
    except OSError:
        raise
    except Exception as error:  # decoders raise various errors for damaged files
        raise OSError(f"not a readable image: {error}") from error


def convolutions(photograph: np.ndarray) -> tuple[Convolution, ...]:
    """The convolutions to compare, for a photograph (h, w, 3) in 0…1: three of itself, others of
    a ResNet's activations before its first block: stem, ReLU, 3×3 max-pooling with stride 2."""
    rgb = jnp.asarray(photograph[None], jnp.float32)
    grey = rgb @ jnp.asarray([[0.299], [0.587], [0.114]], jnp.float32)
    stem = _convolution("7×7 stem, stride 2, 3 → 64", rgb, _random(7, 7, 3, 64), 3, stride=2)
    lax_stem = stem.layer.function(lax.conv_general_dilated, "forward")
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    # Pooling with initial value zero includes ReLU.
    features = lax.reduce_window(
        lax_stem(rgb, stem.kernel, rgb), np.float32(0), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads
    )
    gauss = np.exp(-(np.arange(-5.0, 6.0) ** 2) / 8)  # σ = 2 pixels
    blur = np.outer(gauss, gauss) / gauss.sum() ** 2
    sobel = np.outer([1, 2, 1], [-1, 0, 1]) / 4  # the derivative along x
    tent = np.array([1, 3, 3, 1]) / 4  # interpolates to twice the size
    bilinear = np.outer(tent, tent)[:, :, None, None] * np.eye(64)  # each channel from itself
    return (
        _convolution("Depthwise 11×11 blur", rgb, np.stack([blur] * 3, -1)[:, :, None], 5),
        _convolution("Sobel pair, 3×3, 1 → 2", grey, np.stack([sobel, sobel.T], -1)[:, :, None], 1),
        stem,
        _convolution("3×3, 64 → 64", features, _random(3, 3, 64, 64), 1),
        _convolution("1×1, 64 → 256", features, _random(1, 1, 64, 256), 0),
        # The same convolution as lax.conv_transpose(x, kernel, (2, 2), "SAME").
        _convolution("Transposed 4×4, 2× up, 64 → 64", features, bilinear, 2, up=2),
    )


def _convolution(
    name: str, image: Array, kernel: np.ndarray, pad: int, stride: int = 1, up: int = 1
) -> Convolution:
    groups = image.shape[-1] // kernel.shape[2]
    spec = alike(image.shape, kernel.shape, groups, stride, (pad, pad), up, 1)
    return Convolution(Layer(name, spec), image, jnp.asarray(kernel, jnp.float32))


def _random(*shape: int) -> np.ndarray:
    """He et al.'s initial weights (2015), the same in each run: (kh, kw, c, o)."""
    kernel = np.random.default_rng(0).standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
    # Zero-mean filters respond to structure and not to brightness, as trained ones do.
    return kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)


class Comparison(NamedTuple):
    """One convolution by lax and by all algorithms."""

    convolution: Convolution
    plan: Plan
    output: np.ndarray  # in float64: (1, h, w, o)
    # Named by algorithm, the fastest first; "lax" against itself shows the noise. ``how`` is "→"
    # and the algorithm that "auto" chose, or "▸" for itself: the two have one measurement.
    results: tuple[Result, ...]
    refused: Mapping[str, str]  # why the other algorithms were not run


def compare(
    convolution: Convolution, algorithms: Sequence[str], repeats: int | None = None
) -> Iterator[str | Comparison]:
    """Measures a convolution by lax and by each algorithm, on JAX's default device: yields a
    description before each measurement, and the ``Comparison`` after them. There are ``repeats``
    pairs of calls, lax and the algorithm in turn; by default as many as fit ``BUDGET``, from
    ``FEWEST`` to ``ENOUGH``, and none by what is ``SLOW``."""
    effort, slow = Effort(ENOUGH, BUDGET, 0.0, FEWEST), SLOW
    if repeats is not None:
        effort, slow = Effort(repeats, math.inf, 0.0), math.inf
    layer, operands = convolution.layer, (convolution.image, convolution.kernel, None)
    plan = plan_spec(layer.spec, jax.default_backend())
    yield f"{layer.name}: lax"
    exact = reference(layer.spec, convolution.image, convolution.kernel)
    # The kernel is an argument: a constant would be folded into the compiled code.
    function = layer.function(lax.conv_general_dilated, "forward")
    baseline = Compiled(function, *operands)
    facts = {"name": "lax", "direction": "", "how": "", "tolerance": 1e-4}
    against = partial(measure, effort, baseline, exact=lambda: exact, **facts)
    by_lax = against(baseline, gemm=plan.spec.gemm)

    def result_of(candidate: Candidate, algorithm: str) -> Result | str:
        """A candidate, asked for as ``algorithm``; or the reason why it is not run."""
        if candidate.status == "unsupported":
            return str(candidate.reason)
        if candidate.workspace > WORKSPACE_LIMIT:
            return f"it would need {candidate.workspace / 2**30:.1f} GiB of intermediate arrays"
        function = layer.function(jaxconv.conv_general_dilated, "forward", algorithm=algorithm)
        try:
            subject = Compiled(function, *operands)
            if _program(subject) == _program(baseline):
                return dataclasses.replace(by_lax, gemm=candidate.gemm, is_lax=True)
            seconds = subject.call()
            if seconds > slow and candidate.name != plan.algorithm:
                return f"a call takes {seconds:.1f} s; with --repeats it is run"
            return against(subject, gemm=candidate.gemm)
        except jax.errors.JaxRuntimeError as error:  # out of memory, most likely
            return f"it failed: {str(error).splitlines()[0]}"

    measured: dict[str, Result | str] = {}
    results, refused = [by_lax], {}
    for name in algorithms:
        yield f"{layer.name}: {name}"
        runs = plan.algorithm if name == "auto" else name
        if runs not in measured:
            candidate = next(c for c in plan.candidates if c.name == runs)
            by_auto = runs == plan.algorithm and "auto" in algorithms
            measured[runs] = result_of(candidate, "auto" if by_auto else runs)
        result = measured[runs]
        if isinstance(result, str):
            refused[name] = result
        else:
            how = {"auto": f"→ {plan.algorithm}", plan.algorithm: "▸"}.get(name, "")
            results.append(dataclasses.replace(result, name=name, how=how))
    results.sort(key=lambda result: -result.quartiles()[1])
    yield Comparison(convolution, plan, exact, tuple(results), refused)


def _program(subject: Compiled) -> list[str]:
    """What XLA compiled, without names, which tell where its operations come from."""
    lines = (subject.compiled.as_text() or "").splitlines()
    return [re.sub(r"%[\w.-]+|, metadata={.*?}", "", line) for line in lines if " = " in line]


def table(comparison: Comparison) -> tables.Table:
    """A convolution by lax and by all algorithms, the fastest first."""
    plan = comparison.plan
    above = ["", comparison.convolution.layer.name]
    above.append(f"{plan.spec}: {plan.spec.flops / 1e6:,.1f} MFLOP")
    above.append(f"auto chose {plan.algorithm}: {plan.why}")
    below = [f"  {name} not run: {reason}" for name, reason in comparison.refused.items()]
    return dataclasses.replace(results_table(comparison.results), above=above, below=below)
