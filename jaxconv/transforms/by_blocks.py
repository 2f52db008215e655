"""``by_blocks``: chains of operations that keep images apart, run by blocks of the batch.

The function is traced with the whole batch and with a block of it. What differs in the leading axis
only is one value for each image; an operation known to compute each image from itself alone may run
block by block. Where such operations follow one another and what lies between them outgrows the
cache, they become a loop over the blocks.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

from jaxconv.arguments.errors import fail, of_function
from jaxconv.compat import Literal, Primitive

R = TypeVar("R")

# Bytes of a value of the whole batch that outgrows the cache, and of a value of a block. 1×1,
# activation, depthwise, activation, 1×1 image by image, batch 8, on AMD Zen 4: 1.9 times as fast
# with 38 MB between them (112×112, 16→96 channels), 1.4 times with 14 MB (56×56, 24→144), no faster
# with 5 MB (28×28, 32→192).
OUTGROWN, BLOCK = 8 << 20, 4 << 20

# Input channels from which a dense kernel of several taps is faster with more images: ResNet-50 at
# batch 8 took 1.01 (JAX 0.12) and 1.15 times (0.10) as long with its 3×3 convolutions in chains.
MANY_CHANNELS = 16

# Operations whose output has at each position what the inputs have there (an axis of
# length 1 is repeated).
ELEMENTWISE = """abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf
    erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min
    mul ne neg not or pow reduce_precision rem round rsqrt select_n sign sin sqrt square sub tan
    tanh xor"""
REDUCTIONS = "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum"
WINDOWS = "reduce_window_max reduce_window_min reduce_window_sum"
CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
CONVOLUTIONS = frozenset({"conv_general_dilated", "jaxconv"})
# Operations that run the jaxpr in their parameters once, as written.
OPENED = frozenset({"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"})
# Parameters that are shapes, or parts of them.
SHAPES = frozenset({"shape", "new_sizes", "limit_indices"})


@of_function
def by_blocks(fn: Callable[..., R], *, argnum: int = 0) -> Callable[..., R]:
    """A function like ``fn`` that runs chains of its operations by blocks of the batch.

    Where what lies between the layers of a network outgrows the cache, it is faster to take a few
    images through several layers, then the next ones, than the whole batch through each layer.
    MobileNetV2 at batch 8 runs 1.15 times as fast so, and needs a quarter of the memory.
    Convolutions, products with parameters, elementwise operations, pooling, padding and sums inside
    an image may be in a chain; anything that mixes images is run on the whole batch, and so is all
    that fits the cache.

    It is for inference on CPU, on one device: derivatives are those of ``fn`` itself, on the whole
    batch, since a training step keeps every value for the gradients and gains nothing; so is
    everything on other platforms. Use it inside ``jax.jit``. Values are those of ``fn`` up to
    rounding.

    Args:
      fn: a pure function of arrays and pytrees of arrays, by position. What is differentiated must
        be an argument, not a variable of an outer function.
      argnum: which argument is the batch: an array whose leading axis counts the images, or a
        pytree of such arrays.

    Returns:
      A function with the same arguments and results.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: there is no such argument, or its leading axes differ.

    Example:
      >>> import jax, jax.numpy as jnp, jaxconv
      >>> def forward(params, images):
      ...     return jax.nn.relu(jaxconv.conv(images, params)).mean((1, 2))
      >>> forward = jax.jit(jaxconv.by_blocks(forward, argnum=1))
      >>> forward(jnp.ones((3, 3, 16, 96)), jnp.ones((8, 64, 64, 16))).shape
      (8, 96)
    """
    if not isinstance(argnum, int):
        fail("by_blocks", "argnum must be an integer", repr(argnum), "give the batch's", TypeError)

    @jax.custom_jvp
    def blocked(*args: Any) -> Any:
        return _run(fn, argnum, args)

    blocked.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))

    @functools.wraps(fn, updated=())
    def by_position(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            constraint, given = "fn's arguments must be given by position", f"{next(iter(kwargs))}="
            fail("by_blocks", constraint, given, "leave out the names", TypeError)
        return blocked(*args)

    return by_position


def _run(fn: Callable[..., Any], argnum: int, args: tuple[Any, ...]) -> Any:
    if not -len(args) <= argnum < len(args):
        given = f"{argnum} of {len(args)} arguments"
        fail("by_blocks", "argnum must be an argument's position", given, "give the batch's")
    leaves, tree = jax.tree.flatten(args)
    batch = jax.tree.leaves(args[argnum])
    first = len(jax.tree.leaves(args[: argnum % len(args)]))
    sizes = {x.shape[0] if getattr(x, "shape", ()) else 0 for x in batch}
    images = max(sizes, default=0)
    if len(sizes) != 1 or (images == 0 and not all(getattr(x, "shape", ()) for x in batch)):
        fail(
            "by_blocks",
            "the batch must be arrays with the same number of images along their leading axes",
            ", ".join(str(getattr(x, "shape", x)) for x in batch) or "no array",
            "give another argnum",
        )
    which = range(first, first + len(batch))
    if jax.default_backend() != "cpu" or images < 2:
        return fn(*args)

    def results(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves)))

    def program(count: int) -> Any:
        shapes = [
            jax.ShapeDtypeStruct(
                (count, *x.shape[1:]) if i in which else x.shape, x.dtype, weak_type=x.weak_type
            )
            for i, x in enumerate(map(jax.typeof, leaves))
        ]
        return jax.make_jaxpr(lambda *leaves: _opened(results, leaves))(*shapes)

    try:
        whole = program(images)
        count = Chains(whole, program(1), images).block()
        chains = None if count is None else Chains(whole, program(count), images)
    except Exception:  # the user's, such as a shape that only the whole batch can be brought to
        chains = None
    if chains is None or not chains.alike:
        return fn(*args)
    out = jax.tree.structure(jax.eval_shape(fn, *args))
    return jax.tree.unflatten(out, chains.run(leaves))


class _CarriesFunctions(Exception):
    """An operation, such as shard_map, calls functions in a way of its own."""


def _opened(fn: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    """``fn(*args)``, a list, with the operations inside ``jit`` and activations as its own."""

    def run(jaxpr: Any, consts: Any, args: Sequence[Any]) -> list[Any]:
        values = _Values(jaxpr, consts, args)
        for eqn in jaxpr.eqns:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in OPENED and inner is not None:
                inputs = [values[v] for v in eqn.invars]
                out = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
                values.update(zip(eqn.outvars, out, strict=True))
            elif type(eqn.primitive).get_bind_params is not Primitive.get_bind_params:
                raise _CarriesFunctions
            else:
                values.bind(eqn)
        return [values[v] for v in jaxpr.outvars]

    closed = jax.make_jaxpr(fn)(*args)
    return run(closed.jaxpr, closed.consts, args)


class _Values(dict[Any, Any]):
    """The values of a jaxpr's variables."""

    def __init__(self, jaxpr: Any, consts: Any, args: Sequence[Any]) -> None:
        super().__init__(zip(jaxpr.constvars, consts, strict=True))
        self.update(zip(jaxpr.invars, args, strict=True))

    def __getitem__(self, v: Any) -> Any:
        return v.val if isinstance(v, Literal) else super().__getitem__(v)

    def bind(self, eqn: Any, params: dict[str, Any] | None = None) -> None:
        """Computes an operation's outputs, with other parameters than its own if given."""
        inputs = [self[v] for v in eqn.invars]
        out = eqn.primitive.bind(*inputs, **(params or eqn.params))
        self.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


