"""What the compiler makes of the kernels: 64-bit offsets, 16-byte accesses, no spills. Needs no GPU."""

import importlib.util
import re
import subprocess
import sys
import types
from itertools import combinations
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from genkernels.triton import KernelSpec
from genkernels.triton._recording import kernel_specs, meta

pytestmark = pytest.mark.usefixtures("compiler")

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compile_triton.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compile_triton", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def specs(tool):
    return {f"{spec.kernel.__name__} {spec.label}": spec for spec in tool.load_specs("")}


def chosen(specs):
    """Of some kernels one of every split, layout and direction."""
    wanted = [
        "_couple_kernel 8x12x64x64 fp32 fp32 tanh channel halves forward",
        "_couple_kernel 8x12x64x64 fp32 fp32 tanh channel interleaved inverse",
        "_couple_kernel 8x12x64x64 fp32 fp32 additive checkerboard halves forward",
        "_couple_kernel 64x6x7x7 fp32 fp32 tanh checkerboard interleaved forward",
        "_backward_kernel 8x12x64x64 fp32 fp32 exp channel halves of forward",
        "_backward_kernel 8x12x64x64 fp32 fp32 tanh checkerboard interleaved of reverse",
        "_conv_kernel gated bf16 gate ieee forward",
        "_conv_kernel 7x7A bf16 none ieee forward",
        "_weight_kernel 3x3 bf16 none ieee backward",
        "_weight_kernel 7x7A bf16 none ieee backward",
        "_draw_rows_kernel digits gated fp32 rows 1",
        "_draw_rows_kernel mixture fp32 rows 1",
    ]
    return [specs[name] for name in wanted]


def test_addresses_are_64_bit_where_a_sample_has_2_to_the_31_units(tool, specs):
    """With sizes of 64 bits; with those of 32 bits the tool itself looks at each of these kernels that it compiles."""
    ways = chosen(specs)
    seen = {spec.kernel for spec in ways}
    for spec in specs.values():  # and the first of each other
        if spec.kernel.__name__ not in tool.NARROW and spec.kernel not in seen:
            seen.add(spec.kernel)
            ways.append(spec)
    for spec in ways:
        signature = {name: "i64" if kind == "i32" else kind for name, kind in spec.signature.items()}
        ttir = tool.compile_spec(spec._replace(signature=signature), 90).asm["ttir"]
        assert "tt.addptr" in ttir and tool.narrow_products(ttir) == ([], []), f"{spec.kernel.__name__} {spec.label}"


def test_what_may_count_in_32_bits_is_there(tool, specs):
    assert tool.NARROW.keys() <= {spec.kernel.__name__ for spec in specs.values()}


@triton.jit
def _narrow_kernel(p_x, n):
    o = tl.program_id(0) * n + tl.arange(0, 16)
    tl.store(p_x + o, 0.0)
    tl.store(p_x + o.to(tl.int64), 0.0)


def test_the_check_above_sees_a_32_bit_product(tool):
    spec = KernelSpec("narrow", _narrow_kernel, {"p_x": "*fp32", "n": "i32"}, {}, {"enable_fp_fusion": True})
    narrow, widened = tool.narrow_products(tool.compile_spec(spec, 90).asm["ttir"])
    assert len(narrow) == 1 and len(widened) == 1


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        ("_couple_kernel 8x12x64x64 fp32 fp32 tanh channel halves forward", 8, 4),
        ("_couple_kernel 8x12x64x64 fp32 fp32 tanh channel interleaved forward", 8, 4),
        ("_couple_kernel 8x12x64x64 fp32 fp32 exp checkerboard halves forward", 6, 2),
        ("_couple_kernel 8x12x64x64 bf16 bf16 tanh channel halves forward", 8, 4),
        ("_backward_kernel 8x12x64x64 fp32 fp32 tanh channel halves of forward", 8, 8),
        ("_backward_kernel 8x12x64x64 fp32 fp32 tanh channel halves of reverse", 12, 12),
    ],
)
def test_large_tensors_move_in_16_byte_pieces(tool, specs, name, loads, stores):
    """Two pieces a thread and tensor; nothing narrower but a sample's own ldj or its gradient."""
    ptx = tool.compile_spec(specs[name], 90).asm["ptx"]
    wide = r"\.global\S*\.(v4\.b32|v2\.b64)"
    assert len(re.findall(r"\bld" + wide, ptx)) == loads
    assert len(re.findall(r"\bst" + wide, ptx)) == stores
    narrow = re.findall(r"\b(?:ld|st)\.global\S*", re.sub(r"\b(ld|st)" + wide, "", ptx))
    assert len(narrow) <= 2


