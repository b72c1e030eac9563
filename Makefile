# make help    says what there is.

PYTHON ?= python3
VENV ?= .venv
# The address of PyTorch's index of CPU wheels; empty takes torch from pip's usual index (requirements/README.md).
TORCH_INDEX ?=
# More arguments for the program: make serve ARGS="--tree none --grpc-port 50051"
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := $(shell grep -E '^torch==' requirements/cpu.lock)

.DEFAULT_GOAL := help
.PHONY: help install demo serve draft-head test fuzz lint proto lock chart-readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## the environment in .venv; skipped while it is up to date with the lock

# The stamp is written last, so that an interrupted installation is taken up again.
$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Branchline needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || echo missing)." >&2; \
	  echo "Name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "== 1/4 virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== 2/4 $(TORCH)"
	$(PY) -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c requirements/cpu.lock $(TORCH)
	@echo "== 3/4 everything else: $$(grep -cE '^[a-z]' requirements/cpu.lock) packages"
	$(PY) -m pip install --disable-pip-version-check --no-deps -r requirements/cpu.lock
	@echo "== 4/4 Branchline itself, from this directory"
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## serve the default model on this machine, answer three prompts, stop
	$(PY) -m cluster.demo $(ARGS)

serve: install  ## serve the default model until Ctrl-C
	@exec $(PY) -m cluster.cli serve $(ARGS)

# One stage alone: make draft-head STAGE=evaluate ARGS="--work DIR"
STAGE ?= all
draft-head: install  ## train a draft head: ARGS="--work DIR --model MODEL" (docs/draft-heads.md)
	@exec $(PY) -m tools.draft_head $(STAGE) $(ARGS)

# Tiers, the quick ones first; each has its own limit in seconds. pytest exits with 5 when it finds no test, which is no
# failure where a tier is empty. Where tests compute, two processes with a thread each take a file at a time: two threads
# gain little on tiny models. Tests of whole clusters have the machine to themselves.
TIER = $(PY) -m pytest -q --durations=5
PAIR = $(TIER) -n 2 --dist loadfile
test: export OMP_WAIT_POLICY = PASSIVE
test: export HF_HUB_OFFLINE = 1
test: install lint  ## lint, then all tests, tier by tier
	OMP_NUM_THREADS=1 $(PAIR) --session-timeout=300 -m "not (build or models or wire or cluster)"
	$(TIER) --session-timeout=300 -m "build and not (models or wire or cluster)" || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(PAIR) --session-timeout=2000 -m "models and not (wire or cluster)" || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(PAIR) --session-timeout=1300 -m "wire and not cluster" || [ $$? -eq 5 ]
	$(TIER) --session-timeout=1200 -m "cluster" || [ $$? -eq 5 ]

# Malformed requests of each kind: N=10000.
N ?= 400
fuzz: install  ## malformed requests against a gateway, N of each kind; prints how they were answered
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -s --fuzz $(N) tests/gateway/test_fuzz_grpc.py tests/gateway/test_fuzz_http.py

lint: install  ## ruff, mypy, and the layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

proto: install  ## generate the stubs in branchline/v1 from proto/
	$(PY) -m tools.generate_stubs

lock: install  ## write requirements/*.lock from pyproject.toml and what is installed
	$(PY) -m tools.lock cpu dev > requirements/.cpu.lock
	mv requirements/.cpu.lock requirements/cpu.lock
	$(PY) -m tools.lock cpu > requirements/.image-cpu.lock
	mv requirements/.image-cpu.lock requirements/image-cpu.lock
	$(PY) -m tools.lock cuda > requirements/.cuda.lock
	mv requirements/.cuda.lock requirements/cuda.lock

chart-readme: install  ## write the table of values in the Helm chart's README
	$(PY) -m tools.chart_readme

clean:  ## remove the environment and every cache in this directory
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
