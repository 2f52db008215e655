"""Documents in the user's cache folder: read cheaply, written atomically.

A document is a JSON-serialisable dictionary, in a file of its own in ``config.cache_dir``. Problems
with the folder or a file (damaged, of another version, unreadable, read-only) never raise an error
but cause one warning per file and process: an unreadable document counts as absent, and one that
can't be written is kept in memory. A damaged file is renamed, not overwritten.

Writing needs the package filelock, the default folder platformdirs; both are imported only when
needed and come with the extra "tune".
"""

import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxconv.config import config

Document = dict[str, Any]
Check = Callable[[Document], str | None]
Merge = Callable[[Document], Document]

SCHEMA = 1
LOCK_SECONDS = 10  # to wait for another process, which holds the lock for a few milliseconds
EXTRA = 'pip install "jaxconv[tune]"'

Key = tuple[Path | None, str]
# Files already read: their state (inode, time, size), and the document, None if it was invalid.
_read: dict[Path, tuple[tuple[int, int, int], Document | None]] = {}
# Updates that could not be written, in order.
_pending: dict[Key, list[Merge]] = {}
_warned: set[Key] = set()
# Guards these three: no thread reads a document that another is parsing or writing.
_lock = threading.RLock()


class DamagedError(ValueError):
    """The file does not hold a document of this name; the message says why."""


def no_check(document: Document) -> str | None:
    """Accepts every document."""
    return None


def load(name: str, check: Check = no_check) -> Document | None:
    """The document ``name``; None if there is none or it is invalid.

    It is parsed again only if its file changes. It belongs to the cache: don't modify it.

    Args:
      name: of the file, without its extension.
      check: returns what is wrong with a document, or None. Always the same for the same name.
    """
    folder = config.cache_dir
    with _lock:
        document = None if folder is None else _load(folder / f"{name}.json", name, check)
        for merge in _pending.get((folder, name), ()):
            document = merge(document or {})
        return document


def _load(path: Path, name: str, check: Check) -> Document | None:
    try:
        stat = path.stat()
        state = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if path not in _read or _read[path][0] != state:
            _read[path] = state, None
            _read[path] = state, _parsed(path, name, check)
        return _read[path][1]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except DamagedError as error:
        remedy = (
            "it is ignored, and kept aside as a file *.damaged when there is something to write"
        )
        warn(name, f"{str(path)!r} is damaged ({error}): {remedy}")
    except OSError as error:
        warn(name, f"{str(path)!r} can't be read ({error.strerror}): it is ignored")
    return None


def update(name: str, merge: Merge, check: Check = no_check) -> None:
    """Replaces the document ``name`` by ``merge`` of it, atomically.

    It is locked from reading to replacing, so that concurrent processes don't lose each other's
    updates. Concurrent readers, and those after this process was killed, see the old document.

    Args:
      name: as in ``load``.
      merge: returns the new document; must not modify its argument, which is empty where there was
        no document. It may be called more than once.
      check: as in ``load``.
    """
    with _lock:
        folder = config.cache_dir
        pending = _pending.setdefault((folder, name), [])
        pending.append(merge)
        try:
            if folder is None:
                raise ModuleNotFoundError(name="platformdirs")
            _write(folder / f"{name}.json", name, pending, check)
        except ModuleNotFoundError as error:
            problem = f"it takes the package {error.name!r} to keep it: {EXTRA}"
        except (OSError, NotImplementedError) as error:  # latter: file system without locks
            why = getattr(error, "strerror", None) or error
            problem = f"{str(folder)!r} can't be written ({why})"
        else:
            del _pending[folder, name]
            return
        warn(name, f"measurements are known to this process only, since {problem}")


def _write(path: Path, name: str, merges: list[Merge], check: Check) -> None:
    import filelock  # an optional dependency, not needed for reading

    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        try:
            document = _parsed(path, name, check)
        except FileNotFoundError:
            document = {}
        except DamagedError as error:
            document = {}
            aside = _kept_aside(path)
            warn(name, f"{str(path)!r} was damaged ({error}): it is now {aside!r}")
        for merge in merges:
            document = merge(document)
        text = json.dumps({"schema": SCHEMA, "name": name, "document": document}, indent=1)
        temporary = Path(f"{path}.tmp")  # written only by the holder of the lock
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _parsed(path: Path, name: str, check: Check) -> Document:
    """The document in a file. Raises OSError, or DamagedError if it isn't one of this name."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DamagedError("it is no JSON") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise DamagedError(f"it is not of schema {SCHEMA}")
    document = content.get("document")
    if content.get("name") != name or not isinstance(document, dict):
        raise DamagedError(f"it is no document {name!r}")
    problem = check(document)
    if problem is not None:
        raise DamagedError(problem)
    return document


def _kept_aside(path: Path) -> str:
    """Renames a file to an unused name, which it returns."""
    count = 0
    while (aside := Path(f"{path}{f'.{count}' if count else ''}.damaged")).exists():
        count += 1
    os.replace(path, aside)
    return str(aside)


def warn(name: str, problem: str) -> None:
    """Warns about the document ``name``, unless this process was warned about it before."""
    if (config.cache_dir, name) not in _warned:
        _warned.add((config.cache_dir, name))
        warnings.warn(f"jaxconv's cache: {problem}", UserWarning, stacklevel=2)
