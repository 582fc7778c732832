"""The README: its commands compose, its targets and files exist; the tour of the code is short."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sfumato.compose import CONF, register

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Return the commands in the README's code blocks, split into words."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S)
    text = "".join(blocks).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if line.startswith(("sfumato ", "torchrun ", "make "))
    ]


def settings_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the Sfumato command of a line, and its settings."""
    start = max(words.index(word) for word in ("sfumato",) if word in words)
    return words[start + 1], [word for word in words[start + 2 :] if "=" in word]


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize(
    "words",
    [c for c in commands() if {"train", "sample", "evaluate"} & set(c)],
    ids=" ".join,
)
def test_settings_of_every_command_compose(words: list[str]) -> None:
    command, overrides = settings_of(words)
    register(command)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(command, overrides)
    assert composed


def test_files_that_the_readme_links_exist() -> None:
    links = re.findall(r"\]\(([^)h][^)]*)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def lines_to_read(stop: str) -> int:
    """Return the lines of the file that a stop of the tour links, or of the functions it names."""
    links = re.findall(r"\]\((.+?)\)", stop)
    assert len(links) == 1, stop
    text = (ROOT / links[0]).read_text(encoding="utf-8")
    functions = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    named = re.findall(r"`(\w+)`", stop.partition(". ")[2].partition("](")[0])
    return sum(functions[name] for name in named) if named else len(text.splitlines())


def test_the_tour_of_the_code_is_under_700_lines() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tour = page.partition("## A tour of the code")[2].partition("\n\nFrom there")[0]
    stops = re.findall(r"^\d\. .+(?:\n   .+)*", tour, flags=re.M)
    assert len(stops) == 5
    assert "under 700 lines" in tour
    assert sum(map(lines_to_read, stops)) < 700


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w.]+\.md)", index)) == pages
