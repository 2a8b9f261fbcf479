from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MakeDataset

from conf import load
from data import show
from data.shards import Dataset
from data.stream import stream_of_stage

SOURCES = ("business", "development", "creative")


def test_a_run_shows_what_it_read_whatever_its_sources_are_now(
    make_dataset: MakeDataset, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read, now = make_dataset("read"), make_dataset("now", num_documents=70)
    paths = [f"data.sources.{source}.path={now.path}" for source in SOURCES]
    config = load.compose(["recipe=business_module", f"data.tokenizer={tokenizer_path}", *paths])
    load.write(config, tmp_path / "config.json")
    (tmp_path / "datasets.json").write_text(json.dumps(dict.fromkeys(SOURCES, read.path)))
    assert show.main([f"run={tmp_path}", "step=3", "stage=recover"]) == 0
    stream = stream_of_stage(config, "recover", dict.fromkeys(SOURCES, Dataset.open(read.path)))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"step 3 of recover: {len(lines)} samples"
    documents = stream.documents(3)
    assert [line.rsplit(": ", 1)[1] for line in lines] == [", ".join(names) for names in documents.values()]
    assert show.main([f"run={tmp_path}", "step=100000", "stage=recover"]) == 2
    assert "step=100000: recover takes" in capsys.readouterr().err
    assert [int(line.split()[0]) for line in lines] == stream.sample_ids(3).tolist()
