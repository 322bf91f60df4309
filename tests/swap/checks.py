"""Two models, one swapped and one as it was, led through the same days: what one says the other says."""

from __future__ import annotations

import copy

import torch
from torch import nn

from genkernels import ops
from genkernels.swap import swap_

#: What "the same" means, by dtype, relative to the largest number of a tensor: rounding in another order.
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}
DTYPES = list(CLOSE)


def draw(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def calls_of(monkeypatch, *names: str) -> list[str]:
    """A list that grows by an operator's name with each call of it."""
    calls = []
    for name in names:
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, n=name, r=real, **k: calls.append(n) or r(*a, **k))
    return calls


def errors(found: dict, exact: dict) -> torch.Tensor:
    """Of all numbers of all tensors, relative to the largest one of their tensor."""
    off = [((t - exact[name]).abs() / max(1.0, exact[name].abs().max())).flatten() for name, t in found.items()]
    return torch.cat(off)


def no_worse(ours: dict, theirs: dict, exact: list[dict], where: str) -> None:
    """Of fp32 in which the other library loses digits: where its median error against its own fp64, of each one's
    weights in `exact`, is above what `same` lets pass, no further than that. Which library is nearer at the one
    steepest place of a spline is chance; no number is far off."""
    off, off_theirs = errors(ours, exact[0]), errors(theirs, exact[1])
    medians = off.median().item(), off_theirs.median().item()
    assert medians[0] <= max(medians[1], CLOSE[torch.float32]["atol"]), f"{where}: {medians} off, ours and theirs"
    assert off.max() <= 2e-4, f"{where}: {off.max():.3g} off at most, the other library {off_theirs.max():.3g}"


def same(ours, theirs, dtype: torch.dtype, where: str) -> None:
    near = CLOSE[dtype]
    near = near | {"atol": near["atol"] * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)}
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


def wider(theirs: nn.Module, weights: nn.Module) -> nn.Module:
    """The other library's model in fp64, with the weights of `weights`."""
    model = copy.deepcopy(theirs).double()
    model.load_state_dict(weights.state_dict())
    return model


def check_swap(make, run, dtype: torch.dtype, swapped: int | None = None, copies: bool = True, lossy: bool = False):
    """Swapped and not: in training and evaluation, before and after a training step, in a fresh model with the state
    loaded, and after `undo`.

    Args:
        make: ``make()`` gives a fresh model. run: ``run(model)`` gives named outputs.
        swapped: how many modules are to be swapped; None: one at least. copies: whether a used model can be copied.
        lossy: fp32 is held by `no_worse`; ``run`` takes a model in fp64 too.
    """
    torch.manual_seed(0)
    theirs = make().to(dtype)
    ours = copy.deepcopy(theirs)
    report = swap_(ours)
    assert len(report.swapped) == swapped if swapped is not None else report.swapped, str(report)
    assert list(ours.state_dict()) == list(theirs.state_dict())

    def compare(where: str, ours=ours) -> None:
        a, b = outcome(ours, run, dtype), outcome(theirs, run, dtype)
        assert {name: t.dtype for name, t in a.items()} == {name: t.dtype for name, t in b.items()}, where
        if lossy and dtype == torch.float32:
            exact = [outcome(wider(theirs, model), run, dtype) for model in (ours, theirs)]
            return no_worse(a, b, exact, where)
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
