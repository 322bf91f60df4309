"""Yardsticks, integer outputs, long calls, and compiled baselines that a case makes itself."""

import json
import time

import pytest
import torch

from genkernels import benchmarks
from genkernels.benchmarks import cases as catalogue
from genkernels.benchmarks import machine, measure, plot, providers, report, runner
from genkernels.benchmarks.measure import Inputs, Work
from genkernels.benchmarks.results import Row

CPU = torch.device("cpu")


def draws(x, s):
    """Integers that fp64 inputs could flip: the sign of a sum that is near zero."""
    return ((x + s) > 0).long()


def one_flip(x, s):
    found = draws(x, s)
    found[0, 3] = 1 - found[0, 3]
    return found


@pytest.fixture
def drawing(toy):
    return lambda **fields: toy(
        **{"op": draws, "reference": draws, "outputs": ("image",), "direction": "sample", **fields}
    )


def test_integers_must_equal_the_same_dtype_references(drawing, fake, effort):
    rows, _ = runner.run_case(drawing(), [fake(draws, "cpu"), fake(one_flip, "nflows", ours=False)], CPU, effort)
    assert [row.gate for row in rows] == ["pass", "fail"]
    assert rows[1].fault == "image: 1 of 240 integers differ from the reference's"


def test_the_truth_of_integers_is_not_taken_in_fp64(drawing):
    """A sum that fp32 rounds to 0 and fp64 does not."""
    tiny = {"x": torch.tensor([[1.0]]), "s": torch.tensor([[-1.0]])}

    def op(x, s):
        return (x + 1e-9 + s > 0).long()

    standard = runner.draw(drawing(inputs=lambda rng: tiny, op=op, reference=op), CPU).standard
    assert op(*(t.double() for t in tiny.values())).item() == 1
    assert standard.truth[0].item() == 0 and not standard.fault([torch.tensor([[0]])])
    assert "1 of 1 integers differ" in standard.fault([torch.tensor([[1]])])


def test_floats_beside_integers_keep_their_fp64_truth(drawing):
    def op(x, s):
        return draws(x, s), x * s

    standard = runner.draw(drawing(op=op, reference=op, outputs=("image", "product")), CPU).standard
    assert [t.dtype for t in standard.truth] == [torch.int64, torch.float64]


@pytest.fixture
def only(monkeypatch, effort):
    def set_up(case, *chosen):
        monkeypatch.setattr(catalogue, "find", lambda names, **kwargs: [case])
        monkeypatch.setattr(providers, "local", lambda device: [*chosen])
        monkeypatch.setattr(runner, "QUICK", effort)
        monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(machine, "spare_bytes", lambda device: 1 << 20)

    return set_up


def test_a_yardstick_has_a_column_and_no_gate(only, toy, fake, tmp_path, capsys):
    def half(x, s):
        return x  # not the operator at all

    only(
        toy(yardstick=half, direction="sample"),
        fake(toy().op, "reference"),
        fake(toy().op, "cpu"),
        providers.Yardstick(),
    )
    file = tmp_path / "out.json"
    assert benchmarks.main([], json=file, quick=True, device="cpu") == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["provider"], row["gate"]) for row in rows] == [
        ("reference", "pass"),
        ("cpu", "pass"),
        ("one pass", "none"),
    ]
    assert rows[2]["median_s"] > 0 and rows[2]["share_of_peak"] is None
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    head, line = (next(x for x in table.splitlines() if x.strip().startswith(name)) for name in ("provider", "cpu"))
    assert "× one pass" in head
    expected = rows[2]["median_s"] / rows[1]["median_s"]
    assert f"{expected:.2f}" in line.split() or f"{expected:.2g}" in line.split()


def test_a_case_without_a_yardstick_has_neither(only, toy, fake, capsys):
    only(toy(), fake(toy().op, "reference"), providers.Yardstick())
    assert benchmarks.main([], quick=True, device="cpu") == 0
    table = capsys.readouterr().out
    assert not any(line.strip().startswith("one pass") for line in table.splitlines())
    assert "× one pass" not in next(x for x in table.splitlines() if x.strip().startswith("provider"))


