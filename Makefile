# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_PROMPT ?= a red ball bouncing on a blue background
TORCH := torch==2.13.0

.PHONY: demo test check docs format clean

$(VENV)/runtime: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[build]"
	touch $@

$(VENV)/dev: $(VENV)/runtime
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[export,hub,dev]"
	-$(BIN)/pip install --quiet --editable ".[tensorrt-rtx]"  # where there is none, its tests skip
	touch $@

$(VENV)/docs: $(VENV)/runtime
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

demo: $(VENV)/runtime
	mkdir -p build
	$(BIN)/t2v-rt build-engines demo/bouncing-shapes --output build/demo
	$(BIN)/t2v-rt generate "$(DEMO_PROMPT)" --engines build/demo --output build/demo.mp4 --contact-sheet build/demo.png --seed 0

test: $(VENV)/dev
	$(BIN)/python -m pytest

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
