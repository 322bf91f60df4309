"""``genkernels models [NAME]``: the models, and of one its arguments, their defaults and its presets."""

from __future__ import annotations

import inspect
import re
import textwrap

from genkernels.cli.info import table

WIDTH = 100


def run(arguments) -> int:
    from genkernels.models import MODELS, model_class

    if arguments.name is None:
        rows = []
        for name, kind in MODELS.items():
            presets = ", ".join(preset for preset in kind.presets if "-" not in preset)
            rows.append([name, kind.__name__, " and ".join(kind.takes), presets])
        print(table(["model", "class", "of", "presets"], rows))
        return 0
    kind = model_class(arguments.name)
    text = inspect.cleandoc(kind.__doc__ or "")
    print(textwrap.fill(f"{kind.__name__}: {_plain(text.split(chr(10) * 2)[0])}", WIDTH))
    print(f"of {' and '.join(kind.takes)}\n")
    print(_arguments(kind, text))
    if kind.presets:
        print(f"\n{_presets(kind)}")
    return 0


def _arguments(kind: type, text: str) -> str:
    parameters = {name: p for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    words = argument_words(text, list(parameters))
    width = max(map(len, parameters), default=0)
    lines = [f"{'argument':<{width}}  default: meaning"]
    for name, parameter in parameters.items():
        default = "from the data" if parameter.default is parameter.empty else f"{parameter.default}"
        told = textwrap.wrap(": ".join(filter(None, (default, words.get(name)))), WIDTH - width - 2)
        lines += [f"{name:<{width}}  {told[0]}", *(" " * (width + 2) + line for line in told[1:])]
    return "\n".join(lines)


def argument_words(text: str, names: list[str]) -> dict[str, str]:
    """What a docstring says of each of its arguments, of which several may stand in a line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.M | re.S)
    if section is None:
        return {}
    flat = _plain(section[1])
    starts = list(re.finditer(rf"(?:^|(?<=\. )|(?<=, ))((?:(?:{'|'.join(names)})(?:, )?)+): ", flat))
    ends = [*(start.start() for start in starts[1:]), len(flat)]
    found = {}
    for start, end in zip(starts, ends, strict=True):
        for name in start[1].split(", "):
            found[name] = flat[start.end() : end].strip().rstrip(".,")
    return found


def _plain(text: str) -> str:
    """Words of a docstring, its markup taken off."""
    for old, new in ((r":math:`(.*?)`", r"\1"), (r"``(.*?)``", r"\1"), (r"`(.*?)`", r"\1"), (r"\*(\w.*?)\*", r"\1")):
        text = re.sub(old, new, text, flags=re.S)
    return " ".join(text.split())


def _presets(kind: type) -> str:
    import torch

    rows = []
    for name, preset in kind.presets.items():
        try:
            with torch.device("meta"):  # without storage
                count = f"{sum(p.numel() for p in kind(**preset.sizes).parameters()):,}"
        except Exception:
            count = ""
        sizes = ", ".join(f"{key}={value}" for key, value in preset.sizes.items())
        rows.append([name, count, sizes, ", ".join(f"{key}={value}" for key, value in preset.training.items())])
    return table(["preset", "parameters", "sizes", "training"], rows)
