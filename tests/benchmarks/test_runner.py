"""`main`: what it prints, writes, returns and refuses."""

import datetime
import json
import math

import pytest
import torch

from genkernels import benchmarks
from genkernels.benchmarks import cases as catalogue
from genkernels.benchmarks import machine, providers, runner

ROW_KEYS = {
    "case",
    "shape",
    "dtype",
    "direction",
    "provider",
    "gate",
    "median_s",
    "q20_s",
    "q80_s",
    "peak_bytes",
    "bytes",
    "flops",
    "share_of_peak",
}


def right(x, s):
    return x * torch.exp(s), s.float().sum(1)


def wrong(x, s):
    return x * torch.exp(s) + 1e-3, s.float().sum(1)


@pytest.fixture
def only(monkeypatch, effort, toy):
    """Makes `main` run the toy case on these providers alone, briefly."""

    def set_up(*chosen, **fields):
        monkeypatch.setattr(catalogue, "find", lambda names, **kwargs: [toy(**fields)])
        monkeypatch.setattr(providers, "local", lambda device: [*chosen])
        monkeypatch.setattr(runner, "QUICK", effort)
        monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(machine, "spare_bytes", lambda device: 1 << 20)

    return set_up


def test_json_schema_and_table(only, fake, tmp_path, capsys):
    only(fake(right, "reference"), fake(right, "cpu"), fake(wrong, "compiled", ours=False))
    file = tmp_path / "out.json"
    assert benchmarks.main(["toy"], json=file, quick=True, device="cpu") == 0  # a wrong baseline is not our failure
    data = json.loads(file.read_text())
    assert set(data) == {"machine", "rows"} and [set(row) for row in data["rows"]] == [ROW_KEYS] * 3
    reference, cpu, compiled = data["rows"]
    assert (cpu["case"], cpu["shape"], cpu["dtype"], cpu["direction"]) == (
        "toy/exp",
        [6, 40],
        "float32",
        "forward+backward",
    )
    assert [row["provider"] for row in data["rows"]] == ["reference", "cpu", "compiled"]
    assert [row["gate"] for row in data["rows"]] == ["pass", "pass", "fail"]
    assert compiled["median_s"] is compiled["share_of_peak"] is None
    where = data["machine"]
    share = max(
        1000 / cpu["median_s"] / where["copy_bytes_per_s"],
        10 / cpu["median_s"] / where["product_flops_per_s"]["float32"],
    )
    assert cpu["share_of_peak"] == pytest.approx(share)
    assert where["threads"] >= 1 and where["versions"]["torch"] == torch.__version__ and where["device"]
    assert datetime.datetime.fromisoformat(where["date"]).utcoffset() == datetime.timedelta(0)
    assert any("compiled fails the gate: y: error" in note for note in where["notes"])
    assert list(tmp_path.iterdir()) == [file]  # no half-written file beside it

    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    line = next(line for line in table.splitlines() if line.strip().startswith("cpu"))
    assert f"{reference['median_s'] / cpu['median_s']:.2f}" in line.split()
    failed = next(line for line in table.splitlines() if line.strip().startswith("compiled"))
    assert "FAIL y: error" in failed and "no speed is shown" in failed


def test_our_wrong_backend_makes_the_run_fail(only, fake, capsys):
    only(fake(right, "reference"), fake(wrong, "cpu"))
    assert benchmarks.main(["toy"], quick=True, device="cpu") == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_run_without_any_row_is_not_a_success(only, fake, capsys):
    class Absent:
        name, ours = "cpu", True

        def open(self, problem):
            raise providers.Unavailable("the CPU library was not built")

    only(Absent())
    assert benchmarks.main(["toy"], quick=True, device="cpu") == 1
    assert "not measured: cpu the CPU library was not built" in capsys.readouterr().out


@pytest.mark.parametrize("dies_in", ["warm_up", "turn", "peak_bytes"])
def test_a_provider_lost_on_the_way_costs_its_row_alone(dies_in, fake, toy, effort):
    class Dying(fake):
        def open(self, problem):
            session = super().open(problem)

            def die():
                raise providers.Unavailable("its process ended")

            setattr(session, dies_in, die)
            return session

    chosen = [fake(right, "reference"), Dying(right, "nflows", ours=False), fake(right, "cpu")]
    rows, skipped = runner.run_case(toy(), chosen, torch.device("cpu"), effort)
    assert [row.provider for row in rows] == ["reference", "cpu"] and all(row.median_s for row in rows)
    assert skipped == [("nflows", "its process ended")]


def test_losing_rows_stay_in_the_table(only, fake, capsys):
    def slow(x, s):
        for _ in range(50):
            y = x * torch.exp(s)
        return y, s.float().sum(1)

    only(fake(right, "reference"), fake(slow, "cpu"))
    assert benchmarks.main(["toy"], quick=True, device="cpu") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("cpu"))
    assert float(line.split()[5]) < 1.0  # × reference


@pytest.mark.parametrize("name", ["out.svg", "out.png"])
def test_plot(name, only, fake, tmp_path):
    pytest.importorskip("matplotlib")
    only(fake(right, "reference"), fake(right, "cpu"), fake(wrong, "compiled", ours=False))
    assert benchmarks.main([], plot=tmp_path / name, quick=True, device="cpu") == 0
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def nothing_runs(monkeypatch):
    def measure(*args, **kwargs):
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr(runner, "measure", measure)


