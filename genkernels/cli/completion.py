"""``genkernels completion SHELL``: what a shell has to run so that it completes commands, options and names."""

from __future__ import annotations

from pathlib import Path

from genkernels.cli.arguments import parsers
from genkernels.models._registry import MODELS

SCRIPTS = {
    "bash": """\
# in ~/.bashrc: eval "$(genkernels completion bash)"
_genkernels() {
    local IFS=$'\\n'
    COMPREPLY=($(genkernels completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _genkernels genkernels
""",
    "fish": """\
# in ~/.config/fish/config.fish: genkernels completion fish | source
complete -c genkernels -a '(genkernels completion words -- (commandline -opc)[2..-1] (commandline -ct))'
""",
}
SCRIPTS["zsh"] = SCRIPTS["bash"].replace(
    '# in ~/.bashrc: eval "$(genkernels completion bash)"',
    '# in ~/.zshrc: eval "$(genkernels completion zsh)"\nautoload -U +X compinit && compinit\n'
    "autoload -U +X bashcompinit && bashcompinit",
)


def run(arguments) -> int:
    if arguments.shell == "words":
        print("\n".join(words(arguments.line[arguments.line[:1] == ["--"] :])))
    else:
        print(SCRIPTS[arguments.shell], end="")
    return 0


def words(line: list[str]) -> list[str]:
    """What may stand where the last word of a line is begun; nothing where a file may."""
    *before, begun = line or [""]
    _, commands = parsers()
    if not before:
        allowed = list(commands)
    elif before[0] not in commands:
        allowed = []
    else:
        allowed = _of(before, commands[before[0]], begun)
    return [word for word in allowed if word.startswith(begun)]


def _of(before: list[str], parser, begun: str) -> list[str]:
    """Options, choices of one, or the names of what the command is about."""
    options = {option: action for action in parser._actions for option in action.option_strings}
    if begun.startswith("-"):
        return list(options)
    if (action := options.get(before[-1])) is not None and action.nargs != 0:
        return [str(choice) for choice in action.choices or ()]
    names = {"train": MODELS, "models": MODELS, "help": (), "completion": ("bash", "fish", "zsh")}
    rooms = {"figure": "figures", "table": "tables", "bench": "benchmarks/cases"}
    if before[0] in rooms:
        files = (Path(__file__).parents[1] / rooms[before[0]]).glob("[!_]*.py")
        return sorted(file.stem for file in files)
    return list(names.get(before[0], ())) if len(before) == 1 else []
