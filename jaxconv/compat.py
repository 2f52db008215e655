"""Everything that depends on the JAX version, and nothing else.

Names imported from ``jax._src`` have no public counterpart in JAX 0.10.2 to 0.12; a comment beside
each says what it is for.
"""

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax._src import (
    core,
    linear_util,  # wraps the functions of custom_jvp and custom_vjp
    sharding_impls,  # where a program is lowered for
    source_info_util,
    xla_bridge,
)
from jax._src.config import config_ext
from jax._src.core import (
    Literal,  # jax.extend.core has it too, but importing that takes 30 to 60 ms
    Primitive,  # as well
    Trace,  # base class of accelerate's trace
    auto_insert_reshard,  # casts the operand that lacks a mesh axis inside shard_map
    is_constant_shape,  # False for the symbolic dimensions of jax.export
    jaxprs_in_params,
    mem_kind_to_space,  # memory spaces named by offloading policies
    set_current_trace,
)
from jax._src.dispatch import apply_primitive  # compiles once per parameters outside jit
from jax._src.dtypes import check_and_canonicalize_user_dtype
from jax._src.interpreters import mlir as lowerings
from jax._src.interpreters.partial_eval import (
    Offloadable,  # returned by rematerialisation policies, as is bool
    SaveableType,
    ensure_enum,
)
from jax._src.interpreters.remat import rules as remat_rules
from jax._src.lax.lax import canonicalize_precision, rev_p
from jax._src.lib import (
    xla_client,  # pyright: ignore[reportPrivateImportUsage] (registers what XLA's partitioner asks)
)
from jax._src.sharding_impls import canonicalize_sharding
from jax._src.source_info_util import user_frames  # frames of a traceback outside JAX
from jax._src.util import weakref_lru_cache
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.lax import conv_general_dilated_p

__all__ = [
    "JAXPRS",
    "OLD_XLA",
    "Literal",
    "Offloadable",
    "Primitive",
    "SaveableType",
    "Trace",
    "ad",
    "add_rules",
    "apply_primitive",
    "auto_insert_reshard",
    "batching",
    "canonicalize_precision",
    "canonicalize_sharding",
    "check_and_canonicalize_user_dtype",
    "conv_general_dilated_p",
    "current_trace",
    "current_traceback",
    "custom_call",
    "ensure_enum",
    "eval_jaxpr",
    "has_explicit_sharding",
    "is_constant_shape",
    "jaxprs_in_params",
    "jit_key",
    "linear_util",
    "lowered_for",
    "lowering_rule",
    "mem_kind_to_space",
    "mlir",
    "module_of",
    "no_mesh",
    "partial_eval",
    "places",
    "platform_rules",
    "register_partitioner",
    "remat_rules",
    "rev_p",
    "set_current_trace",
    "sharding_of",
    "user_frames",
    "weakref_lru_cache",
    "with_eqns",
    "with_sharding_in_type",
    "without_dead_code",
    "without_shardings",
]

# Up to JAX 0.11 a jaxpr with its constants is a separate class.
JAXPRS: tuple[type, ...] = (core.Jaxpr, getattr(core, "ClosedJaxpr", core.Jaxpr))

# XLA:CPU compiles loops, slices and convolutions otherwise since JAX 0.11.
OLD_XLA = jax.__version_info__ < (0, 11)

# Part of the key of jit's caches; None unless set.
jit_key = config_ext.Config("jaxconv_accelerate", None, include_in_jit_key=True)


def current_trace() -> Any:
    """The trace that currently interprets primitives."""
    return core.trace_ctx.trace


def current_traceback() -> Any:
    """The user's source location of the operation that JAX is tracing or lowering."""
    return source_info_util.current().traceback


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
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    if inner is jaxpr:
        return jaxpr.replace(eqns=eqns)
    return jaxpr.replace(jaxpr=inner.replace(eqns=eqns))


# The tables of rules for lax's convolution in JAX's other transformations, by module. Importing
# these modules takes 430 ms.
_TABLES = {
    "jax._src.checkify": "error_checks",
    "jax.experimental.jet": "jet_rules",
    "jax.experimental.roofline.roofline": "_rooflines",
    "jax.experimental.sparse.transform": "sparse_rules_bcoo",
}


def add_rules(convolution: Primitive) -> None:
    """Adds lax's rules for ``convolution`` to those tables whose modules are imported."""
    for module, name in _TABLES.items():
        table = getattr(sys.modules.get(module), name, {})
        rule = table.get(conv_general_dilated_p)
        if rule is not None and convolution not in table:
            table[convolution] = _for_primitive(convolution, rule)


def _for_primitive(convolution: Primitive, rule: Any) -> Any:
    if isinstance(rule, partial) and rule.args == (conv_general_dilated_p,):
        return partial(rule.func, convolution)

    def without_algorithm(*args: Any, algorithm: str, **params: Any) -> Any:
        return rule(*args, **params)

    return without_algorithm


def lowering_rule(primitive: Any, platform: str) -> Any:
    """The rule by which ``primitive`` is lowered for ``platform``."""
    for name in xla_bridge.expand_platform_alias(platform):
        if primitive in lowerings._platform_specific_lowerings[name]:
            return lowerings._platform_specific_lowerings[name][primitive].rule
    return lowerings._lowerings[primitive].rule


