"""``enable``: jaxconv plans all of lax's convolutions and poolings in a process."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxconv import compat
from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail
from jaxconv.compat import EVERYWHERE, PLATFORMS
from jaxconv.transforms.planned import PLANNED, Planned

_lock = threading.RLock()
# The platforms on which jaxconv's rules are in place, and what restores lax's.
_enabled, _rules = frozenset[str](), contextlib.ExitStack()
# The platforms of each call of ``enable`` and of each open ``enabled`` block.
_wanted: dict[object, frozenset[str]] = {}


def enable(platforms: Sequence[str] = ("cpu",)) -> None:
    """Lets jaxconv plan every convolution and pooling that this process compiles from now on.

    JAX's lowering rules for ``lax.conv_general_dilated``, for ``lax.reduce_window`` by maximum,
    minimum or sum, and for their derivatives are replaced on these platforms, in all threads, for
    all libraries, and JAX's caches are cleared, so that functions are compiled anew at their next
    call. Programs, gradients and jaxprs are unchanged: only the compiled code differs. ``disable``
    restores the original rules.

    Args:
      platforms: of "cpu", where it pays off, "gpu" and "tpu", where most convolutions and all
        poolings would stay with XLA.

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
    _wanted[names] = names
    _apply()


def disable() -> None:
    """Undoes ``enable`` on all platforms, and open ``enabled()`` blocks; JAX's caches are cleared.

    Example:
      >>> import jaxconv
      >>> jaxconv.disable()
    """
    _wanted.clear()
    _apply()


@contextlib.contextmanager
def enabled(platforms: Sequence[str] = ("cpu",)) -> Iterator[None]:
    """``enable`` for a ``with`` block, in all threads; the last one to end restores the state.

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
    block = object()
    _wanted[block] = _checked("enabled", platforms)
    try:
        _apply()
        yield
    finally:
        _wanted.pop(block, None)  # disable() may have ended it
        _apply()


def _checked(function: str, platforms: Sequence[str]) -> frozenset[str]:
    is_one = isinstance(platforms, str) or not isinstance(platforms, Iterable)
    names: tuple[Any, ...] = (platforms,) if is_one else tuple(platforms)
    for name in names:
        if name not in PLATFORMS:
            to_accelerate = "for one function use jaxconv.accelerate"
            remedy = to_accelerate if callable(name) else hints.of_platform(name)
            fail(function, "platforms must be among 'cpu', 'gpu' and 'tpu'", repr(names), remedy)
    return frozenset(names)


def _apply() -> None:
    """Installs or removes jaxconv's rules according to ``_wanted``."""
    global _enabled
    with _lock:
        wanted = frozenset().union(*list(_wanted.values()))
        if wanted == _enabled:
            return
        _rules.close()
        if wanted:
            for original, planned in PLANNED.items():
                _rules.callback(compat.replace_rule(original, _rule(original, planned, wanted)))
        _enabled = wanted
        jax.clear_caches()


def _rule(original: Any, planned: Planned, wanted: frozenset[str]) -> Callable[..., Any]:
    rules = {p: compat.lowering_rule(original, p) for p in EVERYWHERE}

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        platforms = compat.platforms_of(ctx)
        changed = planned.params(ctx.avals_in, params, "auto")
        if changed is None or wanted.isdisjoint(platforms):
            return rules[platforms[0]](ctx, *operands, **params)
        return planned.lower(ctx, *operands, **changed, wanted=wanted)

    return rule