REFUSED = [
    ({"json": "{tmp}"}, r"bench: json '.*' must be a file, it is a folder"),
    ({"json": "{tmp}/file/x.json"}, r"bench: json '.*/file/x.json' cannot be written: .*/file is not a folder"),
    ({"plot": "{tmp}/file/x.png"}, r"bench: plot '.*/file/x.png' cannot be written: .*/file is not a folder"),
    ({"plot": "{tmp}/x.jpeg"}, r"bench: plot must end in .png, .svg, .pdf, got '.*x.jpeg'"),
    ({"device": "tpu"}, r"bench: device must be cpu.*, got 'tpu'"),
    ({"dtypes": ["fp8"]}, r"bench: dtypes must be among .*float32.*, got fp8"),
    (
        {"providers": ["refrence"]},
        r"bench: providers must be among reference.* got 'refrence'; did you mean reference\?",
    ),
    ({"threads": 0}, r"bench: threads must be at least 1, got 0"),
    ({"limit": 0.0}, r"bench: limit must be more than 0 seconds, got 0.0"),
    ({"cases": ["affine_copling"]}, r"bench: CASE must be .*, got 'affine_copling'; nearest: affine_coupling"),
    ({"cases": ["affine_coupling/sigmod"]}, r"got 'affine_coupling/sigmod'; nearest: affine_coupling/sigmoid"),
    ({"cases": ["zzz"]}, r"got 'zzz'; nearest: affine_coupling"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused_before_anything_is_measured(arguments, sentence, nothing_runs, tmp_path):
    (tmp_path / "file").write_text("")
    filled = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=sentence) as raised:
        benchmarks.main(**{"cases": [], "device": "cpu", **filled})
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_existing_json_survives_a_run_that_dies(only, fake, tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    file.write_text("old")
    only(fake(right, "reference"))
    monkeypatch.setattr(runner.report.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        benchmarks.main([], json=file, quick=True, device="cpu")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_threads_are_set_for_the_run_and_put_back(only, fake):
    seen = set()

    def op(x, s):
        seen.add(torch.get_num_threads())
        return right(x, s)

    before = torch.get_num_threads()
    only(fake(op, "cpu"))
    benchmarks.main([], quick=True, device="cpu", threads=before + 1)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_shares_take_the_larger_of_bytes_and_flops():
    ceilings = machine.Ceilings(torch.device("cpu"), copy=100.0, product={"float32": 1000.0})
    assert ceilings.share(50, 100, "float32", 1.0) == 0.5
    assert ceilings.share(50, 900, "float32", 1.0) == 0.9
    assert ceilings.share(50, 900, "float64", 2.0) == 0.25


@pytest.mark.parametrize("product, share", [({"bfloat16": 4000.0}, 0.5), ({"bfloat16": 10.0}, 2.0), ({}, 2.0)])
def test_a_half_types_product_is_at_least_that_of_fp32(product, share):
    ceilings = machine.Ceilings(torch.device("cpu"), copy=100.0, product={"float32": 1000.0} | product)
    assert ceilings.share(1, 2000, "bfloat16", 1.0) == share


def test_without_ceilings_there_is_no_share():
    assert machine.Ceilings(torch.device("cpu")).share(50, 900, "float32", 1.0) is None


def test_ceilings_keep_the_best_of_two_measurements(monkeypatch):
    monkeypatch.setattr(machine, "spare_bytes", lambda device: 1 << 20)
    ceilings = machine.Ceilings(torch.device("cpu"))
    ceilings.measure([torch.float32], seconds=0.001)
    first = ceilings.copy
    ceilings.measure([torch.bfloat16], seconds=0.001)
    assert set(ceilings.product) == {"float32", "bfloat16"}  # a half type may be widened
    assert 0 < first <= ceilings.copy < math.inf and ceilings.product["float32"] > 0


def test_a_limit_leaves_out_rows_of_every_kind_and_names_them(fake, toy, effort, monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "spare_bytes", lambda device: 1 << 20)
    clock = iter(range(1000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))  # a second a look
    rows = [toy(name=f"toy/{letter}") for letter in "abcdef"]
    whole = runner.measure(rows, [fake(right, "reference")], torch.device("cpu"), effort)
    assert [row.case[-1] for row in whole.rows] == list("abcdef") and not whole.notes
    some = runner.measure(rows, [fake(right, "reference")], torch.device("cpu"), effort, limit=2.5)
    assert [row.case[-1] for row in some.rows] == list("abd")  # a, d, b, in the table's order
    assert len(some.notes) == 1 and some.notes[0].startswith("3 of 6 cases, the 2.5 s being over: toy/c")


def test_ctrl_c_keeps_the_cases_before(only, fake, toy, tmp_path, monkeypatch, capsys):
    only(fake(right, "reference"))
    monkeypatch.setattr(catalogue, "find", lambda names, **kwargs: [toy(name="toy/first"), toy(name="toy/second")])
    run_case, calls = runner.run_case, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(*arguments)

    monkeypatch.setattr(runner, "run_case", stopped)
    file = tmp_path / "out.json"
    assert benchmarks.main(["toy"], json=file, quick=True, device="cpu") == 130
    data = json.loads(file.read_text())
    assert [row["case"] for row in data["rows"]] == ["toy/first"]
    assert "1 of 2 cases, the run being stopped by hand: toy/second" in " ".join(data["machine"]["notes"])
    monkeypatch.setattr(runner, "run_case", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(["toy"], json=file, quick=True, device="cpu")
    assert json.loads(file.read_text()) == data


def test_a_limit_shortens_what_is_measured():
    assert runner._effort(40, False, None) is runner.FULL and runner._effort(40, True, 9.0) is runner.QUICK
    assert runner._effort(40, False, 60.0).seconds == pytest.approx(0.15)
    assert runner._effort(4, False, 1e3) == runner.FULL


def test_fp32_is_no_tf32_on_a_gpu():
    before = torch.backends.cudnn.allow_tf32
    with runner._whole_fp32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cudnn.allow_tf32 == before
