# Everything starts from a bare machine with Python >= 3.10, g++ and make:
#   make demo        trains Glow on real digits, fused and reference path, and shows what it cost and gave
#   make test        the whole test suite, in three runs: in parallel; what needs the cores for itself; Triton's interpreter
#   make bench       the speed table (benchmarks/results holds committed ones)
#   make wheel       a wheel in dist/ with the compiled CPU kernels, for any Linux x86-64, Python >= 3.10 and torch >= 2.10
#   make gpu-check   on a machine with an NVIDIA GPU, with that machine's own Python packages (PYTHON=…, RESULTS=…, PARTS=…)
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
RESULTS ?= gpu-check
PARTS ?= build test sanitize bench
BENCH ?=
# the CUDA library takes minutes to compile; nothing here runs it where there is no GPU (.ci/run compiles it by itself)
BUILD ?= $(if $(shell command -v nvidia-smi),auto,cpu)

# the requirements of the extra bench, of the package that is installed: to install the extra would build it again
define EXTRA_BENCH
import importlib.metadata as m
print(*[r.split(";")[0] for r in m.requires("genkernels") if r.endswith('extra == "bench"')])
endef
export EXTRA_BENCH

SOURCES := setup.py pyproject.toml $(wildcard csrc/*/* csrc/*/*/*)
RUN := $(VENV)/bin/python
# bytecode is made of what is imported, when it is: of all that torch brings it takes most of a minute
INSTALL := $(RUN) -m pip install -q --no-compile
# the processes of a test suite read files that are compiled already, whatever the shell says
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test bench lint wheel gpu-check clean

demo: $(VENV)/train
	$(RUN) tools/demo.py

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n auto -m "not threads"
	$(RUN) -m pytest tests/ops -m threads
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/ops tests/triton -n auto

bench: $(VENV)/train
	$(VENV)/bin/genkernels bench $(BENCH)

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files "*.cpp" "*.h" "*.cu" "*.cuh")
	$(VENV)/bin/lint-imports

wheel: $(VENV)/base
	GENKERNELS_BUILD=$(BUILD) $(RUN) -m pip wheel -q --no-deps --no-build-isolation -w dist .
	$(RUN) tools/check_wheel.py $$(ls -t dist/*.whl | head -1)

gpu-check:
	$(PYTHON) tools/gpu_check.py --results $(RESULTS) --parts $(PARTS)

$(VENV)/base: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "setuptools>=77" wheel numpy "$(TORCH)"
	@touch $@

$(VENV)/train: $(VENV)/base
	GENKERNELS_BUILD=$(BUILD) $(INSTALL) --no-build-isolation -e ".[train]"
	@touch $@

$(VENV)/test: $(VENV)/base
	GENKERNELS_BUILD=$(BUILD) $(INSTALL) --no-build-isolation -e ".[train,test]"
	-$(INSTALL) $$($(RUN) -c "$$EXTRA_BENCH")  # what swap_ swaps; tests without it say that they are skipped
	@touch $@ $(VENV)/train

clean:
	rm -rf $(VENV) build genkernels/_lib demo gpu-check
