"""The arrows between the files of the package, and its public names."""

import ast
import doctest
import graphlib
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trl_personal


PACKAGE = Path(trl_personal.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "trl_personal.")]
KNOW_TRL = {"training"}
ALLOWED = {  # imports from outside the standard library and this package
    "users.py": set(),
    "files.py": set(),
    "user_models": {"torch", "safetensors", "huggingface_hub"},
    "data": {"datasets", "numpy"},
}


class MarkdownParser(doctest.DocTestParser):
    """Examples stand in ```python blocks; the fence is no part of the output."""

    def parse(self, string, name="<string>"):
        return super().parse(string.replace("```python", "").replace("```", ""), name)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    outside = {name.split(".")[0] for name in imported(path) if not name.startswith(".")} - set(
        sys.stdlib_module_names
    )
    part = path.relative_to(PACKAGE).parts[0]
    if part in ALLOWED:
        assert outside <= ALLOWED[part]
    if part not in KNOW_TRL | {"cli"}:
        assert "trl" not in outside


def test_no_circle_of_imports():
    """Imports in functions, and those for type checkers alone, count too."""
    modules = {module_of(path): path for path in FILES}
    arrows = {}
    for module, path in modules.items():
        package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
        arrows[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = ".".join(package[: len(package) - node.level + 1] + (node.module or "").split(".")).rstrip(
                    "."
                )
                for alias in node.names:
                    submodule = f"{source}.{alias.name}"
                    arrows[module].add(submodule if submodule in modules else source)
    graphlib.TopologicalSorter(arrows).prepare()  # raises `CycleError` with the modules of a circle


def test_no_grab_bag_modules():
    assert not [path for path in FILES if path.stem in ("utils", "common", "helpers")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_its_examples_hold(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(parser=MarkdownParser(), exclude_empty=True).find(module, name):
        runner.run(test)
    assert runner.failures == 0


def test_public_names_are_documented():
    for name in trl_personal.__all__:
        value = getattr(trl_personal, name)
        if callable(value):
            assert value.__doc__, name


@pytest.mark.slow
def test_names_of_tests_are_the_same_in_every_process():
    """The workers of one run must collect alike: no set in a test's name, or the whole run is refused."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "--collect-only", "-q", str(Path(__file__).parent)]
    collected = set()
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        collected.add("".join(line for line in run.stdout.splitlines() if "::" in line))
    assert len(collected) == 1
    assert collected.pop().count("::") > 1500


def test_package_says_its_version_and_is_typed():
    assert trl_personal.__version__
    assert (PACKAGE / "py.typed").exists()
