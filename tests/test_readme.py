"""What the README and the documentation show is what is there. `make wheel-check` runs the README's first two blocks."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

import trl_personal
import trl_personal.data


PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_own_user_model_in_the_readme_is_the_examples():
    block = next(block for block in blocks(PAGES["README.md"], "python") if "register_user_model" in block)
    example = (ROOT / "examples/own_user_model.py").read_text().split('"""', 2)[2]
    assert block.strip() == example.strip()
    assert len(example.strip().splitlines()) < 30


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page):
    for block in blocks(PAGES[page], "python"):
        compile(block, page, "exec")


def test_files_listed_in_the_readme_are_those_of_the_package():
    listed = set(re.findall(r"[a-z_]+\.py", blocks(PAGES["README.md"], "text")[-1]))
    assert listed == {path.name for path in Path(trl_personal.__file__).parent.glob("[a-z]*.py")}


def test_every_public_name_is_documented_outside_the_code():
    text = "\n".join(PAGES.values())
    missing = [
        name for name in [*trl_personal.__all__, *trl_personal.data.__all__] if name not in text and name[0] != "_"
    ]
    assert not missing


def test_links_between_pages_lead_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{page}: {target}"
