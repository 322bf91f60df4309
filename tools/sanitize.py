"""Runs every operator's GPU kernels on tiny and odd shapes, for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 9 python tools/sanitize.py --backend cuda
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import genkernels as gk
from genkernels.ops.affine_coupling import LAYOUTS, SCALE_MAPS, SPLITS

SHAPES = [(2, 4, 3, 5), (1, 2, 1, 1), (3, 6, 8, 8), (2, 8, 33, 31), (70, 2)]


def affine_coupling(shapes) -> int:
    runs = 0
    kinds = list(itertools.product(shapes, (torch.float32, torch.bfloat16)))
    every = list(itertools.product(SCALE_MAPS[:4], SPLITS[:2], LAYOUTS[:2], (False, True)))
    every += list(itertools.product(SCALE_MAPS[3:], SPLITS[2:], LAYOUTS[2:], (True,)))  # those of other libraries
    for turn, (scale_map, split, layout, flip) in enumerate(every):
        options = {"scale_map": scale_map, "split": split, "layout": layout, "flip": flip}
        # Triton compiles five kernels a kind: one kind, each time another
        for shape, dtype in kinds if gk.current_backend() == "cuda" else [kinds[turn * 3 % len(kinds)]]:
            if split == "checkerboard" and len(shape) != 4:
                continue
            moved = shape[1] // 2 if split in ("channel", "alternate") else shape[1]
            rows = moved * (1 if scale_map == "additive" else 2)
            x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            params = torch.randn(shape[0], rows, *shape[2:], device="cuda").to(dtype).requires_grad_()
            for function in (gk.ops.affine_coupling, gk.ops.affine_coupling_inverse):
                z, ldj = function(x, params, **options)
                torch.autograd.backward((z, ldj), (torch.ones_like(z), torch.ones_like(ldj)))
            gk.ops.affine_coupling_reverse(z.detach(), ldj.detach(), z.detach(), params.detach(), **options)
            runs += 1
    torch.cuda.synchronize()
    return runs


def others() -> int:
    """The other operators: each one's sample call with its gradients, in fp32."""
    from tests.ops.samples import FURTHER, SAMPLES

    runs = 0
    for name, sample in SAMPLES.items():
        operator = gk.ops.OPERATORS[FURTHER.get(name, name)]
        if operator.kernels.get(gk.current_backend()):
            continue
        function, tensors = sample("cuda", torch.float32)
        if operator.composability["backward"] != "raises":
            tensors = [t.detach().requires_grad_() for t in tensors]
            sum((o * o).sum() for o in function(*tensors)).backward()
        else:
            function(*tensors)
        runs += 1
    torch.cuda.synchronize()
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes (racecheck is slow)")
    arguments = parser.parse_args()
    with gk.use_backend(arguments.backend):
        print(f"{affine_coupling(SHAPES[: arguments.shapes])} calls of affine_coupling on {arguments.backend}")
        print(f"{others()} other operators")


if __name__ == "__main__":
    main()
