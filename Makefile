.PHONY: help install style check test test-slow test-all examples build

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

install:  ## editable, with all that the tests need
	pip install -e ".[test]"

style:  ## format and fix
	ruff format . && ruff check --fix .

check:  ## lint and types
	ruff format --check . && ruff check . && mypy

test:  ## the default suite, under 5 minutes on two cores
	OMP_NUM_THREADS=1 pytest

test-slow:  ## what takes longer, or several processes
	OMP_NUM_THREADS=1 pytest --dist loadgroup -m "slow and not gpu"

test-all: test test-slow  ## both

examples:  ## the paper's first task, small and offline
	accelerate launch examples/gptj_length.py

build:  ## wheel and source distribution
	pip wheel --no-deps -w dist .
