"""Text to a prepared dataset: `python -m data.prepare --input PATH... --output DIR --tokenizer PATH`.

Documents are normalised, held to rules of quality, freed of duplicates and near-duplicates and of text that models are
judged by, split by a hash of their content, tokenised and written as shards. Each step can be switched off. What was
dropped and why is shown and written to report.json. Stopped and run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from conf.errors import DataError, UserError
from conf.schema import DataConfig, SourceConfig
from data.index import FORMAT_VERSION, MANIFEST_NAME
from data.ingest import Ingestion, Progress, ingest
from data.inputs import InputFile, input_files
from data.kafka import is_topic
from data.quality import QualityRules
from data.shards import Access, Dataset
from data.steps import ALL_STEPS, Steps
from data.tokenizer import Tokenizer
from data.tombstones import forgotten_ids
from data.writer import BLOCK_TOKENS

HASHED_BYTES = 64 << 20
"""Files up to this size are known by their content in the cache, larger ones by size and time of change."""


def prepare(
    inputs: Sequence[str],
    output: Path,
    tokenizer: Tokenizer,
    *,
    held_out_fraction: float = 0.05,
    text_field: str = "text",
    block_tokens: int = BLOCK_TOKENS,
) -> Dataset:
    """Make a dataset of all of a text but exact duplicates, in this process. It appears whole, or not at all.

    Args:
        inputs: files, folders, URIs or `shipped:NAME`s.
        output: folder to make; it must not hold anything yet.
        tokenizer: makes the tokens.
        held_out_fraction: share of documents, chosen by hash of their content, that goes to the held-out split.
        text_field: column or key of the text in parquet and jsonl.
        block_tokens: tokens that are read at once.

    Raises:
        DataError: an input is missing or unreadable, a split would be empty, or `output` cannot be written.
    """
    wanted = Ingestion(
        inputs=inputs,
        output=str(output),
        tokenizer=tokenizer,
        steps=Steps(),
        held_out_fraction=held_out_fraction,
        text_field=text_field,
        block_tokens=block_tokens,
        resumable=False,
        on_ray=False,
    )
    dataset, _ = ingest(wanted)
    return dataset


def prepared(source: SourceConfig, data: DataConfig) -> Dataset:
    """The dataset of a source: as it is if its path is one, else from the cache, prepared into it on first use.

    Several processes may ask at once: each prepares, the first to finish is kept and used by all.

    Raises:
        DataError: the source cannot be prepared, or is a dataset made with another tokenizer.
    """
    tokenizer = Tokenizer.load(data.tokenizer)
    # In a bucket nothing else is looked for, so that what is wrong with the bucket is what is told.
    if "://" in source.path or (Path(source.path).expanduser() / MANIFEST_NAME).exists():
        dataset = Dataset.open(source.path, Access(storage=data.storage))
        dataset.check_stored()
    else:
        dataset = _from_cache(source.path, data, tokenizer)
    if dataset.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{source.path}: made with another tokenizer (sha256 {dataset.manifest.tokenizer_sha256[:12]}...) than "
            f"data.tokenizer={data.tokenizer} ({tokenizer.sha256[:12]}...). Use that one or prepare the text anew."
        )
    return dataset


def _from_cache(path: str, data: DataConfig, tokenizer: Tokenizer) -> Dataset:
    cache = Path(data.cache_dir).expanduser()
    key = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.sha256} {data.held_out_fraction!r}\n".encode())
    for file in input_files([path]):
        key.update(f"{file.name} {_fingerprint(file)}\n".encode())
    for document_id in sorted(forgotten_ids([str(cache.absolute())])):
        key.update(f"without {document_id}\n".encode())
    cached = cache / key.hexdigest()[:32]
    if (cached / MANIFEST_NAME).exists():
        return Dataset.open(cached)
    try:
        return prepare([path], cached, tokenizer, held_out_fraction=data.held_out_fraction)
    except DataError:
        # Another process was faster; what it left has the same content.
        if (cached / MANIFEST_NAME).exists():
            return Dataset.open(cached)
        raise


def _fingerprint(file: InputFile) -> str:
    if file.num_bytes <= HASHED_BYTES:
        return file.sha256()
    return f"{file} {file.num_bytes} {file.version}"


def ingestion(options: argparse.Namespace) -> Ingestion:
    """What the command line asks for.

    Raises:
        DataError: an option is not one of those there are.
    """
    quality = None if options.quality == ["off"] else QualityRules.parse(options.quality)
    steps = replace(
        ALL_STEPS,
        unicode_form=options.unicode,
        invalid_utf8=options.invalid_utf8,
        languages=tuple(options.languages),
        quality=quality,
        near_duplicates=options.near_duplicates == "drop",
    )
    return Ingestion(
        inputs=options.input,
        output=options.output,
        tokenizer=Tokenizer.load(options.tokenizer),
        steps=steps,
        held_out_fraction=options.held_out_fraction,
        text_field=options.text_field,
        decontaminate=tuple(options.decontaminate),
        tombstones=tuple(options.tombstones),
        after=options.after,
        on_ray={"ray": True, "here": False, "auto": None}[options.on],
        ray_address=os.environ.get("RAY_ADDRESS") if options.on != "here" else None,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, s3://..., kafka://... or shipped:NAME",
    )
    add("--after", metavar="DIR", help="read topics on from where this dataset ends")
    add("--output", required=True, metavar="DIR", help="folder or URI to make")
    add("--tokenizer", required=True, metavar="PATH", help="tokenizer.json or shipped:tokenizer")
    add("--held-out-fraction", type=float, default=0.05, help="share of documents never trained on")
    add("--text-field", default="text", help="column or key of the text in parquet, jsonl and topics")
    add("--unicode", choices=("NFC", "NFKC", "off"), default="NFC", help="form that texts are brought into")
    add("--invalid-utf8", choices=("drop", "refuse"), default="drop", help="drop and count, or stop at, such documents")
    add("--quality", nargs="*", default=[], metavar="RULE=NUMBER", help="other bounds of quality rules, or off")
    add("--languages", nargs="*", default=[], metavar="CODE", help="keep these only, e.g. en de; none: all")
    add("--near-duplicates", choices=("drop", "keep"), default="drop", help="documents nearly equal to an earlier one")
    add("--decontaminate", nargs="*", default=[], metavar="PATH", help="datasets (held-out part) or texts to judge by")
    add("--tombstones", nargs="*", default=[], metavar="DIR", help="more folders whose forgotten documents stay out")
    add(
        "--on",
        choices=("auto", "here", "ray"),
        default="auto",
        help="this process, or Ray Data (auto: from 256 MiB on)",
    )
    return parser


@contextmanager
def _shown_progress(console: Console) -> Iterator[Progress]:
    """Bars on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    options = parser().parse_args(arguments)
    try:
        with _shown_progress(Console(stderr=True)) as progress:
            dataset, report = ingest(ingestion(options), progress)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: identity {dataset.identity[:12]}")
    for split, total in dataset.manifest.splits.items():
        print(f"  {split}: {total.num_documents} documents, {total.num_tokens} tokens, {total.num_shards} shards")
    for record in dataset.manifest.inputs:
        if is_topic(record.path):
            print(f"  {record.path}: {record.num_bytes} bytes; --after {options.output} goes on there")
    report.show(Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
