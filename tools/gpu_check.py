"""Checks the project on a machine with an NVIDIA GPU and no network, by that machine's own Python packages, in under 9 minutes.

python tools/gpu_check.py --results DIR --parts build test sanitize bench

Builds the CUDA library for the GPU that is there, runs the tests, compute-sanitizer on tiny shapes, and the benchmarks with their
rooflines. Logs and results go to DIR; a short table is printed last. Without a GPU it goes as far as it can and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "test", "sanitize", "bench")
BUDGET_S = 530  # all parts together
SHARE_S = {"build": 150, "test": 240, "sanitize": 120, "bench": 180}


class Check:
    def __init__(self, results: Path):
        self.results = results
        self.began = time.monotonic()
        self.rows: list[dict] = []
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def run(
        self, part: str, name: str, command: list[str], extra: dict | None = None, limit: float | None = None
    ) -> bool:
        left = BUDGET_S - (time.monotonic() - self.began)
        limit = min(left, limit or SHARE_S[part])
        log = self.results / f"{part}-{name}.log"
        start = time.monotonic()
        if limit < 5:
            self.note(part, name, "skipped", 0.0, "the time is used up")
            return False
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=self.env | (extra or {}), timeout=limit
                ).returncode
                outcome = "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
            except OSError as error:
                outcome = f"could not start: {error}"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        self.note(part, name, outcome, time.monotonic() - start, lines[-1][:90] if lines else "")
        return outcome == "ok"

    def note(self, part: str, name: str, outcome: str, seconds: float, last: str) -> None:
        self.rows.append({"part": part, "what": name, "outcome": outcome, "seconds": round(seconds, 1), "last": last})
        print(f"{part:9} {name:12} {outcome:16} {seconds:6.1f} s  {last}", flush=True)


def gpu() -> str | None:
    """Name and compute capability of the GPU, by a process of its own so that this one never touches the driver."""
    code = "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability()) if torch.cuda.is_available() else None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-check")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    check = Check(arguments.results.resolve())
    device = gpu()
    print(f"GPU: {device or 'none: what needs one is left out'}", flush=True)
    python = sys.executable
    if "build" in arguments.parts:
        wanted = {"GENKERNELS_BUILD": "cuda"}
        if device:
            major, minor = device.split()[-2:]
            wanted["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}" + ("a" if major == "9" else "")
        check.run("build", "library", [python, "setup.py", "build_ext", "--inplace"], wanted)
    check.run("build", "info", [python, "-m", "genkernels", "info", "--ops"])
    if "test" in arguments.parts:
        folders = ["tests/cuda/test_affine_coupling_gpu.py", "tests/ops", "tests/triton", "tests/nn", "tests/models"]
        folders.append("tests/training/test_train_gpu.py")
        check.run("test", "gpu", [python, "-m", "pytest", *folders, "-p", "no:cacheprovider"])
    if "sanitize" in arguments.parts and device:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        script = [python, "tools/sanitize.py"]
        sanitize = [tool, "--error-exitcode", "9", "--tool"]
        for backend in ("cuda", "triton"):
            check.run("sanitize", f"mem-{backend}", [*sanitize, "memcheck", *script, "--backend", backend], limit=80)
        check.run(
            "sanitize", "race-cuda", [*sanitize, "racecheck", *script, "--backend", "cuda", "--shapes", "3"], limit=60
        )
    if "bench" in arguments.parts:
        files = ["--json", str(check.results / "bench.json"), "--plot", str(check.results / "bench.png")]
        check.run("bench", "operators", [python, "-m", "genkernels", "bench", *files, *([] if device else ["--quick"])])
    (check.results / "summary.json").write_text(json.dumps({"gpu": device, "rows": check.rows}, indent=1))
    print("\npart      what         outcome           seconds")
    for row in check.rows:
        print(f"{row['part']:9} {row['what']:12} {row['outcome']:16} {row['seconds']:7.1f}  {row['last']}")
    return 0 if all(row["outcome"] == "ok" for row in check.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
