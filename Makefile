.PHONY: help install install-lowest install-main lowest style check test test-slow test-all examples build wheel-check

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

install:  ## editable, with all that the tests need, in the newest versions that setup.cfg allows
	pip install -e ".[test]"

install-lowest:  ## the same in the lowest versions that setup.cfg allows
	pip install -e ".[test]" $(shell $(MAKE) -s lowest)

install-main:  ## the same, then TRL, transformers, PEFT and accelerate from their main branches
	pip install -e ".[test]" && pip install $(foreach name,trl transformers peft accelerate,git+https://github.com/huggingface/$(name))

lowest:  ## print the lowest versions that setup.cfg allows
	@sed -nE 's/^    ([a-z_]+)>=([0-9.]+).*/\1==\2/p' setup.cfg | sort -u

style:  ## format and fix
	ruff format . && ruff check --fix .

check:  ## lint, types and spelling
	ruff format --check . && ruff check . && mypy && typos

test:  ## the default suite, under 5 minutes on two cores
	OMP_NUM_THREADS=1 pytest

test-slow:  ## what takes longer, or several processes
	OMP_NUM_THREADS=1 pytest --dist worksteal -m "slow and not gpu"

test-all: test test-slow  ## both

examples:  ## the paper's first task, small and offline
	accelerate launch examples/gptj_length.py

build:  ## the wheel, in dist/
	rm -rf build dist && pip wheel --no-deps -w dist . && rm -rf build

wheel-check: build  ## the wheel alone in a clean environment: every module imports, the README's example runs
	bash .ci/wheel_check dist/*.whl $(VENV)
