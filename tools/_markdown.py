"""Docstrings as Markdown that a code host renders: mathematics between dollars, arguments as lists, examples fenced.

A docstring is Google's style with a little reStructuredText in it: ``.. math::``, ``:math:``, ``literals``, `names`,
blocks behind ``::``, doctests, simple tables. Prose comes out unwrapped, a paragraph a line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

#: Sections of a docstring, and what the page calls them.
SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Shapes": "Shapes",
    "Example": "Example",
    "Source": "Source",
}
_SECTION = re.compile(rf"({'|'.join(SECTIONS)}):(?:\s+(.*))?$")
_NAME = r"\*{0,2}[a-z_][a-z0-9_]*"
_NAMES = rf"{_NAME}(?:, {_NAME})*"
_ERROR = r"(?:[A-Za-z_]+\.)*[A-Z]\w*(?:Error|Unavailable)"
_RULE = re.compile(r"=+( +=+)+$")


def docstring(text: str | None, parameters: Sequence[str] = ()) -> str:
    """A docstring as Markdown.

    Args:
        text: as it stands in the code.
        parameters: names of the arguments, which may share a line with one another.
    """
    return "\n\n".join(_blocks(inspect.cleandoc(text or "").split("\n"), parameters))


def signature(name: str, thing) -> str:
    """How it is called, as a fenced block, a parameter a line where it is long; "" for what is not called by users."""
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return ""
    parameters, returned = _signature(thing)
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"
    return f"```python\n{line}\n```"


def parameters_of(thing) -> list[str]:
    """The names of what it takes, as its docstring's list tells them."""
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return []
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return []
    passed_on = {p.kind for p in parameters} <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    named = [p.name for p in parameters if p.name != "self"]
    return [] if passed_on and named == ["args", "kwargs"] else named


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# --- blocks -------------------------------------------------------------------------------------------------------


def _blocks(lines: list[str], parameters: Sequence[str] = ()) -> list[str]:
    blocks: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
        elif line.startswith(".. math::"):
            body, i = _indented(lines, i + 1)
            blocks.append(_display(" ".join([line.removeprefix(".. math::"), *body])))
        elif _RULE.match(line):
            end = next(k for k in range(i + 1, len(lines)) if _RULE.match(lines[k]))
            blocks.append(_table(lines[i : end + 1]))
            i = end + 1
        elif line.startswith(">>>"):
            end = next((k for k in range(i, len(lines)) if not lines[k].strip()), len(lines))
            blocks.append(_fenced(lines[i:end], "pycon"))
            i = end
        elif found := _SECTION.match(line):
            body, i = _indented(lines, i + 1)
            if found[2]:  # told on the section's own line, and perhaps on those after it
                while i < len(lines) and lines[i].strip() and not lines[i].startswith("    "):
                    body.append(lines[i])
                    i += 1
                body = [found[2], *body]
            blocks += _section(found[1], body, parameters, on_its_line=bool(found[2]))
        elif line.startswith("- "):
            end = i + 1
            while end < len(lines) and (lines[end].startswith(("- ", "  ")) or not lines[end].strip()):
                end += 1
            blocks.append(_bullets(lines[i:end]))
            i = end
        else:
            end = i + 1
            while end < len(lines) and lines[end].strip() and not _begins(lines[end]):
                end += 1
            text = " ".join(part.strip() for part in lines[i:end])
            i = end
            if text.endswith("::"):
                body, i = _indented(lines, i)
                blocks += [inline(text.removesuffix("::") + ":"), _fenced(body, "python")]
            else:
                blocks.append(inline(text))
    return [block for block in blocks if block]


def _begins(line: str) -> bool:
    """Whether a line ends the paragraph above it."""
    return bool(line.startswith((".. math::", ">>>", "- ")) or _SECTION.match(line) or _RULE.match(line))


def _indented(lines: list[str], i: int) -> tuple[list[str], int]:
    """The indented lines from `i` on, without their indent, and where they end."""
    end = i
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    body = inspect.cleandoc("\n" + "\n".join(lines[i:end])).split("\n")
    return ([] if body == [""] else body), end


def _section(name: str, body: list[str], parameters: Sequence[str], *, on_its_line: bool) -> list[str]:
    title = f"**{SECTIONS[name]}**"
    text = " ".join(line.strip() for line in body)
    if on_its_line and " Source: " in text:  # "Raises: as for `f`. Source: the same."
        text, source = text.split(" Source: ")
        return [f"{title}: {inline(text)}", f"**Source**: {inline(source)}"]
    if name in ("Args", "Attributes", "Shapes") and not (on_its_line and not _entry(text)):
        # Where the shapes belong to no argument, they are a sentence.
        if name != "Shapes" or _entry(text):
            return [title, _list(_entries(body, parameters), code=True)]
    if name == "Raises" and re.match(f"{_ERROR}: ", text):
        return [title, _list(_split(text, _ERROR), code=True)]
    if name in ("Returns", "Example") and not on_its_line:
        inner = _blocks(body)
        return [f"{title}: {inner[0]}", *inner[1:]] if not inner[0].startswith(("```", "$$")) else [title, *inner]
    return [f"{title}: {inline(text)}"]


def _entry(text: str) -> re.Match | None:
    return re.match(rf"({_NAMES}): ", text)


