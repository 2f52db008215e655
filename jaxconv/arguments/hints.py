"""Remedies guessed from arguments that don't fit: suggested only where they would make them fit."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Shape = tuple[int, ...]
Shapes = Iterable[tuple[str, Shape]]
# Letters of spatial dimensions, by their number.
LETTERS = ("", "W", "HW", "DHW")


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

    def rank(guess: Guess) -> tuple[bool, int]:
        return not guess.is_plausible, len(guess.changes)

    best = min(map(rank, fitting), default=None)
    texts = ("; ".join(guess.changes) for guess in fitting if rank(guess) == best)
    return "; or ".join(itertools.islice(dict.fromkeys(texts), 2)) or None


def _combined(images: Shapes, kernels: Shapes, groups: int, name: str) -> Iterator[Guess]:
    """Each image with each kernel, by the groups given and by those that the kernel speaks for.

    A kernel of one input channel is most likely one of a depthwise convolution.
    """
    for (of_x, x), (of_w, w) in itertools.product(images, kernels):
        changes = [text for text in (of_x, of_w) if text]
        yield Guess(changes, x, w, groups)
        inputs, channels = w[-2], x[-1]
        if not 0 < inputs < channels or channels % inputs:
            continue
        if inputs == 1 or groups > 1:
            count = channels // inputs
            reason = "the kernel looks depthwise: " if inputs == 1 else ""
            yield Guess([*changes, f"{reason}give {name}={count}"], x, w, count)


def of_conv(x: Shape, w: Shape, groups: int) -> Iterator[Guess]:
    """What a call of ``conv`` may be meant to be; ``x`` is without a batch where ``w`` says so."""
    ndim, batched = len(w) - 2, len(x) == len(w)
    n, *spatial, channels = x if batched else (1, *x)
    *kernel, inputs, outputs = w
    image = (n, *spatial, channels)
    images: list[tuple[str, Shape]] = [("", image)]
    kernels: list[tuple[str, Shape]] = [("", w)]
    if groups == inputs > 1:
        text = "w looks like TensorFlow's depthwise kernel (kernel…, C, multiplier): give"
        reshaped = (*kernel, 1, inputs * outputs)
        kernels.append((f"{text} w.reshape(*w.shape[:-2], 1, -1)", reshaped))
    elif inputs > 1:
        kernels.append(("w looks like (kernel…, O, I): give w.swapaxes(-1, -2)", _swapped(w)))
    if ndim:
        images += _channels_last("x", x, 1 if batched else 0)
        order = (*range(2, ndim + 2), 1, 0)
        moved = tuple(w[axis] for axis in order)
        if _is_likely(moved[:-2], kernel):
            kernels.append((f"w looks like (O, I, kernel…): give w.transpose{order}", moved))
    if not batched:
        images.append(("x has no axis of channels: give x[..., None]", (*x, 1)))
    yield from _combined(images, kernels, groups, "groups")
    if batched:
        yield Guess(["x and w look exchanged: the image comes first"], w, x, groups)
    if batched and not ndim:  # a matrix as image, and one as kernel
        text = "x and w have no axes of channels: give x[..., None] and w[..., None, None]"
        guess = Guess([text], (1, *x, 1), (*w, 1, 1), groups)
        if guess.is_plausible:
            yield guess


def of_lax(lhs: Shape, rhs: Shape, present: tuple[Shape, Shape], groups: int) -> Iterator[Guess]:
    """Common layouts of the operands of ``conv_general_dilated``, as dimension numbers.

    Args:
      present: the shapes in the canonical layout, as the call has it.
    """
    ndim = len(lhs) - 2
    if ndim >= len(LETTERS):
        return
    letters = LETTERS[ndim]
    images = {f"NC{letters}": (lhs[0], *lhs[2:], lhs[1]), f"N{letters}C": lhs}
    kernels = {f"OI{letters}": (*rhs[2:], rhs[1], rhs[0]), f"{letters}IO": rhs}
    for (image, x), (kernel, w) in itertools.product(images.items(), kernels.items()):
        now_x, now_w = present
        if not _is_likely(x[1:-1], now_x[1:-1]) or not _is_likely(w[:-2], now_w[:-2]):
            continue
        text = "" if (x, w) == present else f"give dimension_numbers={image, kernel, image}"
        yield from _combined([(text, x)], [("", w)], groups, "feature_group_count")


def of_transpose(lhs: Shape, rhs: Shape, transpose_kernel: bool) -> Iterator[Guess]:
    """What a call of ``conv_transpose`` without dimension numbers may be meant to be."""
    *kernel, first, last = rhs
    images = [("", lhs)]
    meant = f"rhs looks like (kernel…, {'I, O' if transpose_kernel else 'O, I'})"
    kernels = [
        ("", (*kernel, last, first) if transpose_kernel else rhs),
        (
            f"{meant}: give transpose_kernel={not transpose_kernel}",
            rhs if transpose_kernel else (*kernel, last, first),
        ),
    ]
    if kernel:
        images += _channels_last("lhs", lhs, 1)
    if kernel and _is_likely(rhs[2:], kernel):
        order = (*range(2, len(rhs)), 1, 0)
        text = f"rhs looks like PyTorch's (I, O, kernel…): give rhs.transpose{order}"
        text += "" if transpose_kernel else " and transpose_kernel=True"
        kernels.append((text, (*rhs[2:], rhs[0], rhs[1])))
    for (of_lhs, image), (of_rhs, kernel) in itertools.product(images, kernels):
        yield Guess([text for text in (of_lhs, of_rhs) if text], image, kernel, 1)


def of_pointwise(x: Shape, w: Shape) -> Iterator[Guess]:
    """What a call of ``pointwise`` may be meant to be."""
    images = [("", x), *(_channels_last("x", x, 1) if len(x) > 2 else ())]
    kernels = [("", w), ("w looks like (O, C): give w.T", _swapped(w))] if len(w) == 2 else []
    if len(w) > 2 and set(w[:-2]) == {1}:
        kernels.append(("w has the axes of a kernel too: give w.reshape(w.shape[-2:])", w[-2:]))
    if len(w) > 2 and set(w[2:]) == {1}:
        kernels.append(("w looks like (O, C, kernel…): give w.reshape(w.shape[:2]).T", w[1::-1]))
    for (of_x, image), (of_w, kernel) in itertools.product(images, kernels):
        changes = [text for text in (of_x, of_w) if text]
        yield Guess(changes, (1, image[-1]), kernel, 1)


def _channels_last(name: str, x: Shape, axis: int) -> Shapes:
    """``x`` with its channels, which are at ``axis``, moved to the end, if they may be there."""
    n, channels, *spatial = x if axis == 1 else (1, *x)
    moved = (n, *spatial, channels)
    if _is_likely(spatial, (channels, *spatial[:-1])):
        text = f"move its channels to the end, jnp.moveaxis({name}, {axis}, -1)"
        yield f"{name} looks channels-first: {text}", moved


def _is_likely(spatial: Sequence[int], now: Sequence[int]) -> bool:
    """Whether these may be the spatial sizes rather than those read now, which may be all equal."""
    return len(set(spatial)) <= 1 or len(set(now)) > 1


def _swapped(w: Shape) -> Shape:
    return (*w[:-2], w[-1], w[-2])


def of_name(given: Any, names: Iterable[str]) -> str:
    """Which of ``names`` is most likely meant by ``given``."""
    folded = {name.lower(): name for name in names}
    text = given.lower() if isinstance(given, str) else ""
    close = difflib.get_close_matches(text, folded, 1)
    return f"perhaps {folded[close[0]]!r} is meant" if close else "use one of these"


def of_platform(given: Any) -> str:
    """Which platform is most likely meant by ``given``."""
    if isinstance(given, str) and given.lower() in ("cuda", "rocm", "metal"):
        return "write 'gpu'"
    return of_name(given, ("cpu", "gpu", "tpu"))


def of_values(given: Sequence[Any], ndim: int) -> str:
    """For integers, or what is given instead, which must be ``ndim`` positive ones."""
    if len(given) == ndim:
        return "give 1 where there is nothing to do"
    if len(given) == ndim + 2 and given[0] == given[-1] == 1:
        return f"leave out batch and channels: {tuple(given[1:-1])}"
    if len(given) == 1 and ndim > 1:
        return f"give one for each spatial dimension: {tuple(given) * ndim}"
    return "give one for each spatial dimension"


def of_no_integers(given: Any, ndim: int) -> str:
    """For what must be ``ndim`` integers, and is no sequence of integers."""
    if isinstance(given, int):
        return f"give {(given,) * ndim}"
    if isinstance(given, str):
        return f"padding is given by name, padding={given!r}"
    return "give static Python integers; under jax.jit, name the argument in static_argnums"


def of_pads(given: Any, ndim: int) -> str:
    """For padding that is no sequence of pairs of integers."""
    remedy = "give one pair for each spatial dimension"
    if isinstance(given, int):
        return f"{remedy}: {((given, given),) * ndim}"
    if isinstance(given, (tuple, list)) and all(isinstance(pad, int) for pad in given):
        if (ndim, len(given)) == (1, 2):
            return f"{remedy}: {(tuple(given),)}"
        if len(given) == ndim:
            return f"{remedy}: {tuple((pad, pad) for pad in given)}"
    return remedy


def of_pairs(pads: Sequence[tuple[int, int]], ndim: int) -> str:
    """For more or fewer pairs of padding than ``ndim``."""
    if len(pads) == 1 and ndim > 1:
        return f"give one for each: {tuple(pads) * ndim}"
    if len(pads) == ndim + 2 and pads[0] == pads[-1] == (0, 0):
        return f"leave out batch and channels: {tuple(pads[1:-1])}"
    return "add or drop pairs"
