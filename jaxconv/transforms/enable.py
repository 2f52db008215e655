"""``enable``: all of lax's convolutions and poolings in a process planned by jaxconv, without code
changes."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail
from jaxconv.arguments.parse import plannable
from jaxconv.compat import conv_general_dilated_p, lowering_rule, mlir, platform_rules
from jaxconv.transforms.poolings import RULES
from jaxconv.transforms.primitive import lowered

PLATFORMS = ("cpu", "gpu", "tpu")

_lock = threading.RLock()
# By platform: the original rules by table and primitive, while jaxconv's are in place.
_originals: dict[str, dict[tuple[str, Any], Any]] = {}
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
    with _lock:
        wanted = set[str]().union(*list(_wanted.values()))
        changed = wanted ^ _originals.keys()
        for platform in changed:
            tables = platform_rules(platform)
            if platform in wanted:
                rules = {original: those[platform] for original, those in RULES.items()}
                rules[conv_general_dilated_p] = _rule(platform)
                _originals[platform] = {(n, p): t.get(p) for n, t in tables.items() for p in rules}
                for original, rule in rules.items():
                    mlir.register_lowering(original, rule, platform=platform)
                continue
            for (name, original), entry in _originals.pop(platform).items():
                del tables[name][original]
                if entry is not None:
                    tables[name][original] = entry
        if changed:
            jax.clear_caches()


def _rule(platform: str) -> Callable[..., Any]:
    original = lowering_rule(conv_general_dilated_p, platform)

    def rule(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        lhs_aval, rhs_aval = ctx.avals_in
        if not plannable(lhs_aval, rhs_aval, params):
            return original(ctx, lhs, rhs, **params)
        # JAX calls the rule once for equal convolutions: it can't see where operands come from. In
        # a network channels first most images come from another convolution.
        return lowered(ctx, lhs, rhs, params | {"algorithm": "auto"}, moved=True)

    return rule
