"""``tools/merge_results.py``: a case measured again takes its place in a committed file as a whole, and says of which
run it is."""

import importlib
import json
import string
import subprocess
import sys
from pathlib import Path

import pytest

from genkernels.benchmarks import report

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def merge(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("merge_results").merge


def row(case, provider, seconds, dtype="float32"):
    return {
        **{"case": f"training_step/{case}", "shape": [2, 3], "dtype": dtype, "direction": "step"},
        **{"provider": provider, "gate": "pass", "median_s": seconds},
    }


def results(date, *rows, notes=()):
    where = {
        **{"device": "a processor", "device_type": "cpu", "threads": 2, "versions": {"torch": "2", "genkernels": "0"}},
        **{"commit": "abc", "copy_bytes_per_s": 1e9, "product_flops_per_s": {}},
    }
    return {"machine": {**where, "date": date, "notes": list(notes)}, "rows": list(rows)}


OLD = results(
    "monday",
    row("nice/points", "reference", 1.0),
    row("nice/points", "fused", 2.0),
    row("nice/points", "reference", 3.0, "bfloat16"),
    row("maf/points", "reference", 4.0),
    notes=["training_step/nice/points  2×3  float32  step: fused fails", "training_step/nice/points  2×3  bfloat16: x"],
)


def times(merged):
    return [
        (r["case"].split("/")[1], r["dtype"][0], r["provider"], r["median_s"], r.get("run")) for r in merged["rows"]
    ]


def test_a_case_is_replaced_as_a_whole_and_names_its_run(merge):
    again = [row("nice/points", name, s) for name, s in (("reference", 5.0), ("compiled", 6.0), ("fused", 7.0))]
    merged = merge(OLD, results("tuesday", *again, notes=["new"]))
    assert times(merged) == [
        ("nice", "f", "reference", 5.0, "a"),
        ("nice", "f", "compiled", 6.0, "a"),
        ("nice", "f", "fused", 7.0, "a"),
        ("nice", "b", "reference", 3.0, None),
        ("maf", "f", "reference", 4.0, None),
    ]
    assert [(key, run["date"], "notes" in run) for key, run in merged["runs"].items()] == [("a", "tuesday", False)]
    assert merged["machine"]["date"] == "monday"
    assert merged["machine"]["notes"] == ["training_step/nice/points  2×3  bfloat16: x", "new"]

    head, _, *lines = report.training_step_table(merged).splitlines()
    assert head.endswith("| × compiled | run |") and [line.split(" | ")[-1] for line in lines] == ["a |", "– |", "– |"]
    assert "run" not in report.training_step_table(OLD)

    twice = merge(merge(merged, results("wednesday", row("maf/points", "reference", 8.0))), results("friday", *again))
    assert [t[-1] for t in times(twice)] == ["c", "c", "c", None, "b"]
    assert {key: run["date"] for key, run in twice["runs"].items()} == {"b": "wednesday", "c": "friday"}
    assert OLD["rows"][0]["median_s"] == 1.0 and "runs" not in OLD


def test_there_are_names_for_more_runs_than_letters(merge):
    many = {**OLD, "runs": {letter: {} for letter in string.ascii_lowercase}}
    merged = merge(many, results("tuesday", row("maf/points", "reference", 8.0)))
    assert merged["rows"][-1]["run"] == "aa" and list(merged["runs"]) == ["aa"]


def test_nothing_is_lost_or_invented(merge):
    with pytest.raises(ValueError, match=r"nice/points  2×3  float32  step must be measured with fused too"):
        merge(OLD, results("tuesday", row("nice/points", "reference", 5.0)))
    with pytest.raises(ValueError, match=r"must be one of the file's, got training_step/nice/digits  2×3"):
        merge(OLD, results("tuesday", row("nice/digits", "reference", 5.0)))


def test_it_rewrites_the_file_or_says_in_a_sentence_why_not(tmp_path):
    pytest.importorskip("matplotlib")
    file, again, wrong, empty = (tmp_path / f"{name}.json" for name in ("old", "again", "wrong", "empty"))
    file.write_text(json.dumps(OLD))
    again.write_text(json.dumps(results("tuesday", row("maf/points", "reference", 9.0))))
    wrong.write_text("{")
    empty.write_text("{}")

    def run(*files):
        command = [sys.executable, TOOLS / "merge_results.py", *files]
        return subprocess.run(command, capture_output=True, text=True)

    for bad in (wrong, empty, tmp_path / "missing.json"):
        before = file.read_text()
        done = run(file, again, bad)
        assert (
            done.returncode == 2
            and str(bad) in done.stderr
            and done.stderr.startswith("merge_results: ")
            and done.stderr.count("\n") == 1
        )
        assert file.read_text() == before
    assert not file.with_suffix(".png").exists() and run(file, again).returncode == 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text())["rows"][-1]["median_s"] == 9.0
