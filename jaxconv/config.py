"""``config``: the settings of a process, from code or from environment variables."""

import contextlib
import dataclasses
import math
import operator
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from jaxconv import tables
from jaxconv.arguments import hints
from jaxconv.arguments.errors import fail

# Share of physical memory that one convolution may take besides operands and output: a program
# holds its own arrays, and XLA may run several convolutions at a time.
MEMORY_SHARE = 8
UNKNOWN_MEMORY = 8 * 2**30  # bytes assumed where the system does not report it

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

# Called when settings or measurements have changed.
listeners: list[Callable[[], None]] = []


def _size(value: Any) -> int | None:
    """Bytes, from a number or a string such as "512MiB"; None for other values."""
    if isinstance(value, str):
        units = {unit.lower(): factor for unit, factor in _UNITS.items()}
        match = _SIZE.fullmatch(value.strip())
        factor = None if match is None else units.get(match[2].lower())
        return None if match is None or factor is None else math.floor(float(match[1]) * factor)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    size = operator.index(value)
    return None if size < 0 else size


def _folder(value: Any) -> Path | None:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        return None
    return Path(value).expanduser()


def _boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        return _BOOLEANS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _memory_share() -> int:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has these
        pages, size = -1, -1
    memory = pages * size if min(pages, size) > 0 else UNKNOWN_MEMORY
    return memory // MEMORY_SHARE


def _user_cache() -> Path | None:
    try:
        import platformdirs  # optional: without it there is no default folder
    except ModuleNotFoundError:
        return None
    return Path(platformdirs.user_cache_dir("jaxconv", appauthor=False))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      variable: the environment variable that gives its value unless ``update`` did.
      expects: what a value must be, for error messages.
      checked: parses a value; None if it is invalid.
      default: the value if none was given.
      summary: what it is, in a line.
    """

    variable: str
    expects: str
    checked: Callable[[Any], Any]
    default: Callable[[], Any]
    summary: str


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "workspace_limit": Setting(
            "JAXCONV_WORKSPACE_LIMIT",
            "a number of bytes such as 536870912, '512MiB' or '2GB'",
            _size,
            _memory_share,
            'bytes of intermediate arrays that "auto" lets an algorithm take',
        ),
        "cache_dir": Setting(
            "JAXCONV_CACHE_DIR",
            "a folder's path",
            _folder,
            _user_cache,
            "the folder for measurements by autotune",
        ),
        "use_cache": Setting(
            "JAXCONV_USE_CACHE",
            "a boolean (1, true, yes, on, 0, false, no, off in the environment)",
            _boolean,
            lambda: True,
            "whether plans use measurements by autotune",
        ),
    }
)


class Config:
    """The settings of this process: read as attributes, changed by ``update`` or ``set``.

    A value is the last one given to ``update``, else that of the environment variable, else the
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

    __slots__ = ("_blocks", "_defaults", "_environed", "_environment", "_given", "_lock")

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._given: dict[str, Any] = {}
        self._environed: dict[str, Any] = {}  # as parsed; None where there is no variable
        self._defaults: dict[str, Any] = {}
        # Values of each open block, the latest last: blocks of threads may overlap.
        self._blocks: tuple[dict[str, Any], ...] = ()
        self._lock = threading.Lock()

    @property
    def workspace_limit(self) -> int:
        """Bytes of intermediate arrays, besides operands and output, that "auto" lets an algorithm
        take. ``xla`` and algorithms asked for by name are exempt. Default: an eighth of the
        machine's memory; plans in a program of several processes, which must be alike, take an
        eighth of 8 GiB instead. A value that is given counts there too: give all the same."""
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
        checked = self._checked("update", {name: value})
        with self._lock:
            holder = next((b for b in reversed(self._blocks) if name in b), self._given)
            holder.update(checked)
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
        block = self._checked("set", values)
        with self._lock:
            self._blocks = (*self._blocks, block)
        notify()
        try:
            yield
        finally:
            with self._lock:
                self._blocks = tuple(other for other in self._blocks if other is not block)
            notify()

    def _checked(self, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = {}
        for name, value in values.items():
            if name not in SETTINGS:
                called = "name" if method == "update" else "each name"
                constraint = f"{called} must be one of {', '.join(SETTINGS)}"
                fail(f"config.{method}", constraint, repr(name), hints.of_name(name, SETTINGS))
            checked[name] = _checked(f"config.{method}", name, name, value)
        return checked

    def _from_user(self, name: str) -> Any:
        """The value of a setting that the user gave, in code or environment; None for a default."""
        for values in (*reversed(self._blocks), self._given):
            if name in values:
                return values[name]
        if name not in self._environed:
            variable = SETTINGS[name].variable
            text = self._environment.get(variable, "")
            called = f"the environment variable {variable}"
            self._environed[name] = _checked("config", name, called, text) if text.strip() else None
        return self._environed[name]

    def _value(self, name: str) -> Any:
        given = self._from_user(name)
        if given is None and name not in self._defaults:
            self._defaults[name] = SETTINGS[name].default()
        return self._defaults[name] if given is None else given

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A process has one configuration: copying and unpickling return that of the process.
        return "config" if self is config else super().__reduce__()

    def __repr__(self) -> str:
        rows = [
            (name, str(self._value(name)), setting.variable, setting.summary)
            for name, setting in SETTINGS.items()
        ]
        header = "setting", "value", "variable", "what it is"
        return tables.Table(rows=[header, *rows], detail=True).text(tables.terminal_width())


def _checked(function: str, name: str, called: str, value: Any) -> Any:
    checked = SETTINGS[name].checked(value)
    if checked is None:
        fail(function, f"{called} must be {SETTINGS[name].expects}", repr(value), "give one")
    return checked


def notify() -> None:
    """Calls the listeners: settings or measurements have changed."""
    for listener in listeners:
        listener()


config = Config()


def several_processes() -> bool:
    """Whether several processes run this program. They must plan alike: if their programs differ,
    they wait for each other for ever. Starts JAX's backend."""
    return jax.process_count() > 1


def over_limit(workspace: int) -> str | None:
    """Why this many bytes of intermediate arrays are too many; None if they are not."""
    limit = config.workspace_limit
    if several_processes() and config._from_user("workspace_limit") is None:
        limit = UNKNOWN_MEMORY // MEMORY_SHARE  # hosts may differ
    if workspace <= limit:
        return None
    sizes = tables.mebibytes(workspace), tables.mebibytes(limit)
    return "its workspace of {} is over the limit of {}".format(*sizes)
