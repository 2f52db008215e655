"""``config``: the settings of a process, from code or from environment variables."""

import contextlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxconv import tables
from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail

# The share of memory that one convolution may take: a program holds its own arrays, and XLA may run
# several convolutions at a time.
MEMORY_SHARE = 8
UNKNOWN_MEMORY = 8 * 2**30  # bytes assumed where the system does not report it
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

listeners: list[Callable[[], None]] = []  # called when settings or measurements have changed


def _size(value: Any) -> int | None:
    text = str(value).strip().lower() if isinstance(value, (str, int, np.integer)) else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(?:([kmgt])(i?))?b)?", text)
    if match is None:
        return None
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** " kmgt".index(prefix or " ")
    return math.floor(Fraction(number) * unit)


def _folder(value: Any) -> Path | None:
    is_path = isinstance(value, (str, os.PathLike)) and os.fspath(value)
    return Path(value).expanduser() if is_path else None


def _boolean(value: Any) -> bool | None:
    text = str(value).strip().lower() if isinstance(value, (str, bool)) else ""
    return text in TRUE if text in TRUE + FALSE else None


def _memory_share() -> int:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has these
        pages = size = -1
    return (pages * size if min(pages, size) > 0 else UNKNOWN_MEMORY) // MEMORY_SHARE


def _user_cache() -> Path | None:
    try:
        import platformdirs  # optional: without it there is no default folder
    except ModuleNotFoundError:
        return None
    return Path(platformdirs.user_cache_dir("jaxconv", appauthor=False))


class Setting(NamedTuple):
    parse: Callable[[Any], Any]  # None where a value is invalid
    default: Callable[[], Any]
    expects: str  # what a value must be


SIZE = "a number of bytes such as 536870912, '512MiB' or '2GB'"
SETTINGS = {
    "workspace_limit": Setting(_size, _memory_share, SIZE),
    "cache_dir": Setting(_folder, _user_cache, "a folder's path"),
    "use_cache": Setting(_boolean, lambda: True, f"a boolean ({', '.join(TRUE + FALSE)})"),
}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"JAXCONV_{name.upper()}"


class Config:
    """The settings of this process: read as attributes, changed by ``update`` or ``set``.

    A value is the last one passed to ``update``, else that of the environment variable, else the
    default. Environment variables are read once, when first needed; an invalid one raises then.
    ``print(jaxconv.config)`` shows all settings with their values and variables.

    A change applies to everything planned after it. Functions that JAX has already compiled stay
    unchanged until ``jax.clear_caches()``.

    Example:
      >>> import jaxconv
      >>> jaxconv.config.update("workspace_limit", "512MiB")
      >>> jaxconv.config.workspace_limit
      536870912
      >>> with jaxconv.config.set(workspace_limit="1GB", use_cache=False):
      ...     jaxconv.config.workspace_limit
      1000000000
    """

    __slots__ = ("_blocks", "_environment")

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        # The values of ``update`` and the environment, then those of each open ``set`` block.
        self._blocks: tuple[dict[str, Any], ...] = ({},)

    @property
    def workspace_limit(self) -> int:
        """Bytes of intermediate arrays, besides operands and output, that "auto" lets an algorithm
        take. ``xla`` and algorithms asked for by name are exempt. Default: an eighth of the
        machine's memory; plans in a program of several processes, which must be alike, take an
        eighth of 8 GiB instead. A value that is set counts there too: set the same in all."""
        return self._value("workspace_limit")

    @property
    def cache_dir(self) -> Path | None:
        """The folder for measurements by ``autotune``. Default: the user's cache folder; None where
        the package platformdirs, which locates it, is not installed."""
        return self._value("cache_dir")

    @property
    def use_cache(self) -> bool:
        """Whether plans use measurements by ``autotune``. Default: True; in a program of several
        processes plans never do."""
        return self._value("use_cache")

    def update(self, name: str, value: Any) -> None:
        """Changes a setting for the process; if an open ``set`` block has set it, until it ends.

        Args:
          name: "workspace_limit", "cache_dir" or "use_cache".
          value: as the attribute of that name, or as text.

        Raises:
          ValueError: there is no such setting, or the value is invalid.
        """
        parsed = _parsed("config.update", name, value, name)
        with _lock:
            block = next((b for b in reversed(self._blocks) if name in b), self._blocks[0])
            block[name] = parsed
        notify()

    @contextlib.contextmanager
    def set(self, **values: Any) -> Iterator[None]:
        """Changes settings for a ``with`` block, in all threads. Blocks may be nested and may
        overlap between threads: the one entered last takes precedence.

        Args:
          values: settings by name.

        Raises:
          ValueError: as ``update``.
        """
        block = {name: _parsed("config.set", name, value, name) for name, value in values.items()}
        with _lock:
            self._blocks = (*self._blocks, block)
        notify()
        try:
            yield
        finally:
            with _lock:
                self._blocks = tuple(other for other in self._blocks if other is not block)
            notify()

    def given(self, name: str) -> Any:
        """The value that code or the environment gives a setting; None where neither does."""
        for block in reversed(self._blocks):
            if name in block:
                return block[name]
        text = self._environment.get(variable(name), "").strip()
        called = f"the environment variable {variable(name)}"
        value = _parsed("config", name, text, called) if text else None
        return self._blocks[0].setdefault(name, value)

    def _value(self, name: str) -> Any:
        value = self.given(name)
        return SETTINGS[name].default() if value is None else value

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A process has one configuration: copying and unpickling return that of the process.
        return "config" if self is config else super().__reduce__()

    def __repr__(self) -> str:
        rows = [("setting", "value", "variable", "what it is")]
        for name in SETTINGS:
            summary = " ".join((getattr(Config, name).__doc__ or "").split()).split(". ")[0]
            rows.append((name, str(self._value(name)), variable(name), summary))
        return tables.Table(rows=rows, detail=True).text(tables.terminal_width())


def _parsed(function: str, name: str, value: Any, called: str) -> Any:
    if name not in SETTINGS:
        constraint = f"name must be one of {', '.join(SETTINGS)}"
        fail(function, constraint, repr(name), hints.of_name(name, SETTINGS))
    parsed = SETTINGS[name].parse(value)
    if parsed is None:
        fail(function, f"{called} must be {SETTINGS[name].expects}", repr(value), "pass one")
    return parsed


def notify() -> None:
    """Calls the listeners: settings or measurements have changed."""
    for listener in listeners:
        listener()


_lock = threading.Lock()
config = Config()


def several_processes() -> bool:
    """Whether several processes run this program. They must plan alike: if their programs differ,
    they wait for each other for ever. Starts JAX's backend."""
    return jax.process_count() > 1
