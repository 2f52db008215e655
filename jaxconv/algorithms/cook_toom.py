"""The matrices of Winograd's minimal filtering, exact, by Cook and Toom's algorithm (Blahut, "Fast
Algorithms for Signal Processing", 2010, chapter 5)."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, reduce
from typing import Any

import numpy as np
from jax import Array, lax

Matrix = tuple[tuple[Fraction, ...], ...]

# Interpolation points, besides infinity. Barabasz, Anderson, Soodhalter & Gregg, "Error Analysis
# and Improving the Accuracy of Winograd Convolution for Deep Neural Networks" (2020):
# the error of F(4, 3) on 0, 1, -1, 1/2, -2 is two thirds of that on 0, 1, -1, 2, -2.
POINTS = tuple(map(Fraction, ("0", "1", "-1", "1/2", "-2", "2", "-1/2")))


@cache
def transforms(m: int, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ (m, n), G (n, r) and Bᵀ (n, n) of F(m, r), n = m + r - 1, exact."""
    points = POINTS[: m + r - 2]
    zero, one = Fraction(0), Fraction(1)
    a, g, b = [], [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = math.prod((p - q for q in others), start=one)
        # The rows of Bᵀ are integers with a non-negative first coefficient, as in the paper.
        row = _product_of(others)
        factor = Fraction(math.lcm(*(c.denominator for c in row)))
        factor *= -1 if next(c for c in row if c) < 0 else 1
        a.append([p**i for i in range(m)])
        g.append([p**k / scale / factor for k in range(r)])
        b.append([c * factor for c in row] + [zero])
    a.append([zero] * (m - 1) + [one])
    g.append([zero] * (r - 1) + [one])
    b.append(_product_of(points))
    return tuple(zip(*a, strict=True)), tuple(map(tuple, g)), tuple(map(tuple, b))


def _product_of(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of Π (x - root), the constant first."""
    factors: list[Any] = [[Fraction(1)], *([-root, Fraction(1)] for root in roots)]
    return list(reduce(np.convolve, factors))


def combinations(matrix: Matrix, terms: Sequence[Array]) -> list[Array]:
    """``matrix @ terms``, written out as sums: zeros and ones cost nothing."""
    totals: list[Any] = [None] * len(matrix)
    for i, row in enumerate(matrix):
        for factor, term in zip(row, terms, strict=True):
            if factor == 0:
                continue
            part = term if abs(factor) == 1 else term * np.asarray(float(abs(factor)), term.dtype)
            if totals[i] is None:
                totals[i] = part if factor > 0 else -part
            else:
                totals[i] = (lax.add if factor > 0 else lax.sub)(totals[i], part)
    return totals
