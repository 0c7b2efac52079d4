# Each target does all of its own set-up and may be repeated at no cost.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs-check torture compat conformance install

demo: install
	@test -f runs/demo/model/model.safetensors || $(BIN)/minigpt train --recipe demo --output_dir runs/demo
	$(BIN)/minigpt generate runs/demo/model --prompt "def __init__(self" --max_new_tokens 150 --seed 1

test: install
	$(BIN)/python -m pytest -n 2

# A hundred real kills in one training, most of them inside a save; the end is compared bit for bit.
torture: install
	$(BIN)/python scripts/torture.py --kills 100

# A folder as remote code under the oldest and the newest release it promises, each in an environment of its own.
compat: install
	$(BIN)/python scripts/compat.py 5.17.0 5.23.0

# The tests that transformers gives to its own models, from a checkout of theirs: make conformance TRANSFORMERS=PATH
conformance: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt parameterized
	$(BIN)/python scripts/conformance.py $(TRANSFORMERS)

# The commands of the README that take minutes, in a copy, as on a fresh machine.
docs-check:
	@folder=$$(mktemp -d) && git clone --quiet . $$folder && $(MAKE) --directory $$folder demo test && rm -rf $$folder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
