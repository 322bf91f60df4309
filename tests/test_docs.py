"""The pages in docs/ say what the docstrings say, the docstrings' examples run, and the README's names exist."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import genkernels

ROOT = Path(genkernels.__file__).parent.parent
OPTIONAL = {"genkernels.triton", "genkernels.__main__"}


def modules():
    for found in pkgutil.walk_packages(genkernels.__path__, "genkernels."):
        if not any(found.name.startswith(skipped) for skipped in OPTIONAL):
            yield found.name


def test_the_pages_are_up_to_date():
    done = subprocess.run([sys.executable, "tools/build_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


def test_the_python_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 4
    drop_in, equivalent, deep, masked = blocks
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
    assert torch.equal(space["completed"][..., :14, :], space["images"][..., :14, :]) and space["nll"].shape == (2,)


def test_the_names_and_places_in_the_readme_are_there():
    from genkernels import models, ops

    text = (ROOT / "README.md").read_text()
    places = set(re.findall(r"`([\w./-]+/[\w./-]*)`", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert len(places) > 12 and not [place for place in sorted(places) if not (ROOT / place).exists()]
    listed = re.search(r"The names: (.*?)\. For the first", text, flags=re.S).group(1)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(ops.OPERATORS)
    listed, presets = re.search(r"^Models: (.*?) \(presets (.*?), and `points` for flows\)", text, flags=re.M).groups()
    assert re.findall(r"`(\w+)`", listed) == list(models.MODELS)
    for preset in re.findall(r"`(\w+)`", presets):
        assert all(preset in model.presets for model in models.MODELS.values())
    assert [name for name in sorted(ops.OPERATORS) if f"\n#### {name}\n" not in text] == [], (
        "an operator is not measured"
    )
