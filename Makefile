# Each target does all of its own set-up and may be repeated at no cost.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install

demo: install
	@test -f runs/demo/model/model.safetensors || $(BIN)/minigpt train --recipe demo --output_dir runs/demo
	$(BIN)/minigpt generate runs/demo/model --prompt "def " --max_new_tokens 200 --seed 1

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
