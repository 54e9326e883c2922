# `make demo` and `make test` set everything up on a fresh machine; after that they start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WILD := .venv-wild
READY := $(VENV)/ready

.PHONY: demo test lint bench large docs tables zoo wild accuracy random budgets real clean

demo: $(READY)  ## shrink ResNet-50 and prove it, then look at two photographs
	$(BIN)/python docs/demo.py

test: $(READY)  ## all tests but the long ones, or those of TESTS="tests/surgery tests/plugin/test_plugins.py"
	$(BIN)/pytest $(TESTS)

lint: $(READY)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy prunekit_core/src prunekit_algos/src

bench: $(READY)  ## speed, side by side with torch-pruning, and memory
	@mkdir -p build
	$(BIN)/pytest benches/speed -o python_files='prune.py fpgm.py nisp.py evidence.py memory.py' --benchmark-json=build/bench.json
	$(BIN)/python benches/shared/pages.py build/bench.json
	$(BIN)/python benches/speed/memory.py

large: $(READY)  ## time and memory of reading language models without their weights, and docs/large.md
	$(BIN)/python benches/studies/large.py

docs: $(READY)  ## the manual, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tables: $(READY)  ## the README's table of algorithms, and docs/algorithms.md
	$(BIN)/python docs/tables.py

zoo: $(READY)  ## hours: prune and verify every model of the zoo, torch-pruning too, and write docs/zoo.md
	$(BIN)/python benches/studies/zoo.py
	$(BIN)/python benches/studies/zoo.py --peer

wild: $(WILD)/ready  ## an hour: two hundred models of some forty packages that the zoo does not have, and docs/wild.md
	$(WILD)/bin/python benches/studies/wild.py
	$(WILD)/bin/python benches/studies/wild.py --peer

accuracy: $(READY)  ## an hour or two: every algorithm on a small ResNet trained on Fashion-MNIST, before and after an epoch; docs/accuracy.md
	$(BIN)/python benches/studies/accuracy.py

random: $(READY)  ## half an hour: prune and verify ten thousand random networks, and write docs/random.md
	$(BIN)/python benches/studies/random_networks.py

budgets: $(READY)  ## a quarter of an hour on a quiet machine: budgets met by six models, and docs/budgets.md
	$(BIN)/python benches/studies/budgets.py

real: $(READY)  ## ten minutes on a quiet machine: two models with their real weights, pruned, and docs/real.md
	$(BIN)/python benches/studies/real.py

clean:
	rm -rf $(VENV) $(WILD) build dist site

# A new or changed requirement makes this stale; an editable install follows the sources by itself.
$(READY): requirements-dev.txt prunekit_core/pyproject.toml prunekit_algos/pyproject.toml
	@echo "Setting up $(VENV): PyTorch is large, this takes some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(WILD)/ready: requirements-dev.txt benches/wild-packages.txt
	$(PYTHON) -m venv $(WILD)
	$(WILD)/bin/pip install -qq --disable-pip-version-check -r requirements-dev.txt
	$(WILD)/bin/pip install -qq --disable-pip-version-check --no-deps -r benches/wild-packages.txt
	@touch $@
