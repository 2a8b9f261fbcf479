"""Rules between the engine and what is asked of it."""

import pytest
from check_samples import assert_told, problems_of, rehearsal


@pytest.mark.parametrize("stage", [2, 3])
def test_megatron_splits_only_optimizer_state(stage):
    assert_told(rehearsal(engine__zero_stage=stage), "engine.zero_stage", "Megatron", "engine.zero_stage=1")
    assert "engine.zero_stage" not in problems_of(rehearsal(engine__zero_stage=1))
