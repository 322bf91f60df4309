"""A map's row in the table of sizes, which tells programs that go through all maps where each begins."""

from __future__ import annotations

import triton
import triton.language as tl

# a map's row in the table of sizes: channels in and out, where its packed matrices, its bias and its planes begin
IN, OUT, PUSH_AT, PULL_AT, BIAS_AT, IN_AT, OUT_AT = (tl.constexpr(i) for i in range(7))
FIELDS = tl.constexpr(7)

SIZES = (
    *("rows", "pitch", "samples", "layers", "inputs", "columns", "height", "width", "probes", "terms", "term", "place"),
    *("first_part", "parts", "steps", "count", "taps", "step", "depth", "most", "features", "block", "classes"),
    "bias_pitch",
)


@triton.jit
def field(p_table, i, FIELD: tl.constexpr):
    return tl.load(p_table + (i * FIELDS + FIELD))
