from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tokenizer

from conf import load
from conf.errors import DataError
from conf.schema import SourceConfig
from data import ingest as ingest_module
from data import units as units_module
from data import writer as writer_module
from data.forget import forget, shards_of
from data.forget import main as forget_main
from data.held_out import held_out_documents
from data.index import FORGOTTEN_ID, SPLITS
from data.ingest import Ingestion, ingest
from data.inputs import input_files
from data.prepare import main
from data.seen import sightings
from data.shards import Dataset
from data.steps import ALL_STEPS, Steps
from data.storage import Store
from data.stream import Stream, stream_of_stage
from data.tokenizer import Tokenizer

WORDS = [f"word{number}" for number in range(400)]
LINES = 120
NEAR, SAME = 7, 5


def prose(seed: int) -> list[str]:
    return [WORDS[number] for number in np.random.default_rng(seed).integers(0, len(WORDS), 70)]


def write_inputs(folder: Path) -> Path:
    """Jsonl without ids, packed jsonl, parquet and a text, with planted faults and duplicates in other files."""
    folder.mkdir()
    lines = [json.dumps({"text": " ".join(prose(number))}).encode() for number in range(LINES)]
    lines[3] = b'{"text": "not \xff text"}'
    lines[10] = b""
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    near = [prose(number) for number in range(20, 20 + NEAR)]
    for words in near:
        words[-1] = "another"
    packed = [{"id": f"near{number}", "text": " ".join(words)} for number, words in enumerate(near)]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, packed)).encode()))
    texts = [" ".join(prose(number)) for number in [*range(40, 40 + SAME), *range(500, 560)]]
    ids = [f"row{number}" for number in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": texts}), folder / "c.parquet", row_group_size=10)
    (folder / "d.txt").write_text("short")
    return folder


def bytes_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def wanted(tmp_path: Path) -> Ingestion:
    return Ingestion(
        inputs=[str(write_inputs(tmp_path / "in"))],
        output=str(tmp_path / "out"),
        tokenizer=Tokenizer.load(write_tokenizer(tmp_path / "tokenizer.json")),
        steps=ALL_STEPS,
        held_out_fraction=0.2,
        block_tokens=3000,
        unit_bytes=12_000,
        on_ray=False,
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks a shard and little text a batch, so that a small input has several of everything."""
    facts = ingest_module.DatasetFacts
    monkeypatch.setattr(ingest_module, "DatasetFacts", lambda **given: facts(shard_blocks=2, **given))
    monkeypatch.setattr(units_module, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(units_module, "BLOCK_CHARACTERS", 6000)


def rows_of(dataset: Dataset) -> Iterator[dict[str, object]]:
    for split in SPLITS:
        seen = set()
        for shard in range(dataset.num_shards(split)):
            for row in dataset.documents(split, shard).to_pylist():
                if row["number"] not in seen:
                    seen.add(row["number"])
                    yield row | {"split": split}


def test_what_is_dropped_and_why_and_where_the_rest_is_from(wanted: Ingestion) -> None:
    dataset, report = ingest(wanted)
    told = json.loads((Path(wanted.output) / "report.json").read_text())
    counts = {reason: found["documents"] for reason, found in told["dropped"].items()}
    assert counts == {"not_utf8": 1, "near_duplicate": NEAR, "duplicate": SAME, "quality": 1}
    assert told["dropped"]["not_utf8"]["examples"] == [{"id": "a.jsonl:4", "source": "a.jsonl", "row": 4, "detail": ""}]
    assert told["dropped"]["near_duplicate"]["examples"][0]["detail"] == "a.jsonl:21 is kept"
    assert told["dropped"]["quality"]["details"] == {"min_words": 1}
    assert told["identity"] == dataset.identity and dataset.manifest.num_duplicates == SAME
    total = LINES - 2 + 60
    assert sum(report.kept.values()) == total == sum(dataset.num_documents(split) for split in SPLITS)
    tokenizer = wanted.tokenizer
    parquet = pq.read_table(Path(wanted.inputs[0]) / "c.parquet").column("text").to_pylist()
    for row in rows_of(dataset):
        text = tokenizer.decode(dataset.document(row["split"], row["number"]).tokens[:-1])  # type: ignore[arg-type]
        if row["source"] == "a.jsonl":
            assert row["id"] == f"a.jsonl:{row['row']}" and text == " ".join(prose(int(str(row["row"])) - 1))
        else:
            assert row["source"] == "c.parquet" and text == parquet[int(str(row["row"]))]


def test_bytes_depend_neither_on_the_order_in_which_work_ends_nor_on_how_it_is_cut(
    wanted: Ingestion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(task: Callable[[str], str], items: list[str]) -> Iterator[tuple[str, str]]:
        assert len(items) > 3
        for item in reversed(items):
            yield item, task(item)

    ingest(wanted)
    monkeypatch.setattr(ingest_module, "run_here", backwards)
    ingest(replace(wanted, output=str(tmp_path / "backwards"), unit_bytes=7000))
    assert bytes_of(tmp_path / "backwards") == bytes_of(tmp_path / "out")


def test_stopped_at_any_point_it_goes_on_and_repeats_nothing_finished(
    wanted: Ingestion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(replace(wanted, output=str(tmp_path / "whole")))

    def stopped(wanted: Ingestion, name: str, most: int) -> list[tuple[str, int]]:
        """Prepare until `most` more units or shards are done; what was told of progress."""
        task, done, told = getattr(ingest_module, name), [], []

        def counted(job: object, item: str) -> str:
            if len(done) == most:
                raise KeyboardInterrupt
            done.append(item)
            return str(task(job, item))

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ingest_module, name, counted)
            ingest(wanted, lambda what, finished, total: told.append((what, finished)))
        return told

    partial = tmp_path / ".out.partial"
    stopped(wanted, "process", 2)
    assert not Path(wanted.output).exists() and partial.exists()
    assert stopped(wanted, "process", 1)[0] == ("text", 2)
    assert stopped(wanted, "make_shard", 2)[0] == ("text", 3)
    made = {path.name: path.stat().st_mtime_ns for path in partial.glob("*/shards/*.arrow")}
    assert len(made) == 2
    stopped(wanted, "_hash_file", 0)
    assert made.items() <= {path.name: path.stat().st_mtime_ns for path in partial.glob("*/shards/*.arrow")}.items()
    # Other options on the way leave nothing of theirs behind.
    stopped(replace(wanted, steps=Steps(invalid_utf8="drop", rows=True)), "make_shard", 3)
    ingest(wanted)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not partial.exists()


def test_two_at_once_into_one_output_are_refused(wanted: Ingestion, tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        with pytest.raises(DataError, match="is being prepared by another process"):
            ingest(wanted)

    ingest(wanted, second)


def test_faults_of_the_input_are_named(wanted: Ingestion, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:4: not UTF-8"):
        ingest(replace(wanted, steps=replace(ALL_STEPS, invalid_utf8="refuse")))
    with pytest.raises(DataError, match=r"none of 192 documents is kept \(.*quality.*\)"):
        ingest(replace(wanted, steps=replace(ALL_STEPS, quality=ALL_STEPS.quality.parse(["min_words=900"]))))  # type: ignore[union-attr]
    lines = (tmp_path / "in/a.jsonl").read_bytes().split(b"\n")
    lines[60] = b'{"body": "no text"}'
    (tmp_path / "in/a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:61: no string under 'text'"):
        ingest(wanted)
    with pytest.raises(DataError, match=r"c\.parquet: no column 'body' among id, text"):
        ingest(replace(wanted, inputs=[str(tmp_path / "in/c.parquet")], text_field="body"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="the input has no text in it"):
        ingest(replace(wanted, inputs=[str(tmp_path / "empty.jsonl")], output=str(tmp_path / "none")))


def test_text_that_judges_models_is_kept_out(
    wanted: Ingestion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = ingest(wanted)
    held_out = {row["id"] for row in rows_of(first) if row["split"] == "held_out"}
    lines = [json.dumps({"id": "leak", "text": " ".join([*prose(900), *prose(int(str(name).split(":")[1]) - 1)[:30]])})
             for name in held_out if str(name).startswith("a.jsonl")]  # fmt: skip
    (tmp_path / "leaks.jsonl").write_text("\n".join(lines))
    arguments = ["--input", str(tmp_path / "in"), str(tmp_path / "leaks.jsonl"), "--output", str(tmp_path / "second")]
    arguments += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--held-out-fraction", "0.2"]
    assert main([*arguments, "--decontaminate", str(tmp_path / "out"), "--near-duplicates", "keep"]) == 0
    assert "dropped: contaminated" in capsys.readouterr().out
    told = json.loads((tmp_path / "second/report.json").read_text())
    leaks = told["dropped"]["contaminated"]["documents"]
    again = [row["id"] for row in rows_of(Dataset.open(tmp_path / "second")) if row["split"] == "train"]
    assert leaks > 5 and "leak" not in again and not held_out & set(again)


def write_run(run: Path, dataset: Dataset, num_steps: int) -> tuple[Path, Callable[..., Path]]:
    """A run that trains on a dataset, as far as its order goes, and what writes a checkpoint's manifest into it."""
    config = load.compose(["recipe=foundation"])
    stage = config.stages["pretrain"]
    training = replace(
        stage.training,
        mixture={"business": 1.0},
        mixture_changes=(),
        sequence_length=200,
        global_batch=4,
        micro_batch=1,
        tokens=num_steps * 800,
    )
    sources = {"business": SourceConfig(path=dataset.path)}
    config = replace(
        config, stages={"pretrain": replace(stage, training=training)}, data=replace(config.data, sources=sources)
    )
    run.mkdir(parents=True)
    load.write(config, run / "config.json")
    (run / "datasets.json").write_text(json.dumps({"business": dataset.path}))
    identity = dataset.identity

    def saved(step: int, stage: str = "pretrain", **about: object) -> Path:
        path = run / f"stages/{stage}/checkpoints/step-{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        provenance = {"stage": stage, "data": {"business": identity}, "parents": [], **about}
        (path / "manifest.json").write_text(json.dumps({"step": step, "provenance": provenance}))
        return path

    return run, saved


def stream_over(run: Path, dataset: Dataset) -> Stream:
    return stream_of_stage(load.read(run / "config.json"), "pretrain", {"business": dataset})


def test_a_forgotten_document_is_gone_and_stays_gone(
    wanted: Ingestion, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "PART_SHARDS", 2)
    before, _ = ingest(wanted)
    assert before.num_shards("train") > before.part_shards("train") == 2
    rows = list(rows_of(before))
    trained = next(row for row in rows if row["split"] == "train" and row["id"] == "a.jsonl:25")
    judged = next(row for row in rows if row["split"] == "held_out")
    # One that begins a shard: the shard before repeats its first token.
    size = before.manifest.block_tokens * before.manifest.shard_blocks
    border = next(row for row in rows if row["split"] == "train" and row["first_token"] <= size < row["first_token"] + row["num_tokens"])  # type: ignore[operator]  # fmt: skip # noqa: E501
    ids = [str(row["id"]) for row in (trained, judged, border)]
    runs = tmp_path / "elsewhere/step-00000002"
    runs.mkdir(parents=True)
    (runs / "manifest.json").write_text(json.dumps({"provenance": {"data": {"business": before.identity}}}))
    run, saved = write_run(tmp_path / "runs/one", before, num_steps=40)
    shown = [
        {name for names in stream_over(run, before).documents(step).values() for name in names} for step in range(40)
    ]

    with pytest.raises(DataError, match=r"holds no document nobody\. Nothing was changed"):
        forget([ids[0], "nobody"], wanted.output)
    done = forget(ids[:2], wanted.output)
    # By step, where the run is there to say; what is made from a checkpoint had seen what that had.
    child = saved(0, stage="prune", data={}, parents=[{"path": str(saved(40))}])
    for document, split in ((ids[0], "train"), (ids[1], "held_out")):
        passages = [passage for passage in done.passages if passage.id == document]
        assert [passage.split for passage in passages] == [split]
        for step in range(41):
            saved(step)
        found = {each.checkpoint: each.saw for each in sightings(run, done.identities, passages)}
        first = next((step for step in range(40) if document in shown[step]), 40)
        assert (0 < first < 40) == (split == "train")
        assert found == {str(saved(step)): step > first for step in range(41)} | {str(child): split == "train"}
    (unknown,) = sightings(tmp_path / "elsewhere", done.identities, done.passages)
    assert unknown.saw and "by the dataset alone" in unknown.why
    arguments = ["--dataset", wanted.output, "--runs", str(tmp_path / "elsewhere")]
    assert forget_main([ids[2], *arguments]) == 0
    # Checkpoints from before the first act had seen what the second one takes out.
    assert f"had seen it: {runs} (business" in capsys.readouterr().out
    assert forget_main([ids[0], "--dataset", wanted.output, "--runs", str(run)]) == 0
    told = capsys.readouterr().out
    first = next(step for step in range(40) if ids[0] in shown[step])
    assert (
        "forgotten 20" in told and f"had not seen it: {saved(first)} (business: first shown in step {first} of" in told
    )
    assert f"had seen it: {child} (made from {saved(40)})" in told

    after = Dataset.open(wanted.output)
    after.check_stored()
    assert after.identity not in (before.identity, done.identities)
    gone = {(row["split"], row["number"]) for row in (trained, judged, border)}
    names = {(row["split"], row["number"]): row["id"] for row in rows_of(after)}
    for row in rows:
        place = (row["split"], row["number"])
        tokens = after.document(*place).tokens  # type: ignore[arg-type]
        assert len(tokens) == row["num_tokens"]
        assert (names[place] == FORGOTTEN_ID) == (place in gone) == bool((tokens == after.end_of_text_id).all())
    for split in SPLITS:
        size = after.manifest.block_tokens
        for number in range(-(-after.num_tokens(split) // size) - 1):
            assert after.block(split, number)[-1] == after.block(split, number + 1)[0]
    assert FORGOTTEN_ID not in {document.id for document in held_out_documents(after, 10**6)}
    content = b"".join(path.read_bytes() for path in (tmp_path / "tombstones").iterdir())
    assert all(name.encode() in content for name in ids) and b"word" not in content

    again, report = ingest(replace(wanted, output=str(tmp_path / "again")))
    assert not set(ids) & {str(row["id"]) for row in rows_of(again)}
    assert report.dropped["forgotten"].documents >= 3


def test_a_document_that_begins_a_shard_is_in_the_shard_before_too() -> None:
    from data.forget import Passage

    passages = {first: Passage(id="", split="train", first=first, after=first + 10) for first in (0, 99, 100, 101, 195)}
    assert {first: list(shards_of(passage, 100)) for first, passage in passages.items()} == {
        0: [0], 99: [0, 1], 100: [0, 1], 101: [1], 195: [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize("dies_at", ["write", "delete"])
def test_forgetting_that_was_killed_is_carried_out_by_the_next(
    wanted: Ingestion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    dataset, _ = ingest(wanted)
    ids = [str(row["id"]) for row in rows_of(dataset)][:2]
    with monkeypatch.context() as patch:
        verb = getattr(Store, dies_at)

        def die(store: Store, name: str, *content: bytes) -> None:
            if name == ("train/index.parquet" if dies_at == "write" else "forgetting/commit.json"):
                raise KeyboardInterrupt
            verb(store, name, *content)

        patch.setattr(Store, dies_at, die)
        with pytest.raises(KeyboardInterrupt):
            forget(ids[:1], wanted.output)
    forget(ids[1:], wanted.output)
    left = {str(row["id"]) for row in rows_of(Dataset.open(wanted.output))}
    assert not left & set(ids) and not list(Path(wanted.output).glob("forgetting/*"))


def test_pieces_of_jsonl_have_every_line_once_wherever_they_are_cut(tmp_path: Path) -> None:
    from data.documents import PieceReader, pieces

    texts = ["", "a", "bb" * 9, "\u00e9" * 7, "c" * 40, "d"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    (file,) = input_files([str(tmp_path / "x.jsonl")])
    for num_bytes in range(1, 200, 3):
        found, lines = [], 0
        for piece in pieces(file, num_bytes):
            reader = PieceReader(piece, "text")
            found += [(lines + record.row, record.text) for record in reader]
            lines += reader.num_lines
        assert found == list(enumerate(texts, 1))
