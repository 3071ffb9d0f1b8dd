"""Rebuild the shipped English sample from public-domain texts in Debian packages.

Writes, byte for byte the same on every run from the same package versions:

- ``maca_llmc/assets/calibration.jsonl``: text to calibrate on,
- ``maca_llmc/assets/evaluation.jsonl``: other works, to measure on.

A row is ``{"text": ..., "source": ...}``. ``maca_llmc/assets/README.md`` names the works.

Usage, on Debian 12 (nothing is installed; the packages are fetched with ``apt-get download``
and unpacked with ``dpkg-deb``)::

    python benchmarks/make_sample.py

    # packages unpacked before, one folder per package: no network
    python benchmarks/make_sample.py --packages unpacked/

Needs the standard library only. R's lazy-load database is simple enough to read without R: each
object is a big-endian length and a zlib stream of an XDR-serialized character vector.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "r-cran-janeaustenr": "1.0.0-1",
    "r-cran-tokenizers": "0.3.0-1",
    "jargon-text": "4.4.7-4.1",
    "miscfiles": "1.5+dfsg-4",
}
AUSTEN = ["emma", "mansfield", "northanger", "persuasion", "pride", "sense"]  # order in the .rdb
TITLES = {
    "emma": "Jane Austen, Emma (1815)",
    "mansfield": "Jane Austen, Mansfield Park (1814)",
    "northanger": "Jane Austen, Northanger Abbey (1817)",
    "persuasion": "Jane Austen, Persuasion (1817)",
    "pride": "Jane Austen, Pride and Prejudice (1813)",
    "sense": "Jane Austen, Sense and Sensibility (1811)",
    "moby": "Herman Melville, Moby-Dick (1851)",
}
JARGON = "The Jargon File, version 4.4.7 (2003)"
CHAPTER = re.compile(r"^(?:CHAPTER|Chapter) (?:\d+|[IVXL]+)\b|^Epilogue$")
JUNK = re.compile(r"^(?:volume\b.*|finis|the end|\W*)$", re.IGNORECASE)
UNWANTED = re.compile(  # crude entries, and tables drawn with lines
    r"penis|fuck|shit|sex|piss|\bass\b|asshole|\bsucks?\b|nazi|[\u2500-\u257f]", re.IGNORECASE
)
Row = dict[str, str]


# --- reading the packages ---------------------------------------------------------------------


def unpack_packages(folder: Path) -> None:
    """Download each package and unpack it into ``folder/<package>``."""
    for package, version in PACKAGES.items():
        subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=folder, check=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)


def read_lazy_load(path: Path) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (``.rdb``), in stored order."""
    blob = path.read_bytes()
    while blob:
        stream = zlib.decompressobj()
        yield read_character_vector(stream.decompress(blob[4:]))  # 4 bytes: unpacked length
        blob = stream.unused_data


def read_character_vector(data: bytes) -> list[str]:
    """Decode one XDR-serialized (version 2 or 3) R character vector, attributes left out."""
    position = 2  # after "X\n"

    def integer() -> int:
        nonlocal position
        position += 4
        return int(struct.unpack_from(">i", data, position - 4)[0])

    version = integer()
    position += 8  # the writer's R version and the oldest reader's
    if version == 3:
        length = integer()  # of the native encoding's name
        position += length
    if integer() & 0xFF != 16:
        raise ValueError("not a character vector")
    strings = []
    for _ in range(integer()):
        integer()  # flags of the string
        length = integer()
        strings.append(data[position : position + length].decode("utf-8"))
        position += length
    return strings


def read_works(packages: Path) -> dict[str, str]:
    """Return the raw text of every work, keyed by a short name."""

    def library(package: str) -> Path:
        return packages / f"r-cran-{package}/usr/lib/R/site-library/{package}/data/Rdata.rdb"

    def gunzip(path: str) -> str:
        return gzip.decompress((packages / path).read_bytes()).decode("utf-8")

    works = {
        name: "\n".join(lines)
        for name, lines in zip(AUSTEN, read_lazy_load(library("janeaustenr")), strict=True)
    }
    (moby,) = read_lazy_load(library("tokenizers"))
    works["moby"] = "\n".join(moby).replace("\r", "").partition("End of Project Gutenberg")[0]
    works["northanger"] = works["northanger"].partition("A NOTE ON THE TEXT")[0]
    jargon = gunzip("jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").replace("\xa0", " ")
    works["jargon"] = re.sub(r"\{([^{}]{1,60})\}", r"\1", jargon)  # cross-references
    for name in ("constitution", "declaration"):
        works[name] = gunzip(f"miscfiles/usr/share/state/us-{name}.gz")
    return works


