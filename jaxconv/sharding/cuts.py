"""How a convolution is cut over several devices, given how its arrays lie on them.

Dimensions have letters: "n" batch, "c" input channels, "o" output channels, "g" groups; "x0",
"x1", … the image's spatial axes and those cut along with them: the output's, or in a kernel's
gradient and where the output is smaller than the kernel, the kernel's; "t0", … the third array's.

Where a letter is cut is a tuple with each device's place along it: it needs no mesh, whose axes
XLA may have split.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxconv.sharding.borders import AxisCut, cut_axis
from jaxconv.spec import ConvSpec

Letters = tuple[str, ...]
Places = tuple[int, ...]


class Dimensions(NamedTuple):
    """What the dimensions of a convolution are, in the user's order."""

    spec: ConvSpec
    sizes: Mapping[str, int]  # of each letter but the "t"
    arrays: tuple[tuple[Letters, ...], ...]  # of each dimension of lhs, rhs, output, outer first
    spatial: tuple[tuple[int, int, int], ...]  # for each axis its dimension of lhs, rhs, output

    def sums(self, d: int) -> bool:
        """Whether an axis of the image is cut along with the kernel's, over which is summed."""
        axis = self.spec.axes[d]
        large = self.spec.weight_gradient and 2 * axis.window > axis.size
        return large or axis.taps > axis.out


def dimensions(lhs: Any, rhs: Any, params: Mapping[str, Any]) -> Dimensions:
    spec = ConvSpec.from_params(lhs, rhs, params)
    (g, _, o, _), c = spec.gemm, spec.rhs_shape[-2]
    sizes = {"n": spec.out_shape[0], "c": c, "o": o, "g": g}
    numbers = params["dimension_numbers"]
    (lhs_n, lhs_c, *_), (rhs_o, rhs_i, *_), (out_n, out_c, *_) = numbers
    arrays: list[list[Letters]] = [[()] * lhs.ndim for _ in range(3)]
    arrays[0][lhs_n] = ("g", "n") if spec.batch_group_count > 1 else ("n",)
    arrays[0][lhs_c] = ("g", "c") if spec.feature_group_count > 1 else ("c",)
    arrays[1][rhs_i], arrays[2][out_n] = ("c",), ("n",)
    arrays[1][rhs_o] = arrays[2][out_c] = ("g", "o") if spec.groups > 1 else ("o",)
    spatial = tuple(zip(*(tuple(axes)[2:] for axes in numbers), strict=True))
    found = Dimensions(spec, sizes, (), spatial)
    for d, axes in enumerate(spatial):
        along, other = (1, 2) if found.sums(d) else (2, 1)
        arrays[0][axes[0]] = arrays[along][axes[along]] = (f"x{d}",)
        arrays[other][axes[other]] = (f"t{d}",)
        sizes[f"x{d}"] = spec.lhs_spatial[d]
    return found._replace(arrays=tuple(map(tuple, arrays)))


class Cut(NamedTuple):
    """How a convolution is cut."""

    devices: int
    places: Mapping[str, Places]  # of each letter that is cut, each device's
    axes: Mapping[int, AxisCut]  # for each spatial axis that is cut, how

    def parts(self, letter: str) -> int:
        return parts(self.places[letter]) if letter in self.places else 1

    def lines(self, letters: Collection[str]) -> list[list[int]]:
        """The devices that differ in their place along ``letters`` only, each in their order."""
        tiles: Counter[Places] = Counter()
        lines: dict[Places, list[tuple[Places, int]]] = defaultdict(list)
        for device in range(self.devices):
            place = tuple(self.places[letter][device] for letter in self.places)
            copy, tiles[place] = tiles[place], tiles[place] + 1
            others = [p[device] for letter, p in self.places.items() if letter not in letters]
            along = tuple(self.places[letter][device] for letter in letters)
            lines[copy, *others].append((along, device))
        return [[device for _, device in sorted(line)] for line in lines.values()]

    def of_dimension(self, letters: Letters) -> Places:
        total = (0,) * self.devices
        for letter in letters:
            own = self.places.get(letter, (0,) * self.devices)
            total = tuple(t * parts(own) + p for t, p in zip(total, own, strict=True))
        return total


def parts(places: Places) -> int:
    return max(places) + 1


def cut_of(found: Dimensions, given: Sequence[Sequence[Places]], devices: int) -> Cut:
    """The cut that leaves the largest array where it is, then, as far as possible, the others;
    ``given`` for each dimension of lhs, rhs and output each device's place along it."""
    spec = found.spec
    shapes = spec.lhs_shape, spec.rhs_shape, spec.out_shape
    places: dict[str, Places] = {}
    axes: dict[int, AxisCut] = {}
    for i in sorted(range(3), key=lambda i: -math.prod(shapes[i])):
        for letters, along in zip(found.arrays[i], given[i], strict=True):
            for letter, own in _split(letters, along, found.sizes):
                if letter in places or letter[0] == "t" or not _apart([*places.values(), own]):
                    continue
                if letter[0] == "x":
                    d = int(letter[1:])
                    part = cut_axis(spec, d, parts(own), found.sums(d))
                    if part is None:
                        continue
                    axes[d] = part
                places[letter] = own
    # What lies inside groups is cut only where each group is on devices of its own, and evenly.
    apart = parts(places.get("g", (0,))) == found.sizes["g"]
    for letter in {inner for dims in found.arrays for _, *rest in dims for inner in rest}:
        if letter in places and not (apart and found.sizes[letter] % parts(places[letter]) == 0):
            del places[letter]
    return Cut(devices, places, axes)


def _split(
    letters: Letters, along: Places, sizes: Mapping[str, int]
) -> Iterator[tuple[str, Places]]:
    """The places along each letter of a dimension; nothing where it would be cut unevenly."""
    count = parts(along)
    if count == 1:
        return
    if len(letters) == 1:
        yield letters[0], along
        return
    (outer, inner), rest = letters, max(1, count // sizes[letters[0]])
    if sizes[outer] % (count // rest) == 0 == sizes[inner] % rest and count % rest == 0:
        yield outer, tuple(place // rest for place in along)
        if rest > 1:
            yield inner, tuple(place % rest for place in along)


def _apart(places: Sequence[Places]) -> bool:
    """Whether the same number of devices is at every combination of places."""
    counts = Counter(zip(*places, strict=True))
    return len(counts) == math.prod(map(parts, places)) and len(set(counts.values())) == 1
