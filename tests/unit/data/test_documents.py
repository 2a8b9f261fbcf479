from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.errors import DataError
from data.documents import content_hash, documents, input_files, is_held_out, normalised

TEXTS = ["first text", "second \u00e9\n"]


def write(folder: Path, kind: str) -> Path:
    """The two texts as a file of this kind, its suffix."""
    path = folder / f"texts.{kind}"
    form, _, compression = kind.partition(".")
    if form == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": TEXTS, "id": ["doc0", "doc1"]}), sink)
        content = sink.getvalue().to_pybytes()
    else:
        lines = [json.dumps({"id": f"doc{number}", "text": text}) for number, text in enumerate(TEXTS)]
        content = "\n\n".join(lines).encode()
    if compression == "gz":
        content = gzip.compress(content)
    if compression == "zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "parquet", "parquet.gz", "parquet.zst"])
def test_every_form_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    (file,) = input_files([str(write(tmp_path, kind))])
    assert [(document.id, document.text) for document in documents(file, "text")] == [
        ("doc0", TEXTS[0]),
        ("doc1", TEXTS[1]),
    ]


def test_a_folder_is_read_in_order_of_names_and_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c", ".hidden"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    found = [document for file in input_files([str(tmp_path)]) for document in documents(file, "text")]
    assert [document.id for document in found] == ["a.md", "b.txt", "d.txt.gz", "sub/c"]
    assert [document.text for document in found][1:3] == ["text of b.txt", "packed"]


def test_faults_name_the_file_and_the_line(tmp_path: Path) -> None:
    faults = {
        "bad.jsonl": (b'{"text": "fine"}\n{"text": \n', "bad.jsonl:2: not JSON"),
        "key.jsonl": (b'{"body": "fine"}\n', "key.jsonl:1: no string under 'text'"),
        "list.jsonl": (b"[1]\n", "list.jsonl:1: no string under 'text'"),
        "cut.parquet": (b"PAR1 not really", "cut.parquet: cannot be read"),
        "cut.txt.gz": (gzip.compress(b"x" * 5000)[:-10], "cut.txt.gz: cannot be read"),
        "cut.txt.zst": (b"not zstd at all", "cut.txt.zst: cannot be read"),
        "image.txt": (b"\x89PNG\xff\xfe", "image.txt: not UTF-8 text"),
    }
    for name, (content, says) in faults.items():
        (tmp_path / name).write_bytes(content)
        (file,) = input_files([str(tmp_path / name)])
        with pytest.raises(DataError) as fault:
            list(documents(file, "text"))
        assert says in str(fault.value)
    (file,) = input_files([str(write(tmp_path, "parquet"))])
    with pytest.raises(DataError, match="no column 'body' among text, id"):
        list(documents(file, "body"))


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        input_files([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="holds no files"):
        input_files([str(tmp_path)])
    with pytest.raises(DataError, match="There is: shipped:business, shipped:creative, shipped:development"):
        input_files(["shipped:busines"])


def test_the_same_text_written_another_way_is_the_same_document() -> None:
    assert content_hash(normalised("caf\u00e9\r\n")) == content_hash(normalised("cafe\u0301\n"))


def test_a_larger_fraction_holds_out_more_of_the_same_documents() -> None:
    digests = [content_hash(str(number)) for number in range(5000)]
    small, large = ({digest for digest in digests if is_held_out(digest, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    # Binomial: 1000 expected, standard deviation 28.
    assert len(large) == pytest.approx(1000, abs=140)
