# `make` alone lists the targets. Each installs what it needs into .venv/ first, once.

PYTHON ?= python3
# extra words for the command of one target: make test ARGS="-k gae -x"
ARGS ?=

BIN := .venv/bin
# exists only after a complete installation
STAMP := .venv/.installed

# Networks here are small: more threads only cost time, and results would depend on their number.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets one after the other also under -j: a benchmark beside the tests measures nothing.
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to the command of train, test, soak, type, bench and bench-peers'

.PHONY: setup
setup: $(STAMP) ## install zrl and everything for its development into .venv/

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make: no $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: zrl needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv/ (a minute or more, most of it torch)"
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install \
		--quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[plot,docs,dev]'
	@touch $@

.PHONY: train
train: $(STAMP) ## solve CartPole-v1 with PPO; fails where the goal is not reached
	$(BIN)/zrl train CartPole-v1 --algo ppo --stop-at-return 475 --steps 150k --seed 1 --require-goal $(ARGS)

.PHONY: test
test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

.PHONY: faults
faults: $(STAMP) ## kill, stop, hang and cut off workers and learners, the long way (make test has the short one)
	$(BIN)/python -m pytest tests/faults tests/system tests/launch tests/rollout/test_remote.py tests/rollout/test_spaces.py tests/cli/test_main.py -m "" $(ARGS)

.PHONY: soak
soak: $(STAMP) ## half an hour of one run with all faults at random: what must hold holds, nothing grows
	$(BIN)/python scripts/soak.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check style and format (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: type
type: $(STAMP) ## check types (mypy --strict)
	$(BIN)/mypy $(ARGS)

.PHONY: bench
bench: $(STAMP) ## run every scripts/bench_*.py, one after the other; that of CUDA only where there is a device
	@set -e; for script in $(sort $(filter-out scripts/bench_cuda.py, $(wildcard scripts/bench_*.py))); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); \
	done
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "== scripts/bench_cuda.py"; $(BIN)/python scripts/bench_cuda.py $(ARGS); \
	fi

.PHONY: bench-peers
bench-peers: $(STAMP) ## measure zrl beside its peers, which get environments of their own in .venv-peers/
	PYTHONPATH=scripts $(BIN)/python -m bench_peers $(ARGS)

.PHONY: docs
docs: $(STAMP) ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.PHONY: clean
clean: ## remove what was built and installed, but not runs/
	rm -rf .venv .venv-peers docs/_build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
