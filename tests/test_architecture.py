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
KNOW_TRL = {"training", "cli"}
OUTSIDE = {  # what a room, or a file of one, may import from outside the standard library and this package
    "users": set(),
    "files": {"filelock"},
    "agreement": {"numpy"},
    "preference_rows": set(),
    "intervals": {"numpy", "scipy"},
    "user_models": {"torch", "safetensors", "huggingface_hub"},
    "models.soft_prompt": {"torch"},
    "serving.manifest": set(),
    "training.prefix_sharing": {"torch", "transformers"},
    "data": {"datasets", "numpy"},
    "serving": {"torch", "safetensors", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "vllm"},
}
# rooms on the ground import no room above them; others import what ARROWS says, and those on the ground: arrows run down
GROUND = {
    "_version",
    "agreement",
    "arrays",
    "canvas",
    "files",
    "intervals",
    "preference_rows",
    "terminal",
    "threads",
    "users",
}
ARROWS = {
    "user_column": set(),
    "user_profile": {"user_column"},
    "user_models": set(),
    "data": {"user_column"},
    "audit": {"user_column", "data"},
    "models": {"user_models", "user_profile"},
    "writing": {"models", "user_profile"},
    "serving": set(),
    "engine": {"serving", "writing", "models", "user_models", "user_profile"},
    "exporting": {"serving", "models", "user_models"},
    "training": {"models", "user_models", "user_column", "user_profile"},
    "evaluation": {"audit", "training", "writing", "models", "user_models", "user_column", "user_profile"},
    "removal": {"training", "models", "user_models"},
    "new_users": {"evaluation", "training", "models", "user_models", "user_column"},
    "cli": {
        "audit",
        "new_users",
        "data",
        "evaluation",
        "exporting",
        "removal",
        "training",
        "engine",
        "serving",
        "writing",
        "models",
        "user_models",
        "user_column",
        "user_profile",
    },
}


class MarkdownParser(doctest.DocTestParser):
    """Examples stand in ```python blocks; the fence is no part of the output."""

    def parse(self, string, name="<string>"):
        return super().parse(string.replace("```python", "").replace("```", ""), name)


def module_of(path):
    """`users`, `training.dpo`, ...; a folder's own name for its `__init__.py`, and nothing for the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """The modules of this package that a file imports, and the names of packages outside of it."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(PACKAGE).parts[:-1]
            base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            target = ".".join(filter(None, base))
            for alias in node.names:  # a name may be a module, or come from the package itself
                name = f"{target}.{alias.name}".strip(".")
                home = next((module for module, names in PUBLIC.items() if alias.name in names), None)
                inside.add(name if name in FILE_OF else target or home or "_version")
    return inside - {module_of(path)}, outside - set(sys.stdlib_module_names) - {"__future__"}


PUBLIC = trl_personal._MODULES
FILE_OF = {module_of(path): path for path in FILES}
ARROWS_OF_FILES = {module: imports_of(path) for module, path in FILE_OF.items() if module}


@pytest.mark.parametrize("module", ARROWS_OF_FILES)
def test_arrows_run_down(module):
    room = module.split(".")[0]
    assert room in ARROWS or room in GROUND
    others = {name.split(".")[0] for name in ARROWS_OF_FILES[module][0]} - {room}
    assert others <= ARROWS.get(room, set()) | GROUND


@pytest.mark.parametrize("module", ARROWS_OF_FILES)
def test_a_room_knows_what_it_needs_only(module):
    outside = ARROWS_OF_FILES[module][1]
    room = module.split(".")[0]
    assert room in KNOW_TRL or "trl" not in outside
    for name in {room, module} & OUTSIDE.keys():
        assert outside <= OUTSIDE[name]


def test_there_is_no_circle_in_the_house():
    """Neither of files nor of rooms; imports in functions, and those for type checkers alone, count too."""
    files = {module: inside for module, (inside, _) in ARROWS_OF_FILES.items()}
    rooms = {}
    for module, inside in files.items():
        room = module.split(".")[0]
        rooms[room] = rooms.get(room, set()) | {name.split(".")[0] for name in inside} - {room}
    for arrows in (files, rooms):
        graphlib.TopologicalSorter(arrows).prepare()  # raises `CycleError` with the names of a circle


def test_no_file_has_outgrown_its_room():
    lines = {module_of(path) or "__init__": len(path.read_text().splitlines()) for path in FILES}
    assert max(lines.values()) <= 600
    assert max(lines[f"training.{name}"] for name in ("mixin", "dpo", "checkpoints")) <= 350
    assert len([path for path in FILES if path.parent == PACKAGE]) <= 16


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
