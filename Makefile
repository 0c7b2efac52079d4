# Each target does all of its own set-up and may be repeated at no cost.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs-check torture install

demo: install
	@test -f runs/demo/model/model.safetensors || $(BIN)/minigpt train --recipe demo --output_dir runs/demo
	$(BIN)/minigpt generate runs/demo/model --prompt "def __init__(self" --max_new_tokens 150 --seed 1

test: install
	$(BIN)/python -m pytest -n 2

# A hundred real kills in one training, most of them inside a save; the end is compared bit for bit.
torture: install
	$(BIN)/python scripts/torture.py --kills 100

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