def test_no_hardware_exponential_in_fp32_and_no_flush_to_zero(tool, specs):
    for direction in ("forward", "inverse"):
        for scale_map in ("exp", "sigmoid", "tanh"):
            spec = specs[f"_couple_kernel 8x12x64x64 fp32 fp32 {scale_map} channel halves {direction}"]
            ptx = tool.compile_spec(spec, 90).asm["ptx"]
            assert "ex2.approx" not in ptx and "lg2.approx" not in ptx and "div.full" not in ptx
            assert set(re.findall(r"\S*\.ftz\S*", ptx)) <= {"rsqrt.approx.ftz.f32"}  # the seed of a reciprocal


def test_fp64_constants_keep_their_bits(tool, specs):
    spec = next(s for name, s in specs.items() if "fp64 fp64 tanh channel" in name and "forward" in name)
    ttir = tool.compile_spec(spec, 90).asm["ttir"]
    assert "1.4426950408889634" in ttir or "1.44269504088896" in ttir
    assert not re.search(r"arith\.extf", ttir), "a constant or a value passed through fp32"


def test_the_tool_sees_spills(tool, specs):
    spec = specs["_backward_kernel 8x12x64x64 fp32 fp32 tanh channel halves of reverse"]
    assert tool.resource_usage(tool.compile_spec(spec, 90).asm["cubin"])["STACK"] == 0
    starved = spec._replace(options=spec.options | {"maxnreg": 24})
    assert tool.resource_usage(tool.compile_spec(starved, 90).asm["cubin"])["STACK"] > 0


def test_a_part_of_the_configurations_has_every_pair_of_settings(tool, specs):
    """Types, constants and options of a kernel, any two that come together; and it is a part."""
    every = list(specs.values())
    part = tool.pairs(every)
    assert len(part) < 0.7 * len(every)

    def met(configurations):
        return {(spec.kernel, frozenset(two)) for spec in configurations for two in combinations(settings(spec), 2)}

    def settings(spec):
        return [(name, str(spec.constants.get(name, kind))) for name, kind in (spec.signature | spec.options).items()]

    assert {spec.kernel for spec in part} == {spec.kernel for spec in every} and met(part) == met(every)


def test_what_a_launcher_gives_a_kernel_is_recorded():
    """Constants and options as they are given, numbers by their type, a missing tensor as a constant."""

    def launch():
        grid = (3,)
        x = meta(8, dtype=torch.bfloat16)
        _recorded_kernel[grid](x, None, 5, 2**31, WIDE=True, num_warps=2)

    module = types.SimpleNamespace(sample_calls=lambda: [("once", launch), ("again", launch)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "recorded", module)
        (spec,) = kernel_specs("recorded")
    assert (spec.label, spec.kernel, spec.options) == ("once", _recorded_kernel, {"num_warps": 2})
    kinds = {"p_x": "*bf16", "p_y": "constexpr", "n": "i32", "m": "i64", "WIDE": "constexpr"}
    assert spec.signature == kinds and spec.constants == {"p_y": None, "WIDE": True}


@triton.jit(do_not_specialize=("n", "m"))
def _recorded_kernel(p_x, p_y, n, m, WIDE: tl.constexpr):
    tl.store(p_x, 0.0)


def test_importing_the_package_does_not_import_triton():
    code = "import sys, genkernels, genkernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOOL.parents[1]).returncode == 0
