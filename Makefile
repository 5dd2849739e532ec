PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test test-checked test-unchecked test-slow lint bench clean

demo: .venv/demo
	$(BIN)/falign demo

test: test-checked test-unchecked

test-checked: .venv/installed
	OMP_NUM_THREADS=1 FALIGN_TYPECHECK=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not compiled and not unchecked"

test-unchecked: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "(compiled or unchecked) and not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/sphinx-build --builder html --fail-on-warning --keep-going --jobs 2 --quiet --doctree-dir build/doctrees docs build/site
	@echo the site is build/site/index.html

bench: .venv/installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/measure.py
	$(BIN)/python benchmarks/two_layer.py
	$(BIN)/python benchmarks/linear_theory.py

# What the demo needs alone; the tests' environment is the same one with more in it, so that either may come first.
.venv/demo: pyproject.toml constraints.txt
	@echo "installing PyTorch and what falign[lab] needs into .venv: half a minute and the download; 1.5 GB on disk with"
	@echo "PyTorch for CPUs, several times as much with the libraries of CUDA, which PyTorch for Linux brings by default"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lab]"
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
