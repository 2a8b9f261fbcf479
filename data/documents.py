"""Documents out of files: text (one a file), jsonl and parquet, plain or compressed with gzip or zstd; local or stored.

A file is read in pieces, so that one of any size is the work of many: row groups of parquet, lines of plain jsonl that
begin in a range of bytes, messages of a topic. Compressed files and texts are one piece each.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from conf.schema import StorageConfig
from data.inputs import InputFile, input_files
from data.kafka import Stretch, is_topic, messages

HASH_BYTES = 16
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson")
ROWS_AT_ONCE = 1024

__all__ = ["Document", "InputFile", "Piece", "PieceReader", "Record", "content_hash", "documents", "input_files"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name it can be found by."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A document as it stands in its file.

    Attributes:
        id: the name it has there; None: it has none, and is called by its row.
        row: row of parquet, from 0; line of jsonl within the piece, from 1; offset of a message; 0 for a text.
        text: None where there is none, for its fault.
        fault: why the text cannot be had; malformed where a message is not JSON with a text in it.
    """

    id: str | None
    row: int
    text: str | None
    fault: Literal["", "not_utf8", "malformed"] = ""

    @classmethod
    def of_text(cls, document_id: str | None, row: int, text: str | None) -> Record:
        """A document whose text could be had, or None where it is not UTF-8."""
        return cls(document_id, row, text, "not_utf8" if text is None else "")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file: row groups, bytes of plain jsonl or offsets of a partition [first, end), else all of it."""

    file: InputFile
    first: int = 0
    end: int | None = None


def normalised(text: str) -> str:
    """The text as it is hashed and tokenised: Unicode NFC, lines end in a line feed."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def content_hash(text: str) -> bytes:
    """Hash of a normalised text; equal texts are one document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether the document of this hash is held out: a matter of its content alone, whatever else there is."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def pieces(file: InputFile, num_bytes: int, storage: StorageConfig | None = None) -> list[Piece]:
    """A file in pieces of about so many bytes, in order; the same whoever reads them.

    Raises:
        DataError: it is parquet by its name and has no readable footer.
    """
    if is_topic(file.folder):
        return [Piece(file, offsets.start, offsets.stop) for offsets in Stretch.of(file).pieces()]
    form, compression = _form(file)
    if compression or form == "text" or file.num_bytes <= num_bytes:
        return [Piece(file)]
    if form == "jsonl":
        starts = range(0, file.num_bytes, num_bytes)
        return [Piece(file, start, min(start + num_bytes, file.num_bytes)) for start in starts]
    with _explained(file), file.open(storage) as stream:
        metadata = pq.ParquetFile(stream).metadata
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    found, first, size = [], 0, 0
    for group, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= num_bytes or group + 1 == len(sizes):
            found.append(Piece(file, first, group + 1))
            first, size = group + 1, 0
    return found or [Piece(file)]


class PieceReader:
    """The records of a piece, in its order, one at a time.

    Attributes:
        num_lines: lines of jsonl read so far; 0 for other forms. The lines of the pieces before make a line's number.
        num_bytes: of the values of messages read so far; 0 for files.
        digest: sha256 over offset, length and value of those messages.
    """

    def __init__(self, piece: Piece, text_field: str, storage: StorageConfig | None = None) -> None:
        self.num_lines = 0
        self.num_bytes = 0
        self.digest = hashlib.sha256()
        self._piece = piece
        self._field = text_field
        self._storage = storage or StorageConfig()

    def __iter__(self) -> Iterator[Record]:
        """Iterate.

        Raises:
            DataError: the file cannot be read as what its name says; names the file and the line.
        """
        file = self._piece.file
        if is_topic(file.folder):
            yield from self._messages(Stretch.of(file))
            return
        form, compression = _form(file)
        with _explained(file), file.open(self._storage) as plain, _unpacked(plain, compression) as stream:
            if form == "parquet":
                # Parquet is read from its end, where a compressed stream cannot go.
                yield from self._parquet(io.BytesIO(stream.read()) if compression else stream)
            elif form == "jsonl":
                yield from self._json_lines(stream)
            else:
                yield Record.of_text(file.name, 0, _decoded(stream.read()))

    def _messages(self, stretch: Stretch) -> Iterator[Record]:
        first, end = self._piece.first, self._piece.end
        assert end is not None, "a piece of a partition has an end"
        for offset, value in messages(stretch, first, end, self._storage.retry_seconds):
            self.num_bytes += len(value or b"")
            self.digest.update(offset.to_bytes(8, "big") + len(value or b"").to_bytes(8, "big") + (value or b""))
            if not value:
                # Topics that are compacted have them, to say that a key is gone.
                yield Record(None, offset, "")
            elif stretch.form == "text":
                yield Record.of_text(None, offset, _decoded(value))
            else:
                yield self._message(stretch, offset, value)

    def _message(self, stretch: Stretch, offset: int, value: bytes) -> Record:
        try:
            return self._json_record(value, offset, lambda: f"{stretch.address}: offset {offset}")
        except DataError as error:
            if stretch.malformed == "drop":
                return Record(None, offset, None, "malformed")
            raise DataError(f"{error} To count and drop such messages, add malformed=drop to the topic.") from error

    def _json_lines(self, stream: io.BufferedIOBase) -> Iterator[Record]:
        position, end = self._piece.first, self._piece.end
        if position:
            # A line belongs to the piece it begins in.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while end is None or position < end:
            line = stream.readline()
            if not line:
                return
            position += len(line)
            self.num_lines += 1
            if line.strip():
                yield self._json_record(line, self.num_lines, self._line)

    def _json_record(self, content: bytes, row: int, place: Callable[[], str]) -> Record:
        try:
            record = json.loads(content)
        except UnicodeDecodeError:
            return Record.of_text(None, row, None)
        except ValueError as error:
            raise DataError(f"{place()}: not JSON ({error}). There must be one object a line or message.") from error
        if not isinstance(record, dict) or not isinstance(text := record.get(self._field), str):
            raise DataError(f"{place()}: no string under '{self._field}'. Name the right key with --text-field.")
        given = str(record["id"]) if "id" in record else None
        # An escaped half of a surrogate pair is JSON and not text.
        return Record.of_text(given, row, text if _is_text(text) else None)

    def place(self, record: Record) -> str:
        """The file, and the line or row of the record that was read last."""
        if is_topic(self._piece.file.folder):
            return f"{Stretch.of(self._piece.file).address}: offset {record.row}"
        form, _ = _form(self._piece.file)
        if form == "jsonl":
            return self._line()
        return str(self._piece.file) + (f": row {record.row}" if form == "parquet" else "")

    def _line(self) -> str:
        """The file and the number of the line that was read last."""
        before, left = 0, self._piece.first
        with self._piece.file.open(self._storage) as stream:
            while left and (chunk := stream.read(min(left, 1 << 20))):
                before += chunk.count(b"\n")
                left -= len(chunk)
            if self._piece.first and chunk[-1:] != b"\n":
                before += 1
        return f"{self._piece.file}:{before + self.num_lines}"

    def _parquet(self, stream: io.BufferedIOBase) -> Iterator[Record]:
        file, field = self._piece.file, self._field
        parquet = pq.ParquetFile(stream, pre_buffer=True)
        columns = parquet.schema_arrow.names
        if field not in columns:
            raise DataError(
                f"{file}: no column '{field}' among {', '.join(columns)}. Name the right one with --text-field."
            )
        wanted = [field, "id"] if "id" in columns and field != "id" else [field]
        groups = range(self._piece.first, parquet.num_row_groups if self._piece.end is None else self._piece.end)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(self._piece.first))
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=list(groups), columns=wanted):
            texts = _texts(batch.column(field))
            ids = batch.column("id").to_pylist() if "id" in batch.schema.names else [None] * len(texts)
            for text, given in zip(texts, ids, strict=True):
                if not isinstance(text, str | bytes):
                    raise DataError(f"{file}: row {row} has no text in column '{field}'. Fill it or leave it out.")
                yield Record.of_text(None if given is None else str(given), row, _decoded(text))
                row += 1


def documents(file: InputFile, text_field: str, storage: StorageConfig | None = None) -> Iterator[Document]:
    """The documents of a file, in its order, one at a time.

    Args:
        file: `.parquet`, `.jsonl`/`.ndjson`, or anything else as one UTF-8 text; each may be `.gz` or `.zst`.
        text_field: column or key of the text; `id` names the document where there is one.
        storage: how storage is spoken to.

    Raises:
        DataError: the file cannot be read as what its name says; names the file and the line.
    """
    reader = PieceReader(Piece(file), text_field, storage)
    for record in reader:
        if record.text is None:
            raise not_utf8(reader.place(record))
        yield Document(record.id if record.id is not None else f"{file.name}:{record.row}", record.text)


def not_utf8(place: str) -> DataError:
    """The refusal of a record whose text is not UTF-8."""
    return DataError(f"{place}: not UTF-8 text. Convert it, leave it out, or have such documents dropped and counted "
                     "(--invalid-utf8 drop).")  # fmt: skip


def _form(file: InputFile) -> tuple[str, str | None]:
    """What a file is by its name: parquet, jsonl or text; and how it is compressed."""
    name = file.object.lower()
    compression = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    if name.endswith(".parquet"):
        return "parquet", compression
    return "jsonl" if name.endswith(JSON_LINES) else "text", compression


def _unpacked(stream: io.BufferedIOBase, compression: str | None) -> io.BufferedIOBase:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stream)
    if compression == "zstd":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream), "zstd"))
    return stream


def _texts(column: pa.Array) -> list[object]:
    """Values of a column; all of them as bytes where some string in it is not UTF-8."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        binary: Callable[[], pa.DataType] = pa.large_binary if pa.types.is_large_string(column.type) else pa.binary
        values = column.view(binary()).to_pylist()
    return values


def _decoded(text: str | bytes) -> str | None:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


class _explained:
    """Turns what decoders say into errors that name the file."""

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | EOFError | pa.ArrowException):
            raise DataError(f"{self._file}: cannot be read ({error}).") from error
