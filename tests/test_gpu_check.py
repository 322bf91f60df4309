"""tools/gpu_check.py, as far as a machine without a GPU shows: every test file has its process, and nothing outlives
its time."""

import importlib.util
import os
import signal
import subprocess
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_what_it_runs(tmp_path, number):
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_check as g; from pathlib import Path; g.listen(); "
        f"g.Check(Path({str(tmp_path)!r})).run(g.Job('test', 'long', [sys.executable, '-c', "
        f"{SPAWN.format('time.sleep(60)')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    log, end = tmp_path / "test-long.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    child = int(log.read_text())
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

    tests = [f"tests/ops/test_made.py::test_a[triton-{i}]" for i in range(300)] + ["tests/nn/test_made.py::test_b"]
    jobs = tool.test_jobs("python", tests)
    told = {argument for job in jobs for argument in job.command}
    kernels = {p for folder in ("ops", "triton", "cuda") for p in (ROOT / "tests" / folder).glob("test_*.py")}
    gpu = set((ROOT / "tests").glob("*/test_*gpu.py"))
    assert gpu and {str(p.relative_to(ROOT)) for p in kernels | gpu} | {"tests/nn", "tests/models"} <= told
    assert all((ROOT / a.removeprefix("--ignore=")).exists() for a in told if "tests/" in a)
    assert len({job.name for job in jobs}) == len(jobs)
    shards = [job.extra["GENKERNELS_TEST_SHARD"] for job in jobs if job.name.startswith("ops-made-")]
    assert len(shards) > 1 and shards == [f"{k}/{len(shards)}" for k in range(1, len(shards) + 1)]
    limits = tool.bench_limits(sys.executable, True)
    assert set(limits) == set(operators()) and min(limits.values()) > tool.START_S + 2
    assert sum(limits.values()) <= tool.SHARE_S["bench"] + len(limits)
    assert tool.SHARE_S["build"] + tool.SHARE_S["test"] < tool.BUDGET_S < 9 * 60


def test_what_runs_here_is_found(tool):
    found = tool.collected(sys.executable)
    assert len(found) > 1000 and all((ROOT / test.split("::")[0]).exists() for test in found)
    assert {"ops", "nn", "models", "triton"} <= {test.split("/")[1] for test in found}


def test_shards_take_each_test_once():
    from tests.conftest import share_out

    class Config:
        class hook:
            pytest_deselected = staticmethod(lambda items: None)

    taken = []
    for k in (1, 2, 3):
        items = list(range(10))
        share_out(Config, items, k, 3)
        taken += items
    assert sorted(taken) == list(range(10)) and len(taken) == 10