@dataclasses.dataclass(frozen=True)
class Chains:
    """Which operations of a program run by blocks.

    Attributes:
      whole, part: jaxprs of the program for all images, and for a block of them.
      images: of the whole.
    """

    whole: Any
    part: Any
    images: int

    @functools.cached_property
    def alike(self) -> bool:
        """Whether both have the same operations, in the same order."""
        whole, part = ([e.primitive for e in x.jaxpr.eqns] for x in (self.whole, self.part))
        return whole == part

    @functools.cached_property
    def each(self) -> set[Any]:
        """The variables of the whole that hold one value for each image."""

        def differs(v: Any, w: Any) -> bool:
            a, b = v.aval.shape, w.aval.shape
            return a != b and a[:1] == (self.images,) and a[1:] == b[1:]

        return {v for v, w in self._pairs() if differs(v, w)}

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        whole, part = self.whole.jaxpr, self.part.jaxpr
        yield from zip(whole.invars, part.invars, strict=True)
        for e, f in zip(whole.eqns, part.eqns, strict=True):
            yield from zip(e.outvars, f.outvars, strict=True)

    @functools.cached_property
    def kinds(self) -> list[str]:
        """For each operation: "apart" if it keeps the images apart, "free" if it has to do with
        none, else "mixing"."""
        found = []
        for e, f in zip(self.whole.jaxpr.eqns, self.part.jaxpr.eqns, strict=True):
            of_images = [v for v in e.invars if not isinstance(v, Literal) and v in self.each]
            pairs = zip(e.outvars, f.outvars, strict=True)
            known = all(v in self.each or v.aval.shape == w.aval.shape for v, w in pairs)
            same = all(e.params[key] == f.params[key] for key in e.params if key not in SHAPES)
            if known and same and not of_images and not self.each & set(e.outvars):
                found.append("free")
            elif known and same and self.each >= set(e.outvars) and apart(e, of_images):
                found.append("apart")
            else:
                found.append("mixing")
        return found

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Indices of the first operation of each chain, and of the first one behind it: between
        operations that mix images, from the first to the last that reads or writes a value that
        outgrows the cache."""
        runs = []
        indices = range(len(self.kinds))
        for mixing, group in itertools.groupby(indices, lambda i: self.kinds[i] == "mixing"):
            large = [i for i in group if not mixing and self._outgrows(i)]
            if large and self._pays(large[0], large[-1] + 1):
                runs.append((large[0], large[-1] + 1))
        return runs

    def _pays(self, start: int, end: int) -> bool:
        """Whether a chain spares more than it costs: the results of convolutions and products that
        stay in it, against what it reads and writes, which is copied. Without this, ResNet-50 at
        batch 8 took 1.02 times as long, and needed 1.4 times the memory."""
        entering, leaving = self.edges(start, end)
        inside = [
            v
            for eqn in self.whole.jaxpr.eqns[start:end]
            if eqn.primitive.name in (*CONVOLUTIONS, "dot_general")
            for v in eqn.outvars
            if v in self.each and v not in leaving
        ]
        return sum(map(size_of, inside)) > sum(map(size_of, (*entering, *leaving)))

    def edges(self, start: int, end: int) -> tuple[list[Any], list[Any]]:
        """The values of images that a chain reads, and those of its own that are needed behind."""
        eqns, jaxpr = self.whole.jaxpr.eqns, self.whole.jaxpr
        chain = [eqns[i] for i in range(start, end) if self.kinds[i] == "apart"]
        made = dict.fromkeys(v for eqn in chain for v in eqn.outvars)
        read = dict.fromkeys(v for eqn in chain for v in eqn.invars if not isinstance(v, Literal))
        behind = [v for eqn in eqns[end:] for v in eqn.invars] + list(jaxpr.outvars)
        needed = {v for v in behind if not isinstance(v, Literal)}
        entering = [v for v in read if v in self.each and v not in made]
        return entering, [v for v in made if v in needed]

    def _outgrows(self, i: int) -> bool:
        eqn = self.whole.jaxpr.eqns[i]
        touched = (v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal))
        large = any(v in self.each and size_of(v) > OUTGROWN for v in touched)
        return large and self.kinds[i] == "apart"

    def block(self) -> int | None:
        """The number of images that are best taken at a time; None where nothing is gained."""
        if not self.alike or not self.runs:
            return None
        eqns = self.whole.jaxpr.eqns
        values = [v for start, end in self.runs for eqn in eqns[start:end] for v in eqn.outvars]
        image = max(size_of(v) for v in values if v in self.each) / self.images
        fit = max(1, int(BLOCK / image))
        count = max(n for n in range(1, min(fit, self.images) + 1) if self.images % n == 0)
        return count if count < self.images else None

    def run(self, args: Sequence[Any]) -> list[Any]:
        """The results, chains by blocks."""
        jaxpr = self.whole.jaxpr
        values, ends = _Values(jaxpr, self.whole.consts, args), dict(self.runs)
        start = 0
        while start < len(jaxpr.eqns):
            end = ends.get(start, start + 1)
            if end > start + 1:
                self._run_chain(values, start, end)
            else:
                values.bind(jaxpr.eqns[start])
            start = end
        return [values[v] for v in jaxpr.outvars]

    def _run_chain(self, values: _Values, start: int, end: int) -> None:
        eqns, blocks = self.whole.jaxpr.eqns, self.part.jaxpr.eqns
        chain = [i for i in range(start, end) if self.kinds[i] == "apart"]
        for i in range(start, end):
            if self.kinds[i] == "free":
                values.bind(eqns[i])
        entering, leaving = self.edges(start, end)
        count = blocks[chain[0]].outvars[0].aval.shape[0]

        def block(arrays: list[Any]) -> list[Any]:
            inside = copy.copy(values)
            inside.update(zip(entering, arrays, strict=True))
            for i in chain:
                inside.bind(eqns[i], blocks[i].params)
            return [inside[v] for v in leaving]

        cut = [values[v].reshape(self.images // count, count, *v.aval.shape[1:]) for v in entering]
        out = lax.map(block, cut)
        values.update((v, x.reshape(v.aval.shape)) for v, x in zip(leaving, out, strict=True))


def size_of(v: Any) -> int:
    """Bytes of a variable's value."""
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize


