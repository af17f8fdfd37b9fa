# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_PROMPT ?= a red ball bouncing on a blue background
TORCH := torch==2.13.0
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
# How tests run: WORKERS=0 in one process, SEED=7 in a random order, ARGS="-k noise" for anything else pytest takes
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
	$(if $(SEED),-p randomly --randomly-seed=$(SEED)) $(ARGS)

.PHONY: demo test test-fast check docs format clean

$(VENV)/runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[build]"
	touch $@

$(VENV)/fast: $(VENV)/runtime  # no torch
	$(INSTALL) --editable ".[hub,plots,dev]"
	touch $@

$(VENV)/dev: $(VENV)/fast
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable ".[export]"
	-$(INSTALL) --editable ".[tensorrt-rtx]"  # where there is none, its tests skip
	touch $@

$(VENV)/docs: $(VENV)/runtime
	$(INSTALL) --editable ".[docs]"
	touch $@

demo: $(VENV)/runtime
	mkdir -p build
	$(BIN)/t2v-rt build-engines demo/bouncing-shapes --output build/demo
	$(BIN)/t2v-rt generate "$(DEMO_PROMPT)" --engines build/demo --output build/demo.mp4 --contact-sheet build/demo.png --seed 0

test: $(VENV)/dev
	$(PYTEST)

test-fast: $(VENV)/fast
	$(PYTEST) -m "not reference and not slow and not gpu"

check: $(VENV)/dev $(VENV)/docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples docs
	$(BIN)/typos

docs: $(VENV)/docs  # the API reference from docstrings, build/docs/index.html
	$(BIN)/python -W error docs/api.py

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV)