def platform_rules(platform: str) -> dict[str, dict[Any, Any]]:
    """The tables of rules specific to ``platform``, to be read and restored."""
    return {
        name: lowerings._platform_specific_lowerings[name]
        for name in xla_bridge.expand_platform_alias(platform)
    }


def has_explicit_sharding(*avals: Any) -> bool:
    """Whether types of arrays carry a sharding (JAX's explicit sharding mode)."""
    return any(entry is not None for aval in avals for entry in aval.sharding.spec)


# XLA's partitioner


def lowered_for(ctx: Any) -> tuple[int, bool]:
    """For how many devices a program is lowered whose operations XLA partitions, 1 if it doesn't;
    and whether it may ask this process how: not for a program that is exported, or one of which
    some axes are manual (``shard_map`` with automatic ones)."""
    where = ctx.module_context.axis_context
    if isinstance(where, sharding_impls.ShardingContext):
        return where.num_devices, not ctx.module_context.lowering_parameters.for_export
    if isinstance(where, sharding_impls.SPMDAxisContext):
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
    return lowerings.lower_with_sharding_in_types(ctx, out, ctx.avals_out[0])


def register_partitioner(target: str, *callbacks: Callable[..., Any]) -> None:
    """Registers what XLA calls for a custom call to ``target``: how it lies, given its user; its
    program; how it lies, given its operands."""
    register = xla_client.register_custom_call_partitioner
    register(target, *callbacks)
    xla_bridge.register_plugin_callbacks(partial(register, target, *callbacks))


def places(sharding: Any, ndim: int, devices: int) -> list[tuple[int, ...]]:
    """For each dimension the place of each device, of XLA's sharding; None is replicated."""
    if sharding is None or not sharding.is_tiled():
        return [(0,) * devices] * ndim
    if hasattr(sharding, "v3_to_v2_sharding"):
        sharding = xla_client.HloSharding.v3_to_v2_sharding(sharding)
    shape = sharding.tile_assignment_dimensions()
    order = np.argsort(sharding.tile_assignment_devices())
    return [tuple(i.ravel()[order].tolist()) for i in np.indices(shape)[:ndim]]


def sharding_of(places: Sequence[Sequence[int]]) -> Any:
    """XLA's sharding by which devices have these places along each dimension."""
    counts = [max(along) + 1 for along in places]
    if math.prod(counts) == 1:
        return xla_client.HloSharding.replicate()
    grid = np.lexsort(places[::-1]).reshape(*counts, -1)
    rest = [xla_client.OpSharding.Type.REPLICATED] if grid.shape[-1] > 1 else []
    grid = grid if rest else grid[..., 0]
    return xla_client.HloSharding.subgroup_with_device_ordering(np.ascontiguousarray(grid), rest)


def module_of(
    function: Callable[..., Any], args: Sequence[Any], axis: tuple[str, int], platforms: Any
) -> bytes:
    """The program of each of several devices, which have a place along a named axis."""
    name, size = axis
    mesh: Any = jax.sharding.AbstractMesh((size,), (name,))
    with no_mesh():
        jaxpr = jax.make_jaxpr(function, axis_env=[axis])(*args)
    with core.extend_axis_env_nd([axis]), no_mesh():
        module = lowerings.build_mlir_module_helper(
            jaxpr,
            name="part",
            platforms=platforms,
            backend=None,
            axis_context=sharding_impls.SPMDAxisContext(mesh, frozenset({name})),
        )
    return lowerings.module_to_bytecode(module)


def custom_call(
    ctx: Any,
    target: str,
    operands: Sequence[Any],
    key: str,
    arrays: Sequence[Sequence[Sequence[str]]],
    sizes: Mapping[str, int],
    kinds: Mapping[str, Collection[str]],
) -> Any:
    """A call of which XLA asks the callbacks registered for ``target``, with ``key``.

    Args:
      arrays: for each dimension of the operands and of the output its factors, those of dimensions
        that correspond being the same.
      sizes: of factors.
      kinds: the factors that aren't simply kept, by the keywords of ``SdyShardingRule``.
    """
    # Imported here, as it takes 10 ms.
    from jax._src import custom_partitioning_sharding_rule as rules

    (out_type,) = mlir.aval_to_ir_types(ctx.module_context, ctx.avals_out[0])
    mappings = [
        rules.ArrayMapping(*(f[0] if len(f) == 1 else rules.CompoundFactor(*f) for f in factors))
        for factors in arrays
    ]
    used = {f for array in arrays for factors in array for f in factors}
    whole = {factors[0] for array in arrays for factors in array if len(factors) == 1}
    keywords: dict[str, Any] = {f: sizes[f] for f in used - whole}
    for kind, factors in kinds.items():
        keywords[kind] = tuple(f for f in factors if f in used)
    rule = rules.SdyShardingRule(tuple(mappings[:-1]), (mappings[-1],), **keywords)
    types = [x.type for x in operands]
    call = lowerings.custom_call(
        target,
        result_types=[out_type],
        operands=operands,
        backend_config=key,
        api_version=2,
        extra_attributes={
            "sdy.sharding_rule": rules.sdy_sharding_rule_to_mlir(rule, types, [out_type])
        },
    )
    return call.results
