"""The package as a whole: what it exports and imports, its layers, and that its examples run."""

import ast
import copy
import functools
import graphlib
import inspect
import itertools
import json
import pickle
import re
from importlib import metadata
from pathlib import Path

import children
import pytest
import reference

import jaxconv
from jaxconv.config import SETTINGS, Config

PACKAGE = Path(jaxconv.__file__).parent
README = Path(__file__).parents[1] / "README.md"
PUBLIC = sorted(itertools.chain.from_iterable(reference.GROUPS.values()))


# What it exports


def test_all_is_exact_and_sorted() -> None:
    assert jaxconv.__all__ == PUBLIC
    assert all(hasattr(jaxconv, name) for name in PUBLIC)


FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(jaxconv, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented_with_an_example(name: str) -> None:
    function = getattr(jaxconv, name)
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    sections = ["Example:\n  >>> import"]
    if signature.parameters:
        sections += ["Args:", "Raises:"]
    if signature.return_annotation is not None:
        sections.append("Returns:")
    for section in sections:
        assert section in text, f"{name} has no {section!r}"
    if "The others: as in" not in text:
        assert set(signature.parameters) <= set(re.findall(r"\w+", text))
    assert inspect.getdoc(jaxconv.UnsupportedConvError)


def test_page_of_functions_is_up_to_date() -> None:
    """``python tests/reference.py`` writes it."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_config_is_documented() -> None:
    settings = {n: p for n, p in vars(Config).items() if isinstance(p, property)}
    assert set(settings) == set(SETTINGS)
    for name, setting in settings.items():
        assert "Default:" in (inspect.getdoc(setting) or ""), name
    for name in ("update", "set"):
        text = inspect.getdoc(getattr(Config, name)) or ""
        assert "Args:" in text
        assert "Raises:" in text
    assert "Example:\n  >>> import" in (inspect.getdoc(Config) or "")


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_version() -> None:
    assert jaxconv.__version__ == metadata.version("jaxconv")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxconv.nothing


@pytest.mark.parametrize("value", [jaxconv.ALGORITHMS, jaxconv.ALGORITHMS["shift"], jaxconv.config])
def test_copies_are_the_value_itself(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) is value
    assert copy.copy(value) is copy.deepcopy(value) is value


def test_algorithms_are_shown_by_name_and_summary() -> None:
    *_, last = lines = str(jaxconv.ALGORITHMS).splitlines()
    assert len(lines) == len(jaxconv.ALGORITHMS)
    assert last == repr(jaxconv.ALGORITHMS["xla"])
    assert last == "xla: lax's own convolution, in the canonical layout"


# What it imports

IMPORTED = """
import sys
import jax, numpy
before = {name.partition(".")[0] for name in sys.modules}
import jaxconv, jaxconv.cli
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("jaxconv")))
"""


def test_import_needs_jax_and_numpy_only() -> None:
    packages, modules = children.output(1, "-c", IMPORTED).splitlines()
    assert packages == "jaxconv"
    assert {"jaxconv.api", "jaxconv.planning.rows"} <= set(modules.split())
    assert not re.search(r"jaxconv\.(app|bench)", modules)


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# The floors of the house, the lowest first. What each is for stands in its module or folder.
FLOORS = (
    ("compat", "spec", "layout", "loops", "tables"),
    ("arguments", "config"),
    ("sharding",),
    ("algorithms", "pooling"),
    ("planning",),
    ("transforms",),
    ("tools",),
    ("api", "patches", "pools", ""),
    ("bench",),
    ("app",),
    ("cli", "__main__"),
)


@pytest.mark.parametrize(
    "module", ["jaxconv" if name == "" else f"jaxconv.{name}" for names in FLOORS for name in names]
)
def test_every_floor_says_its_purpose(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


def floor(module: str) -> int:
    """The number of the floor that ``module`` is on."""
    name = module.removeprefix("jaxconv").lstrip(".").partition(".")[0]
    return next(i for i, names in enumerate(FLOORS) if name in names)


@functools.cache
def imports(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if (node.module or "").partition(".")[0] == "jaxconv":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in MODULES else str(node.module) for name in names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str) -> None:
    for imported in imports(module):
        assert floor(imported) <= floor(module), f"{module} imports {imported}, a floor above it"


def test_there_is_no_circle_of_imports() -> None:
    sorter = graphlib.TopologicalSorter({module: imports(module) for module in MODULES})
    order = list(sorter.static_order())  # raises CycleError, which names the circle
    assert order.index("jaxconv.spec") < order.index("jaxconv.planning.plan")


INTERNAL = re.compile(r"^\s*(?:from|import) (jax\.(?:_src|extend|interpreters)\b.*)", re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_what_depends_on_the_version_of_jax_is_in_compat(module: str) -> None:
    found = INTERNAL.findall(MODULES[module].read_text(encoding="utf-8"))
    assert not found or module == "jaxconv.compat", f"{module} imports {found}"
    private = [name for name in found if name.startswith("jax._src")]
    assert not private, f"{module} imports {private}: look it up by compat.NAMES"


# Its examples

EXAMPLES = """
import doctest, importlib, json, sys

modules, blocks = map(json.loads, sys.argv[1:])
tried = 0
for name in modules:
    results = doctest.testmod(importlib.import_module(name))
    if results.failed:
        sys.exit(1)
    tried += results.attempted
print(tried)
namespace = {"__name__": "__main__"}
for i, block in enumerate(blocks):
    exec(compile(block, f"python block {i + 1} of the README", "exec"), namespace)
"""
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_examples_of_docstrings_and_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other in a process of their own."""
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200, "the README is no longer one of one reading"
    blocks = BLOCK.findall(text)
    assert blocks, "the README has no python block"
    modules = {"jaxconv.config", *(getattr(jaxconv, name).__module__ for name in FUNCTIONS)}
    first = "jaxconv.tools.memory"  # before JAX computes anything
    ordered = [first, *sorted(modules - {first})]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    printed = children.output(1, "-c", EXAMPLES, json.dumps(ordered), json.dumps(blocks))
    # Each function's example has an import and at least one line more.
    assert int(printed.partition("\n")[0]) >= 2 * len(FUNCTIONS)
