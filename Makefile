# make train       train on CarRacing with the preset that suits this machine
# make test        run the tests
# make lint        check style and types
# make docs        build the documentation as a site, in build/site
# make bench       measure the planner, the update, the environment and whole training
# make figures     the paper's figures and table from the agents in the box and their decoders, as
#                  one page: within an hour on two cores; OPTIONS='--quick --out build/quick'
#                  for a trial in minutes
# make reproduce   the same from nothing: trains both agents before, a few hours more

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
BIN     = $(VENV)/bin

# The GPU extra follows from the CUDA version that the driver supports.
CUDA   := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -1)
GPU    := $(if $(filter 12 13,$(CUDA)),cuda$(CUDA))
PRESET ?= $(if $(GPU),paper,cpu)
ONE     = $(if $(GPU),--cores 1)  # two processes do not share a GPU's memory
OPTIONS ?=
COMMA  := ,
READY   = $(VENV)/installed-$(subst $(COMMA),-,$(EXTRAS))

.PHONY: train test lint docs bench figures reproduce clean

train: $(READY)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(BIN)/python -m valdi_jax.train --env carracing --preset $(PRESET)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -d build/site

bench: $(READY)
	$(BIN)/python benchmarks/planner_hz.py
	$(BIN)/python benchmarks/update_hz.py
	$(BIN)/python benchmarks/env_hz.py
	$(BIN)/python benchmarks/train_throughput.py

figures: $(READY)
	$(BIN)/python experiments/reproduce.py --out build/figures $(ONE) $(OPTIONS)

reproduce: $(READY)
	$(BIN)/python experiments/reproduce.py --train --preset $(PRESET) --out runs/reproduce $(ONE) $(OPTIONS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)$(if $(GPU),$(COMMA)$(GPU))]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