# --- cleaning ---------------------------------------------------------------------------------


def clean(lines: Iterable[str], verse_indent: int) -> str:
    """Join hard-wrapped lines into paragraphs with a blank line between them.

    A paragraph of short lines, all indented by ``verse_indent`` columns or more, is verse or a
    list and keeps its line breaks.
    """
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).expandtabs()):
        rows = [line for line in block.split("\n") if line.strip()]
        if not rows or JUNK.match(block.strip()):
            continue
        display = all(
            line.startswith(" " * verse_indent) and len(line.strip()) < 56 for line in rows
        )
        text = ("\n" if display else " ").join(re.sub(r"\s+", " ", line.strip()) for line in rows)
        paragraphs.append(text)
    return "\n\n".join(paragraphs)


def read_chapters(text: str) -> list[str]:
    """Split a novel at its chapter headings; front matter and volume titles are left out."""
    lines = [line for line in text.split("\n") if not line.strip().startswith("[At this point")]
    starts = [number for number, line in enumerate(lines) if CHAPTER.match(line)]
    chapters = [
        clean(lines[start:end], verse_indent=2)
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)
    ]
    # Gutenberg's typing: _italics_, -- for a dash, * for a footnote.
    chapters = [re.sub(r"_([^_]+)_", r"\1", chapter) for chapter in chapters]
    chapters = [re.sub(r" ?--+ ?", "—", chapter).replace("*", "") for chapter in chapters]
    return [chapter for chapter in chapters if len(chapter) > 1000]  # not the stage directions


def group_chapters(chapters: list[str], sizes: list[int], limit: int) -> list[str]:
    """Join consecutive chapters into documents of about ``sizes`` characters, in turn.

    No document exceeds ``limit`` unless a single chapter does.
    """
    documents: list[str] = []
    current = ""
    for chapter in chapters:
        joined = f"{current}\n\n{chapter}" if current else chapter
        if current and len(joined) > limit:
            documents.append(current)
            joined = chapter
        current = joined
        if len(current) >= sizes[len(documents) % len(sizes)]:
            documents.append(current)
            current = ""
    return [*documents, current] if current else documents


