"""``bench training_step``: what is run, the gate, what it refuses. No timing is asserted."""

import copy
import dataclasses
import importlib.util
import json
import math

import pytest
import torch
from torch import nn

from genkernels import benchmarks
from genkernels.benchmarks import machine, report, runner, training_step
from genkernels.benchmarks.peers import Peer
from genkernels.benchmarks.runner import run_case
from genkernels.benchmarks.training_step import Budget, StepCase, StepProvider, StepSession, fault_of
from genkernels.models import MODELS
from genkernels.nn import ActNorm
from tests.training.toys import ToyGAN

CPU = torch.device("cpu")
SMALL = StepCase("nice", "points", torch.float32, gate_steps=3)


@pytest.fixture
def briefly(monkeypatch, effort):
    monkeypatch.setattr(runner, "QUICK", effort)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "spare_bytes", lambda device: 1 << 20)


@dataclasses.dataclass
class Spoiled(StepProvider):
    """Trains on a loss that is a little wrong from the second step on."""

    def open(self, problem):
        session = StepSession(problem, self)
        (move,), calls = session.trainer.moves, iter(range(1000))
        spoiled = lambda x: move.loss(x) + (1e-3 if next(calls) else 0.0)  # noqa: E731
        session.trainer.moves = [dataclasses.replace(move, loss=spoiled)]
        return session


