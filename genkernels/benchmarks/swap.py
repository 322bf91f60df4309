"""``genkernels bench swap`` and ``genkernels swap``: a model of another library before and after `genkernels.swap_`.

Both run in one process and take turns under the clock; what a swap changes is measured on a whole training step (loss,
backward, optimiser) and on a call that draws samples. No speed is told where the losses differ.
"""

from __future__ import annotations

import copy
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genkernels._config import check_threads
from genkernels._files import refuse_unwritable, write_json
from genkernels._machine import device_name, versions
from genkernels._version import commit
from genkernels._words import UsageError
from genkernels.swap import Report, swap_

PACKAGES = ("nflows", "normflows", "zuko", "FrEIA")
#: What a factory gives: a model, ``loss(model)`` of one training step, and where it has one ``sample(model)``.
Made = tuple[nn.Module, Callable[[nn.Module], Tensor], Callable[[nn.Module], Any] | None]
#: Losses in fp32 that are further apart than this are not those of one model.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """One call, before and after, in seconds."""

    case: str
    call: str
    before_s: float
    after_s: float
    gate: str

    @property
    def speedup(self) -> float:
        return self.before_s / self.after_s


def compare(case: str, made: Made, seconds: float = 1.0) -> tuple[Report, list[Row]]:
    """Swaps a copy of a model, and measures it beside the model itself."""
    theirs, loss, sample = made
    ours = copy.deepcopy(theirs)
    report = swap_(ours)
    pair = (theirs, ours)
    found = []
    for model in pair:
        torch.manual_seed(0)
        found.append(loss(model).item())
    gate = "pass" if abs(found[0] - found[1]) <= TOLERANCE * max(1.0, abs(found[0])) else "fail"
    optimizers = [torch.optim.Adam(model.parameters(), 1e-5) for model in pair]

    def step(i: int) -> None:
        optimizers[i].zero_grad()
        loss(pair[i]).backward()
        optimizers[i].step()

    @torch.no_grad()
    def draw(i: int) -> None:
        sample(pair[i])

    calls = {"training step": step} | ({"sampling": draw} if sample is not None else {})
    rows = []
    for name, call in calls.items():
        before, after = _in_turns(call, seconds) if gate == "pass" else (float("nan"), float("nan"))
        rows.append(Row(case, name, before, after, gate))
    return report, rows


