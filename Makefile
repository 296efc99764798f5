# Every target makes the environment itself if need be. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
KSERVE := .venv-kserve
READY  := $(VENV)/.ready

CONFIG ?= training/configs/digits.toml
RUN    ?= runs/digits
BUNDLE ?= models/digits/1
MODELS ?= models
PORT   ?= 8000
ARGS   ?=

# onnxruntime-gpu where an NVIDIA driver is present, else its CPU twin.
RUNTIME := $(shell if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)

.PHONY: help install demo train compare evaluate export verify serve test kserve lint type format openapi settings config-page proto figures bench-family bench rehearse clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY) ## make .venv with pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(RUNTIME),train,data,export,grpc,dev]'
	@touch $@

demo: $(READY) ## train, export, serve and ask, on real digits; ONCE=1 exits instead of serving on
	$(BIN)/python -m benchmarks.demo --port $(PORT) $(if $(ONCE),--once)

train: $(READY) ## train a family (CONFIG=..., RUN=..., ARGS=...)
	$(BIN)/hbll train --config $(CONFIG) --out $(RUN) $(ARGS)

compare: $(READY) ## compare all training methods (CONFIG=..., ARGS=--seeds 0 ...)
	$(BIN)/hbll compare --config $(CONFIG) $(ARGS)

evaluate: $(READY) ## score every path of RUN
	$(BIN)/hbll evaluate $(RUN) $(ARGS)

export: $(READY) ## write RUN as BUNDLE
	$(BIN)/hbll export $(RUN) $(BUNDLE) $(ARGS)

verify: $(READY) ## check BUNDLE against RUN
	$(BIN)/hbll verify $(BUNDLE) --checkpoint $(RUN) $(ARGS)

serve: $(READY) ## serve MODELS on PORT
	$(BIN)/hbll serve $(MODELS) --port $(PORT) $(ARGS)

test: $(READY) ## run all tests, in as many processes as cores, four at most
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(ARGS)

kserve: $(READY) $(KSERVE)/.ready ## let KServe's own clients, in an environment of theirs, ask a server of MODELS
	$(KSERVE)/bin/python tests/e2e/kserve_client.py $(BIN)/python $(MODELS)

$(KSERVE)/.ready: tests/e2e/kserve_constraints.txt
	$(PYTHON) -m venv $(KSERVE)
	$(KSERVE)/bin/python -m pip install --disable-pip-version-check -q -c $< kserve
	@touch $@

lint: $(READY) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(READY) ## mypy, strict
	$(BIN)/mypy
	$(BIN)/mypy docker/rehearse.py

format: $(READY) ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: $(READY) ## write openapi.yaml from the app
	$(BIN)/python -m service.openapi openapi.yaml

settings: $(READY) ## write the table of docs/settings.md from the settings
	$(BIN)/python -m service.settings_page docs/settings.md

config-page: $(READY) ## write the tables of docs/config.md from the configuration
	$(BIN)/python -m training.config_page docs/config.md

bench-family: runs/bench-models/bench/1/manifest.json ## train and export the family of the benchmarks, once: 8 minutes

runs/bench-models/bench/1/manifest.json: | $(READY)
	$(BIN)/hbll train --config training/configs/bench.toml --out runs/bench
	$(BIN)/hbll export runs/bench runs/bench-models/bench/1

bench: bench-family ## compare policies in the simulator and on real servers; wants a quiet machine (ARGS=--seeds 1 ...)
	$(BIN)/hbll simulate --out docs/bench
	$(BIN)/hbll bench --out docs/bench $(ARGS)

proto: $(READY) ## write the stubs of gRPC from their proto
	$(BIN)/python -m service.oip.rpc.generate

figures: $(READY) ## draw the pictures of the README from RUN and BUNDLE
	$(BIN)/python -m benchmarks.figures $(RUN) $(BUNDLE)

rehearse: $(READY) ## build and run what docker/Dockerfile says, serving MODELS, without a container engine
	$(BIN)/python docker/rehearse.py $(MODELS)

clean: ## remove the environment and caches, keep runs and models
	rm -rf $(VENV) $(KSERVE) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
