"""What README.md and docs/ say: their Python runs, their links lead somewhere, their commands exist."""

import re
import shlex
from pathlib import Path

import pytest

import config
import main

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in sorted(PAGES.items())}
BLOCKS = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# So that the pages run in seconds; a rate that is given saves a range test.
SMALLER = {"width=16": "width=2", "epochs=2": "epochs=1", "val_split=0.1": "val_split=0.1, lr=0.01"}
EXTRAS = ("lightning", "onnx", "onnxscript", "onnxruntime")
PLACEHOLDERS = {"RULE", "NAME"}


def python_of(text):
    """The Python of a page as one program, each block on the lines where it stands."""
    program = ["\n"] * len(text.splitlines())
    for block in BLOCKS.finditer(text):
        first = text.count("\n", 0, block.start(1))
        lines = block[1].splitlines(keepends=True)
        program[first : first + len(lines)] = lines
    return "".join(program)


def commands_of(text):
    """Every line `python main.py ...` of a page's blocks, as words."""
    for block in SHELL.finditer(text):
        for line in block[1].splitlines():
            if line.startswith("python main.py"):
                yield shlex.split(line, comments=True)[2:]


def anchors_of(text):
    """The names by which GitHub links to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.slow
# Of Lightning and of PyTorch's exporter themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if BLOCKS.search(text)])
def test_the_python_of_a_page_runs_as_it_stands(name, tmp_path, monkeypatch):
    program = python_of(TEXTS[name])
    for package in EXTRAS:
        if f"import {package}" in program or f"from {package}" in program:
            pytest.importorskip(package)
    for usual, small in SMALLER.items():
        program = program.replace(usual, small)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, name, "exec"), {"__name__": "page"})


def test_the_readme_is_short_and_shows_python():
    assert len(TEXTS["README.md"].splitlines()) <= 180
    assert BLOCKS.search(TEXTS["README.md"])


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_within_the_repository_leads_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", TEXTS[name])
    for link in filter(None, (first or second for first, second in links)):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        path = (PAGES[name].parent / file).resolve() if file else PAGES[name]
        assert path.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors_of(path.read_text(encoding="utf-8")), f"{name} links to {link}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_of_a_page_has_a_name_and_flags_that_exist(name):
    for words in commands_of(TEXTS[name]):
        if words and not words[0].startswith("-"):
            assert words[0] in main.COMMANDS, words
        elif words != ["--help"] and not PLACEHOLDERS & set(words):
            config.parse_config(words)


def test_the_files_of_a_space_ask_for_what_the_repository_asks_for_but_pillow():
    page = TEXTS["docs/space.md"]
    requirements = page.partition("```text\n")[2].partition("```")[0].splitlines()
    ours = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert requirements == [line for line in ours if line and not line.startswith("pillow")]
    version = re.search("^sdk_version: (.*)$", page, re.MULTILINE)[1]
    assert f"gradio=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_a_python_block_keeps_its_line_numbers():
    page = "a\n```python\nx = 1\n```\nb\n```python\ny = 2\n```\n"
    assert [line.strip() for line in python_of(page).split("\n")[2::4]] == ["x = 1", "y = 2"]
