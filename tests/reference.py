"""Writes ``jaxconv/README.md``, the page of every public name, from the docstrings."""

import inspect
import re
import sys
from pathlib import Path

import jaxconv
from jaxconv.config import Config

PAGE = Path(jaxconv.__file__).parent / "README.md"
# A heading, and all indented lines after it.
SECTION = re.compile(
    r"^(Args|Attributes|Returns|Yields|Raises|Warns|Example):\n((?:(?: .*)?(?:\n|\Z))+)",
    re.MULTILINE,
)
ITEM = re.compile(r"^(\*{0,2}\w+(?:, \w+)*|The others): ", re.MULTILINE)
# In the order of a reader.
GROUPS = {
    "Convolutions": ("conv", "conv_general_dilated", "conv_transpose", "pointwise"),
    "Pooling": ("max_pool", "avg_pool"),
    "Patches": ("im2col", "col2im"),
    "Programs": ("accelerate", "enable", "disable", "enabled", "keep_memory"),
    "Plans, measurements and settings": ("plan", "explain", "autotune", "config"),
    "Algorithms": ("ALGORITHMS", "UnsupportedConvError"),
}


def page() -> str:
    """The page as Markdown."""
    parts = ["# jaxconv's functions\n", _plain(inspect.getdoc(jaxconv) or "")]
    for group, names in GROUPS.items():
        parts.append(f"\n## {group}\n")
        parts += map(_entry, names)
    return "\n".join(parts).rstrip() + "\n"


def _entry(name: str) -> str:
    value = getattr(jaxconv, name)
    if name == "ALGORITHMS":
        rows = (f"| `{a.name}` | {a.summary} |" for a in value.values())
        body = "The algorithms by name.\n\n| name | what it does |\n|---|---|\n" + "\n".join(rows)
        return f"### `{name}`\n\n{body}\n"
    if name == "config":
        settings = {n: p for n, p in vars(Config).items() if isinstance(p, property)}
        items = (f"- `{n}`: {_inline(inspect.getdoc(p))}" for n, p in settings.items())
        methods = (_function(f"config.{n}", getattr(Config, n)) for n in ("update", "set"))
        return "\n".join(
            [f"### `{name}`\n", markdown(inspect.getdoc(Config) or ""), *items, "", *methods]
        )
    return _function(name, value)


def _function(name: str, value: object) -> str:
    shown = ""
    if inspect.isfunction(value):
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
        shown = str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
    code = f"```python\n{name}{shown}\n```\n\n" if shown else ""
    return f"### `{name}`\n\n{code}{markdown(inspect.getdoc(value) or '')}"


def markdown(docstring: str) -> str:
    """A docstring in Markdown: its sections as lists, its examples as code."""
    first, *rest = SECTION.split(docstring)
    parts = [_plain(first)]
    for heading, body, prose in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        parts += [_section(heading, inspect.cleandoc("\n" + body)), _plain(prose)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(heading: str, body: str) -> str:
    if heading == "Example":
        return "\n\n".join(map(_fenced, re.split(r"\n{2,}", body)))
    if not ITEM.match(body):
        return f"**{heading}**: {_inline(body)}"
    names, texts = (ITEM.split(body)[i::2] for i in (1, 2))
    items = (f"- {_code(n)}: {_inline(t)}" for n, t in zip(names, texts, strict=True))
    return f"**{heading}**\n\n" + "\n".join(items)


def _fenced(paragraph: str) -> str:
    return f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>>") else _plain(paragraph)


def _code(names: str) -> str:
    return names if " " in names.replace(", ", "") else f"`{names.replace(', ', '`, `')}`"


def _inline(text: str | None) -> str:
    return _plain(" ".join((text or "").split()))


def _plain(text: str) -> str:
    return text.strip().replace("``", "`")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
