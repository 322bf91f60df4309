"""The Triton kernels of masked_conv against the reference and its fp64 oracle."""

import pytest
import torch

from genkernels.reference import masked_conv as reference
from genkernels.triton import masked_conv as kernels
from tests.ops.test_masked_conv import PROBLEMS, Problem, cotangents, everything, wide

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
# several splits of the pixels; several blocks of channels in and out, with and without the gate
PROBLEMS = [
    *PROBLEMS[:-1],
    Problem(2, 3, 4, 23, 24, (3, 3)),
    Problem(1, 40, 70, 5, 6, (3, 3)),
    Problem(1, 4, 80, 3, 3, (3, 3), activation="gate", condition=2),
]
# the interpreter is slow: fp64 and fp16 on every third
CASES = [(p, d) for i, p in enumerate(PROBLEMS) for d in (DTYPES if i % 3 == 0 else DTYPES[:2])]
IDS = [f"{PROBLEMS.index(p)}-{str(d).removeprefix('torch.')}" for p, d in CASES]


@pytest.mark.parametrize("problem,dtype", CASES, ids=IDS)
def test_every_problem_agrees_with_the_reference(device, poisoned, problem, dtype):
    torch.manual_seed(6)
    tensors = problem.tensors(dtype, device)
    given = cotangents(problem, tensors)
    before = [None if t is None else t.clone() for t in tensors]
    ours = everything(kernels, problem, tensors, *given)
    same = everything(reference, problem, tensors, *given)
    exact = everything(reference, problem, wide(*tensors), *wide(*given))
    for name, true in exact.items():
        a, b = ours[name], same[name]
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and a.is_contiguous(), name
        if not a.numel():
            continue
        error, its = (a.double() - true).abs().max(), (b.double() - true).abs().max()
        # fp64 rounds on both sides; the interpreter cuts bf16 off where a GPU rounds to nearest
        units = {torch.float64: 64, torch.bfloat16: 4}.get(dtype, 2)
        assert error <= 2 * its + units * torch.finfo(dtype).eps * true.abs().max(), (name, float(error), float(its))
    assert all(a is b or torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("problem", PROBLEMS[::3], ids=range(0, len(PROBLEMS), 3))
def test_dead_taps_are_never_read_and_get_exactly_zero(device, poisoned, problem):
    x, weight, *rest = problem.tensors(torch.float32, device)
    dead = ~problem.mask.to(device)
    given = cotangents(problem, [x])
    clean = everything(kernels, problem, [x, weight, *rest], *given)
    spoiled = everything(kernels, problem, [x, weight.masked_fill(dead, float("nan")), *rest], *given)
    assert all(torch.equal(clean[name], value) for name, value in spoiled.items())
    assert (spoiled["grad_weight"][dead] == 0).all()


def test_an_empty_batch_and_the_same_bits_each_run(device):
    empty = Problem(0, 3, 6, 4, 5, (3, 3), activation="gate", condition=2, residual=True)
    tensors = empty.tensors(torch.float32, device)
    for name, value in everything(kernels, empty, tensors, *cotangents(empty, tensors)).items():
        assert not value.numel() or (value == 0).all(), name
    problem = Problem(2, 8, 16, 23, 24, (3, 3), "B", 1, activation="gate", condition=4)
    tensors = problem.tensors(torch.float32, device)
    given = cotangents(problem, tensors)
    first, again = (everything(kernels, problem, tensors, *given) for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in again.items())


def test_the_gradient_of_the_weight_is_split_by_shape_alone():
    assert kernels._splits(4, 1, 32) == (1, 1)
    for pixels, programs in ((784 * 256, 5), (1 << 33, 100), (1025, 1)):
        splits, steps = kernels._splits(pixels, programs, 64)
        assert splits * steps * 64 >= pixels > (splits - 1) * steps * 64 and splits <= max(1, -(-1024 // programs))
