"""What depends on the JAX version, and nothing else.

What is taken from ``jax._src`` has no public counterpart in JAX 0.10.2 to 0.12; each name says
beside it what it is for.
"""

from typing import Any

import jax
from jax._src.core import (
    Primitive,  # jax.extend.core has it too, but importing that takes 30 to 60 ms
    auto_insert_reshard,  # casts the operand that lacks a mesh axis inside shard_map
    is_constant_shape,  # False for the symbolic dimensions of jax.export
    jaxpr_as_fun,
)
from jax._src.dispatch import apply_primitive  # compiles once per parameters outside jit
from jax._src.dtypes import check_and_canonicalize_user_dtype
from jax._src.lax.lax import canonicalize_precision
from jax.interpreters import ad, batching, mlir
from jax.lax import conv_general_dilated_p

__all__ = [
    "Primitive",
    "ad",
    "apply_primitive",
    "auto_insert_reshard",
    "batching",
    "canonicalize_precision",
    "check_and_canonicalize_user_dtype",
    "conv_general_dilated_p",
    "has_explicit_sharding",
    "is_constant_shape",
    "jaxpr_as_fun",
    "mlir",
]


def has_explicit_sharding(*arrays: Any) -> bool:
    """Whether the types of ``arrays`` carry a sharding (JAX's explicit sharding mode)."""
    return any(entry is not None for x in arrays for entry in jax.typeof(x).sharding.spec)
