"""Everything that depends on the JAX version, and nothing else.

Private names of JAX are attributes of this module, ``compat.ensure_enum``, looked up when they are
used: one that a newer JAX lacks disables what needs it, with a message, and nothing else.
"""

import importlib
import math
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import core
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir, partial_eval
from jax.interpreters.xla import apply_primitive as apply_primitive
from jax.lax import conv_general_dilated_p

# The oldest version that jaxconv supports, and the newest that it is tested with.
OLDEST, NEWEST = (0, 10, 2), (0, 12)
SUPPORTED = f"JAX {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"

if jax.__version_info__[:2] > NEWEST:
    warnings.warn(
        f"jaxconv is tested with {SUPPORTED}, and this is {jax.__version__}: what needs a private"
        " name that it lacks will raise an error. Install one of these, or a newer jaxconv",
        stacklevel=2,
    )


# Looked up when used: its module, and what needs it. ``jax.extend`` takes 30 to 60 ms to import.
NAMES = {
    "canonicalize_precision": ("jax._src.lax.lax", "precision"),
    "check_and_canonicalize_user_dtype": ("jax._src.dtypes", "preferred_element_type"),
    "canonicalize_sharding": ("jax._src.sharding_impls", "out_sharding"),
    "lower_with_sharding_in_types": ("jax._src.interpreters.mlir", "explicit sharding"),
    "auto_insert_reshard": ("jax._src.core", "a convolution under a mesh"),
    "ensure_enum": ("jax._src.interpreters.partial_eval", "a policy of jax.checkpoint"),
    "Offloadable": ("jax._src.interpreters.partial_eval", "a policy of jax.checkpoint"),
    "SaveableType": ("jax._src.interpreters.partial_eval", "a policy of jax.checkpoint"),
    "rules": ("jax._src.interpreters.remat", "jax_remat3"),
    "find_top_trace": ("jax.extend.core", "accelerate"),
    "set_current_trace": ("jax.extend.core", "accelerate"),
    "linear_util": ("jax.extend", "accelerate"),
    "jaxprs_in_params": ("jax.extend.core", "explain"),
    "source_info_util": ("jax.extend", "explain"),
    "user_frames": ("jax._src.source_info_util", "explain"),
    "_lowerings": ("jax.interpreters.mlir", "enable"),
    "_platform_specific_lowerings": ("jax.interpreters.mlir", "enable"),
    "_uncacheable_primitives": ("jax._src.interpreters.mlir", "enable"),
    "xla_client": ("jax._src.lib", "partitioning"),
    "register_plugin_callbacks": ("jax._src.xla_bridge", "partitioning"),
    "extend_axis_env_nd": ("jax._src.core", "partitioning"),
    "build_mlir_module_helper": ("jax._src.interpreters.mlir", "partitioning"),
    "custom_call": ("jax._src.interpreters.mlir", "partitioning"),
    "str_to_sdy_sharding_rule": ("jax._src.custom_partitioning_sharding_rule", "partitioning"),
    "sdy_sharding_rule_to_mlir": ("jax._src.custom_partitioning_sharding_rule", "partitioning"),
}


