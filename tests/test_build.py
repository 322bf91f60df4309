"""setup.py: what GENKERNELS_BUILD asks for is built, or refused by one sentence that names the missing thing."""

import ctypes
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from genkernels import backends
from genkernels._version import commit

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def setup():
    spec = importlib.util.spec_from_file_location("genkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_in(setup, folder, wish):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENKERNELS_BUILD", wish)
        command = setup.BuildLibraries(setup.BinaryDistribution({"name": "genkernels"}))
        command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
        command.ensure_finalized()
        command.run()
    return sorted((folder / "lib").rglob("*.so"))


@pytest.fixture
def build_here(setup, tmp_path):
    return lambda wish: build_in(setup, tmp_path / "build", wish)


@pytest.fixture
def build(build_here):
    return lambda wish: [path.name for path in build_here(wish)]


@pytest.fixture
def small_sources(setup, tmp_path, monkeypatch):
    """Stands in for ``csrc``, whose real build is the installed one: what is compiled, for whom and into what."""
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        text = f'extern "C" __attribute__((visibility("default"))) int {name}() {{ return WIDTH; }}'
        (folder / f"{name}.cpp").write_text(
            "#if __AVX512F__\n#define WIDTH 512\n#elif __AVX2__\n#define WIDTH 256\n#else\n#define WIDTH 0\n#endif\n"
            + text
        )
    monkeypatch.setattr(setup, "CSRC", folder.parent)


def test_nothing_is_built_when_nothing_is_wished(build):
    assert build("none") == []


def test_the_cpu_library_is_built_for_every_processor_it_may_meet(build_here, setup, small_sources):
    widths = {"avx512": 512, "avx2": 256, "generic": 0}
    libraries = build_here("cpu")
    assert [path.name for path in libraries] == sorted(f"libgenkernels_cpu_{v}.so" for v in setup.cpu_variants())
    for path, variant in zip(libraries, sorted(setup.cpu_variants()), strict=True):
        library = ctypes.CDLL(str(path))
        assert library.one() == library.two() == widths[variant]
    facts = json.loads(libraries[0].with_name("built.json").read_text())
    assert facts["commit"] == commit() and facts["torch"] == str(torch.__version__)
    assert facts["cpu"]["variants"] == list(setup.cpu_variants()) and facts["cpu"]["compiler"]


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump on PATH")
def test_a_library_asks_for_nothing_newer_than_glibc_2_28(setup, tmp_path, monkeypatch):
    """What is built here: maths, shared pointers and errors as the kernels have them; and that the look at it sees."""
    source = tmp_path / "csrc" / "cpu" / "one.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(
        "#include <cmath>\n#include <memory>\n#include <sstream>\n#include <stdexcept>\n"
        'extern "C" __attribute__((visibility("default"))) double one(double x) {\n'
        "  auto shared = std::make_shared<double>(x);\n  auto other = shared;\n  std::ostringstream text;\n"
        "  text << std::exp(*other) + std::log(x) + std::pow(x, x);\n"
        "  if (x < 0) throw std::runtime_error(text.str());\n  return std::stod(text.str());\n}\n"
    )
    monkeypatch.setattr(setup, "CSRC", source.parents[1])
    monkeypatch.setattr(setup, "cpu_variants", lambda: {"generic": []})
    (library,) = build_in(setup, tmp_path / "build", "cpu")
    assert setup.symbols(library)["GLIBC"] and setup.too_new(library) == []
    one = ctypes.CDLL(str(library)).one
    one.restype, one.argtypes = ctypes.c_double, [ctypes.c_double]
    assert one(2.0) == pytest.approx(math.exp(2) + math.log(2) + 4, rel=1e-5)  # of six digits
    monkeypatch.setattr(setup, "PORTABLE", ())
    monkeypatch.setattr(setup, "PORTABLE_SOURCES", [])
    (library,) = build_in(setup, tmp_path / "without", "cpu")
    here = tuple(map(int, platform.libc_ver()[1].split(".")))
    assert bool(setup.too_new(library)) == (here > (2, 28))


@pytest.mark.skipif(not shutil.which("objdump"), reason="there is no objdump on PATH")
def test_the_installed_library_runs_on_glibc_2_28(setup):
    if backends.why_missing("cpu"):
        pytest.skip("the CPU library is not built")
    assert setup.too_new(backends.library_path("cpu")) == []
    assert backends.built()["cpu"]["variants"] == list(setup.cpu_variants())


def test_the_installed_library_is_there_for_every_processor_it_may_meet(setup):
    if backends.why_missing("cpu"):
        pytest.skip("the CPU library is not built")
    names = {path.name for path in (Path(backends.__file__).parent / "_lib").glob("libgenkernels_cpu_*.so")}
    assert names == {f"libgenkernels_cpu_{variant}.so" for variant in setup.cpu_variants()}


