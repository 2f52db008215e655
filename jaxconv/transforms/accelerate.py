"""``accelerate``: a function like ``fn`` whose convolutions and poolings are jaxconv's.

While ``fn`` runs, a trace on top of the current one (like ``vmap``'s) binds jaxconv's primitive in
place of lax's, and forwards everything else, so that tracers, static arguments, effects and state
are those of ``fn``. Jaxprs in parameters of other primitives are rewritten, once each.
"""

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import jax
from jax.core import Trace

from jaxconv import compat
from jaxconv.arguments.errors import check_function
from jaxconv.planning.choose import check_name
from jaxconv.transforms.planned import PLANNED, planned, planned_eqn
from jaxconv.transforms.poolings import POOLINGS
from jaxconv.transforms.primitive import conv_p

P = ParamSpec("P")
R = TypeVar("R")

# Primitives that run the jaxprs in their parameters as written: convolutions can be replaced there.
_TRANSPARENT = """call closed_call composite cond custom_jvp_call custom_lin custom_linear_solve
    custom_vjp_call custom_vmap_call eval_jaxpr jit linear_call remat2 remat_opt run_state scan
    shard_map while"""
TRANSPARENT = frozenset(_TRANSPARENT.split())
# Parameters of these that are rules, functions of arrays; and those that return a jaxpr.
RULES = ("bwd", "rule")
THUNKS = ("fun_jaxpr_thunk", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "transpose_thunk")


def accelerate(fn: Callable[P, R], *, algorithm: str = "auto") -> Callable[P, R]:
    """A function like ``fn`` whose convolutions and poolings jaxconv plans, forward and backward.

    Every ``lax.conv_general_dilated`` that ``fn`` runs becomes jaxconv's, whichever library calls
    it, and under every transformation: ``jax.jit(accelerate(step))`` and
    ``accelerate(jax.jit(step))`` compile the same. So does every ``lax.reduce_window`` by maximum,
    minimum or sum (max and average pools) and their gradients, except on GPU and TPU, where none
    was measured, and where XLA shards them: there they stay with XLA.

    Convolutions inside a primitive that jaxconv does not know (a Pallas kernel, say) stay with lax,
    with one warning for each primitive. So do those of functions already compiled, and of code that
    runs after ``fn`` has returned, such as the function returned by ``jax.vjp``.

    Args:
      fn: any function, preferably the whole training step, so that it includes the gradients.
      algorithm: "auto", or a name in ``ALGORITHMS``, used wherever it supports the convolution;
        "xla" leaves poolings with XLA too.

    Returns:
      A function with the same arguments, results, static arguments, donation and effects.

    Raises:
      TypeError: ``fn`` can't be called.
      ValueError: ``algorithm`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, jaxconv
      >>> def loss(image, kernel):
      ...     return jax.lax.conv(image, kernel, (1, 1), "SAME").sum()
      >>> step = jax.jit(jaxconv.accelerate(jax.grad(loss, argnums=1)))
      >>> step(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))).shape
      (4, 3, 3, 3)
    """
    check_function("accelerate", fn)
    check_name("accelerate", algorithm)
    return functools.wraps(fn, updated=())(_under(fn, algorithm))


def _under(fn: Callable[..., Any], algorithm: str) -> Callable[..., Any]:
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        trace = compat.find_top_trace(())
        if not (isinstance(trace, _AccelerateTrace) and trace.algorithm == algorithm):
            trace = _AccelerateTrace(trace, algorithm)
        with _binding_to(trace):
            return fn(*args, **kwargs)

    return accelerated


@contextlib.contextmanager
def _binding_to(trace: Any) -> Iterator[None]:
    """Makes a trace the current one, and adds its algorithm, if any, to the key of jit's caches."""
    algorithm = getattr(trace, "algorithm", None)
    with compat.set_current_trace(trace), compat.accelerated(algorithm):
        yield


class _AccelerateTrace(Trace):
    """Replaces lax's convolutions by jaxconv's and binds everything to ``parent``."""

    def __init__(self, parent: Any, algorithm: str) -> None:
        super().__init__()
        self.parent, self.algorithm = parent, algorithm
        self.requires_low = False  # left to the parent
        # By this Flax and Haiku detect that a transformation has begun since an object was created,
        # and then make it immutable. None has begun here, so it is the parent's.
        self._weakref = parent._weakref

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parent, name)

    def stage_value(self, val: Any) -> Any:
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Any, params: Any, /) -> Any:
        if primitive in PLANNED:
            avals = list(map(jax.typeof, tracers))
            primitive, params = planned(primitive, avals, params, self.algorithm)
        else:
            params = _rewritten_params(primitive, params, self.algorithm)
        with _binding_to(self.parent):
            return primitive.bind(*tracers, **params)

    def _process_functions(self, primitive: Any, /, *args: Any, **params: Any) -> Any:
        *functions, tracers = args
        subfuns = tuple(_by(_under, f, self.algorithm) for f in functions)
        with _binding_to(self.parent):
            return primitive.bind(*tracers, subfuns=subfuns, **params)

    process_custom_jvp_call = process_custom_vjp_call = _process_functions
    process_shard_map = _process_functions

    def process_call(self, primitive: Any, fun: Any, tracers: Any, params: Any, /) -> Any:
        return self._process_functions(primitive, fun, tracers, **params)


