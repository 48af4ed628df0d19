# Everything a developer, an operator trying it out, and CI run. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/keyturn/v1/*.proto)
ARGS   ?=

GRPCURL := github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3

.DEFAULT_GOAL := help
.PHONY: help setup tools protos demo serve test check fmt bench bench-simulate clean release-protos schema

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make the virtual environment with everything in it

$(VENV)/.ready: pyproject.toml protos/generate.py $(PROTOS)
	@$(PYTHON) -c 'import sys; sys.exit("keyturn needs Python 3.11 or newer; this is %s: set PYTHON=" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,embedded]' --group dev
	@touch $@

tools: .tools/$(notdir $(GRPCURL)) ## build grpcurl into .tools/bin; needs Go

.tools/$(notdir $(GRPCURL)):
	@command -v go > /dev/null || { echo "grpcurl is built by Go, and there is no go on PATH" >&2; exit 1; }
	GOBIN="$(CURDIR)/.tools/bin" go install $(GRPCURL)
	@touch $@

protos: setup ## generate the Python stubs again
	$(BIN)/python protos/generate.py

demo: setup ## show the main job on an embedded PostgreSQL (ARGS=--once: show it and stop)
	@$(BIN)/keyturn demo $(ARGS)

serve: setup ## run the sidecar (ARGS='--embedded DIR …')
	@$(BIN)/keyturn serve $(ARGS)

test: setup $(if $(shell command -v go 2> /dev/null),tools) ## run every test (ARGS='-k name' to choose)
	$(BIN)/python -m pytest $(ARGS)

check: setup ## lint, types, import contracts, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against protos/released.json

fmt: setup ## format code and protos
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write protos

schema: setup ## write down what the migrations make, for `keyturn db check`
	$(BIN)/python -m tests.schema

release-protos: setup ## make today's protos the ones that later ones must stay compatible with
	$(BIN)/buf build protos --exclude-source-info --output protos/released.json

bench: setup ## measure against a bare echo, side by side (ARGS='--seconds 10')
	$(BIN)/python -m tests.bench $(ARGS)

bench-simulate: setup ## measure SimulateFlags over a million recorded requests (ARGS='--records 100000')
	$(BIN)/python -m tests.bench.simulate $(ARGS)

clean: ## remove what the tasks made
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f clients/python/keyturn/v1/*_pb2*