def spread(items: list[str], characters: int) -> list[str]:
    """Pick items evenly over the list until they hold about ``characters`` in all."""
    count = min(len(items), max(1, round(characters * len(items) / sum(map(len, items)))))
    return [items[index * len(items) // count] for index in range(count)]


def read_jargon_chapter(text: str, title: str) -> str:
    """Return one prose chapter of the Jargon File, from its title to the next chapter's."""
    body = text[text.index(f"\n{title}\n") + 1 :]
    end = re.search(r"\n(?:Chapter \d+|Appendix [A-C]|Glossary|Bibliography)\b", body)
    if end is None:
        raise ValueError(f"no end to {title}")
    chapter = clean(body[: end.start()].split("\n"), verse_indent=4)
    return re.sub(r"Table of Contents\n\n(?:[^\n]{1,40}\n\n)+", "", chapter)


def read_jargon_entries(text: str) -> list[str]:
    """Return the glossary's prose entries of 350 to 2,000 characters, in order."""
    glossary = text[text.index("\nGlossary\n") : text.index("\nAppendix A. ")]
    entries = []
    for part in re.split(r"\n(?=   :[^\s:][^\n]*:)", glossary)[1:]:
        head, _, body = part.partition("\n\n")
        name = re.match(r"\s*:(.+?):(?:\s|$)", head)
        prose = clean(body.split("\n"), verse_indent=4)
        plain = "\n" not in prose.replace("\n\n", "") and not UNWANTED.search(part)
        if name and plain and 350 <= len(prose) <= 2000:
            entries.append(f"{name[1]}: {prose}")
    return entries


# --- choosing ---------------------------------------------------------------------------------


def rows(documents: Iterable[str], source: str) -> list[Row]:
    """Give every document its source."""
    return [{"text": document.strip(), "source": source} for document in documents]


def novel_rows(
    works: dict[str, str], name: str, sizes: list[int], limit: int, characters: int
) -> list[Row]:
    """Return about ``characters`` of one novel as documents of ``sizes``, spread over it."""
    documents = group_chapters(read_chapters(works[name]), sizes, limit)
    return rows(spread(documents, characters), TITLES[name])


def calibration_rows(works: dict[str, str]) -> list[Row]:
    """Return the documents to calibrate on."""
    result = []
    for name, sizes in {
        "emma": [9_000, 22_000, 9_000],
        "mansfield": [9_000, 12_000, 22_000],
        "northanger": [9_000, 9_000, 20_000],
        "pride": [2_500, 9_000, 12_000, 2_500, 9_000, 20_000],
        "sense": [9_000, 2_500, 9_000, 30_000, 9_000],
    }.items():
        result += novel_rows(works, name, sizes, limit=40_000, characters=158_000)
    body, _, amendments = works["constitution"].partition("\nAmendments\n")
    result += rows(
        (clean(part.split("\n"), verse_indent=2) for part in (body, amendments)),
        "The Constitution of the United States",
    )
    chapters = [
        "Chapter 1. Hacker Slang and Hacker Culture",
        "Chapter 2. Of Slang, Jargon, and Techspeak",
        "Chapter 4. Jargon Construction",
        "Chapter 5. Hacker Writing Style",
    ]
    result += rows((read_jargon_chapter(works["jargon"], title) for title in chapters), JARGON)
    entries = read_jargon_entries(works["jargon"])
    return result + rows(spread(entries[0::2], 70_000), JARGON)


def evaluation_rows(works: dict[str, str]) -> list[Row]:
    """Return the documents to measure on, from other works or other parts of the Jargon File."""
    result = []
    for name in ("moby", "persuasion"):  # long enough for contexts of 8192 tokens
        result += novel_rows(works, name, [37_500], limit=60_000, characters=80_000)
    used = [row["text"] for row in result]
    for name in ("moby", "persuasion"):
        rest = [
            chapter
            for chapter in read_chapters(works[name])
            if len(chapter) >= 10_500 and not any(chapter in text for text in used)
        ]
        result += rows(spread(rest, 26_000), TITLES[name])
    declaration = works["declaration"].partition("The signers of the Declaration")[0]
    result += rows(
        [clean(declaration.split("\n"), verse_indent=2)], "The Declaration of Independence"
    )
    chapters = ["Chapter 7. Hacker Speech Style", "Chapter 8. International Style"]
    result += rows((read_jargon_chapter(works["jargon"], title) for title in chapters), JARGON)
    entries = read_jargon_entries(works["jargon"])
    return result + rows(spread(entries[1::2], 20_000), JARGON)


# --- checking and writing ---------------------------------------------------------------------


def shared_text(first: list[Row], second: list[Row], words: int = 20) -> set[tuple[str, ...]]:
    """Return the runs of ``words`` words that occur in both sets of rows."""

    def runs(sample: list[Row]) -> set[tuple[str, ...]]:
        split = [re.findall(r"\w+", row["text"].lower()) for row in sample]
        return {
            tuple(text[index : index + words])
            for text in split
            for index in range(len(text) - words + 1)
        }

    return runs(first) & runs(second)


def write(path: Path, sample: list[Row]) -> None:
    """Write one JSON object per line and print what was written."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    characters = sum(len(row["text"]) for row in sample)
    digest = hashlib.sha256(data).hexdigest()
    print(f"{path.relative_to(ROOT)}: {len(sample)} documents, {characters} characters, {digest}")


def main() -> None:
    """Build both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder with the packages unpacked in it")
    packages = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            unpack_packages(packages)
        works = read_works(packages)
    calibration, evaluation = calibration_rows(works), evaluation_rows(works)
    if overlap := shared_text(calibration, evaluation):
        raise SystemExit(f"calibration and evaluation share text: {sorted(overlap)[:3]}")
    write(ROOT / "maca_llmc/assets/calibration.jsonl", calibration)
    write(ROOT / "maca_llmc/assets/evaluation.jsonl", evaluation)


if __name__ == "__main__":
    main()
