# Everything a developer, an operator trying it out, and CI run. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/keyturn/v1/*.proto)
ARGS   ?=
WORKERS ?= auto

GRPCURL := github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3

# The clients that are not Python, and the program that each is built by.
CLIENTS := go:go typescript:npm java:mvn rust:cargo
# $(call in_clients,TARGET): that target of each whose toolchain is here. A missing one is said; in CI it is a failure.
define in_clients
@for each in $(CLIENTS); do \
  client=$${each%%:*}; tool=$${each##*:}; \
  if command -v $$tool > /dev/null; then \
    $(MAKE) --no-print-directory --directory clients/$$client $(1) || exit 1; \
  elif [ "$$CI" = true ]; then \
    echo "clients/$$client: there is no $$tool on PATH" >&2; exit 1; \
  else \
    echo "clients/$$client: skipped, there is no $$tool on PATH"; \
  fi; \
done
endef

.DEFAULT_GOAL := help
.PHONY: help setup tools clients conformance protos demo serve test test-faults check fmt bench bench-simulate bench-size bench-workers clean release-protos schema

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

clients: ## build the clients in Go, TypeScript, Java and Rust, where their toolchains are
	$(call in_clients,build)

protos: setup ## generate the Python stubs again
	$(BIN)/python protos/generate.py

demo: setup ## show the main job on an embedded PostgreSQL (ARGS=--once: show it and stop)
	@$(BIN)/keyturn demo $(ARGS)

serve: setup ## run the sidecar (ARGS='--embedded DIR …')
	@$(BIN)/keyturn serve $(ARGS)

test: setup $(if $(shell command -v go 2> /dev/null),tools) ## run every test, of every client too (ARGS='-k name' to choose, WORKERS=0 for one process)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

test-faults: setup ## run the fault suite, short as in `make test` (ARGS=--faults-long: its long form)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) tests/faults $(ARGS)

conformance: setup ## run the scenarios with every client, and write the table in clients/README.md
	CI=true $(BIN)/python -m pytest --numprocesses $(WORKERS) tests/conformance/test_conformance.py
	$(BIN)/python -m tests.conformance.table

check: setup ## lint, types, import contracts, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against protos/released.json
	$(call in_clients,check)

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

bench-size: setup ## measure 1,000 users against 1,000,000; some minutes (ARGS='--users 100000 …')
	$(BIN)/python -m tests.bench.size $(ARGS)

bench-workers: setup ## measure one process against several (ARGS='--workers 4')
	$(BIN)/python -m tests.bench.workers $(ARGS)

clean: ## remove what the tasks made
	rm -rf $(VENV) .tools .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f clients/python/keyturn/v1/*_pb2* .conformance.json
	$(call in_clients,clean)
