# One command each, on a machine with Python 3.10 or later and make:
#   make demo    install into .venv and run the two recipes that ship
#   make test    install into .venv and run the tests, offline
# PYTHON=python3.11 chooses the interpreter, VENV=folder the environment, PYTEST_ARGS and PIP_ARGS are passed on.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS ?= .venv-clients
BROWSER ?= build/browser
HEADERS ?= build/cpp/usr/include/onnxruntime
HEADERS_FROM := http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb
HEADERS_SUM := 14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08
INSTALLED := $(VENV)/.installed
TYPES := build/types/tersor

.PHONY: help demo test test-clients test-browser test-cpp lint types bench clean

help:  ## Say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tersor needs Python 3.10 or later: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[demo,train,dev]'
	@touch $@

demo: $(INSTALLED)  ## Slice and export the decoder that ships, then export a sentence encoder
	$(BIN)/tersor apply quickstart --offline
	$(BIN)/tersor apply minilm-packed --offline

test: $(INSTALLED)  ## Run the tests, offline
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

test-clients: $(INSTALLED)  ## Open results in stock clients, in two environments of their own
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) \
	  optimum-onnx==0.1.0 'sentence-transformers>=5,<6' 'transformers>=4.57,<4.58' torch onnxruntime
	test -x $(CLIENTS)-genai/bin/python || $(PYTHON) -m venv $(CLIENTS)-genai
	$(CLIENTS)-genai/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  onnxruntime-genai==0.18.0 onnx-ir transformers torch
	TERSOR_CLIENTS=$(abspath $(CLIENTS))/bin/python TERSOR_GENAI=$(abspath $(CLIENTS))-genai/bin/python \
	  HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m clients $(PYTEST_ARGS) tests/test_clients.py

test-browser: $(INSTALLED)  ## Run artifacts in headless Chromium; needs Node.js and Chromium
	npm install --silent --no-fund --no-audit --no-package-lock --prefix $(BROWSER) onnxruntime-web@1.30.0 playwright-core@1.65.1
	TERSOR_BROWSER=$(abspath $(BROWSER)) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-cpp: $(INSTALLED)  ## Compile an artifact's C++ and run it; needs g++, curl and dpkg
	test -d $(HEADERS) || (mkdir -p build && curl -sSfo build/headers.deb $(HEADERS_FROM) && \
	  echo "$(HEADERS_SUM)  build/headers.deb" | sha256sum --check --quiet && dpkg-deb -x build/headers.deb build/cpp)
	TERSOR_ORT_HEADERS=$(abspath $(HEADERS)) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cpp $(PYTEST_ARGS)

lint: $(INSTALLED) types  ## Check style and types
	$(BIN)/ruff check .
	MYPYPATH=build/types $(BIN)/mypy -p tersor.compress -p tersor.sparse -p tersor.export -p tersor.recipes

# Type checkers do not follow an editable install to folders of other names; they do follow links.
types:
	@mkdir -p $(TYPES)
	@for part in compress sparse export recipes; do ln -sfn "$(CURDIR)/$$part" $(TYPES)/$$part; done

bench: $(INSTALLED)  ## Run the benchmarks
	for file in benchmarks/*.py; do HF_HUB_OFFLINE=1 $(BIN)/python $$file || exit 1; done

clean:  ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf .venv $(CLIENTS) $(CLIENTS)-genai build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
