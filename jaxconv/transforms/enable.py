"""``enable``: all of lax's convolutions in a process planned by jaxconv, without code changes."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail
from jaxconv.compat import conv_general_dilated_p, lowering_rule, mlir, platform_rules
from jaxconv.transforms.primitive import lowered, plannable

PLATFORMS = ("cpu", "gpu", "tpu")

_lock = threading.RLock()
# By platform: the original rules, while jaxconv's is in place.
_originals: dict[str, dict[str, Any]] = {}
# The platforms that ``enable()`` was called for; and those of each open ``enabled()`` block.
_standing: set[str] = set()
_blocks: dict[object, frozenset[str]] = {}


def enable(platforms: Sequence[str] = ("cpu",)) -> None:
    """Lets jaxconv plan every convolution that this process compiles from now on.

    Effects on the process: JAX's lowering rule for ``lax.conv_general_dilated`` is replaced on the
    given platforms, in all threads, for all libraries; and JAX's caches are cleared
    (``jax.clear_caches``), so that functions compiled before are compiled anew, by jaxconv, at
    their next call. ``disable`` restores the original rule. Calling it twice has no further effect.
    Programs, gradients and jaxprs are unchanged: only the compiled code differs.

    Args:
      platforms: any of "cpu", "gpu", "tpu". The default is CPU, where it pays off: on the others
        nearly all convolutions stay with XLA.

    Raises:
      ValueError: an unknown platform.

    Example:
      >>> import jax, jax.numpy as jnp, jaxconv
      >>> jaxconv.enable()
      >>> jax.lax.conv(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME").shape
      (1, 4, 8, 8)
      >>> jaxconv.disable()
    """
    names = _checked("enable", platforms)
    with _lock:
        _standing.update(names)
        _apply()


def disable() -> None:
    """Undoes ``enable`` on all platforms, and open ``enabled()`` blocks with it.

    JAX's original rule for ``lax.conv_general_dilated`` is restored, and JAX's caches are cleared.
    If nothing was enabled, nothing happens.

    Example:
      >>> import jaxconv
      >>> jaxconv.disable()
    """
    with _lock:
        _standing.clear()
        _blocks.clear()
        _apply()


@contextlib.contextmanager
def enabled(platforms: Sequence[str] = ("cpu",)) -> Iterator[None]:
    """``with enabled():`` is ``enable`` for the block; the previous state is restored afterwards.

    It applies to the whole process, including other threads. Blocks may be nested and may overlap
    between threads: the last one to end restores the state.

    Args:
      platforms: as in ``enable``.

    Returns:
      A context manager.

    Raises:
      ValueError: an unknown platform.

    Example:
      >>> import jax, jax.numpy as jnp, jaxconv
      >>> with jaxconv.enabled():
      ...     y = jax.lax.conv(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), (1, 1), "SAME")
      >>> y.shape
      (1, 4, 8, 8)
    """
    names = _checked("enabled", platforms)
    block = object()
    with _lock:
        _blocks[block] = names
        _apply()
    try:
        yield
    finally:
        with _lock:
            _blocks.pop(block, None)  # disable() may have ended it
            _apply()


def _checked(function: str, platforms: Sequence[str]) -> frozenset[str]:
    is_one = isinstance(platforms, str) or not isinstance(platforms, Iterable)
    names: tuple[Any, ...] = (platforms,) if is_one else tuple(platforms)
    for name in names:
        if name not in PLATFORMS:
            remedy = hints.of_platform(name)
            if callable(name):
                remedy = "for one function use jaxconv.accelerate"
            fail(function, "platforms must be among 'cpu', 'gpu' and 'tpu'", repr(names), remedy)
    return frozenset(names)


def _apply() -> None:
    """Installs or removes jaxconv's rules according to ``_standing`` and ``_blocks``."""
    wanted = _standing.union(*_blocks.values())
    if wanted == set(_originals):
        return
    for platform in wanted - set(_originals):
        tables = platform_rules(platform)
        _originals[platform] = {
            name: table.get(conv_general_dilated_p) for name, table in tables.items()
        }
        # Called for each of equal convolutions too, since it looks at where operands come from.
        options = {"platform": platform, "cacheable": False}
        mlir.register_lowering(conv_general_dilated_p, _rule(platform), **options)
    for platform in set(_originals) - wanted:
        tables = platform_rules(platform)
        for name, entry in _originals.pop(platform).items():
            if entry is None:
                del tables[name][conv_general_dilated_p]
            else:
                tables[name][conv_general_dilated_p] = entry
    jax.clear_caches()


def _rule(platform: str) -> Callable[..., Any]:
    original = lowering_rule(conv_general_dilated_p, platform)

    def rule(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        lhs_aval, rhs_aval = ctx.avals_in
        if not plannable(lhs_aval, rhs_aval, params):
            return original(ctx, lhs, rhs, **params)
        return lowered(ctx, lhs, rhs, params | {"algorithm": "auto"})

    return rule
