# Each target does all of its own set-up and may be repeated at no cost.
PYTHON ?= python3
BIN := .venv/bin
SAMPLE ?= 100
SEED ?= 0

.PHONY: demo test lint docs-check torture compat conformance mutants neighbours neighbours-quick install

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

# Change the code at random spots, and see whether the tests that reach them notice: make mutants SAMPLE=100 SEED=0
mutants: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python scripts/mutants.py --sample $(SAMPLE) --seed $(SEED)

# Other people's programs, run for real on a folder trained here. Environments and folder are kept in .neighbours/.
neighbours: .neighbours/venv/installed .neighbours/vllm/installed
	.neighbours/venv/bin/python -m pytest tests/neighbours

# Those of them that need nothing beyond .venv.
neighbours-quick: install
	$(BIN)/python -m pytest tests/neighbours/test_pipeline.py tests/neighbours/test_peft.py tests/neighbours/test_launch.py

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

EXTRAS = $(shell $(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'], sep=',')")

.neighbours/venv/installed: pyproject.toml constraints.txt tests/neighbours/requirements.txt
	$(PYTHON) -m venv .neighbours/venv
	.neighbours/venv/bin/python -m pip install --quiet --constraint constraints.txt \
		--requirement tests/neighbours/requirements.txt --editable '.[$(EXTRAS)]'
	DS_BUILD_OPS=0 .neighbours/venv/bin/python -m pip install --quiet --no-deps --no-build-isolation deepspeed==0.19.8
	@touch $@

# torchvision and its like are for pictures and sound; those that fit a CUDA torch break a CPU one.
.neighbours/vllm/installed: tests/neighbours/requirements-vllm.txt
	$(PYTHON) -m venv .neighbours/vllm
	.neighbours/vllm/bin/python -m pip install --quiet --requirement tests/neighbours/requirements-vllm.txt
	.neighbours/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