def _in_turns(call: Callable[[int], None], seconds: float) -> tuple[float, float]:
    """Median seconds of ``call(0)`` and ``call(1)``."""
    taken: tuple[list[float], list[float]] = ([], [])
    for i in (0, 1):
        call(i)
    began = time.perf_counter()
    while time.perf_counter() - began < 2 * seconds or len(taken[0]) < 3:
        for i in (0, 1):
            at = time.perf_counter()
            call(i)
            _wait()
            taken[i].append(time.perf_counter() - at)
    return statistics.median(taken[0]), statistics.median(taken[1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    width = max(len(row.case) for row in rows)
    lines = [f"{'case':<{width}}  {'call':<13}  {'before':>10}  {'after':>10}  speed-up"]
    for row in rows:
        if row.gate != "pass":
            lines.append(f"{row.case:<{width}}  {row.call:<13}  the losses differ: no speed is told")
            continue
        before, after = (f"{1e3 * value:.3f} ms" for value in (row.before_s, row.after_s))
        lines.append(f"{row.case:<{width}}  {row.call:<13}  {before:>10}  {after:>10}  {row.speedup:.2f}×")
    return "\n".join(lines)


def main(quick: bool = False, json: str | os.PathLike | None = None, threads: int | None = None) -> int:
    """Every case whose library is installed; what is not is named."""
    check_threads(threads, "bench: threads")
    if threads is not None:
        torch.set_num_threads(threads)
    if json is not None:
        refuse_unwritable(json, f"bench: json {str(json)!r}")
    rows: list[Row] = []
    for case, make in CASES.items():
        torch.manual_seed(0)
        try:
            made = make()
        except ModuleNotFoundError as error:
            print(f"{case}: left out, {error.name} is not installed (extra bench)")
            continue
        rows += compare(case, made, 0.1 if quick else 1.0)[1]
    if rows:
        print(table(rows))
    if json is not None:
        here = {"device": device_name("cpu"), "threads": torch.get_num_threads(), "versions": versions(PACKAGES)}
        here |= {"commit": commit(), "quick": quick}
        write_json(json, {"machine": here, "rows": [asdict(row) for row in rows]}, indent=1)
    return 0 if rows and all(row.gate == "pass" for row in rows) else 1


def factory(name: str) -> Made:
    """What a user's ``MODULE:FUNCTION`` gives, checked."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"swap: FACTORY must be MODULE:FUNCTION, got {name!r}")
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UsageError(f"swap: {name}: no module named {error.name!r} can be imported from here") from error
    except AttributeError as error:
        raise UsageError(f"swap: module {module} must have a function {function}, it has none") from error
    if not callable(make):
        raise UsageError(f"swap: {name} must be a function, got {type(make).__name__}")
    try:
        made = make()
    except Exception as error:
        raise UsageError(f"swap: {name}() raised {type(error).__name__}: {error} (--debug shows where)") from error
    parts = made if isinstance(made, tuple) else (made,)
    fits = 2 <= len(parts) <= 3 and isinstance(parts[0], nn.Module) and all(callable(part) for part in parts[1:])
    if not fits:
        got = ", ".join(type(part).__name__ for part in parts)
        raise UsageError(
            f"swap: {name}() must give (model, loss) or (model, loss, sample), functions of the model, got ({got})"
        )
    return (*parts, None)[:3]


# ---------------------------------------------------------------------------------------------------------------- cases


def _nll(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: -model.log_prob(x).mean()


def nflows_realnvp() -> Made:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    def net(into, out):
        return ResidualNet(into, out, hidden_features=64, num_blocks=2)

    couplings = [transforms.AffineCouplingTransform([(i + layer) % 2 for i in range(32)], net) for layer in range(8)]
    model = flows.Flow(transforms.CompositeTransform(couplings), distributions.StandardNormal([32]))
    return model, _nll(torch.randn(512, 32)), lambda m: m.sample(512)


def nflows_maf() -> Made:
    from nflows import distributions, flows, transforms

    layers = []
    for _ in range(2):
        layers += [transforms.MaskedAffineAutoregressiveTransform(64, 512), transforms.ReversePermutation(64)]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([64]))
    return model, _nll(torch.randn(100, 64)), lambda m: m.sample(100)


def nflows_nsf() -> Made:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    def net(into, out):
        return ResidualNet(into, out, hidden_features=64, num_blocks=2)

    def coupling(layer):
        mask = [(i + layer) % 2 for i in range(32)]
        return transforms.PiecewiseRationalQuadraticCouplingTransform(mask, net, 8, tails="linear", tail_bound=3.0)

    couplings = transforms.CompositeTransform([coupling(layer) for layer in range(4)])
    model = flows.Flow(couplings, distributions.StandardNormal([32]))
    return model, _nll(torch.randn(512, 32)), lambda m: m.sample(512)


def nflows_autoregressive_nsf() -> Made:
    from nflows import distributions, flows, transforms

    made = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    layers = []
    for _ in range(2):
        layers += [made(8, 64, num_bins=8, tails="linear", tail_bound=3.0), transforms.ReversePermutation(8)]
    model = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([8]))
    return model, _nll(torch.randn(512, 8)), lambda m: m.sample(512)


def zuko_maf() -> Made:
    import zuko

    model = zuko.flows.MAF(64, transforms=2, hidden_features=(512, 512))
    x = torch.randn(100, 64)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((100,))


def zuko_nice() -> Made:
    import zuko

    model = zuko.flows.NICE(32, transforms=8, hidden_features=(64, 64))
    x = torch.randn(512, 32)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((512,))


def zuko_nsf() -> Made:
    import zuko

    model = zuko.flows.NSF(8, transforms=3, hidden_features=(64, 64))
    x = torch.randn(512, 8)
    return model, lambda m: -m().log_prob(x).mean(), lambda m: m().sample((512,))


def normflows_glow() -> Made:
    import normflows as nf

    blocks = [nf.flows.GlowBlock(12, 32, init_zeros=False) for _ in range(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((12, 16, 16)), blocks)
    x = torch.randn(16, 12, 16, 16)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(16)


def normflows_realnvp() -> Made:
    import normflows as nf

    layers = []
    for _ in range(8):
        layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([16, 64, 64, 32])), nf.flows.Permute(32, mode="swap")]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(32), layers)
    x = torch.randn(512, 32)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(512)


def normflows_nsf() -> Made:
    import normflows as nf

    layers = [nf.flows.CoupledRationalQuadraticSpline(32, 2, 64, reverse_mask=bool(layer % 2)) for layer in range(4)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(32), layers)
    x = torch.randn(512, 32)
    return model, lambda m: m.forward_kld(x), lambda m: m.sample(512)


def freia_glow() -> Made:
    from FrEIA import framework, modules

    def net(into, out):
        return nn.Sequential(nn.Linear(into, 64), nn.ReLU(), nn.Linear(64, out))

    model = framework.SequenceINN(32)
    for _ in range(8):
        model.append(modules.GLOWCouplingBlock, subnet_constructor=net)
    return _freia(model)


def _freia(model: nn.Module) -> Made:
    x = torch.randn(512, 32)

    def loss(m):
        z, log_det = m(x)
        return (0.5 * z.square().sum(1) - log_det).mean()

    return model, loss, lambda m: m(x, rev=True)


def torch_critic() -> Made:
    from torch.nn.utils.parametrizations import spectral_norm

    layers, widths = [], (3, 32, 64, 64, 128, 128, 256)
    for i, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [spectral_norm(nn.Conv2d(into, out, 3, 1 + i % 2, 1)), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(256 * 16, 1)))
    real, fake = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    return model, lambda m: (m(fake) - m(real)).mean(), None


CASES: dict[str, Callable[[], Made]] = {
    "nflows RealNVP": nflows_realnvp,
    "nflows MAF": nflows_maf,
    "nflows NSF": nflows_nsf,
    "nflows NSF, autoregressive": nflows_autoregressive_nsf,
    "zuko MAF": zuko_maf,
    "zuko NICE": zuko_nice,
    "zuko NSF": zuko_nsf,
    "normflows RealNVP": normflows_realnvp,
    "normflows NSF": normflows_nsf,
    "normflows Glow": normflows_glow,
    "FrEIA GLOWCouplingBlock": freia_glow,
    "torch spectral_norm": torch_critic,
}


def show(name: str, seconds: float = 1.0) -> int:
    """``genkernels swap MODULE:FUNCTION``: the report and the measured speed-up."""
    made = factory(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report, rows = compare(name, made, seconds)
    print(report)
    if report.swapped:
        print()
        print(table(rows))
    return 0 if all(row.gate == "pass" for row in rows) else 1
