"""``config``: the settings of a process, from code or from environment variables."""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    return int(float(number) * unit)


def _folder(value: Any) -> Path | None:
    is_path = isinstance(value, (str, os.PathLike)) and os.fspath(value)
    return Path(value).expanduser() if is_path else None


def _boolean(value: Any) -> bool | None:
    text = str(value).strip().lower() if isinstance(value, (str, bool)) else ""
    return text in TRUE if text in TRUE + FALSE else None


# Of each setting: what parses a value, to None where it is invalid; and what one must be.
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "workspace_limit": (_size, "a number of bytes such as 536870912, '512MiB' or '2GB'"),
    "cache_dir": (_folder, "a folder's path"),
    "use_cache": (_boolean, f"a boolean ({', '.join(TRUE + FALSE)})"),
}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"JAXCONV_{name.upper()}"


class Config:
    """The settings of this process: read as attributes, changed by ``update`` or ``set``.

    A value is the last one passed to ``update``, else that of the environment variable, read once,
    when first needed, else the default. ``print(jaxconv.config)`` shows all values and variables. A
    change applies to everything planned after it, not to functions that JAX has already compiled.

    Example:
      >>> import jaxconv
      >>> with jaxconv.config.set(workspace_limit="512MiB", use_cache=False):
      ...     jaxconv.config.workspace_limit
      536870912
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
        limit = self.given("workspace_limit")
        return _memory() // MEMORY_SHARE if limit is None else limit

    @property
    def cache_dir(self) -> Path | None:
        """The folder for measurements by ``autotune``. Default: the user's cache folder; None where
        the package platformdirs, which locates it, is not installed."""
        folder = self.given("cache_dir")
        if folder is None:
            with contextlib.suppress(ModuleNotFoundError):
                import platformdirs

                folder = Path(platformdirs.user_cache_dir("jaxconv", appauthor=False))
        return folder

    @property
    def use_cache(self) -> bool:
        """Whether plans use measurements by ``autotune``. Default: True; in a program of several
        processes plans never do."""
        return self.given("use_cache") is not False

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
        """Changes settings for a ``with`` block, in all threads; the one entered last counts.

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

    def __reduce__(self) -> str:
        return "config"  # copying and unpickling return that of the process

    def __repr__(self) -> str:
        rows = [("setting", "value", "variable", "what it is")]
        for name in SETTINGS:
            summary = " ".join((getattr(Config, name).__doc__ or "").split()).split(". ")[0]
            rows.append((name, str(getattr(self, name)), variable(name), summary))
        return str(tables.Table(rows=rows, detail=True))


def _parsed(function: str, name: str, value: Any, called: str) -> Any:
    if name not in SETTINGS:
        constraint = f"name must be one of {', '.join(SETTINGS)}"
        fail(function, constraint, repr(name), hints.of_name(name, SETTINGS))
    parse, expected = SETTINGS[name]
    parsed = parse(value)
    if parsed is None:
        fail(function, f"{called} must be {expected}", repr(value), "pass one")
    return parsed


def _memory() -> int:
    """Bytes of this machine's memory."""
    pages = size = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has these
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size if min(pages, size) > 0 else UNKNOWN_MEMORY


def notify() -> None:
    """Calls the listeners: settings or measurements have changed."""
    for listener in listeners:
        listener()


_lock = threading.Lock()
config = Config()


def several_processes() -> bool:
    """Whether several processes run this program, which must plan alike. Starts JAX's backend."""
    return jax.process_count() > 1
