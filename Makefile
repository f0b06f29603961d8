# Everything on a bare machine: Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test bench lint format docs clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[examples]' --group dev
	@touch $(STAMP)

demo: setup  ## train on digits, print the comparisons, write the pictures
	$(BIN)/python examples/harmonize.py
	$(BIN)/python examples/domain_adaptation.py
	$(BIN)/python examples/spikes.py
	$(BIN)/python examples/gradient_flow.py
	$(BIN)/python examples/batch_norm.py

test: setup  ## the whole suite, doctests included
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup  ## ratios against what one would use instead
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/backward.py
	$(BIN)/python benchmarks/clipping.py
	$(BIN)/python benchmarks/batch_norm.py
	$(BIN)/python benchmarks/flow.py
	$(BIN)/python benchmarks/compile_time.py

lint: setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## the site, in docs/_build/html; a warning is an error
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python -m sphinx -W -n --keep-going --quiet -b html \
	  -a -E -d docs/_build/doctrees docs docs/_build/html

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .hypothesis .ruff_cache
