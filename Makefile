# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-kafka lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m jobs.demo $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread: where other processes are busy, several of PyTorch's wait for each other most of the time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest $(ARGS)

test-kafka: $(VENV)/.installed
	$(BIN)/pytest --apache-kafka -m kafka $(ARGS)

clean:
	rm -rf $(VENV) var
