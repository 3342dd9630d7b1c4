# make quickstart: the whole story on this machine, in minutes.   make test: every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

FUZZ_SECONDS ?= 600
# Processes that share the tests; each takes up to 3 GB.
TEST_WORKERS ?= 2

.PHONY: install quickstart test fuzz check spell types docs containers clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { \
	  echo "pal_ds needs a C++ compiler: DeepSpeed builds its CPU communication at first use. Install g++ (Debian: apt-get install g++) and run make again." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "pal_ds needs Python 3.11 to 3.13; $$($(PYTHON) --version) was found. Name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

quickstart: install
	$(BIN)/python tools/quickstart.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck slurm/*.sh slurm/*.sbatch .ci/run tests/slurm/*.sh tests/artefacts/*.sh

spell: install
	$(BIN)/codespell

# Node.js comes with the requirements; nothing is downloaded here. About three minutes of processor time.
types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

# The manual, into site/: open site/index.html, or look at it while you write with `.venv/bin/mkdocs serve`.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Checked, not built: that needs Docker and a GPU base image.
containers: install
	$(BIN)/hadolint containers/Dockerfile

test: check
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

# Damaged files against every reader, so many seconds for each of the eight (tests/fuzz).
fuzz: install
	$(BIN)/python -m tests.fuzz.fuzz --seconds $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) runs site
