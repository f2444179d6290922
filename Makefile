# make demo: train and compare X-Former and the Q-Former (BLIP-2) on this machine; make test, make lint: what CI runs.
# Each sets up .venv by itself. PYTHON=python3.12 make … picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin
# Two threads of one process collapse on a small machine; the demo runs two processes of one thread side by side.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-transformers lint docs bench bench-peers clean

demo: .venv/demo.stamp
	$(BIN)/xformer demo

test: .venv/dev.stamp
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: .venv/dev.stamp
	$(BIN)/pytest -m slow

# transformers' own tests of models, which come with its source distribution; their markers are not ours.
TRANSFORMERS_TESTS := .cache/transformers-tests

test-transformers: $(TRANSFORMERS_TESTS)
	$(BIN)/pytest -n 2 --dist worksteal -q -o addopts= -p no:warnings tests/transformers_common.py

$(TRANSFORMERS_TESTS): .venv/dev.stamp
	rm -rf .cache/sdist $@
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		-c constraints.txt -d .cache/sdist transformers
	mkdir -p $@.partial
	tar -xzf .cache/sdist/transformers-*.tar.gz -C $@.partial --strip-components=1 --wildcards '*/tests'
	touch $@.partial/tests/__init__.py
	mv $@.partial $@

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/demo.stamp
	$(BIN)/python benchmarks/step.py

# LAVIS needs packages of 2023, in an environment of its own. Its other requirements are not used (benchmarks/lavis_stage1.py).
PEERS := .cache/peers

bench-peers: .venv/demo.stamp $(PEERS)/stamp
	$(BIN)/python benchmarks/peers.py --python $(PEERS)/bin/python
	$(BIN)/python benchmarks/generate.py

$(PEERS)/stamp: | .venv/bin/python
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.13.0 transformers==4.26.1 tokenizers==0.13.3 numpy==1.26.4
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps salesforce-lavis==1.0.2
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "xformer-mllm needs Python 3.11 or newer: PYTHON=python3.12 make …"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,serve,easy-vqa,gguf,lora,dev,docs]'
	@touch $@ .venv/demo.stamp

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
