"""Markdown documents of the project, for tests that hold them to the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.endswith("_page.md")  # what pages are made of
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    """Path inside the project."""
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [text for kind, text in BLOCK.findall(path.read_text()) if kind == language]


def prose(path: Path) -> str:
    """The text without fenced blocks."""
    return BLOCK.sub("", path.read_text())


def inline_code(path: Path) -> list[str]:
    """What stands in single backticks, on one line or over a line's end."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
