from __future__ import annotations

import ast
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import data.corpora
from data.corpora import shipped
from data.documents import content_hash, is_held_out, normalised

FOLDER = Path(data.corpora.__file__).parent
CORPORA = ["business", "development", "creative"]


@pytest.mark.parametrize("name", CORPORA)
def test_a_shipped_corpus_has_hundreds_of_different_documents_of_named_sources(name: str) -> None:
    table = pq.read_table(shipped(f"shipped:{name}", ".parquet"))
    assert table.schema.names == ["id", "text", "source"]
    ids, texts = table["id"].to_pylist(), table["text"].to_pylist()
    assert len(texts) >= 300
    assert len(set(ids)) == len(ids) and len({content_hash(normalised(text)) for text in texts}) == len(texts)
    assert min(map(len, texts)) >= 300
    held_out = [text for text in texts if is_held_out(content_hash(normalised(text)), 0.05)]
    assert len(held_out) >= 10
    sources = (FOLDER / "SOURCES.md").read_text()
    for source in set(table["source"].to_pylist()):
        section = sources.split(f"## {source}\n")[1].split("\n## ")[0]
        licence = section.split("Licence")[1]
        assert any(right in licence for right in ("public domain", "PSF-2.0", "verbatim copying")), source


def test_development_corpus_carries_the_licence_of_python() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (FOLDER / "LICENSE-python.md").read_text()


def test_everything_shipped_is_under_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 5_000_000


def test_data_never_imports_torch() -> None:
    for path in FOLDER.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "torch",
                "ray",
                "hydra",
                "parallel",
                "recipes",
                "train",
            }
