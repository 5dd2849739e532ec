PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test test-checked test-unchecked test-slow lint bench clean

demo: .venv/installed
	$(BIN)/python -m falign.lab.demo runs/demo
	$(BIN)/falign reproduce song2021 --preset quick --workers 2 --out results

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

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
