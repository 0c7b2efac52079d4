# Each target installs what it needs; repeated calls skip what is already installed.
PYTHON ?= python3
BIN := .venv/bin
SAMPLE ?= 100
SEED ?= 0

.PHONY: demo test test-slow browser-test lint docs-check site release torture cluster compat conformance mutants neighbours \
	neighbours-quick install

demo: install
	@test -f runs/demo/model/model.safetensors || $(BIN)/minigpt train --recipe demo --output_dir runs/demo
	$(BIN)/minigpt generate runs/demo/model --prompt "def __init__(self" --max_new_tokens 150 --seed 1
	@test -f runs/demo/demo.html || { $(BIN)/minigpt export runs/demo/model --to html --output_dir runs/demo/page \
		&& mv runs/demo/page/demo.html runs/demo && rmdir runs/demo/page; }
	@echo "open runs/demo/demo.html in a browser to generate text and to look inside the model"

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Longer tests: several processes, concurrent caches, compilation, killed processes, the commands of the README, notebooks.
test-slow: .venv/slow
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The exported page under node, and in headless Chromium (installed by apt if missing) that page, from a file and from a
# Space, and the page of `minigpt chat --web`.
browser-test: install
	@command -v chromium >/dev/null || { apt-get update && apt-get install --yes chromium nodejs; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser,web]'
	$(BIN)/python -m pytest tests/export/test_html.py tests/export/test_html_browser.py tests/publish/test_space_browser.py \
		tests/test_chat_web.py

# Kill a training run 100 times, mostly during a save, and compare the final state bit for bit with an uninterrupted run.
torture: install
	$(BIN)/python scripts/torture.py --kills 100

# Train with DDP and FSDP2 on several processes, interrupt and resume the runs, and compare them with one process.
cluster: install
	$(BIN)/python scripts/cluster.py

# Load a model folder as remote code with the oldest and the newest supported release, each in a separate environment.
compat: install
	$(BIN)/python scripts/compat.py 5.17.0 5.23.0

# Run transformers' own model tests, from a checkout of transformers: make conformance TRANSFORMERS=PATH
conformance: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt parameterized
	$(BIN)/python scripts/conformance.py $(TRANSFORMERS)

# Mutation testing on a random sample of mutants: make mutants SAMPLE=100 SEED=0
mutants: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python scripts/mutants.py --sample $(SAMPLE) --seed $(SEED)

# Test a trained model folder with third-party programs. The environments and the folder are stored in .neighbours/.
neighbours: .neighbours/venv/installed .neighbours/vllm/installed .neighbours/npm/installed
	@command -v chromium >/dev/null || { apt-get update && apt-get install --yes chromium; }
	@command -v slurmctld >/dev/null || { apt-get update && apt-get install --yes slurmctld slurmd slurm-client munge; }
	.neighbours/venv/bin/python -m pytest tests/neighbours

# The subset of these tests that needs only .venv.
neighbours-quick: install
	$(BIN)/python -m pytest tests/neighbours/test_pipeline.py tests/neighbours/test_peft.py tests/neighbours/test_launch.py

# The commands of the README that take minutes, in a fresh clone.
docs-check:
	@folder=$$(mktemp -d) && git clone --quiet . $$folder && $(MAKE) --directory $$folder demo test && rm -rf $$folder

# The documentation site, in site/.
site: .venv/slow
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Build sdist and wheel in dist/, check them, and install each in a new environment of every supported Python on this machine.
release: .venv/slow
	$(BIN)/python scripts/release.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/slow: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,release,site]'
	@touch $@

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

.neighbours/npm/installed: tests/neighbours/package.json
	mkdir -p .neighbours/npm && cp tests/neighbours/package.json .neighbours/npm
	npm install --prefix .neighbours/npm --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# The CUDA builds of torchvision, torchaudio and torchcodec fail to import with a CPU build of torch, and are not needed.
.neighbours/vllm/installed: tests/neighbours/requirements-vllm.txt
	$(PYTHON) -m venv .neighbours/vllm
	.neighbours/vllm/bin/python -m pip install --quiet --requirement tests/neighbours/requirements-vllm.txt
	.neighbours/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
