# `make serve` and `make test` need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: serve test check bench differential install clean

serve: $(STAMP)
	@exec $(BIN)/python -m dynserve up $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(ARGS)

differential: $(STAMP)
	DIFFERENTIAL_STREAMS=100000 $(BIN)/python -m pytest tests/security/test_framing.py -k h11 -s $(ARGS)

install: $(STAMP)

$(STAMP): pyproject.toml docker/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dynserve needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c docker/constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c docker/constraints.txt -e '.[torch,nixl,local,bench,test]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
