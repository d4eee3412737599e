# Two commands matter: `make demo` and `make test`. Both set everything up first, from a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
STAMP := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEMO_FLAGS := $(if $(QUICK),--quick --run-dir runs/demo-quick) $(if $(NO_SERVE),--no-serve)

.PHONY: setup demo test lint bench docs sanitize clean

# Everything that training, serving and chatting need.
$(BASE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "python 3.10 or newer is needed; set PYTHON=")'
	@echo "setting up $(VENV): about a minute the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a looser requirement would pull gigabytes of CUDA packages
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) 'torch==2.13.0' 2>&1 | grep -v WARNING || true
	@$(BIN)/python -c 'import torch' || { echo "torch 2.13.0 could not be installed; install torch into $(VENV) by hand, then run make again"; exit 2; }
	@$(PIP) --editable . 2>&1 | grep -v WARNING || true
	@$(BIN)/python -c 'import shoal, fastapi'
	@$(BIN)/python -c 'from shoal.kernels.cpu.build import library; print("cpu kernels:", "built" if library() else "not built")'
	@$(BIN)/python -c 'from shoal.kernels.array_pool import pool_arrays; print("array pool:", "built" if pool_arrays() else "not built")'
	@touch $(BASE)

# And what the tests compare with: transformers, official clients, a browser.
setup: $(STAMP)

$(STAMP): $(BASE)
	@echo "adding what the tests need: about a minute the first time"
	@$(PIP) --editable '.[dev]' 2>&1 | grep -v WARNING || true
	@$(BIN)/python -c 'import shoal, transformers, pytest'
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
	  echo "installing chromium for the browser tests"; \
	  (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 || echo "no chromium: browser tests will be skipped"; fi
	@touch $(STAMP)

demo: $(BASE)
	$(BIN)/shoal demo $(DEMO_FLAGS)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check shoal tests benchmarks
	$(BIN)/ruff format --check shoal tests benchmarks
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/train.py --output benchmarks/results/train.json

# The kernels under the address and undefined-behaviour sanitisers, through the tests that fuzz them. Output is not captured,
# since a finding ends the process.
sanitize: setup
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  SHOAL_KERNELS=sanitize $(BIN)/python -m pytest -q -s tests/kernels tests/engine/test_runner.py tests/engine/test_fp8_cache.py tests/engine/test_fast_prefill.py

docs: setup
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