def gains_by_batch(shape: Sequence[int], spec: Sequence[int]) -> bool:
    """Whether a convolution by a kernel of this shape is best done for all images at once."""
    _, channels, *taps = (shape[axis] for axis in spec)
    return channels >= MANY_CHANNELS and math.prod(taps) > 1


def apart(eqn: Any, of_images: Sequence[Any]) -> bool:
    """Whether an operation computes each image of its outputs from the same one of its inputs.

    Args:
      eqn: an equation whose outputs hold one value for each image.
      of_images: those of its inputs that do.
    """
    name, params = eqn.primitive.name, eqn.params
    only_first = list(of_images) == [eqn.invars[0]]
    if name in ELEMENTWISE.split():
        return all(v.aval.ndim == eqn.outvars[0].aval.ndim for v in of_images)
    if name in CONVOLUTIONS:
        numbers = params["dimension_numbers"]
        leading = numbers.lhs_spec[0] == numbers.out_spec[0] == 0
        alone = only_first and leading and params["batch_group_count"] == 1
        return alone and not gains_by_batch(eqn.invars[1].aval.shape, numbers.rhs_spec)
    if name == "dot_general":
        (summed, _), (batched, _) = params["dimension_numbers"]
        return only_first and not batched and 0 not in summed
    if name == "broadcast_in_dim":
        return not of_images or params["broadcast_dimensions"][:1] == (0,)
    if name == "reshape":  # its leading axis counts the images before and after
        return params["dimensions"] is None
    if name == "transpose":
        return params["permutation"][0] == 0
    if name in REDUCTIONS.split():
        return 0 not in params["axes"]
    if name in CUMULATIVE.split():
        return params["axis"] != 0
    if name in WINDOWS.split():
        ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        return params["padding"][0] == (0, 0) and all(params[key][0] == 1 for key in ones)
    if name == "pad":
        return only_first and tuple(params["padding_config"][0]) == (0, 0, 0)
    if name == "slice":
        strides = params["strides"]
        return params["start_indices"][0] == 0 and (strides is None or strides[0] == 1)
    if name == "concatenate":
        return params["dimension"] != 0
    if name in ("squeeze", "rev"):
        return 0 not in params["dimensions"]
    return False
