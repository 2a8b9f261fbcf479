from __future__ import annotations

import ast
from collections.abc import Iterable
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
        tree = ast.parse(path.read_text())
        forbidden = {"torch", "ray", "hydra", "parallel", "recipes", "train"}
        at_import = imported(tree.body)
        assert not at_import & forbidden, path
        # Large text is prepared on Ray, which is imported when that is asked for, there and nowhere else.
        allowed = {"ray"} if path.name == "runners.py" else set()
        assert not imported(ast.walk(tree)) & (forbidden - allowed), path


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Root packages that these nodes import."""
    names: list[str] = []
    for node in nodes:
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return {name.split(".")[0] for name in names}
