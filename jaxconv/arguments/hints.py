"""Remedies guessed from arguments that don't fit: suggested only where they would make them fit."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax import lax

Shape = tuple[int, ...]
Shapes = Iterable[tuple[str, Shape]]
LETTERS = ("", "W", "HW", "DHW")  # of spatial dimensions, by their number
SWAPPED = "look swapped: the image comes first"
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int8", "int16")
DTYPES += ("int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
PRECISIONS = ("default", "high", "highest", "float32", "tensorfloat32", "bfloat16", "bfloat16_3x")


class Guess(NamedTuple):
    """Changes by which a call may be meant, and its operands then, in the canonical layout."""

    changes: Sequence[str]
    x: Shape  # (N, spatial…, C)
    w: Shape  # (spatial…, C / groups, O)
    groups: int

    @property
    def fits(self) -> bool:
        *_, inputs, outputs = self.w
        return self.x[-1] == self.groups * inputs and outputs % self.groups == 0

    @property
    def is_plausible(self) -> bool:
        """Whether the kernel is of one size along all axes, and not larger than the image."""
        kernel, image = self.w[:-2], self.x[1:-1]
        return len(set(kernel)) <= 1 and all(k <= n for k, n in zip(kernel, image, strict=True))


def likeliest(guesses: Iterable[Guess]) -> str | None:
    """The guesses that fit by the fewest changes, in words; None where none does."""
    fitting = [guess for guess in guesses if guess.changes and guess.fits]
    ranks = [(not guess.is_plausible, len(guess.changes)) for guess in fitting]
    ranked = zip(ranks, fitting, strict=True)
    texts = ("; ".join(guess.changes) for rank, guess in ranked if rank == min(ranks))
    return "; or ".join(itertools.islice(dict.fromkeys(texts), 2)) or None


def _combined(images: Shapes, kernels: Shapes, groups: int, name: str) -> Iterator[Guess]:
    """Each image with each kernel, by the groups passed and by those that the kernel speaks for."""
    for (of_x, x), (of_w, w) in itertools.product(images, kernels):
        changes = [text for text in (of_x, of_w) if text]
        yield Guess(changes, x, w, groups)
        inputs, channels = w[-2], x[-1]
        if name and 0 < inputs < channels and not channels % inputs and (inputs == 1 or groups > 1):
            count = channels // inputs
            reason = "the kernel looks depthwise: " if inputs == 1 else ""
            yield Guess([*changes, f"{reason}use {name}={count}"], x, w, count)


def of_conv(x: Shape, w: Shape, groups: int) -> Iterator[Guess]:
    """What a call of ``conv`` may be meant to be; ``x`` is without a batch where ``w`` says so."""
    ndim, batched = len(w) - 2, len(x) == len(w)
    *kernel, inputs, outputs = w
    images: list[tuple[str, Shape]] = [("", x if batched else (1, *x))]
    kernels: list[tuple[str, Shape]] = [("", w)]
    if groups == inputs > 1:
        text = "w looks like TensorFlow's depthwise kernel (kernel…, C, multiplier): pass"
        kernels.append((f"{text} w.reshape(*w.shape[:-2], 1, -1)", (*kernel, 1, inputs * outputs)))
    elif inputs > 1:
        text = "w looks like (kernel…, O, I): pass w.swapaxes(-1, -2)"
        kernels.append((text, (*kernel, outputs, inputs)))
    if ndim:
        images += _channels_last(x, 1 if batched else 0)
        order = (*range(2, ndim + 2), 1, 0)
        moved = tuple(w[axis] for axis in order)
        if _is_likely(moved[:-2], kernel):
            kernels.append((f"w looks like (O, I, kernel…): pass w.transpose{order}", moved))
    if not batched:
        images.append(("x has no channel axis: pass x[..., None]", (*x, 1)))
    yield from _combined(images, kernels, groups, "groups")
    if batched:
        yield Guess([f"x and w {SWAPPED}"], w, x, groups)
    if batched and not ndim:  # a matrix as image, and one as kernel
        text = "x and w have no channel axes: pass x[..., None] and w[..., None, None]"
        guess = Guess([text], (1, *x, 1), (*w, 1, 1), groups)
        if guess.is_plausible:
            yield guess


def of_lax(
    lhs: Shape, rhs: Shape, dnums: lax.ConvDimensionNumbers, transposed: bool | None, groups: int
) -> Iterator[Guess]:
    """The operands of lax's functions swapped, or in another of the common layouts. ``transposed``:
    ``transpose_kernel`` of ``conv_transpose``; None for ``conv_general_dilated``."""

    def canonical(lhs: Shape, rhs: Shape, dnums: lax.ConvDimensionNumbers) -> tuple[Shape, Shape]:
        (n, c, *spatial), (o, i, *kernel), _ = dnums
        channels = (o, i) if transposed else (i, o)
        return tuple(lhs[d] for d in (n, *spatial, c)), tuple(rhs[d] for d in (*kernel, *channels))

    now, is_forward = canonical(lhs, rhs, dnums), transposed is None
    yield Guess([f"lhs and rhs {SWAPPED}"], *canonical(rhs, lhs, dnums), groups)
    if len(lhs) - 2 >= len(LETTERS):
        return
    letters = LETTERS[len(lhs) - 2]
    images = f"NC{letters}", f"N{letters}C"
    kernels = (f"OI{letters}", f"IO{letters}"), (f"{letters}IO", f"{letters}OI")
    for image, orders, other in itertools.product(images, kernels, (False, True)):
        numbers = image, orders[other and is_forward], image
        x, w = canonical(lhs, rhs, lax.conv_dimension_numbers(lhs, rhs, numbers))
        if not _is_likely(x[1:-1], now[0][1:-1]) or not _is_likely(w[:-2], now[1][:-2]):
            continue
        if other and is_forward and (x != now[0] or 1 in w[-2:]):
            continue  # the kernel's channels in an uncommon order: only where nothing else is wrong
        changes = [] if (x, w) == now else [f"use dimension_numbers={numbers}"]
        if other and not is_forward:
            changes.append(f"use transpose_kernel={not transposed}")
            w = (*w[:-2], *w[:-3:-1])
        name = "feature_group_count" if is_forward else ""
        yield from _combined([("; ".join(changes), x)], [("", w)], groups, name)


def of_pointwise(x: Shape, w: Shape) -> Iterator[Guess]:
    """What a call of ``pointwise`` may be meant to be."""
    images = [("", x), *(_channels_last(x, 1) if len(x) > 2 else ())]
    kernels = [("", w), ("w looks like (O, C): pass w.T", w[::-1])] if len(w) == 2 else []
    if len(w) == 1:
        kernels.append(("w has no axis of output channels: pass w[:, None]", (*w, 1)))
    if len(w) > 2 and set(w[:-2]) == {1}:
        kernels.append(("w has the axes of a kernel too: pass w.reshape(w.shape[-2:])", w[-2:]))
    if len(w) > 2 and set(w[2:]) == {1}:
        kernels.append(("w looks like (O, C, kernel…): pass w.reshape(w.shape[:2]).T", w[1::-1]))
    yield from _combined([(text, (1, image[-1])) for text, image in images], kernels, 1, "")
    if len(x) == 2:
        yield Guess([f"x and w {SWAPPED}"], (1, *w[-1:]), x, 1)


def _channels_last(x: Shape, axis: int) -> Shapes:
    """``x`` with its channels, which are at ``axis``, moved to the end, if they may be there."""
    n, channels, *spatial = x if axis == 1 else (1, *x)
    if _is_likely(spatial, (channels, *spatial[:-1])):
        text = f"move its channels to the end, jnp.moveaxis(x, {axis}, -1)"
        yield f"x looks channels-first: {text}", (n, *spatial, channels)


def _is_likely(spatial: Sequence[int], now: Sequence[int]) -> bool:
    """Whether these may be the spatial sizes rather than those read now, which may be all equal."""
    return len(set(spatial)) <= 1 or len(set(now)) > 1


def _channels_first(given: Any) -> tuple[bool, bool]:
    """Of image and kernel, by ``dimension_numbers``, which may be malformed."""
    if given is None:
        return True, True
    specs = (*given, "", "")[:2] if isinstance(given, (tuple, list)) else ("", "")
    image, kernel = (s if isinstance(s, (str, tuple)) and len(s) > 2 else "" for s in specs)
    return image[1:2] in ("C", (1,)), kernel[:2] in ("OI", "IO", (0, 1), (1, 0))


def lettered(rank: int, like: Any = ()) -> tuple[str, str, str]:
    """``dimension_numbers`` for operands of this rank, in the layout of others."""
    ndim = rank - 2
    letters = LETTERS[ndim] if ndim < len(LETTERS) else "".join(map(chr, range(97, 97 + ndim)))
    image, kernel = _channels_first(like)
    image = f"NC{letters}" if image else f"N{letters}C"
    return image, f"OI{letters}" if kernel else f"{letters}IO", image


def look_swapped(image: Shape, kernel: Shape) -> bool:
    """Whether these may be an image without batch and a kernel, both channels last."""
    guess = Guess((), (1, *image), kernel, 1)
    return len(kernel) > 2 and len(image) == len(kernel) - 1 and guess.fits and guess.is_plausible


def of_axes(x: str, w: str, lhs: Shape, rhs: Shape, given: Any) -> str:
    """For operands that lack axes, by ``dimension_numbers``; their names come first."""
    image, kernel = _channels_first(given)
    of_x = f"{x}[None, None]" if image else f"{x}[None, ..., None]"
    of_w = f"{w}[None, None]" if kernel else f"{w}[..., None, None]"
    missing = len(rhs) - len(lhs)
    if missing == 1:
        has_channels = 1 in (lhs[:1] if image else lhs[-1:])
        if 1 in (rhs[1:2] if kernel else rhs[-2:-1]) and not has_channels:
            return f"{x} has no channel axis: pass {x}{'[:, None]' if image else '[..., None]'}"
        return f"{x} has no batch: pass {x}[None]"
    as_image, as_kernel = (*rhs[1:], *rhs[:1]), (*lhs[2:], *lhs[1::-1])
    if missing == -1 and look_swapped(as_image if image else rhs, as_kernel if kernel else lhs):
        return f"{x} and {w} {SWAPPED}"
    remedies = {0: f"{of_x} and {of_w}", 2: of_x, -2: of_w}
    if missing in remedies:
        return f"add the two axes, {remedies[missing]}"
    return "add the missing axes" if missing > 0 else f"make the leading axes of {x} one batch"


def of_dimension_numbers(x: str, w: str, lhs: Shape, rhs: Shape, given: Any) -> str:
    """For what are no dimension numbers of these operands; their names come first."""
    rank, usual = len(lhs), lettered(len(lhs), given)
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        return f"pass all three, such as {usual}"
    if not all(isinstance(spec, str) for spec in given):
        return "for axes by number pass lax.ConvDimensionNumbers(*dimension_numbers)"
    image, kernel, out = upper = [spec.upper() for spec in given]
    for meant in (upper, [kernel, image, out]):
        try:
            lax.conv_dimension_numbers(lhs, rhs, tuple(meant))
        except TypeError:
            continue
        return f"did you mean {tuple(meant)}?"
    if all(len(spec) == rank for spec in given):
        others = "and in all three the same other letters"
        return f"name 'N' and 'C', in the kernel 'O' and 'I', {others}"
    if rank == 2:
        return f"{of_axes(x, w, lhs, rhs, given)}, or use {usual}"
    return f"use {usual}, or give {x} and {w} an axis for each letter"


def of_name(
    given: Any, names: Iterable[str], otherwise: str = "use one of these", cutoff: float = 0.6
) -> str:
    """Which of ``names`` is most likely meant by ``given``, or by what has it as its name."""
    folded = {name.lower(): name for name in names}
    given = getattr(given, "name", given)
    close = difflib.get_close_matches(str(given).lower(), folded, 1, cutoff)
    return f"did you mean {folded[close[0]]!r}?" if close else otherwise


def of_platform(given: Any) -> str:
    if isinstance(given, str) and given.lower() in ("cuda", "rocm", "metal"):
        return "use 'gpu'"
    return of_name(given, ("cpu", "gpu", "tpu"))


def of_values(given: Sequence[Any], ndim: int) -> str:
    """For what must be ``ndim`` positive integers or pairs of padding."""
    if len(given) == ndim:
        return "use 1"
    if ndim and len(given) == ndim + 2 and given[0] == given[-1] in (1, (0, 0)):
        return f"leave out batch and channels: {tuple(given[1:-1])}"
    if len(given) == 1 and ndim > 1:
        return f"pass one for each spatial dimension: {tuple(given) * ndim}"
    more = ", or add the axes that the operands lack" if len(given) > ndim else ""
    return f"pass one for each spatial dimension{more}"


def of_no_integers(given: Any, ndim: int) -> str:
    """For what must be ``ndim`` integers, or one where 0, and is no sequence of integers."""
    if given is None or isinstance(given, int):
        return f"use {(given or 1,) * ndim or 1}"
    if isinstance(given, str) and given.upper() in ("SAME", "SAME_LOWER", "VALID", "CAUSAL"):
        return f"pass padding by name, padding={given!r}"
    return "pass static Python integers; under jax.jit, name the argument in static_argnums"


def of_pads(given: Any, ndim: int) -> str:
    """For padding that is no sequence of pairs of integers."""
    remedy = "pass one pair for each spatial dimension"
    if given is None:
        return "use 'VALID' for none"
    pads = (given,) * ndim if isinstance(given, int) else given
    if not isinstance(pads, (tuple, list)) or not all(isinstance(pad, int) for pad in pads):
        return remedy
    pairs = (tuple(pads),) if (ndim, len(pads)) == (1, 2) else tuple((pad, pad) for pad in pads)
    return f"{remedy}: {pairs}" if len(pairs) == ndim else remedy
