# Everything on a bare machine: Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
TORCHJD ?= torchjd[full]==0.18.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-oldest test-newest bench bench-torch bench-reference lint format mutants docs notebooks clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[examples]' --group dev
	@touch $(STAMP)

DEMO := rare_classes detection gradient_flow spikes attention_logits learning_rate batch_norm domain_adaptation many_losses
demo: setup  ## four minutes of comparisons; pictures in examples/output
	@for name in $(DEMO); do echo "== examples/$$name.py" && \
	  $(BIN)/python examples/$$name.py || exit; done
	@echo "Each script has a long version: --full"

test: setup  ## the whole suite, doctests included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# with the lowest and the highest versions that pyproject.toml admits
test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest:  ## PYTHON=python3.13 for the newest of all
	$(PYTHON) -m venv --clear $(VENV)-$@
	$(VENV)-$@/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=$(VENV)-$@ $(VENV)-$@/bin/uv pip install --quiet \
	  --resolution $(RESOLUTION) --editable '.[examples]' --group dev
	$(VENV)-$@/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: setup  ## against what one would use instead; ONLY=clipping, QUICK=1
	$(BIN)/python benchmarks $(if $(QUICK),--quick) --only '$(ONLY)'

# in an environment that has PyTorch and TorchJD; TORCH=torch==... chooses which
bench-torch: RUN := --only torch:
bench-reference: RUN := --save reference
bench-torch bench-reference:  ## against PyTorch; all, as in benchmarks/results
	test -x $(VENV)-torch/bin/python || $(PYTHON) -m venv $(VENV)-torch
	$(VENV)-torch/bin/python -m pip install --quiet --upgrade 'pip>=25.1' $(TORCH) '$(TORCHJD)'
	$(VENV)-torch/bin/python -m pip install --quiet --editable '.[examples]'
	$(VENV)-torch/bin/python benchmarks $(if $(QUICK),--quick) $(RUN)

lint: setup  ## formatting, lint, spelling and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell --dictionary=- --dictionary=docs/american.txt
	$(BIN)/pyrefly check
	$(BIN)/python -m tests.typing

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: setup  ## wrong lines that the tests must notice, one after another
	$(BIN)/python -m tests.mutants

docs: setup  ## the site, in docs/_build/html; a warning is an error. RUN=off: quick
	$(BIN)/python -m pip install --quiet --group docs
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx -W -n --keep-going --quiet -b html \
	  $(if $(RUN),-D nb_execution_mode=$(RUN)) \
	  -a -E -d docs/_build/doctrees docs docs/_build/html

notebooks: setup  ## docs/notebooks for Colab, of docs/guides
	$(BIN)/python docs/notebooks.py

clean:
	rm -rf $(VENV) $(VENV)-* docs/_build docs/api/generated .jax_cache .pytest_cache .hypothesis .ruff_cache
