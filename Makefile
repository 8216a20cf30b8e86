# `make demo` and `make test` need only Python 3.11-3.13 and make; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
TYPES := build/types

.PHONY: demo test lint types protos golden clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch .venv/ready

demo: .venv/ready  ## serve the shipped model, take an instance away in the middle of a generation, watch it go on
	$(BIN)/python -m spotjax.tools.demo

test: .venv/ready  ## all tests, on two CPU cores without an accelerator
	$(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy sees the packages of the top level where they are installed: as spotjax.models and so on
types: .venv/ready
	rm -rf $(TYPES) && mkdir -p $(TYPES)/spotjax
	ln -s $(CURDIR)/spotjax/* $(CURDIR)/models $(CURDIR)/meshes $(CURDIR)/tools $(TYPES)/spotjax/
	cd $(TYPES) && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p spotjax

protos: .venv/ready  ## regenerate the checked-in gRPC stubs
	$(BIN)/python -m spotjax.tools.generate_protos

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
