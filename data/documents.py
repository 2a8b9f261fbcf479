"""Documents out of files: text (one a file), jsonl and parquet, plain or compressed with gzip or zstd."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.corpora import is_shipped, shipped

HASH_BYTES = 16
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read documents from.

    Attributes:
        path: where it is.
        name: its path as recorded in the lineage and in document ids: relative to the input it was found under.
    """

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name it can be found by."""

    id: str
    text: str


def normalised(text: str) -> str:
    """The text as it is hashed and tokenised: Unicode NFC, lines end in a line feed."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def content_hash(text: str) -> bytes:
    """Hash of a normalised text; equal texts are one document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether the document of this hash is held out: a matter of its content alone, whatever else there is."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def input_files(inputs: Sequence[str]) -> list[InputFile]:
    """The files of paths, folders and `shipped:NAME`s, each folder in the order of its names.

    Raises:
        DataError: an input is missing or an empty folder.
    """
    files: list[InputFile] = []
    for location in inputs:
        path = shipped(location, ".parquet") if is_shipped(location) else Path(location).expanduser()
        if path.is_file():
            files.append(InputFile(path, path.name))
            continue
        if not path.is_dir():
            raise DataError(
                f"{location}: there is no such file or folder. Give text, jsonl or parquet, or shipped:NAME."
            )
        found = [
            InputFile(file, file.relative_to(path).as_posix())
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise DataError(f"{location}: the folder holds no files. Give text, jsonl or parquet.")
        files += found
    return files


def documents(file: InputFile, text_field: str) -> Iterator[Document]:
    """The documents of a file, in its order, one at a time.

    Args:
        file: `.parquet`, `.jsonl`/`.ndjson`, or anything else as one UTF-8 text; each may be `.gz` or `.zst`.
        text_field: column or key of the text; `id` names the document where there is one.

    Raises:
        DataError: the file cannot be read as what its name says; names the file and the line.
    """
    name = file.path.name.lower()
    compression = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    try:
        with _opened(file.path, compression) as stream:
            if name.endswith(".parquet"):
                # Parquet is read from its end, where a compressed stream cannot go.
                yield from _parquet(io.BytesIO(stream.read()) if compression else stream, file, text_field)
            elif name.endswith(JSON_LINES):
                yield from _json_lines(stream, file, text_field)
            else:
                yield Document(file.name, stream.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8 text (byte {error.start}). Convert it or leave it out.") from error
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: cannot be read ({error}).") from error


def _opened(path: Path, compression: str | None) -> io.BufferedIOBase:
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _json_lines(stream: io.BufferedIOBase, file: InputFile, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file.path}:{number}: not JSON ({error}). A jsonl file has one object a line.") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise DataError(
                f"{file.path}:{number}: no string under '{text_field}'. Name the right key with --text-field."
            )
        yield Document(str(record.get("id", f"{file.name}:{number}")), record[text_field])


def _parquet(stream: io.BufferedIOBase, file: InputFile, text_field: str) -> Iterator[Document]:
    parquet = pq.ParquetFile(stream)
    columns = parquet.schema_arrow.names
    if text_field not in columns:
        raise DataError(
            f"{file.path}: no column '{text_field}' among {', '.join(columns)}. Name the right one with --text-field."
        )
    wanted = [text_field, "id"] if "id" in columns else [text_field]
    row = 0
    for batch in parquet.iter_batches(batch_size=1024, columns=wanted):
        texts = batch.column(text_field).to_pylist()
        ids = batch.column("id").to_pylist() if "id" in columns else [None] * len(texts)
        for text, given_id in zip(texts, ids, strict=True):
            if not isinstance(text, str):
                raise DataError(
                    f"{file.path}: row {row} has no text in column '{text_field}'. Fill it or leave it out."
                )
            yield Document(str(given_id) if given_id is not None else f"{file.name}:{row}", text)
            row += 1
