# Every target sets itself up: `make demo` and `make test` work on a fresh clone with Python 3.11 and make.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= tutelage-demo
# More arguments for pip, such as an index with CPU builds of torch.
PIP_ARGS ?=
# Arguments of the training benchmark, such as --models small.
BENCH_ARGS ?=
# Names of the images, and more arguments for docker build.
IMAGES ?= tutelage
DOCKER_ARGS ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c docker/constraints.txt

.PHONY: demo test test-all lint types format bench images clean

demo: $(VENV)/.demo  ## Both pipelines on real human feedback, end to end
	$(BIN)/tutelage demo --output-dir $(OUTPUT)

test: $(VENV)/.dev  ## All tests but those that take long or need Docker
	$(BIN)/python -m pytest -m "not slow and not docker" -n auto --maxprocesses 4 --dist loadfile

test-all: $(VENV)/.dev  ## Every test that can run on this machine
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The two code folders are mapped to tutelage.*; links give the type checker that layout.
types: $(VENV)/.dev
	@mkdir -p .cache/types/tutelage
	@ln -sfn ../../../components .cache/types/tutelage/components
	@ln -sfn ../../../pipelines .cache/types/tutelage/pipelines
	MYPYPATH=.cache/types $(BIN)/mypy --cache-dir .cache/mypy --namespace-packages -p tutelage

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## Measurements; see tests/benchmarks/README.md
	$(BIN)/python tests/benchmarks/data_preparation.py
	$(BIN)/python tests/benchmarks/training.py $(BENCH_ARGS)

images:  ## Both images of the stages; see docker/README.md
	@for target in light train; do \
	  DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target $$target -t $(IMAGES)/$$target:$(VERSION) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) \
	    --build-arg PIP_ARGS="$(PIP_ARGS)" $(DOCKER_ARGS) . || exit; \
	done

clean:
	rm -rf $(VENV) .cache build *.egg-info

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Tutelage needs $(PYTHON): install Python 3.11, or run make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: run make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment can be made: on Debian or Ubuntu, apt-get install python3.11-venv"; exit 1; }

$(VENV)/.demo: $(BIN)/python pyproject.toml docker/constraints.txt
	@echo "Installing into $(VENV) (once; torch is large)"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(INSTALL) -e '.[bench]'
	@touch $@
