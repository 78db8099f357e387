"""Documents: links lead somewhere, commands can be given, every table has one place."""

from __future__ import annotations

import dataclasses
import re
import shlex
from importlib.util import find_spec

import pytest

from dssolver_search.cli import COMMANDS, named
from dssolver_search.settings import parse
from tests import documents

ROOT = documents.ROOT
DOCUMENTS = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for folder in (".", "hub_cards", "search", "search/demo", "search/docs", "tests/data", "tests/pipelines")
    for file in sorted((ROOT / folder).glob("*.md"))
}
SCRIPTS = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "search" / "demo").glob("*.py"))
OF_OTHERS = {"multi_gpu", "num_processes", "num_cpu_threads_per_process"} | set(re.findall(r'"--(\w+)"', SCRIPTS))
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", DOCUMENTS[name]):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def commands(text: str) -> list[list[str]]:
    """Words after `-m dssolver_search` of every command on lines of its own; "..." stands for anything."""
    lines = re.findall(r"^(?:    |[a-z]).*-m dssolver_search (.*)$", text.replace("\\\n", " "), flags=re.M)
    return [shlex.split(line, comments=True) for line in lines if "..." not in line and "`" not in line]


@every_document
def test_commands_can_be_given(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = DOCUMENTS[name]
    for words in commands(text):
        parse(named(COMMANDS[words[0]][0]), words[1:], words[0])
    settings = [named(config) for config, _ in COMMANDS.values()]
    known = OF_OTHERS | {field.name for config in settings for field in dataclasses.fields(config)}
    assert set(re.findall(r"--(\w+_\w+)", text)) <= known
    for module in re.findall(r"-m\s+((?:tests|dssolver_search)\.[\w.]*\w)", text):
        assert find_spec(module), module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in makefile, target


def test_the_front_page_of_the_search_is_short_and_has_every_command():
    text = DOCUMENTS["search/README.md"]
    assert len(text.splitlines()) <= 200
    assert COMMANDS.keys() - {words[0] for words in commands(text)} == {"cards"}  # in hub_cards/README.md


def test_every_table_has_one_place():
    documents.check(documents.FILES)
    assert documents.FILES.keys() == documents.MAKERS.keys()
    marked = [mark for file in DOCUMENTS for mark in re.findall(r"<!-- (\S+) -->", DOCUMENTS[file])]
    of_their_own = ["solvers"] * 2  # of README.md and hub_cards/README.md
    assert sorted(marked) == sorted(slash + name for name in [*documents.FILES, *of_their_own] for slash in ("", "/"))


def test_a_table_is_put_into_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    file = tmp_path / documents.FILES["steps"]
    file.parent.mkdir(parents=True)
    file.write_text("before\n<!-- steps -->\nold\n<!-- /steps -->\nafter\n")
    monkeypatch.setitem(documents.MAKERS, "steps", lambda: "a\n\nb\n")
    documents.main(["steps"])
    assert file.read_text() == "before\n<!-- steps -->\na\n\nb\n<!-- /steps -->\nafter\n"
    assert documents.block("steps") == "a\n\nb"
    file.write_text("before\n<!-- steps -->\nold\n")
    with pytest.raises(ValueError, match=r"^search/docs/results.md has 0 lines <!-- /steps -->; put one where it"):
        documents.put("steps", "new")
    assert "old" in file.read_text()
