# make train   train on CarRacing with the preset that suits this machine
# make test    run the tests
# make lint    check style and types
# make docs    build the documentation as a site, in build/site
# make bench   measure the planner, the update, the environment and whole training

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
BIN     = $(VENV)/bin

# The GPU extra follows from the CUDA version that the driver supports.
CUDA   := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -1)
GPU    := $(if $(filter 12 13,$(CUDA)),cuda$(CUDA))
PRESET ?= $(if $(GPU),paper,cpu)
COMMA  := ,
READY   = $(VENV)/installed-$(subst $(COMMA),-,$(EXTRAS))

.PHONY: train test lint docs bench clean

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

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)$(if $(GPU),$(COMMA)$(GPU))]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
