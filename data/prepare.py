"""Text to a prepared dataset: `python -m data.prepare --input PATH... --output DIR --tokenizer PATH`.

Documents are normalised, exact duplicates dropped, split by a hash of their content, tokenised and written as shards.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from conf.errors import DataError, UserError
from conf.schema import DataConfig, SourceConfig
from data.corpora import is_shipped
from data.documents import Document, InputFile, content_hash, documents, input_files, is_held_out, normalised
from data.index import FORMAT_VERSION, MANIFEST_NAME, SPLITS, InputRecord, Split
from data.shards import Access, Dataset
from data.storage import Store
from data.tokenizer import Tokenizer
from data.writer import BLOCK_TOKENS, DatasetFacts, DatasetWriter

BATCH_CHARACTERS = 2 << 20
"""Text tokenised at once: enough to keep all cores busy, small beside a shard."""
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
    """Make a dataset. It appears under `output` whole, by rename, or not at all.

    Memory: one shard a split, and 16 bytes (some 100 in a Python set) a document to know duplicates by.

    Args:
        inputs: files, folders or `shipped:NAME`s.
        output: folder to make; it must not hold anything yet.
        tokenizer: makes the tokens.
        held_out_fraction: share of documents, chosen by hash of their content, that goes to the held-out split.
        text_field: column or key of the text in parquet and jsonl.
        block_tokens: tokens that are read at once.

    Raises:
        DataError: an input is missing or unreadable, a split would be empty, or `output` cannot be written.
    """
    if not 0 < held_out_fraction < 0.5:
        raise DataError(f"held-out fraction {held_out_fraction}: it must be above 0 and below 0.5, e.g. 0.05.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: is there already. Remove it or choose another output.")
    files = input_files(inputs)
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        facts = DatasetFacts(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_text_id=tokenizer.end_of_text_id,
            held_out_fraction=held_out_fraction,
            block_tokens=block_tokens,
        )
        writer = DatasetWriter(Store.open(partial), facts)
        preparation = _Preparation(writer, tokenizer)
        for batch in _batches(files, text_field):
            preparation.add(batch)
        _check_not_empty({split: writer.num_documents(split) for split in SPLITS}, held_out_fraction)
        lineage = [
            InputRecord(path=file.name, num_bytes=file.path.stat().st_size, sha256=_sha256(file.path)) for file in files
        ]
        writer.finish(num_duplicates=preparation.num_duplicates, inputs=lineage)
        partial.rename(output)
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error}). Choose a folder with room that you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Dataset.open(output)


def prepared(source: SourceConfig, data: DataConfig) -> Dataset:
    """The dataset of a source: as it is if its path is one, else from the cache, prepared into it on first use.

    Several processes may ask at once: each prepares, the first to finish is kept and used by all.

    Raises:
        DataError: the source cannot be prepared, or is a dataset made with another tokenizer.
    """
    tokenizer = Tokenizer.load(data.tokenizer)
    if not is_shipped(source.path) and Store.open(source.path, data.storage).exists(MANIFEST_NAME):
        dataset = Dataset.open(source.path, Access(storage=data.storage))
        dataset.check_stored()
    elif "://" in source.path:
        raise DataError(
            f"{source.path}: no dataset here (no {MANIFEST_NAME}), and text is read from local files only. "
            "Prepare it with python -m data.prepare and copy the result there."
        )
    else:
        dataset = _from_cache(source.path, data, tokenizer)
    if dataset.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{source.path}: made with another tokenizer (sha256 {dataset.manifest.tokenizer_sha256[:12]}...) than "
            f"data.tokenizer={data.tokenizer} ({tokenizer.sha256[:12]}...). Use that one or prepare the text anew."
        )
    return dataset


def _from_cache(path: str, data: DataConfig, tokenizer: Tokenizer) -> Dataset:
    key = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer.sha256} {data.held_out_fraction!r}\n".encode())
    for file in input_files([path]):
        key.update(f"{file.name} {_fingerprint(file.path)}\n".encode())
    cached = Path(data.cache_dir).expanduser() / key.hexdigest()[:32]
    if (cached / MANIFEST_NAME).exists():
        return Dataset.open(cached)
    try:
        return prepare([path], cached, tokenizer, held_out_fraction=data.held_out_fraction)
    except DataError:
        # Another process was faster; what it left has the same content.
        if (cached / MANIFEST_NAME).exists():
            return Dataset.open(cached)
        raise


def _fingerprint(path: Path) -> str:
    status = path.stat()
    if status.st_size <= HASHED_BYTES:
        return _sha256(path)
    return f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _batches(files: Sequence[InputFile], text_field: str) -> Iterator[list[tuple[str, Document]]]:
    """Documents of all files, each with its file, in groups of `BATCH_CHARACTERS`, normalised, empty ones left out."""
    batch: list[tuple[str, Document]] = []
    characters = 0
    for file in files:
        for document in documents(file, text_field):
            text = normalised(document.text)
            if text.strip():
                batch.append((file.name, Document(document.id, text)))
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class _Preparation:
    """Documents as they come, duplicates left out, into a writer."""

    def __init__(self, writer: DatasetWriter, tokenizer: Tokenizer) -> None:
        self.num_duplicates = 0
        self._writer = writer
        self._tokenizer = tokenizer
        self._seen: set[bytes] = set()

    def add(self, batch: Sequence[tuple[str, Document]]) -> None:
        """Tokenise documents, each with its file, that were not seen before and put each on its side."""
        fresh: list[tuple[str, Document, Split]] = []
        for source, document in batch:
            digest = content_hash(document.text)
            if digest in self._seen:
                self.num_duplicates += 1
                continue
            self._seen.add(digest)
            held_out = is_held_out(digest, self._writer.facts.held_out_fraction)
            fresh.append((source, document, "held_out" if held_out else "train"))
        encoded = self._tokenizer.encode([document.text for _, document, _ in fresh])
        for (source, document, split), tokens in zip(fresh, encoded, strict=True):
            self._writer.add(split, document.id, source, tokens)


def _check_not_empty(num_documents: dict[Split, int], held_out_fraction: float) -> None:
    total = sum(num_documents.values())
    if not total:
        raise DataError(
            "the input has no text in it (only empty documents or none at all). Give at least two documents."
        )
    for split, count in num_documents.items():
        if not count:
            raise DataError(
                f"none of {total} documents fell to the {split} split at held_out_fraction={held_out_fraction}. "
                "Models are judged on documents they never saw, so both splits must have some: "
                "cut the text into more documents, or change the fraction."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or shipped:NAME")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="tokenizer.json or shipped:tokenizer")
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="share of documents never trained on")
    parser.add_argument("--text-field", default="text", help="column or key of the text in parquet and jsonl")
    options = parser.parse_args(arguments)
    try:
        dataset = prepare(
            options.input,
            options.output,
            Tokenizer.load(options.tokenizer),
            held_out_fraction=options.held_out_fraction,
            text_field=options.text_field,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    manifest = dataset.manifest
    print(f"{options.output}: identity {manifest.identity[:12]}, {manifest.num_duplicates} duplicates dropped")
    for split, total in manifest.splits.items():
        print(f"  {split}: {total.num_documents} documents, {total.num_tokens} tokens, {total.num_shards} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
