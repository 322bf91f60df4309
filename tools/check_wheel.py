#!/usr/bin/env python3
"""Looks at the libraries of a wheel, or of this checkout: do they run on every Linux with glibc 2.28?

    python tools/check_wheel.py [dist/genkernels-….whl]

Prints the newest symbols that each library asks for, and what the wheel says of itself. Exits with 1 where one asks for
more than `OLDEST` in setup.py has, asks for Python, or is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("genkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(library: Path, setup) -> list[str]:
    """Why a library does not run everywhere: symbols that came later, and libraries that may not be there."""
    found = [f"asks for {symbol}" for symbol in setup.too_new(library)]
    shown = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    needed = [line.split()[1] for line in shown.splitlines() if line.strip().startswith("NEEDED")]
    return found + [f"needs {name}" for name in needed if "python" in name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="default: the libraries in genkernels/_lib")
    wheel = parser.parse_args().wheel
    setup = load_setup()
    with tempfile.TemporaryDirectory() as folder:
        at = ROOT
        if wheel:
            at = Path(folder)
            zipfile.ZipFile(wheel).extractall(at)
        libraries = sorted((at / "genkernels" / "_lib").glob("*.so"))
        wrong = 0
        for library in libraries:
            newest = ", ".join(
                f"{name} {'.'.join(map(str, version))}" for name, version in sorted(setup.symbols(library).items())
            )
            problems = faults(library, setup)
            wrong += bool(problems)
            print(f"{library.name}: {newest}" + "".join(f"; {problem}" for problem in problems))
        built = at / "genkernels" / "_lib" / "built.json"
        print(built.read_text().rstrip() if built.exists() else "no built.json: nothing says what was built")
        print(f"{len(libraries)} libraries, {wrong} of which run on newer systems only")
        if wheel and not any(at.glob("*.dist-info/built.json")):
            print("no built.json in the wheel's metadata")
            return 1
        return 1 if wrong or not libraries or not built.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
