"""The pages say what the code says and render on a code host; every example runs; the README's names, commands and
numbers are true."""

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import genkernels

ROOT = Path(genkernels.__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
OPTIONAL = {"genkernels.triton", "genkernels.__main__"}
for library, file in genkernels.swap._walk.FILES.items():
    if importlib.util.find_spec(library) is None:
        OPTIONAL.add(f"genkernels.swap.{file}")


def modules():
    """All of them, those of folders without an ``__init__`` too."""
    for path in sorted((ROOT / "genkernels").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not any(name.startswith(skipped) for skipped in OPTIONAL):
            yield name


@pytest.fixture
def tool(monkeypatch):
    """A module of tools/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


# --- pages --------------------------------------------------------------------------------------------------------


def test_the_pages_are_up_to_date():
    done = subprocess.run([sys.executable, "tools/build_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_page_for_everything_and_the_index_links_all():
    from genkernels import models, ops

    names = {path.stem for path in DOCS}
    families = {kind.__module__.split(".")[2] for kind in models.MODELS.values()}
    rooms = {"models", "training", "data", "metrics", "losses", "layers", "pictures", "speed", "networks"}
    assert names >= {*ops.OPERATORS, *families, *rooms}
    linked = re.findall(r"\]\((\w[\w-]*)\.md\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(linked) == sorted(names - {"README"})


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_page_is_markdown_that_renders(path):
    text = path.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    assert "```" not in prose, "a fence is open"
    for trace in (".. math::", ":math:", "``", "::\n"):
        assert trace not in prose, f"{trace!r} is no Markdown"
    for line in prose.split("\n"):
        outside = re.sub(r"`[^`]*`|(?<!\\)\$[^$]+\$", "", line)
        assert "`" not in outside and not re.search(r"(?<![\\$])\$(?!\$)", outside), f"not closed: {line}"
        assert not re.search(r"<[A-Za-z/]", outside.replace(r"\<", "")), f"a tag: {line}"
        assert line == line.rstrip()
    blocks = re.findall(r"^\$\$$", prose, flags=re.M)
    assert len(blocks) == prose.count("$$") and len(blocks) % 2 == 0, "display mathematics stands on lines of its own"
    for formula in re.findall(r"^\$\$\n(.*?)\n\$\$$", prose, flags=re.S | re.M) + re.findall(r"\$([^$\n]+)\$", prose):
        assert formula.count("{") == formula.count("}"), formula
        assert not re.search(r"\\[^A-Za-z]|[<>*]", formula), f"Markdown would read it as its own: {formula}"
    for rows in re.findall(r"(?:^\|.*\|\n?)+", prose, flags=re.M):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.strip().split("\n")}
        assert len(columns) == 1 and re.match(r"\|( --- \|)+$|\|(-+\|)+$", rows.split("\n")[1]), rows


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_somewhere(path):
    for target, _, heading in re.findall(r"\]\(([\w./-]+)(#([\w-]+))?\)", path.read_text()):
        assert (path.parent / target).exists(), target
        if heading:
            assert f"\n### {heading}\n" in (path.parent / target).read_text(), f"{target}#{heading}"


def documented():
    """Every entry of every page: the page, its name, the thing, the text below its heading."""
    for path in DOCS:
        for name, text in re.findall(
            r"^## `(genkernels[\w.]+)`\n(.*?)(?=^## |\Z)", path.read_text(), flags=re.S | re.M
        ):
            module, _, attribute = name.rpartition(".")
            own = text.split("\n### ")[0]  # without a class's methods
            yield pytest.param(getattr(importlib.import_module(module), attribute), own, id=f"{path.stem}:{attribute}")


@pytest.mark.parametrize(("thing", "text"), list(documented()))
def test_the_arguments_of_everything_public_are_bullets(thing, text, tool):
    wanted = tool("_markdown").parameters_of(thing)
    if not wanted or not re.search(r"^(Args|Attributes):", inspect.cleandoc(thing.__doc__), flags=re.M):
        return
    if re.search(r"\*\*Arguments\*\*: as for `", text):
        return
    labels = [match[1] for match in re.finditer(r"^- ((?:`[^`]+`(?:, )?)+|The others): ", text, flags=re.M)]
    told = {name.lstrip("*") for label in labels for name in re.findall(r"`([^`]+)`", label)}
    missing = [name for name in wanted if name not in told]
    assert not missing or "The others" in labels, f"no bullet for {', '.join(missing)}"


def test_docstrings_become_markdown(tool):
    markdown = tool("_markdown").docstring
    assert markdown(".. math:: y = a\\,b_{<i}\n    + c\n\nwith :math:`a \\in [0,\n1)`.") == (
        "$$\ny = a\\thinspace b_{\\lt i} + c\n$$\n\nwith $a \\in [0, 1)$."
    )
    assert markdown("As\n``f(x)``::\n\n    f(x)\n\n    g(`x`)\n\nThen `f`.") == (
        "As `f(x)`:\n\n```python\nf(x)\n\ng(`x`)\n```\n\nThen `f`."
    )
    arguments = """Does it.

    Args:
        x: ``[N]``, or more of
            it. y: another, with
        a line torn out. The others: as for `f`.
        *rest: all. a, b: both of
            them.
        c: ``[n]``, d: less.

    Raises:
        ValueError: x is wrong. genkernels.BackendUnavailable: cannot. Source: nothing.
    """
    assert markdown(arguments, ("x", "y", "rest", "a", "b", "c", "d")).split("\n\n", 1)[1] == (
        "**Arguments**\n\n- `x`: `[N]`, or more of it.\n- `y`: another, with a line torn out.\n"
        "- The others: as for `f`.\n- `*rest`: all.\n- `a`, `b`: both of them.\n- `c`: `[n]`.\n- `d`: less.\n\n"
        "**Raises**\n\n- `ValueError`: x is wrong.\n- `genkernels.BackendUnavailable`: cannot. Source: nothing."
    )
    assert markdown("Args: as for `f`.\n\nSource: somebody,\n2020.") == (
        "**Arguments**: as for `f`.\n\n**Source**: somebody, 2020."
    )
    assert markdown("====  ======\na     first\n      line\nb|c   second\n====  ======") == (
        "|  |  |\n| --- | --- |\n| a | first line |\n| b\\|c | second |"
    )
    assert markdown("a < b, a <b> and 5 $, *all* of it") == "a < b, a \\<b> and 5 \\$, *all* of it"


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 7
    drop_in, equivalent, deep, masked, lipschitz, critics, train = blocks
    space: dict = {}
    exec(drop_in, space)
    fused = space["layer"](space["x"])
    exec(equivalent, space)
    import torch

    torch.testing.assert_close(space["z"], fused[0])
    torch.testing.assert_close(space["ldj"], fused[1])
    exec(deep, space)
    space["ldj"].sum().backward()
    exec(masked, space)
    torch.testing.assert_close(space["flow"].inverse(space["z"])[0], space["x"])
    assert space["samples"].shape == (100, 64)
    assert torch.equal(space["completed"][..., :14, :], space["images"][..., :14, :]) and space["nll"].shape == (2,)
    exec(lipschitz, space)
    assert space["low"] <= space["high"] <= 0.91
    torch.testing.assert_close(space["block"](space["x"])[0], space["z"], rtol=0, atol=2e-5)
    exec(critics, space)
    assert space["way"].startswith("four passes") and space["found"].difference < 1e-4 and space["distance"] > 0
    assert all(p.grad is not None for p in space["critic"].parameters())
    monkeypatch.chdir(tmp_path)
    assert "max_steps=1000" in train
    exec(train.replace("max_steps=1000", "max_steps=2"), space)
    assert space["result"].steps == space["state"]["step"] == 2 and space["images"].shape == (16, 1, 8, 8)
    assert space["estimates"] == space["result"].held_out and (tmp_path / "sheet.png").stat().st_size > 500


SWAPS = {
    "swap": ("nflows",),
    "swap-nflows": ("nflows",),
    "swap-normflows": ("normflows",),
    "swap-zuko": ("zuko",),
    "swap-freia": ("FrEIA",),
    "swap-pixelcnns": ("pytorch_generative", "pythae"),
    "swap-torch": (),
}


@pytest.mark.parametrize("page", SWAPS)
def test_the_python_on_the_pages_of_other_libraries_runs_and_prints_what_they_say(page):
    for library in SWAPS[page]:
        pytest.importorskip(library)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", text.split("\n## `")[0], flags=re.S | re.M)
    space, printed, told = {}, io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        for language, block in blocks:
            if language == "python":
                exec(block, space)
            told += block if language == "text" else ""
    assert printed.getvalue() == told and len(blocks) > (0 if page == "swap" else 4)


@pytest.mark.parametrize("page", SWAPS)
def test_the_pages_of_other_libraries_name_every_class(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for library in SWAPS[page] if page != "swap" else ():
        pytest.importorskip(library)
        rules = importlib.import_module(f"genkernels.swap.{library.lower()}").LIBRARY.rules
        assert [kind.__name__ for kind in rules if f"`{kind.__name__}`" not in text] == []


# --- the README ---------------------------------------------------------------------------------------------------


def test_the_names_and_places_in_the_readme_are_there():
    from genkernels import data, models, ops

    places = set(re.findall(r"`([\w./-]+/[\w./-]*)`", README))
    assert len(places) > 12 and not [place for place in sorted(places) if not (ROOT / place).exists()]
    listed = re.search(r"The names: (.*?)\. For the first", README, flags=re.S).group(1)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(ops.OPERATORS)
    families = re.findall(r"^[A-Z][\w ]+: (`.*?) \(presets (.*?)\)\.$", README, flags=re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(names for names, _ in families))) == sorted(models.MODELS)
    for names, presets in families:
        kinds = [models.MODELS[name] for name in re.findall(r"`(\w+)`", names)]
        assert all(any(p in kind.presets for kind in kinds) for p in re.findall(r"`(\w+)`", presets))
    assert [name for name in data.NAMES if f"`{name}`" not in README] == []


def test_the_commands_in_the_readme_are_understood(tmp_path, monkeypatch):
    from genkernels import figures, models, tables
    from genkernels.cli.arguments import parse
    from genkernels.cli.inpaint import known_region
    from genkernels.cli.rooms import own_options

    blocks = [
        body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M) if not language
    ]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.strip().split("\n")]
    inline = [code for code in re.findall(r"`((?:genkernels|make|python) [^`]+)`", README) if "…" not in code]
    commands = [line for line in [*lines, *inline] if line and not line.startswith("pip ")]
    assert len(commands) > 12 and {line.split()[0] for line in commands} == {"genkernels", "make", "python"}
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    monkeypatch.chdir(tmp_path)
    for line in commands:
        program, *words = shlex.split(line)
        if program == "genkernels":
            arguments = parse(words)
            if words[0] == "train":
                assert arguments.like or arguments.model in models.MODELS
            if words[0] in ("figure", "table"):
                room = figures if words[0] == "figure" else tables
                own_options(words[0], arguments.name, room.find(arguments.name), arguments.options)
            if part := getattr(arguments, "inpaint", None):  # a line before makes the mask
                known_region(part, (1, 8, 8))
        elif program == "make":
            assert words[0] in targets
        elif words[0] == "-c":
            exec(words[1], {})
        else:
            assert (ROOT / words[0]).exists()


def test_a_row_of_each_operator_and_the_worst_of_all(tool):
    speed = tool("_speed")
    table = re.search(r"<!-- rows: .*?-->\n(.*?)<!-- end of rows -->", README, flags=re.S)[1]
    rows = [line for line in table.split("\n") if line.startswith("| ")][2:]
    assert 1 < len(rows) <= 16
    everything = [found for file in speed.operator_files() for found in speed.measured(file).values()]
    worst = min(min(speed.others(found).values()) for found in everything if "cpu" in found)
    ratios = [cell for row in rows for cell in row.strip("| ").split(" | ")[5:]]
    assert min(float(ratio) for ratio in ratios if re.fullmatch(r"[\d.]+", ratio)) <= worst + 0.01
    for file in speed.operator_files():
        assert f"[{file.name}]" in README or not file.stem.endswith("-cpu"), f"{file.name} is not named"


def test_every_row_that_was_measured_is_on_the_page_of_speed(tool):
    from genkernels import ops

    speed = tool("_speed")
    page = (ROOT / "docs" / "speed.md").read_text()
    operators = page.split("\n### Lost or level\n")[0]
    assert [name for name in ops.OPERATORS if f"\n### {name}\n" not in page] == [], "an operator is not measured"
    rows = [line for line in operators.split("\n") if re.search(r" (forward|inverse|reverse|sample|step)\b", line)]
    assert len([row for row in rows if row.startswith("| ")]) == sum(
        len(speed.measured(file)) for file in speed.operator_files()
    )
    assert all(file.name in page for file in (ROOT / "benchmarks" / "results").glob("*.json"))


def test_lost_rows_are_listed_and_training_steps_once_they_are_measured(tool, tmp_path, monkeypatch):
    from genkernels.benchmarks import report

    speed = tool("_speed")
    machine = {
        **json.loads((speed.RESULTS / "made-cpu.json").read_text())["machine"],
        "device": "a processor",
        "commit": "abc",
    }
    row = {"shape": [2, 3], "dtype": "float32", "direction": "forward", "gate": "pass", "share_of_peak": 0.5}
    rows = [
        {**row, "case": "made/x", "provider": provider, "median_s": seconds, "gate": gate}
        for provider, seconds, gate in (
            ("reference", 2e-3, "pass"),
            ("compiled", 0.4e-3, "pass"),
            ("cpu", 1e-3, "pass"),
            ("nflows", None, "fail"),
        )
    ]
    (tmp_path / "made-cpu.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    step = {"case": "training_step/gan/points", "provider": "compiled", "parted": "step 3: loss 1, the reference's 2"}
    (tmp_path / "training_step-cpu.json").write_text(json.dumps({"machine": machine, "rows": [step]}))
    for name in ("likelihoods-cpu.json", "demo-cpu.json", "photos32-cpu.json"):
        (tmp_path / name).write_text((speed.RESULTS / name).read_text())
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "training_step_table", lambda data: f"steps: {data['rows'][0]['case']}")
    page = speed.page()
    assert "| x, float32, forward | 2.00 | 0.40 | **1.00** | 2.00 | 0.40 | 50 % | wrong |" in page
    assert "| made: x, 2×3, float32, forward | torch.compile | 0.40 | made-cpu.json |" in page
    assert "a processor" in page and "eager PyTorch | " not in page
    assert "## Training steps" in page and "steps: training_step/gan/points" in page
    assert "training_step-cpu.json" in page and "round: compiled of gan/points (step 3)." in page