@pytest.mark.parametrize(
    "wish,missing,sentence",
    [
        ("cpu", "compiler", "the CPU library was not built: /no/such/g++ could not be started"),
        ("cuda", "nvcc", "the CUDA library was not built: there is no CUDA compiler (nvcc) on PATH or in CUDA_HOME"),
        ("cpu", "torch", "the CPU library was not built: torch is not importable while building"),
        ("gpu", "", "GENKERNELS_BUILD must be one of auto, none, cpu, cuda, got 'gpu'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(build, setup, monkeypatch, wish, missing, sentence):
    if missing == "compiler":
        monkeypatch.setenv("CXX", "/no/such/g++")
    elif missing == "nvcc":
        monkeypatch.setattr(setup, "nvcc", lambda: None)
        monkeypatch.setattr(setup.BuildLibraries, "build_cpu", lambda *a: None)
    elif missing == "torch":
        monkeypatch.setattr(setup, "torch_folder", lambda: None)
    with pytest.raises(SystemExit) as refused:
        build(wish)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_auto_goes_on_without_and_says_why(build, setup, monkeypatch, capfd):
    monkeypatch.setattr(setup, "torch_folder", lambda: None)
    assert build("auto") == []
    assert "--no-build-isolation" in capfd.readouterr().err


def test_architectures(setup):
    assert setup.architecture_flags("8.0;9.0a;10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must list numbers such as 9.0a, got 'hopper'"):
        setup.architecture_flags("hopper")


def test_other_processors_get_a_generic_build_that_computes_the_same(build_here, setup, monkeypatch):
    """The build for processors other than x86-64: one operator of it held against the reference on this one, the
    others parsed and their templates instantiated, without code."""
    monkeypatch.setattr(setup, "cpu_variants", lambda: {"generic": []})
    monkeypatch.setattr(setup, "COMMON_FLAGS", [flag.replace("-O3", "-O0") for flag in setup.COMMON_FLAGS])
    sources, compile_once = setup.BuildLibraries._sources, setup.compile_once
    others = [path for path in sources(None, "cpu", ".cpp") if path.stem != "affine_coupling"]
    assert len(others) > 10
    monkeypatch.setattr(
        setup.BuildLibraries, "_sources", lambda self, *at: [p for p in sources(self, *at) if p not in others]
    )
    commands = []
    monkeypatch.setattr(setup, "compile_once", lambda job: commands.append(job[1]) or compile_once(job))
    (library,) = build_here("cpu")
    (like,) = [command for command in commands if any(part.endswith("affine_coupling.cpp") for part in command)]
    options = like[: like.index("-c")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: setup.run((path.name, [*options, "-fsyntax-only", str(path)])), others))
    assert library.name == "libgenkernels_cpu_generic.so"
    # this processor's own library is kept out of sight, so that the generic one is the only one registered
    code = f"""
import pathlib
real = pathlib.Path.exists
pathlib.Path.exists = lambda self: not self.name.startswith("libgenkernels") and real(self)
import torch
from importlib import import_module
from genkernels import backends, ops
reference = import_module("genkernels.reference.affine_coupling")
assert backends.why_missing("cpu")
torch.ops.load_library({str(library)!r})
x, params = torch.randn(3, 6, 7, 5), torch.randn(3, 6, 7, 5)
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for scale_map in range(3):
        a = [t.to(dtype) for t in (x, params)]
        ours = torch.ops.genkernels.affine_coupling(*a, scale_map, 1.0, 0, 0, False, False)
        torch.testing.assert_close(ours, reference.affine_coupling(*a, scale_map, 1.0, 0, 0, False, False))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.parametrize("name", ["spectral_norm", "made", "autoregressive_sampling"])
def test_what_a_source_is_made_of_is_what_the_compiler_reads(setup, name):
    """A change to any of it compiles the source again, and to nothing else."""
    source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
    options = [*setup.COMMON_FLAGS, *setup.PORTABLE, *setup.torch_flags(setup.torch_folder())[0]]
    read = subprocess.run(["g++", *options, "-MM", str(source)], capture_output=True, text=True, check=True).stdout
    files = {Path(file).resolve() for file in read.replace("\\\n", " ").split()[1:]}
    own = {file for file in files if ROOT / "csrc" in file.parents}
    assert len(own) > 5 and set(setup.included(source, Path(setup.PORTABLE[1]))) == own


def test_a_changed_header_compiles_again_what_includes_it_alone(setup, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(setup, "run", lambda job: (ran.append(job[0]), Path(job[1][-1]).touch()))
    (tmp_path / "deep.h").write_text("1")
    (tmp_path / "near.h").write_text('#include "deep.h"')
    (tmp_path / "all.h").write_text("2")
    (tmp_path / "one.cpp").write_text('#include "near.h"')
    (tmp_path / "two.cpp").write_text("#include <vector>")

    def build():
        ran.clear()
        for name in ("one", "two"):
            files = [str(tmp_path / file) for file in ("all.h", f"{name}.cpp", f"{name}.o")]
            setup.compile_once((name, ["g++", "-include", files[0], "-c", files[1], "-o", files[2]]))
        return list(ran)

    assert build() == ["one", "two"] and build() == []
    (tmp_path / "deep.h").write_text("3")
    assert build() == ["one"]
    (tmp_path / "all.h").write_text("4")
    assert build() == ["one", "two"]


def test_the_sources_name_nothing_that_came_after_torch_2_10():
    """Their headers are those of the torch that is there, whatever TORCH_TARGET_VERSION says: a later name stops the
    build on 2.10 to 2.12."""
    later = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # 2.13
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert sources and not [(p.name, name) for p in sources for name in later if name in p.read_text()]
