"""What the networks of all frameworks have in common: how they are trained, and on what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Training:
    """The training of one network, written as its framework's users write it, in float64.

    Attributes:
      start: gives the state before the first step, always the same.
      step: one training step; its arguments and results are up to the framework. Its report is
        the loss, the outputs, and the gradients with respect to all parameters.
      batches: the arguments of ``step`` that are not state.
      jit: the framework's own.
      advance: ``(step, state, batch)`` to ``(state, report)``, where ``step`` may be jitted.
      split: a state to what is static and what is arrays.
      merge: a new state from both.
    """

    start: Callable[[], Any]
    step: Callable[..., Any]
    batches: list[tuple[Any, ...]]
    jit: Callable[..., Any] = jax.jit
    advance: Callable[..., Any] = lambda step, state, batch: step(*state, *batch)
    split: Callable[[Any], tuple[Any, Any]] = lambda state: (None, state)
    merge: Callable[[Any, Any], Any] = lambda _, state: state


STEPS = 5


def images(*shape: int, labels: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each step, images of ``shape`` (batch first) and a label for each."""
    random = np.random.default_rng(0)
    return [(random.normal(size=shape), random.integers(0, labels, shape[0])) for _ in range(STEPS)]


def volumes(*shape: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each step, one-channel volumes of ``shape`` and a mask: where they are positive."""
    random = np.random.default_rng(1)
    batches = [random.normal(size=shape) for _ in range(STEPS)]
    return [(x, (x > 0).astype(np.float64)) for x in batches]


def signals(batch: int, length: int, levels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each step, quantised sine waves, and the same one sample later."""
    random = np.random.default_rng(2)
    batches = []
    for _ in range(STEPS):
        phase, frequency = random.uniform(0, 6, (batch, 1)), random.uniform(0.1, 1, (batch, 1))
        wave = np.sin(phase + frequency * np.arange(length + 1))
        samples = np.floor((wave + 1) / 2 * (levels - 1e-6)).astype(np.int64)
        batches.append((samples[:, :-1], samples[:, 1:]))
    return batches


def numbers(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree, by their paths; random keys as the integers they are."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found
