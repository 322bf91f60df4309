"""Checks the project on a machine with an NVIDIA GPU and no network, by that machine's own Python packages, in under 9
minutes.

python tools/gpu_check.py --results DIR --parts build test sanitize bench

Builds the CUDA library for the GPU that is there, runs the tests, compute-sanitizer on tiny shapes, and the benchmarks
with their rooflines. Logs and results go to DIR; a short table is printed last. Without a GPU it goes as far as it can
and says so.

Every group of tests and every operator's benchmark is a process of its own: an error of the device, which ends all work
of the process that meets it, or a hang costs its own group alone. Groups of tests run side by side, since most of their
time is Triton's compiling on one core; what is timed runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "test", "sanitize", "bench")
BUDGET_S = 530  # all parts together
SHARE_S = {"build": 150, "test": 190, "sanitize": 75, "bench": 450}  # each
START_S = 20  # of a benchmark's process, start and end
LEAST_S = 3  # of measuring, whatever an operator has of cases
#: What a test costs beside one that compiles for Triton: seconds on one core, or next to nothing.
COMPILES, RUNS = 1.0, 0.1
#: Between the signal that lets a process report what it has and the one that ends it.
GRACE_S = 10


#: Leaders of the process groups that run now.
RUNNING: set[int] = set()


class Job(NamedTuple):
    part: str
    name: str
    command: list[str]
    extra: dict[str, str] = {}
    limit: float | None = None


class Check:
    def __init__(self, results: Path):
        self.results = results
        self.began = time.monotonic()
        self.rows: list[dict] = []
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def run(self, *jobs: Job) -> bool:
        """Runs the jobs of one part, as many side by side as there are cores; they share the part's time."""
        cores = os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(max(1, cores // len(jobs)))} if len(jobs) > 1 else {}
        end = time.monotonic() + (jobs[0].limit or SHARE_S[jobs[0].part])
        with ThreadPoolExecutor(min(cores, len(jobs))) as pool:
            return all(list(pool.map(lambda job: self._run(job, threads, end), jobs)))

    def _run(self, job: Job, threads: dict[str, str], end: float) -> bool:
        limit = min(self.began + BUDGET_S, end) - time.monotonic()
        log = self.results / f"{job.part}-{job.name}.log"
        start = time.monotonic()
        if limit < 5:
            self.note(job, "skipped", 0.0, "the time is used up")
            return False
        with log.open("w") as out:
            try:
                code = run_group(job.command, out, self.env | threads | job.extra, limit)
                outcome = "ok" if code == 0 else f"failed ({code})" if code is not None else f"stopped at {limit:.0f} s"
            except OSError as error:
                outcome = f"could not start: {error}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        self.note(job, outcome, time.monotonic() - start, lines[-1][:90] if lines else "")
        return outcome == "ok"

    def note(self, job: Job, outcome: str, seconds: float, last: str) -> None:
        row = {"part": job.part, "what": job.name, "outcome": outcome, "seconds": round(seconds, 1), "last": last}
        self.rows.append(row)
        print(show(row), flush=True)


def show(row: dict) -> str:
    return f"{row['part']:9} {row['what']:24} {row['outcome']:16} {row['seconds']:6.1f} s  {row['last']}"


def run_group(command: list[str], out, env: dict[str, str], limit: float) -> int | None:
    """The exit status, or None where `limit` passed: then the process and all that it started are interrupted, which
    makes pytest report the failures it has seen, and killed a little later."""
    # no process of a pool, of compilers say, may go on behind the next part's back, nor hold the GPU
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=env,
        start_new_session=True,
    )
    RUNNING.add(process.pid)
    try:
        return process.wait(max(limit - GRACE_S, limit / 2))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(min(GRACE_S, limit / 2))
        except subprocess.TimeoutExpired:
            pass
        return None
    finally:
        kill_group(process.pid)
        process.wait()
        RUNNING.discard(process.pid)


def kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def listen() -> None:
    """Ctrl-C and SIGTERM end what runs, which has a session of its own and hears neither, and then this process, whose
    threads would wait for it."""

    def stop(number: int, _frame) -> None:
        for leader in list(RUNNING):
            kill_group(leader)
        print("gpu_check: stopped", file=sys.stderr, flush=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def gpu() -> str | None:
    """Name and compute capability of the GPU, by a process of its own so that this one never touches the driver."""
    code = (
        "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability()) if "
        "torch.cuda.is_available() else None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def collected(python: str) -> list[str]:
    """The tests that run here, by their full names. Asked while the library is built: its tests may be missing, which
    cost little."""
    folders = [f"tests/{folder}" for folder in ("cuda", "models", "nn", "ops", "training", "triton")]
    command = [python, "-m", "pytest", *folders, "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def groups_of(tests: list[str]) -> dict[str, tuple[list[str], float]]:
    """Groups of tests, by name: what pytest is told, and their cost. A group a file of what runs kernels, for the rest
    a group a folder."""
    kernels = [p for folder in ("ops", "triton", "cuda") for p in (ROOT / "tests" / folder).glob("test_*.py")]
    files = [*kernels, *(ROOT / "tests").glob("*/test_*gpu.py")]
    paths = {f"{p.parent.name}-{p.stem.removeprefix('test_')}": [str(p.relative_to(ROOT))] for p in files}
    alone = {path for (path,) in paths.values()}
    for folder in ("models", "nn"):
        ignored = [f"--ignore={path}" for path in sorted(alone) if path.startswith(f"tests/{folder}/")]
        paths[folder] = [f"tests/{folder}", *ignored]
    costs = dict.fromkeys(paths, RUNS)
    names = {path: name for name, (path, *_) in paths.items()}
    for test in tests:
        file = test.split("::", 1)[0]
        name = names.get(file) or file.split("/")[1]
        if name in costs:
            costs[name] += COMPILES if "[triton" in test or file.startswith("tests/triton/") else RUNS
    return {name: (path, costs[name]) for name, path in paths.items()}


def test_jobs(python: str, tests: list[str]) -> list[Job]:
    """Two processes a core in all, shared out by what the groups cost, each group in one or more; the longest first."""
    groups = groups_of(tests)
    share = sum(cost for _, cost in groups.values()) / (2 * (os.cpu_count() or 1))
    shards = {name: max(1, round(cost / share)) for name, (_, cost) in groups.items()}
    jobs = []
    for name, (path, _) in sorted(groups.items(), key=lambda item: -item[1][1] / shards[item[0]]):
        # -vv, against the -q of pyproject.toml: the log's last line names the test that hung
        options = ["-vv", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120"]
        command = [python, "-m", "pytest", *path, *options]
        for k in range(1, shards[name] + 1):
            extra = {"GENKERNELS_TEST_SHARD": f"{k}/{shards[name]}"} if shards[name] > 1 else {}
            jobs.append(Job("test", name if shards[name] == 1 else f"{name}-{k}", command, extra))
    return jobs


def bench_limits(python: str, device: bool) -> dict[str, int]:
    """Seconds for each benchmark, start and end of its process included: some, and then the same for each case."""
    code = (
        "import json; from genkernels.benchmarks import cases; "
        f"print(json.dumps({{n: len(cases.find([n], device='cuda', quick={not device})) for n in cases.operators()}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    least = START_S + LEAST_S
    measuring = SHARE_S["bench"] - least * len(counts)
    return {name: least + round(measuring * count / sum(counts.values())) for name, count in counts.items()}


def sanitize_jobs(python: str) -> list[Job]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [tool, "--error-exitcode", "9", "--tool"]
    script = [python, "tools/sanitize.py", "--backend"]
    # torch's own pool would hide a step beyond a tensor that still lies in the pool's block
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        *(Job("sanitize", f"mem-{b}", [*command, "memcheck", *script, b], alone) for b in ("cuda", "triton")),
        Job("sanitize", "race-cuda", [*command, "racecheck", *script, "cuda", "--shapes", "3"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-check")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.results.resolve())
    listen()  # also because processes begun by one that ignores SIGINT would ignore it too
    device = gpu()
    print(f"GPU: {device or 'none: what needs one is left out'}", flush=True)
    python = sys.executable
    with ThreadPoolExecutor(1) as aside:
        tests = aside.submit(collected, python) if "test" in arguments.parts else None
        if "build" in arguments.parts:
            wanted = {"GENKERNELS_BUILD": "cuda"}
            if device:
                major, minor = device.split()[-2:]
                wanted["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == "9" else "")
            check.run(Job("build", "library", [python, "setup.py", "build_ext", "--inplace"], wanted))
        check.run(Job("build", "info", [python, "-m", "genkernels", "info", "--ops"]))
    if tests:
        check.run(*test_jobs(python, tests.result()))
    if "sanitize" in arguments.parts and device:
        check.run(*sanitize_jobs(python))
    if "bench" in arguments.parts:
        for name, limit in bench_limits(python, bool(device)).items():
            files = ["--json", str(check.results / f"{name}.json"), "--plot", str(check.results / f"{name}.png")]
            options = ["--limit", str(limit - START_S)] if device else ["--quick"]
            bench = [python, "-m", "genkernels", "bench", name, *files, *options]
            check.run(Job("bench", name, bench, limit=limit + GRACE_S))
    (check.results / "summary.json").write_text(json.dumps({"gpu": device, "rows": check.rows}, indent=1))
    print("\npart      what                     outcome           seconds")
    for row in check.rows:
        print(show(row))
    return 0 if all(row["outcome"] == "ok" for row in check.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
