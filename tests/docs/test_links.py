"""No dead link, anchor or path in any document."""

import re

import pytest
from documents import DOCUMENTS, ROOT, anchors, inline_code, name_of, prose

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:maca_llmc|serve|tests|benchmarks|recipes|requirements|docs)/[\w./*\-]*")
MODULE = re.compile(r"(?:maca_llmc|maca_serve)(?:\.\w+)+")
PACKAGES = {"maca_llmc": ROOT / "maca_llmc", "maca_serve": ROOT / "serve" / "maca_serve"}


def links():
    return [(path, link) for path in DOCUMENTS for link in LINK.findall(prose(path))]


def test_the_documents_are_found():
    assert {"README.md", "docs/cli.md", "benchmarks/README.md"} <= set(map(name_of, DOCUMENTS))
    assert len(links()) > 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(document):
    dead = []
    for link in LINK.findall(prose(document)):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_in_backticks_exist(document):
    named = [code for code in inline_code(document) if PATH.fullmatch(code)]
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


def is_there(name):
    """Whether a dotted name is a module, or a word that its package's module holds."""
    package, *parts = name.split(".")
    place = PACKAGES[package]
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
            continue
        file = place / f"{part}.py"
        if file.is_file() and number == len(parts) - 1:
            return True
        source = place.with_suffix(".py") if place.with_suffix(".py").is_file() else None
        source = source or (place / "__init__.py")
        return (
            number == len(parts) - 1 and re.search(rf"\b{part}\b", source.read_text()) is not None
        )
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_in_backticks_exist(document):
    words = (re.split(r"[\s(]", code)[0] for code in inline_code(document))
    assert [word for word in words if MODULE.fullmatch(word) and not is_there(word)] == []


def test_a_path_that_is_not_there_is_seen():
    assert not is_there("maca_llmc.asymmetry") and not is_there("maca_llmc.gptq.moment")
    assert is_there("maca_llmc.gptq.moments") and is_there("maca_llmc.quantize")
    assert not any(ROOT.glob("maca_llmc/hessian.py"))


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))
