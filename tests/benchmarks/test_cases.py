"""The catalogue: every case file keeps the protocol, and its counts are those of its tensors."""

import math

import pytest
import torch

from genkernels.backends import use_backend
from genkernels.benchmarks import cases as catalogue
from genkernels.benchmarks import peers
from genkernels.benchmarks.measure import as_tuple

QUICK = catalogue.find([], quick=True)
ALL = [
    case
    for device in ("cpu", "cuda")
    for quick in (False, True)
    for case in catalogue.find([], device=device, quick=quick)
]


def test_titles_are_unique_and_names_lead_back_to_their_case():
    for device in ("cpu", "cuda"):
        titles = [case.title for case in catalogue.find([], device=device)]
        assert len(set(titles)) == len(titles) > 0
    for case in QUICK:
        assert case.title in [found.title for found in catalogue.find([case.name], quick=True)]
        assert case.operator in catalogue.operators()


def test_asking_twice_gives_a_case_once_and_keeps_the_order():
    names = [
        case.name for case in catalogue.find(["affine_coupling/tanh", "affine_coupling/exp", "affine_coupling/tanh"])
    ]
    assert names[0] == "affine_coupling/tanh" and names.count("affine_coupling/tanh") == 2  # fp32 and bf16
    assert set(names[2:]) == {"affine_coupling/exp"}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.title.replace("×", "x"))
def test_peers_modules_answer_for_every_case(case):
    for peer in peers.of(case):
        assert isinstance(peers.adapters(case.operator).unsupported(peer, case), str)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.title.replace("×", "x"))
def test_op_under_the_reference_backend_is_the_reference(case):
    drawn = case.inputs(torch.Generator().manual_seed(1))
    with use_backend("reference"), torch.no_grad():
        got, want = as_tuple(case.op(*drawn.values())), as_tuple(case.reference(*drawn.values()))
    assert len(got) == len(want) == len(case.outputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for tensor in drawn.values():
        varies = tensor.numel() == 1 or tensor.unique().numel() > 1
        assert tensor.is_contiguous() and (varies or not tensor.is_floating_point())


@pytest.mark.parametrize(
    "case", [c for c in ALL if math.prod(c.shape) < 4e6], ids=lambda case: case.title.replace("×", "x")
)
def test_affine_coupling_counts_no_byte_that_is_not_moved(case):
    """One pass reads every input and writes every output; a backward pass touches at most the same again and the
    gradients."""
    if case.operator != "affine_coupling":
        pytest.skip("another operator's counts")
    drawn = case.inputs(torch.Generator().manual_seed(1))
    once = sum(t.nbytes for t in drawn.values())
    big = math.prod(case.shape) * case.dtype.itemsize  # x, or z, or a gradient of either
    params = drawn["params"].nbytes
    small = case.shape[0] * 4  # the log-determinants are not counted
    if (
        case.direction in ("forward", "inverse") or case.settings["scale_map"] == "additive"
    ):  # whose gradients are views
        assert case.bytes == once + big
    elif case.direction == "reverse":
        assert case.bytes == once + 2 * big + params - small
    else:
        forward, most = once + big, 3 * big + 2 * params
        assert forward + big + params < case.bytes <= forward + most
    assert case.flops > 0
