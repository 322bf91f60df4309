"""Two models, one swapped and one as it was, led through the same days: what one says the other says."""

from __future__ import annotations

import copy

import torch
from torch import nn

from genkernels.swap import swap_

#: What "the same" means, by dtype, relative to the largest number of a tensor: rounding in another order.
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}


def same(ours, theirs, dtype: torch.dtype, where: str) -> None:
    near = CLOSE[dtype]
    # a gradient adds up products over the batch, and the other library's slopes cancel where ours do not
    factor = 4 if "gradient" in where and dtype == torch.float32 else 1
    near = near | {"atol": factor * near["atol"] * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)}
    torch.testing.assert_close(ours, theirs, **near, msg=lambda m: f"{where}: {m}")


def outcome(model: nn.Module, run, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every output of `run(model)`, and every gradient of a weighting of all of them."""
    model.zero_grad()
    found = run(model)
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for value in found.values():
        total = total + (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
    total.backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()} | grads


def check_swap(make, run, dtype: torch.dtype, swapped: int | None = None, copies: bool = True):
    """Swapped and not: in training and evaluation, before and after a training step, in a fresh model with the state
    loaded, and after `undo`.

    Args:
        make: ``make()`` gives a fresh model. run: ``run(model)`` gives named outputs.
        swapped: how many modules are to be swapped; None: one at least. copies: whether a used model can be copied.
    """
    torch.manual_seed(0)
    theirs = make().to(dtype)
    ours = copy.deepcopy(theirs)
    report = swap_(ours)
    assert len(report.swapped) == swapped if swapped is not None else report.swapped, str(report)
    assert list(ours.state_dict()) == list(theirs.state_dict())

    def compare(where: str, ours=ours) -> None:
        a, b = outcome(ours, run, dtype), outcome(theirs, run, dtype)
        assert a.keys() == b.keys(), where
        for name, value in a.items():
            same(value, b[name], dtype, f"{where}: {name}")

    for training in (True, False):
        ours.train(training), theirs.train(training)
        compare(f"{training=}")
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (ours, theirs)]
    for optimizer in optimizers:
        optimizer.step()
    compare("after a step")
    torch.manual_seed(1)
    fresh = make().to(dtype).eval()
    swap_(fresh)
    fresh.load_state_dict(theirs.state_dict())
    compare("loaded", fresh)
    if copies:
        compare("copied", copy.deepcopy(ours))
    report.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert not [name for m in ours.modules() for name in vars(m) if name.startswith("_gk_")]
    compare("undone")
    return report
