"""tools/gpu_check.py, as far as a machine without a GPU shows: every test file has its process, and nothing outlives
its time."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPAWN = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); {}"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its tuples look their annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("end", "limit", "status"), [("sys.exit(3)", 60, 3), ("time.sleep(60)", 4, None)], ids=["ends", "hangs"]
)
def test_what_a_process_started_ends_with_it(tool, tmp_path, end, limit, status):
    began = time.monotonic()
    with (tmp_path / "log").open("w") as out:
        assert tool.run_group([sys.executable, "-c", SPAWN.format(end)], out, dict(os.environ), limit) == status
    assert time.monotonic() - began < limit + 5
    child = int((tmp_path / "log").read_text().split()[0])
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def test_a_job_that_fails_hides_no_other(tool, tmp_path):
    check = tool.Check(tmp_path)
    jobs = [
        tool.Job("test", name, [sys.executable, "-c", f"print({name!r}); raise SystemExit({code})"])
        for name, code in (("good", 0), ("bad", 1))
    ]
    jobs.append(tool.Job("test", "absent", ["/no/such/program"]))
    assert not check.run(*jobs)
    outcomes = {row["what"]: (row["outcome"].split(":")[0], row["last"]) for row in check.rows}
    assert outcomes == {"good": ("ok", "good"), "bad": ("failed (1)", "bad"), "absent": ("could not start", "")}


def test_every_operator_is_tested_and_measured(tool):
    from genkernels.benchmarks.cases import operators

    jobs = tool.test_jobs("python")
    wanted = {
        str(p.relative_to(ROOT)) for folder in ("ops", "triton") for p in (ROOT / "tests" / folder).glob("test_*")
    }
    assert wanted <= {argument for job in jobs for argument in job.command}
    assert all((ROOT / a).exists() for job in jobs for a in job.command if a.startswith("tests/"))
    assert len({job.name for job in jobs}) == len(jobs)
    assert set(tool.SHARDS) <= {job.name.rsplit("-", 1)[0] for job in jobs}
    assert set(tool.BENCH_S) == set(operators())
    assert tool.SHARE_S["build"] + tool.SHARE_S["test"] < tool.BUDGET_S < 9 * 60


def test_shards_take_each_test_once():
    from tests.conftest import pytest_collection_modifyitems

    class Config:
        class hook:
            pytest_deselected = staticmethod(lambda items: None)

    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for k in (1, 2, 3):
            patch.setenv("GENKERNELS_TEST_SHARD", f"{k}/3")
            items = list(range(10))
            pytest_collection_modifyitems(Config, items)
            taken += items
    assert sorted(taken) == list(range(10)) and len(taken) == 10
