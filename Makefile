# Each goal does all set-up by itself: a virtual environment in .venv with everything installed.
# Needed beforehand: Python 3.11 or newer, and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed.stamp
DEMO   ?= run --backbone random:timm:resnet18 --task voc --protocol smoke --demo --out runs/demo
CHECKED = $(foreach d,evalsuite pretrain plugins benchmarks,$(if $(shell find $(d) -name '*.py' 2>/dev/null),$(d)))

.PHONY: demo test test-portable fuzz lint bench install

demo: install
	$(BIN)/evalsuite $(DEMO)

# Two workers of one thread each: the tests are many small jobs, and torch threads would only get in their way.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# What is computed, once more as on a processor without vector instructions: no number may depend on the machine.
NUMERIC = tests/parity tests/pretrain/test_golden.py tests/pretrain/test_blocks.py tests/pretrain/test_methods.py tests/plugins \
    tests/evalsuite/metrics tests/evalsuite/test_backbone.py tests/evalsuite/probes/test_probes.py tests/evalsuite/test_statistics.py \
    tests/evalsuite/test_resize.py tests/evalsuite/test_positions.py tests/evalsuite/probing/test_heads.py \
    tests/evalsuite/checkpoints/test_networks.py tests/evalsuite/engines/test_native.py

test-portable: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/portable.py --run -m pytest -n 2 --dist worksteal $(NUMERIC) $(ARGS)

# Files of strangers, mutated: 10,000 pickles, 10,000 headers, 2,000 results, new ones every time; and runs that are killed at every write
# and at random moments. `make test` holds a few, always the same.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz tests/test_killed.py --hypothesis-profile=fuzz --timeout=0 $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict $(CHECKED)

bench: install
	$(BIN)/python -m benchmarks $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than 3.11; point to a newer one: make PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV) (some gigabytes, some minutes; once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