def _entries(body: list[str], parameters: Sequence[str]) -> list[tuple[str, str]]:
    """``(names, what they are)`` of a list of arguments.

    A line that begins with a name begins an entry. Within an entry, the next one begins behind a full stop, or behind a
    comma where it is known to be a parameter. How lines are indented decides nothing else.
    """
    entries: list[str] = []
    for line in map(str.strip, body):
        begun = _entry(line) and (not parameters or set(_bare(_entry(line)[1])) & set(parameters))
        if begun or not entries:
            entries.append(line)
        else:
            entries[-1] += f" {line}"
    return [found for entry in entries for found in _split(_parted(entry, parameters), _NAMES + "|The others")]


def _parted(text: str, parameters: Sequence[str]) -> str:
    """An entry with full stops for the commas that part arguments; the one in ``a, b: what both are`` joins them."""
    if not parameters:
        return text
    known = "|".join(map(re.escape, parameters))
    joined = re.compile(rf"(?:^|[.;)] |, )(?:{known})$")

    def stop(comma: re.Match) -> str:
        return ", " if joined.search(text[: comma.start()]) else ". "

    return re.sub(rf", (?=(?:{known}): )", stop, text)


def _bare(names: str) -> list[str]:
    return [name.lstrip("*") for name in names.split(", ")]


def _split(text: str, name: str) -> list[tuple[str, str]]:
    """Entries that share a line: ``a: this. b: that.``"""
    parts = re.split(rf"(?:^|(?<=[.;)]) )({name}): ", text)
    return list(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def _list(entries: list[tuple[str, str]], code: bool) -> str:
    lines = []
    for names, text in entries:
        label = names if names == "The others" else ", ".join(f"`{name}`" for name in names.split(", "))
        lines.append(f"- {label}: {inline(text)}")
    return "\n".join(lines)


def _bullets(lines: list[str]) -> str:
    """A list whose items may hold blocks of their own."""
    items: list[list[str]] = []
    for line in lines:
        if line.startswith("- "):
            items.append([line[2:]])
        else:
            items[-1].append(line[2:] if line.startswith("  ") else line)
    texts = ["\n\n".join(_blocks(item)) for item in items]
    return "\n".join("- " + text.replace("\n", "\n  ") for text in texts)


def _table(lines: list[str]) -> str:
    """A simple table: columns as wide as their rules, a row without its first cell goes on with the one above."""
    starts = [found.start() for found in re.finditer("=+", lines[0])]
    rules = [k for k, line in enumerate(lines) if _RULE.match(line)]
    header = [""] * len(starts)
    rows: list[list[str]] = []
    for k, line in enumerate(lines):
        if k in rules:
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if len(rules) > 2 and k < rules[1]:
            header = cells
        elif cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    return table([[inline(cell) for cell in row] for row in rows], [inline(cell) for cell in header])


def _fenced(lines: list[str], language: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"]).replace("\n\n```", "\n```")


# --- lines --------------------------------------------------------------------------------------------------------

_SPAN = re.compile(r":math:`([^`]*)`|``(.+?)``(?!`)|`([^`]+)`")


def inline(text: str) -> str:
    """A paragraph: names and literals as code, mathematics between dollars, the rest safe from being taken for HTML."""
    parts, last = [], 0
    for span in _SPAN.finditer(text):
        parts.append(_prose(text[last : span.start()]))
        math, literal, name = span.groups()
        parts.append(f"${_latex(math)}$" if math is not None else f"`{literal or name}`")
        last = span.end()
    return " ".join("".join([*parts, _prose(text[last:])]).split(" ")).strip()


def _prose(text: str) -> str:
    text = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text.replace("$", r"\$"))
    return re.sub(r"(?<![\w*])\*(?=[a-z]\w*:)", r"\\*", text)


def _display(text: str) -> str:
    return f"$$\n{_latex(text)}\n$$"


#: In Markdown a backslash before punctuation is an escape, and ``<`` may begin a tag: letters say the same.
_SPELLED = {
    r"\,": r"\thinspace ",
    r"\;": r"\thickspace ",
    r"\!": r"\negthinspace ",
    r"\{": r"\lbrace ",
    r"\}": r"\rbrace ",
    r"\|": r"\Vert ",
    r"\ ": "~",
    "<": r"\lt ",
    ">": r"\gt ",
    "*": r"\ast ",
    "½": r"\tfrac12 ",
}


def _latex(text: str) -> str:
    for written, spelled in _SPELLED.items():
        text = text.replace(written, spelled)
    # an underscore behind a bracket would begin emphasis, but not before a space
    return " ".join(re.sub(r"(?<=[^\w\s])_", "_ ", text).split())


def _signature(thing) -> tuple[list[str], str]:
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return [], ""
    if isinstance(thing, type) and parameters_of(thing) == []:
        return [], ""
    parameters, marked = [], False
    for p in found.parameters.values():
        if p.name == "self":
            continue
        if p.kind is p.KEYWORD_ONLY and not marked:
            parameters.append("*")
        marked = marked or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        # annotations are strings (they are never evaluated): shown without their quotes
        told = re.sub(r"ForwardRef\(('[^']*')\)", r"\1", str(p))  # as those of a named tuple are
        text = re.sub(r": '([^']*)'", r": \1", told).replace("<factory>", "...")
        parameters.append(re.sub(r"'([^'\"]*)'", r'"\1"', text))
    returned = found.return_annotation
    if isinstance(thing, type) or returned is found.empty:
        return parameters, ""
    return parameters, f" -> {returned if isinstance(returned, str) else getattr(returned, '__name__', returned)}"