def test_every_model_at_its_presets_in_both_precisions():
    found = training_step.cases()
    assert {case.model for case in found} == set(MODELS)
    assert {case.preset for case in found} == {"digits", "points", "photos32", "two_photos32"}
    names = [(case.name, case.dtype) for case in found]
    assert len(names) == len(set(names)) and {dtype for _, dtype in names} == {torch.float32, torch.bfloat16}
    assert all(case.gate_steps == 30 for case in found)
    quick = training_step.cases(quick=True)
    assert [case.model for case in quick] == list(MODELS) and not any(case.preset == "photos32" for case in quick)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["training_step", "glow/points"], [("glow", "points")]),
        (["training_step/maf/digits"], [("maf", "digits")]),
        (["training_step", "iaf", "iaf/points"], [("iaf", "digits"), ("iaf", "points")]),
    ],
)
def test_models_are_found_by_name(names, expected):
    found = training_step.find(names)
    assert list(dict.fromkeys((case.model, case.preset) for case in found)) == expected
    assert len(found) == 2 * len(expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"cases": ["training_step", "gloww"]}, r"got 'gloww'; nearest: glow"),
        ({"cases": ["training_step", "glow/diggits"]}, r"got 'glow/diggits'; nearest: glow/digits"),
        ({"cases": ["training_step", "iaf/photos32"]}, r"got 'iaf/photos32': the reference's density takes D"),
        ({"cases": ["training_step"], "dtypes": ["fp16"]}, r"dtypes must be among .*float32, bfloat16.*, got float16"),
        ({"cases": ["training_step"], "providers": ["fsued"]}, r"got 'fsued'; did you mean fused\?"),
        ({"cases": ["training_step"], "providers": ["cpu"]}, r"providers must be among reference, compiled, fused"),
        ({"cases": ["training_steps"]}, r"CASE must be an operator .*got 'training_steps'; nearest: training_step"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refused_in_one_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(runner, "measure", lambda *a, **k: pytest.fail("measured before the arguments were checked"))
    with pytest.raises(ValueError, match=sentence) as raised:
        benchmarks.main(**{"device": "cpu", **arguments})
    assert "\n" not in str(raised.value)


def test_rows_files_and_table(briefly, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "steps.json", tmp_path / "steps.png"
    arguments = {"quick": True, "device": "cpu", "providers": ["reference", "fused"], "json": file, "plot": picture}
    assert benchmarks.main(["training_step", "nice/points"], **arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["case"] for row in rows} == {"training_step/nice/points"}
    assert rows[0]["provider"] == "reference" and rows[0]["shape"] == [64, 2] and rows[0]["direction"] == "step"
    assert all(row["gate"] == "pass" and row["median_s"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert all(row["share_of_peak"] is None for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    table = report.training_step_table(file).splitlines()
    assert table[0].startswith("| model | preset | precision | batch | eager ms | compiled ms | fused ms")
    assert table[2].startswith("| nice | points | fp32 | 64 | ") and len(table) == 3


def test_a_provider_that_fails_the_gate_shows_no_speed(effort):
    chosen = [training_step.local()[0], Spoiled("fused", "auto", compiled=False, ours=True)]
    rows, _ = run_case(SMALL, chosen, CPU, effort)
    reference, spoiled = rows
    assert reference.gate == "pass" and reference.median_s
    assert spoiled.gate == "fail" and spoiled.fault.startswith("step 2: loss ")
    assert (spoiled.median_s, spoiled.q20_s, spoiled.q80_s, spoiled.peak_bytes) == (None,) * 4
    table = report.training_step_table({"rows": [row.to_json() for row in rows]})
    assert "fails the gate" in table and table.rstrip().endswith("| – | – |")


@dataclasses.dataclass
class Detoured(StepProvider):
    """The same numbers to the bit by one operation more."""

    def open(self, problem):
        session = StepSession(problem, self)
        detour = lambda loss: lambda x: loss(x) * 1.0  # noqa: E731
        session.trainer.moves = [dataclasses.replace(m, loss=detour(m.loss)) for m in session.trainer.moves]
        return session


def test_a_fused_step_that_is_the_reference_s_has_its_samples(effort, capsys):
    level = StepCase("bigan", "points", torch.float32, gate_steps=3)
    eager = [provider for provider in training_step.local() if not provider.compiled]
    detoured = Detoured("detoured", "reference", compiled=False, ours=True)
    rows, _ = run_case(level, [*eager, detoured], CPU, effort)
    reference, fused, other = rows
    assert [row.gate for row in rows] == ["pass"] * 3
    assert (reference.same_as, fused.same_as, other.same_as) == ("", "reference", "")
    assert fused.median_s == reference.median_s != other.median_s
    assert [row.to_json().get("same_as") for row in rows] == [None, "reference", None]
    assert report.training_step_table({"rows": [row.to_json() for row in rows[:2]]}).rstrip().endswith("| same | – |")
    report.show(runner.Results({}, rows=rows))
    assert report.SAME[:40] in capsys.readouterr().out

    (reference, fused), _ = run_case(dataclasses.replace(level, model="gan"), eager, CPU, effort)  # which has kernels
    assert not fused.same_as and fused.median_s != reference.median_s


@dataclasses.dataclass
class Parting(StepProvider):
    """Whose losses are off from a call of each player's on, in fp32 alone or in fp64 as well."""

    first_call: int = 1
    also_in_double: bool = False

    def open(self, problem):
        return PartingSession(problem, self)


class PartingSession(StepSession):
    def _start(self, problem, dtype):
        model, trainer = super()._start(problem, dtype)
        off = 0.0 if dtype == torch.float64 and not self.provider.also_in_double else 1e-2
        trainer.moves = [dataclasses.replace(move, loss=self._off(move.loss, off)) for move in trainer.moves]
        return model, trainer

    def _off(self, loss, off):
        calls = iter(range(1000))
        return lambda x: loss(x) + (off if next(calls) >= self.provider.first_call else 0.0)


def test_losses_of_players_that_part_by_rounding_are_held_in_fp64(effort, capsys):
    case = StepCase("gan", "points", torch.float32, gate_steps=3)
    rounding = Parting("rounding", "auto", compiled=False, ours=True)
    wrong = dataclasses.replace(rounding, name="wrong", also_in_double=True)
    at_once = dataclasses.replace(rounding, name="at once", first_call=0)
    rows, _ = run_case(case, [training_step.local()[0], rounding, wrong, at_once], CPU, effort)
    assert [row.gate for row in rows] == ["pass", "pass", "fail", "fail"]
    assert [row.parted[:6] for row in rows] == ["", "step 3", "", ""] and rows[1].median_s
    assert rows[2].fault.startswith("step 3: loss ") and "in fp64, step 3: loss " in rows[2].fault
    assert rows[3].fault.startswith("step 1: loss ") and "fp64" not in rows[3].fault
    assert [row.to_json().get("parted", "")[:6] for row in rows] == ["", "step 3", "", ""]
    report.show(runner.Results({}, rows=rows[:2]))
    shown = capsys.readouterr().out
    assert report.PARTED[:40] in shown and "rounding of training_step/gan/points" in shown

    one_player = Parting("one player", "auto", compiled=False, ours=True)  # whose loss says enough in fp32
    (row,), _ = run_case(SMALL, [one_player], CPU, effort)
    assert row.gate == "fail" and not row.parted


def test_the_rule_of_the_gate():
    assert not fault_of([1.0, 50.0], [1.00009, 50.004], 0.0)  # 1e-4 of the reference, of 1 where that is smaller
    assert fault_of([1.0, 50.0], [1.0, 50.006], 0.0).startswith("step 2: loss 50, the reference's 50.006")
    assert not fault_of([1.019], [1.0], 0.01)  # twice the reference's own error in bf16
    assert fault_of([1.021], [1.0], 0.01)
    assert fault_of([math.nan], [1.0], 1.0) and fault_of([math.inf], [1.0], 1.0)


@pytest.mark.parametrize("dtype", training_step.DTYPES)
def test_every_provider_starts_from_the_same_weights_and_batches(dtype):
    problem = training_step.draw(dataclasses.replace(SMALL, dtype=dtype), CPU)
    again = training_step.draw(dataclasses.replace(SMALL, dtype=dtype), CPU)
    assert (
        problem.truth == again.truth and len(problem.truth) == 3 and (problem.own_error > 0) == (dtype != torch.float32)
    )
    assert all(torch.equal(a, b) for a, b in zip(problem.batches, again.batches, strict=True))
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    assert not StepSession(problem, training_step.local()[2]).check()
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


@pytest.mark.parametrize("name", ["glow", "hybridflow"])
def test_no_provider_sets_actnorms_within_a_step(name):
    """A compiled one would break its graph there."""
    problem = training_step.draw(StepCase(name, "points", torch.float32, 1), CPU)
    assert all(m.ready for m in problem.model.modules() if isinstance(m, ActNorm))


def test_a_step_is_that_of_training():
    """Loss, clipped gradients, Adam: as written out by hand."""
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    x = 100 * torch.randn(5, 3)
    move = training_step.Move(lambda x: model(x).square().mean(), list(model.parameters()))
    trainer = training_step.Trainer([move], torch.float32, CPU)
    losses = trainer.run([x, x])
    optimizer = torch.optim.Adam(twin.parameters())
    for i, loss in enumerate(losses):
        expected = twin(x).square().mean()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1) / 100
        optimizer.zero_grad()
        expected.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_step_of_two_players_is_a_round():
    """Three moves of the critic and, after the first of them as in training, one of the generator, each on its own
    parameters."""
    torch.manual_seed(0)
    model = ToyGAN()
    moves = training_step.moves_of(model)
    critic, generator = ([*part.parameters()] for part in (model.critic, model.generator))
    assert [len(move.parameters) for move in moves] == [len(p) for p in (critic, generator, critic, critic)]
    assert [move.lr for move in moves] == [2e-3, 1e-3, 2e-3, 2e-3]
    trainer = training_step.Trainer(moves, torch.float32, CPU)
    before = copy.deepcopy(model)
    losses = trainer.run([torch.randn(5, 2)])
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    counts = {id(trainer.optimizers[id(m.parameters)]): m for m in moves}
    steps = [int(next(iter(trainer.optimizers[id(m.parameters)].state.values()))["step"]) for m in counts.values()]
    assert steps == [3, 1]
    assert all(
        not torch.equal(a, b) for a, b in zip(model.critic.parameters(), before.critic.parameters(), strict=True)
    )


def test_within_a_limit_cases_are_compiled_while_all_rows_still_fit():
    offered = training_step.local()
    compiled = [p for p in offered if p.compiled]
    budget = Budget(100.0, 4, offered)
    assert budget.chosen(0.0) == offered
    compiled[0].seconds += 30.0
    budget.done(40.0)  # 10 s eager, 30 s compiling
    assert budget.chosen(40.0) == offered  # 30 s for three more cases and 30 s to compile fit into 60 s
    compiled[0].seconds += 5.0
    budget.done(15.0)
    assert budget.chosen(55.0) == [p for p in offered if not p.compiled]
    budget.done(10.0)
    assert len(budget.chosen(60.0)) == 4  # the last case, and time left again


@pytest.mark.parametrize(("model", "preset", "peer"), [("maf", "points", "nflows"), ("glow", "digits", "normflows")])
def test_a_peers_model_is_ours(model, preset, peer, effort):
    """Its first loss from our weights passes the gate. Skipped where it is not installed (extra `bench`)."""
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    session = Peer(peer)
    try:
        rows, skipped = run_case(StepCase(model, preset, torch.float32, 3), [session], CPU, effort)
        assert not skipped and [(row.provider, row.fault) for row in rows] == [(peer, "")] and rows[0].median_s
        rows, skipped = run_case(StepCase(model, preset, torch.bfloat16, 3), [session], CPU, effort)
        assert not rows and skipped == [(peer, "rounds log-determinants to bf16 under autocast")]
    finally:
        session.close()
