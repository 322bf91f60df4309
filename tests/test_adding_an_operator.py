"""The operator that docs/adding-an-operator.md adds, file by file, in a copy of this repository: compiled, documented,
and held to what every operator is held to."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from genkernels import backends
from genkernels.ops import FEATURES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/adding-an-operator.md").read_text()
FILES = dict(re.findall(r"^### `([^`]+)`\n\n```\w+\n(.*?)^```", PAGE, flags=re.S | re.M))
LINE = "from genkernels.ops.scale import scale\n"


def run(*command, at, **environment):
    environment = {**os.environ, "PYTHONPATH": str(at), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([str(c) for c in command], cwd=at, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the page's files and its line."""
    at = tmp_path_factory.mktemp("copy")
    for name in ("genkernels", "csrc", "tests", "tools", "docs"):
        shutil.copytree(ROOT / name, at / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, at / name)
    (at / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name, text in FILES.items():
        assert not (at / name).exists(), f"{name} is there already"
        (at / name).write_text(text)
    init = at / "genkernels/ops/__init__.py"
    init.write_text(init.read_text().replace("\n__all__ =", f"{LINE}\n__all__ =", 1))
    assert init.read_text().count(LINE) == 1 and LINE in PAGE
    compile_into(at)
    return at


def compile_into(at: Path) -> None:
    """Adds scale.cpp to the CPU library: as a library of its own that brings the built one along."""
    built = backends.library_path("cpu")
    if built is None:
        pytest.skip("the CPU library is not built")
    spec = importlib.util.spec_from_file_location("genkernels_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    folder, variant = at / "genkernels/_lib", built.stem.removeprefix("libgenkernels_cpu_")
    rest = folder / "librest.so"
    (folder / built.name).rename(rest)
    include, link = setup.torch_flags(setup.torch_folder())
    flags = [*setup.COMMON_FLAGS, *setup.CPU_FLAGS, *setup.cpu_variants()[variant], "-Werror"]
    link = ["-shared", "-Wl,--no-as-needed", rest, "-Wl,-rpath,$ORIGIN", *link]
    compiler = os.environ.get("CXX") or shutil.which("g++")
    run(compiler, *flags, *include, at / "csrc/cpu/scale.cpp", *link, "-o", folder / built.name, at=folder)


def test_it_takes_seven_files_and_a_line():
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.M)
    assert len(listed) == 7 and set(FILES) == set(listed) - {"csrc/cuda/scale.cu"}


def passed(copy, *arguments, **environment) -> list[str]:
    """The tests that passed, by name; none may fail or be skipped."""
    report = copy / "report.xml"
    run(
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *arguments,
        at=copy,
        **environment,
    )
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    assert not [case.get("name") for case in cases if len(case) and case[0].tag != "system-out"]
    return [case.get("name") for case in cases]


def test_it_passes_its_own_tests_and_the_conformance_test(copy):
    (copy / "docs/scale.md").touch()  # build_docs writes it, below
    keep = "test_scale or scale] or [scale or each_file_of_a_floor"
    names = passed(copy, "-k", keep, "tests/ops/test_scale.py", "tests/ops/test_operators.py")
    here = [feature for feature in FEATURES if feature != "CUDA graph capture"]  # which takes a GPU
    assert {f"test_composability_cell[scale-{feature}]" for feature in here} <= set(names)
    assert "test_has_all_that_an_operator_needs[scale]" in names
    assert "test_each_file_of_a_floor_belongs_to_an_operator_of_that_name" in names
    for implementation in ("reference", "cpu"):
        assert sum(f"[{implementation}" in name for name in names) > 20, implementation


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_its_triton_kernel_runs_in_the_interpreter(copy):
    names = passed(copy, "tests/ops/test_scale.py", TRITON_INTERPRET="1")
    assert sum("[triton interpreted" in name for name in names) > 20


def test_info_benchmarks_and_pages_find_it_by_its_name(copy):
    python = sys.executable
    both = "from genkernels.benchmarks import cases; print(*(c.title for c in cases.find(['scale'], quick=True)));"
    both += "from genkernels.cli import main; main(['info', '--ops'])"
    title, shown = run(python, "-c", both, at=copy).split("\n", 1)
    assert title.startswith("scale  64×96")
    assert re.search(r"^scale +reference", shown, flags=re.M)
    assert re.search(r"^ +cpu +on CPU", shown.split("\nscale ")[1], flags=re.M)
    run(python, "tools/build_docs.py", at=copy)
    assert "Every column of x times its own factor." in (copy / "docs/scale.md").read_text()