@lru_cache(maxsize=len(NAMES))
def _jaxs(name: str) -> Any:
    """One of ``NAMES``."""
    module, feature = NAMES[name]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise RuntimeError(
            f"jaxconv: {feature} needs {module}.{name}, which JAX {jax.__version__} lacks; install"
            f" {SUPPORTED}, or a newer jaxconv"
        ) from None


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return _jaxs(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Primitive: Any = type(conv_general_dilated_p)
PLATFORMS = ("cpu", "gpu", "tpu")
EVERYWHERE = (*PLATFORMS, "other")
ALIASES = {"gpu": ("cuda", "rocm", "oneapi")}  # what JAX calls a platform when it lowers


def canonicalize_precision(precision: Any) -> Any:
    """``precision`` as the parameter of lax's convolution."""
    if precision is None and jax.config.jax_default_matmul_precision is None:
        return None
    return _jaxs("canonicalize_precision")(precision)


def auto_insert_reshard(*arrays: Any) -> Any:
    """``arrays``, those cast that lack a mesh axis along which others differ in ``shard_map``."""
    alone = jax.sharding.get_abstract_mesh().empty
    return arrays if alone else _jaxs("auto_insert_reshard")(*arrays)


def is_constant_shape(shape: Sequence[Any]) -> bool:
    """Whether sizes are numbers: False for the symbolic ones of ``jax.export``."""
    try:
        return all(operator.index(size) >= 0 for size in shape)
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        return False


# XLA:CPU compiles loops, slices and convolutions otherwise since JAX 0.11.
OLD_XLA = jax.__version_info__ < (0, 11)

# Part of the key of jit's caches: the algorithm of ``accelerate`` while it runs, else None.
accelerated = jax.make_user_context(None)


def eval_jaxpr(closed: Any, *args: Any) -> Any:
    """Runs a jaxpr; its operations get the source lines of the caller, not their own."""
    with jax.debug_nans(False):  # it was in effect when the operations were traced
        return core.eval_jaxpr(
            getattr(closed, "jaxpr", closed), closed.consts, *args, propagate_source_info=False
        )


def without_dead_code(jaxpr: Any) -> Any:
    """``jaxpr`` without the operations whose results nothing uses, which XLA drops as well."""
    return partial_eval.dce_jaxpr(getattr(jaxpr, "jaxpr", jaxpr), used_outputs=True)[0]


def with_eqns(jaxpr: Any, eqns: list[Any]) -> Any:
    """``jaxpr`` with other equations and the same constants."""
    if not hasattr(jaxpr, "jaxpr"):
        return jaxpr.replace(eqns=eqns)
    return jaxpr.replace(jaxpr=jaxpr.jaxpr.replace(eqns=eqns))


def remat_rules() -> dict[Any, Any]:
    """The rules by which JAX 0.12 recomputes if jax_remat3 is set; empty where there are none."""
    try:
        return _jaxs("rules")
    except RuntimeError:
        return {}


# Rules for lax's primitives in JAX's other transformations, by modules that take 430 ms to import.
_TABLES = {
    "jax._src.checkify": "error_checks",
    "jax.experimental.jet": "jet_rules",
    "jax.experimental.roofline.roofline": "_rooflines",
    "jax.experimental.sparse.transform": "sparse_rules_bcoo",
}


def add_rules(primitive: Any, original: Any) -> None:
    """Adds lax's rules for ``original`` to those tables whose modules are imported."""
    for module, name in _TABLES.items():
        table = getattr(sys.modules.get(module), name, {})
        rule = table.get(original)
        if rule is None or primitive in table:
            continue
        if isinstance(rule, partial) and rule.args == (original,):
            table[primitive] = partial(rule.func, primitive)
        else:
            table[primitive] = lambda *args, algorithm, _rule=rule, **kw: _rule(*args, **kw)


def lowering_rule(primitive: Any, platform: str) -> Any:
    """The rule by which ``primitive`` is lowered for ``platform``."""
    try:
        specific, common = map(_jaxs, ("_platform_specific_lowerings", "_lowerings"))
        tables = [specific.get(name, {}) for name in ALIASES.get(platform, (platform,))]
    except RuntimeError:  # then nothing is enabled that could stand in for it
        return mlir.lower_fun(primitive.bind, multiple_results=False)
    return next((t[primitive] for t in tables if primitive in t), common.get(primitive)).rule


def replace_rule(primitive: Any, rule: Callable[..., Any]) -> Callable[[], None]:
    """Lowers ``primitive`` by ``rule`` on all platforms, each time anew, so that it can look at
    operands; returns what restores JAX's rules."""
    needed = "_platform_specific_lowerings", "_lowerings", "_uncacheable_primitives"
    specific, common, uncacheable = map(_jaxs, needed)
    tables = [common, *specific.values()]
    found = [(table, table.pop(primitive)) for table in tables if primitive in table]
    mlir.register_lowering(primitive, rule, cacheable=False)

    def restore() -> None:
        del common[primitive]
        uncacheable.discard(primitive)
        for table, entry in found:
            table[primitive] = entry

    return restore


def platforms_of(ctx: Any) -> list[str]:
    """For which a rule lowers: "cpu", "gpu", "tpu", "other"."""
    names = ctx.platforms or ctx.module_context.platforms
    families = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    found = (families.get(name, name) for name in names)
    return list(dict.fromkeys(name if name in PLATFORMS else "other" for name in found))


def has_explicit_sharding(*avals: Any) -> bool:
    """Whether types of arrays carry a sharding (JAX's explicit sharding mode)."""
    return any(entry is not None for aval in avals for entry in aval.sharding.spec)


def lowered_for(ctx: Any) -> tuple[int, bool]:
    """For how many devices a program is lowered whose operations XLA partitions, 1 if it doesn't;
    and whether it may ask this process how: not for a program that is exported, or one of which
    some axes are manual (``shard_map`` with automatic ones)."""
    where = ctx.module_context.axis_context
    if isinstance(where, mlir.ShardingContext):
        exported = ctx.module_context.lowering_parameters.for_export
        return where.num_devices, where.num_devices > 1 and not exported and _partitions()
    if isinstance(where, mlir.SPMDAxisContext):
        manual = set(where.manual_axes) == set(where.mesh.axis_names)
        return 1 if manual else where.mesh.size, False
    return 1, False


def no_mesh() -> Any:
    """A context without the user's mesh, so that types get no shardings."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def without_shardings(ctx: Any) -> Any:
    """``ctx`` with types that carry no shardings, which algorithms' own operations don't keep."""
    avals = [core.ShapedArray(aval.shape, aval.dtype) for aval in (*ctx.avals_in, *ctx.avals_out)]
    count = len(ctx.avals_in)
    return ctx.replace(avals_in=avals[:count], avals_out=avals[count:])


def with_sharding_in_type(ctx: Any, out: Any) -> Any:
    """A lowered output that lies as its type says."""
    (aval,) = ctx.avals_out
    explicit = has_explicit_sharding(aval)
    return _jaxs("lower_with_sharding_in_types")(ctx, out, aval) if explicit else out


def _partitions() -> bool:
    """Whether this JAX has all that XLA's partitioner is asked by."""
    try:
        return all(map(_jaxs, (n for n, (_, need) in NAMES.items() if need == "partitioning")))
    except RuntimeError:
        return False


def register_partitioner(target: str, *callbacks: Callable[..., Any]) -> None:
    """Registers what XLA calls for a custom call to ``target``: how it lies, given its user; its
    program; how it lies, given its operands."""
    register = _jaxs("xla_client").register_custom_call_partitioner
    register(target, *callbacks)
    _jaxs("register_plugin_callbacks")(partial(register, target, *callbacks))


def places(sharding: Any, ndim: int, devices: int) -> list[tuple[int, ...]]:
    """For each dimension the place of each device, of XLA's sharding; None is replicated."""
    if sharding is None or not sharding.is_tiled():
        return [(0,) * devices] * ndim
    sharding = _jaxs("xla_client").HloSharding.v3_to_v2_sharding(sharding)
    shape = sharding.tile_assignment_dimensions()
    order = np.argsort(sharding.tile_assignment_devices())
    return [tuple(i.ravel()[order].tolist()) for i in np.indices(shape)[:ndim]]


def sharding_of(places: Sequence[Sequence[int]]) -> Any:
    """XLA's sharding by which devices have these places along each dimension."""
    xla = _jaxs("xla_client")
    counts = [max(along) + 1 for along in places]
    if math.prod(counts) == 1:
        return xla.HloSharding.replicate()
    grid = np.lexsort(places[::-1]).reshape(*counts, -1)
    rest = [xla.OpSharding.Type.REPLICATED] if grid.shape[-1] > 1 else []
    grid = grid if rest else grid[..., 0]
    return xla.HloSharding.subgroup_with_device_ordering(np.ascontiguousarray(grid), rest)


def module_of(
    function: Callable[..., Any], args: Sequence[Any], axis: tuple[str, int], platforms: Any
) -> bytes:
    """The program of each device along a named axis."""
    name, size = axis
    mesh: Any = jax.sharding.AbstractMesh((size,), (name,))
    with no_mesh():
        jaxpr = jax.make_jaxpr(function, axis_env=[axis])(*args)
    with _jaxs("extend_axis_env_nd")([axis]), no_mesh():
        context = mlir.SPMDAxisContext(mesh, frozenset({name}))
        module = _jaxs("build_mlir_module_helper")(
            jaxpr, name="part", platforms=platforms, backend=None, axis_context=context
        )
    return mlir.module_to_bytecode(module)


def asking_call(
    ctx: Any, target: str, operands: Sequence[Any], key: str, rule: str, **factors: Any
) -> Any:
    """A call of which XLA asks the callbacks registered for ``target``, with ``key``; of which
    dimensions correspond by ``rule`` and ``factors``, as in ``custom_partitioning``."""
    (out_type,) = mlir.aval_to_ir_types(ctx.module_context, ctx.avals_out[0])
    parsed = _jaxs("str_to_sdy_sharding_rule")(rule, **factors)
    attribute = _jaxs("sdy_sharding_rule_to_mlir")(parsed, [x.type for x in operands], [out_type])
    words = {"api_version": 2, "extra_attributes": {"sdy.sharding_rule": attribute}}
    return _jaxs("custom_call")(
        target, result_types=[out_type], operands=operands, backend_config=key, **words
    ).results