def test_the_picture_takes_a_yardstick(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        Row("toy", [1], "float32", "sample", name, gate, median_s=t, q20_s=t, q80_s=t)
        for name, gate, t in (("reference", "pass", 1.0), ("cpu", "pass", 0.01), ("one pass", "none", 0.02))
    ]
    plot.draw(report.groups(rows), [], tmp_path / "x.svg", "svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert [plot._kind(row) for row in rows] == ["PyTorch", "other libraries", "yardstick"]


def test_a_case_makes_its_own_compiled_baseline_or_says_why_not(toy, effort):
    calls = []

    def build():
        return lambda x, s: calls.append(1) or toy().op(x, s)

    rows, _ = runner.run_case(toy(compiled=build), [providers.Compiled()], CPU, effort)
    assert rows[0].gate == "pass" and calls
    rows, skipped = runner.run_case(toy(compiled="left out: why"), [providers.Compiled()], CPU, effort)
    assert not rows and skipped == [("compiled", "left out: why")]


def test_a_long_call_is_its_own_warm_up(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0.005)
    calls = []

    def slow(x):
        calls.append(1)
        time.sleep(0.025)  # beyond 4 × LONG
        return x

    work = Work(slow, [Inputs((torch.zeros(2),))], "sample")
    assert work.warm_up() >= 0.025 and len(calls) == 1
    assert len(work.turn()) == 1 and len(calls) == 2
    assert work.peak_bytes() is None and len(calls) == 2


def test_a_long_set_up_is_no_long_call(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0.02)
    calls = []

    def lazy(x):
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0.0)
        return x

    work = Work(lazy, [Inputs((torch.zeros(2),))], "sample")
    work.warm_up()
    assert not work.long and work.peak_bytes() is not None


def test_a_long_reference_is_called_once_for_its_gate(monkeypatch, toy):
    calls = []

    def slow(x, s):
        calls.append(1)
        return draws(x, s)

    case = toy(op=slow, reference=slow, outputs=("image",), direction="sample")
    problem = runner.draw(case, CPU)
    assert len(calls) == 1
    problem.standard.seconds = 1e9
    assert providers.Backend("reference").open(problem).check() == "" and len(calls) == 1


def test_a_run_too_large_for_bars_is_a_line_a_case_and_a_mark_a_provider(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    told = (("reference", 1.0), ("fused", 0.25), ("compiled", None), ("zuko", 2.0))
    rows = [
        Row(f"toy/{case}", [1], "float32", "step", name, "pass" if t else "fail", t and t * k, ours=name == "fused")
        for k, case in enumerate("abc", 1)
        for name, t in told
    ]
    groups = report.groups(rows)
    plot.draw(groups, [], tmp_path / "bars.svg", "svg")
    monkeypatch.setattr(plot, "_MOST", len(rows) - 1)
    monkeypatch.setattr(plot, "_LINES", 2)
    plot.draw(groups, [], tmp_path / "marks.svg", "svg")
    assert (tmp_path / "bars.svg").read_text().count("<path") != (tmp_path / "marks.svg").read_text().count("<path")

    figure = plot._as_marks(groups, ["where"])
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes] == [
        ["toy/a, 1, float32, step", "toy/b, 1, float32, step"],
        ["toy/c, 1, float32, step"],
    ]
    first, last = figure.axes
    assert [text.get_text() for text in first.texts] == ["1000.0 → 250.0 ms, 1 wrong", "2000.0 → 500.0 ms, 1 wrong"]
    marks = [line.get_xdata()[0] for line in last.lines if len(line.get_xdata()) == 1]
    assert sorted(marks) == [0.5, 4.0] and all(first.get_xlim()[0] < at < first.get_xlim()[1] for at in marks)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"genkernels", "torch.compile", "zuko"}
