"""Text to a prepared dataset: `python -m data.prepare --input PATH... --output DIR --tokenizer PATH`.

Documents are normalised, exact duplicates dropped, split by a hash of their content, tokenised and written as shards.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError, UserError
from conf.schema import DataConfig, SourceConfig
from data.documents import Document, InputFile, content_hash, documents, input_files, is_held_out, normalised
from data.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    SPLITS,
    InputRecord,
    Manifest,
    ShardEntry,
    Split,
    Totals,
    identity_of,
    index_bytes,
)
from data.shards import Dataset
from data.storage import Storage
from data.tokenizer import Tokenizer

SHARD_TOKENS = 4 << 20
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
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """Make a dataset. It appears under `output` whole, by rename, or not at all.

    Memory: one shard a split, and 16 bytes (some 100 in a Python set) a document to know duplicates by.

    Args:
        inputs: files, folders or `shipped:NAME`s.
        output: folder to make; it must not hold anything yet.
        tokenizer: makes the tokens.
        held_out_fraction: share of documents, chosen by hash of their content, that goes to the held-out split.
        text_field: column or key of the text in parquet and jsonl.
        shard_tokens: a shard is closed when it has this many.

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
        for split in SPLITS:
            (partial / split).mkdir(parents=True)
        writer = _Writer(partial, tokenizer, shard_tokens)
        for batch in _batches(files, text_field):
            writer.add(batch, held_out_fraction)
        _finish(writer, files, tokenizer, held_out_fraction)
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
    if Storage.open(source.path).exists(MANIFEST_NAME):
        dataset = Dataset.open(source.path)
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


def _batches(files: Sequence[InputFile], text_field: str) -> Iterator[list[Document]]:
    """Documents of all files in groups of `BATCH_CHARACTERS`, normalised, empty ones left out."""
    batch: list[Document] = []
    characters = 0
    for file in files:
        for document in documents(file, text_field):
            text = normalised(document.text)
            if text.strip():
                batch.append(Document(document.id, text))
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Shards of both splits, as documents come."""

    def __init__(self, root: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.root = root
        self.entries: list[ShardEntry] = []
        self.num_duplicates = 0
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._seen: set[bytes] = set()
        self._open: dict[Split, list[tuple[str, npt.NDArray[np.uint32]]]] = {split: [] for split in SPLITS}
        self._open_tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)

    def add(self, batch: Sequence[Document], held_out_fraction: float) -> None:
        """Tokenise documents that were not seen before and put each on its side."""
        fresh: list[tuple[Document, Split]] = []
        for document in batch:
            digest = content_hash(document.text)
            if digest in self._seen:
                self.num_duplicates += 1
                continue
            self._seen.add(digest)
            fresh.append((document, "held_out" if is_held_out(digest, held_out_fraction) else "train"))
        encoded = self._tokenizer.encode([document.text for document, _ in fresh])
        for (document, split), tokens in zip(fresh, encoded, strict=True):
            self._open[split].append((document.id, tokens))
            self._open_tokens[split] += len(tokens) + 1
            if self._open_tokens[split] >= self._shard_tokens:
                self.flush(split)

    def flush(self, split: Split) -> None:
        """Write the open shard of a split, if there is anything in it."""
        rows = self._open[split]
        if not rows:
            return
        dtype = np.uint16 if self._tokenizer.vocab_size <= 1 << 16 else np.uint32
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum([len(tokens) + 1 for _, tokens in rows], out=offsets[1:])
        values = np.full(offsets[-1], self._tokenizer.end_of_text_id, dtype)
        for (_, tokens), start in zip(rows, offsets, strict=False):
            values[start : start + len(tokens)] = tokens
        table = pa.table(
            {
                "id": pa.array([name for name, _ in rows], pa.string()),
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            }
        )
        number = sum(entry.split == split for entry in self.entries)
        path = self.root / split / f"{number:06d}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=len(rows))
        entry = ShardEntry(
            split=split,
            path=f"{split}/{path.name}",
            num_documents=len(rows),
            num_tokens=int(offsets[-1]),
            num_bytes=path.stat().st_size,
            sha256=_sha256(path),
        )
        self.entries.append(entry)
        self._open[split] = []
        self._open_tokens[split] = 0


def _finish(writer: _Writer, files: Sequence[InputFile], tokenizer: Tokenizer, held_out_fraction: float) -> None:
    """Close the shards and write index and manifest.

    Raises:
        DataError: a split is empty.
    """
    for split in SPLITS:
        writer.flush(split)
    totals = {split: _totals([entry for entry in writer.entries if entry.split == split]) for split in SPLITS}
    _check_not_empty(totals, held_out_fraction)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        identity=identity_of(writer.entries, tokenizer.sha256),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        held_out_fraction=held_out_fraction,
        num_duplicates=writer.num_duplicates,
        splits=totals,
        inputs=tuple(
            InputRecord(path=file.name, num_bytes=file.path.stat().st_size, sha256=_sha256(file.path)) for file in files
        ),
    )
    (writer.root / INDEX_NAME).write_bytes(index_bytes(writer.entries))
    partial = writer.root / f"{MANIFEST_NAME}.partial"
    with partial.open("wb") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(writer.root / MANIFEST_NAME)


def _totals(entries: Sequence[ShardEntry]) -> Totals:
    return Totals(
        num_shards=len(entries),
        num_documents=sum(entry.num_documents for entry in entries),
        num_tokens=sum(entry.num_tokens for entry in entries),
    )


def _check_not_empty(totals: dict[Split, Totals], held_out_fraction: float) -> None:
    num_documents = sum(total.num_documents for total in totals.values())
    if not num_documents:
        raise DataError(
            "the input has no text in it (only empty documents or none at all). Give at least two documents."
        )
    for split, total in totals.items():
        if not total.num_documents:
            raise DataError(
                f"none of {num_documents} documents fell to the {split} split at "
                f"held_out_fraction={held_out_fraction}. "
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
