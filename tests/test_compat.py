"""Newer JAX: a version that nobody has tested, and one that lacks a private name."""

import json

import children

from jaxconv.compat import NAMES

# In one process jaxconv is imported again and again, each time with others of the names hidden: of
# features that use none of one another's. Programs are lowered, not compiled.
SCRIPT = """
import functools, importlib, json, sys, warnings
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

SAME = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
X, W = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
one = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
two = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,))
plain = importlib.import_module

def conv(x, w, **arguments):
    # By name, since the planner takes half a second to start.
    arguments = SAME | arguments
    return jaxconv.conv_general_dilated(x, w, **arguments, algorithm="im2col")

def by_lax(x, w):
    return lax.conv_general_dilated(x, w, **SAME)

def lowered(function, *args):
    # Another function each time, so that nothing is reused.
    return jax.jit(lambda *args: function(*args)).lower(*args).as_text()

def explicitly(**arguments):
    with jax.set_mesh(explicit):
        placed = jax.device_put(X, P("i")), jax.device_put(W, P())
        lowered(lambda x, w: conv(x, w, **arguments), *placed)

def enabled():
    with jaxconv.enabled():
        fun = lambda x, w: lax.conv_general_dilated(x, w, **SAME, feature_group_count=3)
        assert "stablehlo.convolution" not in lowered(fun, X, W[:, :, :1, :3])

def partitioned():
    text = lowered(conv, jax.device_put(X, NamedSharding(two, P("i"))), W)
    assert ("custom_call @jaxconv" in text) == whole

def policy():
    fun = jax.checkpoint(conv, policy=jax.checkpoint_policies.dots_saveable)
    lowered(jax.grad(lambda x, w: jnp.sum(fun(x, w))), X, W)

def in_shard_map():
    specs = dict(mesh=one, in_specs=(P("i"), P()), out_specs=P("i"))
    lowered(jax.shard_map(conv, **specs), X, W)

def gradients():
    fun = lambda x, w: jnp.sum(jax.vmap(conv, (0, None))(x[None], w))
    lowered(jax.grad(fun, (0, 1)), X, W)

FEATURES = {
    "jaxconv": gradients,
    "xla": lambda: lowered(lambda x, w: jaxconv.conv(x, w, algorithm="xla"), X, W),
    "plan": lambda: jaxconv.plan(X, W),
    "precision": lambda: lowered(lambda x, w: conv(x, w, precision="highest"), X, W),
    "preferred_element_type": lambda: lowered(
        lambda x, w: conv(x, w, preferred_element_type="float32"), X, W
    ),
    "out_sharding": lambda: explicitly(out_sharding=P("i")),
    "explicit sharding": explicitly,
    "a convolution under a mesh": in_shard_map,
    "a policy of jax.checkpoint": policy,
    "accelerate": lambda: lowered(jaxconv.accelerate(by_lax, algorithm="im2col"), X, W),
    "explain": lambda: jaxconv.explain(by_lax, X, W),
    "enable": enabled,
    "partitioning": partitioned,
}

class Hiding:
    def __init__(self, module, names):
        self.module, self.names = module, names

    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(name)
        return getattr(self.module, name)

def without(names, module, *rest):
    hidden = [name for name in names if NAMES[name][0] == module]
    return Hiding(plain(module, *rest), hidden) if hidden else plain(module, *rest)

def apart(name, other):
    one, two = NAMES[name][1], NAMES[other][1]
    return one != two and name not in used.get(two, ()) and other not in used.get(one, ())

def imported():
    for module in [m for m in sys.modules if m.partition(".")[0] == "jaxconv"]:
        del sys.modules[module]
    return plain("jaxconv")

def errors(features):
    found = {}
    for feature in features:
        try:
            FEATURES[feature]()
        except Exception as error:
            found[feature] = f"{type(error).__name__}: {error}"
    return found

jaxconv, whole = imported(), True
compat = plain("jaxconv.compat")
used, lookup = {}, compat._jaxs
for feature, use in FEATURES.items():
    names = used[feature] = []
    compat._jaxs = lambda name: (names.append(name), lookup(name))[1]
    use()
NAMES, rounds = compat.NAMES, []
for name in NAMES:
    for names in rounds:
        if all(apart(name, other) for other in names):
            names.append(name)
            break
    else:
        rounds.append([name])
report, whole = {"used": used, "hidden": {}}, False
for names in rounds:
    importlib.import_module = functools.partial(without, names)
    jaxconv = imported()
    found = errors({"jaxconv"} | {NAMES[name][1] for name in names} & set(FEATURES))
    for name in names:
        features = {"jaxconv", NAMES[name][1]}
        report["hidden"][name] = {key: found[key] for key in features & set(found)}
importlib.import_module = plain
jax.__version_info__, jax.__version__ = (99, 1, 2), "99.1.2"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    imported()
report["warnings"] = [f"{w.category.__name__}: {w.message}" for w in caught]
print(json.dumps(report))
"""


# What works without a name, by other means or in part.
WITHOUT = ("jaxconv", "jax_remat3", "partitioning")


def test_what_needs_a_name_that_is_gone_fails_alone() -> None:
    """One test, since what it looks at is a process of 15 seconds."""
    report = json.loads(children.output(2, "-c", SCRIPT))
    assert report["hidden"].keys() == NAMES.keys()
    for name, errors in report["hidden"].items():
        module, feature = NAMES[name]
        assert set(errors) <= {feature} - {*WITHOUT}, name
        for error in errors.values():
            start = f"RuntimeError: jaxconv: {feature} needs {module}.{name}, which JAX "
            assert error.startswith(start)
            assert " lacks; install JAX 0.10.2 to 0.12, or a newer jaxconv" in error
        looked_up = any(name in names for names in report["used"].values())
        assert errors or feature in WITHOUT or not looked_up, name

    # Features use their own names only.
    mesh = "a convolution under a mesh"
    more = {"explicit sharding": {mesh}, "out_sharding": {mesh, "explicit sharding"}}
    for feature, names in report["used"].items():
        allowed = {feature, *WITHOUT} | more.get(feature, set())
        assert {NAMES[name][1] for name in names} <= allowed, feature
    # The others are looked up on import, for offloading, or for functions with rules.
    others = {"rules", "Offloadable", "linear_util", "source_info_util"}
    assert set(NAMES) - set().union(*report["used"].values()) == others

    (warning,) = report["warnings"]  # of a newer version
    assert warning.startswith("UserWarning: jaxconv is tested with JAX 0.10.2 to 0.12, and this is")
    assert "99.1.2" in warning
