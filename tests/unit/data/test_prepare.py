from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeDataset, write_jsonl, write_tokenizer

from conf.errors import DataError
from conf.schema import DataConfig, SourceConfig
from data import writer as writer_module
from data.index import SPLITS, Split
from data.prepare import main, prepare, prepared
from data.shards import Dataset
from data.tokenizer import Tokenizer

TEXTS = [f"document number {number}" for number in range(200)]


def texts_of(dataset: Dataset, split: Split, tokenizer: Tokenizer) -> dict[str, str]:
    found = [dataset.document(split, number) for number in range(dataset.num_documents(split))]
    assert all(document.tokens[-1] == tokenizer.end_of_text_id for document in found)
    return {document.id: tokenizer.decode(document.tokens[:-1]) for document in found}


def config(tmp_path: Path, tokenizer: Path) -> DataConfig:
    return DataConfig(tokenizer=str(tokenizer), sources={}, held_out_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def test_every_document_is_there_once_with_its_text(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    source = write_jsonl(tmp_path / "in.jsonl", [*TEXTS, *TEXTS[:50], "", " \n"])
    dataset = prepare([str(source)], tmp_path / "out", tokenizer, held_out_fraction=0.2, block_tokens=500)
    train, held_out = (texts_of(dataset, split, tokenizer) for split in SPLITS)
    assert not train.keys() & held_out.keys()
    assert train | held_out == {f"doc{number}": text for number, text in enumerate(TEXTS)}
    assert dataset.manifest.num_duplicates == 50
    assert dataset.num_tokens("train") > 3 * dataset.manifest.block_tokens
    assert [record.path for record in dataset.manifest.inputs] == ["in.jsonl"]


def test_a_document_falls_on_the_same_side_whatever_else_there_is(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    sides = []
    for name, texts in (("all", TEXTS), ("reversed", TEXTS[::-1]), ("some", TEXTS[60:]), ("twice", TEXTS + TEXTS)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        dataset = prepare([str(source)], tmp_path / name, tokenizer, held_out_fraction=0.2)
        train, held_out = ({*texts_of(dataset, split, tokenizer).values()} for split in SPLITS)
        assert not train & held_out
        sides.append(held_out)
    assert sides[0] == sides[1] == sides[3]
    assert sides[2] == sides[0] & set(TEXTS[60:])


def test_same_input_same_identity_and_other_input_another(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer, other = Tokenizer.load(tokenizer_path), Tokenizer.load(write_tokenizer(tmp_path / "other.json", ("zz",)))
    source, longer = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", [*TEXTS, "one more"])
    made = [
        prepare([str(path)], tmp_path / f"out{number}", by, held_out_fraction=0.2).identity
        for number, (path, by) in enumerate(
            [(source, tokenizer), (source, tokenizer), (longer, tokenizer), (source, other)]
        )
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3


@pytest.mark.parametrize("dies_at", ["part_bytes", "root_bytes"])
def test_a_killed_prepare_is_not_mistaken_for_a_dataset(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, dies_at, die)
        # What SIGKILL leaves: nothing is cleaned up.
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(source)], tmp_path / "out", Tokenizer.load(tokenizer_path))
    assert not (tmp_path / "out").exists()
    (leftover,) = tmp_path.glob(".out.partial-*")
    with pytest.raises(DataError, match="no dataset here"):
        Dataset.open(leftover)
    assert prepare([str(source)], tmp_path / "out", Tokenizer.load(tokenizer_path)).num_documents("train") > 100


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(DataError, match="is there already"):
        prepare([str(source)], tmp_path / "out", Tokenizer.load(tokenizer_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("texts", "says"), [([], "no text in it"), (["only one"], "none of 1 documents")])
def test_an_empty_split_is_refused_and_leaves_nothing(
    tmp_path: Path, tokenizer_path: Path, texts: list[str], says: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    with pytest.raises(DataError, match=says):
        prepare([str(source)], tmp_path / "out", Tokenizer.load(tokenizer_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tokenizer.json"]


def test_the_cache_is_used_until_text_tokenizer_or_fraction_change(tmp_path: Path, tokenizer_path: Path) -> None:
    source = SourceConfig(path=str(write_jsonl(tmp_path / "in.jsonl", TEXTS)))
    data = config(tmp_path, tokenizer_path)
    first = prepared(source, data).path
    assert prepared(source, data).path == first
    write_jsonl(tmp_path / "in.jsonl", [*TEXTS, "one more"])
    changed = prepared(source, data).path
    write_tokenizer(tokenizer_path, ("zz",))
    assert len({first, changed, prepared(source, data).path}) == 3


def test_two_at_once_end_up_with_one_dataset(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = SourceConfig(path=str(write_jsonl(tmp_path / "in.jsonl", TEXTS))), config(tmp_path, tokenizer_path)
    both_wrote = threading.Barrier(2, timeout=30)
    finish = writer_module.DatasetWriter.finish

    def wait_for_the_other(writer: writer_module.DatasetWriter, **arguments: object) -> object:
        manifest = finish(writer, **arguments)  # type: ignore[arg-type]
        both_wrote.wait()
        return manifest

    monkeypatch.setattr(writer_module.DatasetWriter, "finish", wait_for_the_other)
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(prepared(source, data).path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 2 and len(set(paths)) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(paths[0]).name]


def test_a_dataset_made_with_another_tokenizer_is_refused(
    tmp_path: Path, make_dataset: MakeDataset, tokenizer_path: Path
) -> None:
    dataset = make_dataset()
    source, data = SourceConfig(path=dataset.path), config(tmp_path, tokenizer_path)
    assert prepared(source, data).identity == dataset.identity
    other = config(tmp_path, write_tokenizer(tmp_path / "other.json", ("zz",)))
    with pytest.raises(DataError, match="made with another tokenizer"):
        prepared(source, other)


def test_command_line_makes_a_dataset_and_says_what_is_wrong(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = ["--input", str(source), "--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_path)]
    arguments += ["--quality", "off", "--near-duplicates", "keep"]
    assert main(arguments) == 0
    assert "train:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/dataset.json").read_text())["vocab_size"] == 257
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    arguments[3] = str(tmp_path / "second")
    assert main([arguments[0], str(tmp_path / "nowhere"), *arguments[2:]]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*arguments, "--held-out-fraction", "0.9"]) == 2
    assert "below 0.5" in capsys.readouterr().err


def test_big_vocabularies_are_stored_as_uint32(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "big.json", tuple(f"word{number}" for number in range(70_000)))
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    dataset = prepare([str(source)], tmp_path / "out", Tokenizer.load(tokenizer))
    assert dataset.tokens("train", 0, 5).dtype == np.uint32
