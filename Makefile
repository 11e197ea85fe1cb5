# Each target makes the environment it needs: .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := .venv-peers

.PHONY: demo test test-all compatibility benchmark benchmark-peers lint clean

demo: $(STAMP)
	$(RUN) recipes/digits_cnn.py

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

compatibility: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) tests/compatibility.py -n 2

# Print the tables, and write them into benchmarks/RESULTS.md and docs/performance.md.
benchmark: $(STAMP)
	$(RUN) benchmarks/qat_step.py --write
	$(RUN) benchmarks/scaling.py --write
	$(RUN) benchmarks/set_up.py --write
	$(RUN) benchmarks/accuracy.py --write
	$(RUN) benchmarks/profile_step.py --write

# The other tools need an environment of their own; a quarter of an hour. What was measured before a break is kept.
benchmark-peers:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-peers.txt
	$(PEERS)/bin/python benchmarks/peers.py --write --resume

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[export,hydra,recipes,dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis
