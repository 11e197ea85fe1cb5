# Each target makes the environment it needs: .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-all compatibility benchmark lint clean

demo: $(STAMP)
	$(RUN) recipes/digits_cnn.py

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

compatibility: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) tests/compatibility.py -n 2

benchmark: $(STAMP)
	$(RUN) benchmarks/qat_step.py

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[export,hydra,recipes,dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis
