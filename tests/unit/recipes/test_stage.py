"""What a stage is given: models that speak the tokens of this run's data."""

from types import SimpleNamespace

import pytest
import torch
from check_samples import rehearsal

from conf.errors import CheckpointError
from parallel.engine import Piece
from recipes.stage import StageInput
from train.checkpoint import Checkpoint, checkpoint_name
from train.manifest import Provenance
from train.saver import Saver


@pytest.fixture
def checkpoint(tmp_path):
    config = rehearsal()
    provenance = Provenance(
        run="run-1",
        recipe="foundation",
        stage="pretrain",
        model=config.model,
        engine=config.engine,
        tokenizer="0" * 64,
        data={},
        parents=(),
    )
    saver = Saver(tmp_path, rank=0, world_size=1, keep=1)
    weights = [Piece("model.norm.weight", (3,), (0,), torch.ones(3))]
    saver.save(1, weights=weights, resume=[], provenance=provenance, samples=0, tokens=0)
    saver.wait()
    return tmp_path / checkpoint_name(1)


def given(checkpoint, tokenizer):
    datasets = {"business": SimpleNamespace(tokenizer_sha256=tokenizer)}
    return StageInput(context=None, name="distill", incoming=checkpoint, datasets=datasets)


def test_a_teacher_or_student_of_another_tokenizer_is_refused(checkpoint):
    assert isinstance(given(checkpoint, "0" * 64).open_model(None), Checkpoint)
    with pytest.raises(
        CheckpointError, match=r"tokenizer 000000000000.*111111111111.*token ids would mean other words"
    ):
        given(checkpoint, "1" * 64).open_model(None)