def _by(transform: Callable[..., Any], f: Any, algorithm: str) -> Any:
    """``transform(f, algorithm)`` for a function, plain or wrapped by JAX."""
    if isinstance(f, compat.linear_util.WrappedFun):
        return compat.linear_util.transformation2(_transformed)(f, transform, algorithm)
    return transform(f, algorithm)


def _transformed(f: Any, transform: Callable[..., Any], algorithm: str, *args: Any) -> Any:
    return transform(f, algorithm)(*args)


def _rewriting(thunk: Callable[..., Any], algorithm: str) -> Callable[..., Any]:
    def rewriting(*args: Any) -> Any:
        jaxpr, *others = thunk(*args)
        return _rewritten(jaxpr, algorithm) or jaxpr, *others

    return rewriting


def _rewritten_params(primitive: Any, params: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """``params`` with the convolutions in their jaxprs replaced; unchanged if there are none."""
    if primitive.name not in TRANSPARENT:
        if any(map(_convolves, params.values())):
            _warn(type(params["_prim"]).__name__ if "_prim" in params else primitive.name)
        return params
    changed = {}
    for key, value in params.items():
        if key in RULES:
            changed[key] = _by(_under, value, algorithm)
        elif key in THUNKS:
            changed[key] = _by(_rewriting, value, algorithm)
        elif (replaced := _rewritten_value(value, algorithm)) is not value:
            changed[key] = replaced
    return {**params, **changed} if changed else params


def _convolves(value: Any) -> bool:
    """Whether ``value`` is or contains a jaxpr with convolutions of lax."""
    if isinstance(value, tuple):
        return any(map(_convolves, value))
    # Some parameters of JAX's primitives are objects that hold traced functions (lax.custom_root).
    params = getattr(value, "params", None)
    if isinstance(params, dict):
        return any(map(_convolves, params.values()))
    jaxpr = value.jaxpr if isinstance(value, jax.stages.Traced) else value
    return hasattr(jaxpr, "eqns") and _rewritten(jaxpr, "auto") is not None


def _rewritten_value(value: Any, algorithm: str) -> Any:
    """``value``, with its convolutions replaced if it is a jaxpr or a tuple of them."""
    if hasattr(value, "eqns"):
        return _rewritten(value, algorithm) or value
    if not isinstance(value, tuple):
        return value
    items = [_rewritten_value(item, algorithm) for item in value]
    if all(map(operator.is_, items, value)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


_kept: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def _rewritten(jaxpr: Any, algorithm: str) -> Any:
    """A jaxpr with jaxconv's convolutions in place of lax's; None where there are none."""
    results = _kept.setdefault(jaxpr, {})
    if algorithm not in results:
        eqns = []
        for eqn in (planned_eqn(eqn, algorithm) for eqn in jaxpr.eqns):
            params = _rewritten_params(eqn.primitive, eqn.params, algorithm)
            eqns.append(eqn if params is eqn.params else eqn.replace(params=params))
        same = all(map(operator.is_, eqns, jaxpr.eqns))
        results[algorithm] = None if same else compat.with_eqns(jaxpr, eqns)
    return results[algorithm]


@functools.lru_cache
def _warn(primitive: str) -> None:
    warnings.warn(
        f"jaxconv.accelerate: the convolutions inside {primitive!r} stay with lax, since jaxconv"
        " does not know how that primitive runs them; accelerate the function inside it instead",
        stacklevel=2,
    )


def _remat(original: Any, trace: Any, *operands: Any, algorithm: str, **params: Any) -> Any:
    rule = _under(compat.remat_rules()[original], algorithm)
    out, saved, rest = rule(trace, *operands, **params)
    return out, saved, _under(rest, algorithm)


# JAX 0.12 uses these rules to recompute if jax_remat3 is set; JAX 0.10 has none for convolutions.
for _primitive in (conv_p, *POOLINGS.values()):
    if _primitive.original in compat.remat_rules():
        compat.remat_rules()[_primitive] = functools.partial(_remat, _primitive.original)
