"""Changes told to somebody who ran out of memory: each of them valid, and fitting by the memory model."""

import math

from check_samples import BIG_DISK, changed, full_size

from conf.schema import RunConfig
from parallel.plan.memory import GIB
from recipes.check import resolve
from recipes.fitting import advice, changes_that_fit, needed_bytes

STAGE = "specialise"


def large_batch(**values: object) -> RunConfig:
    """A 70B on 256 GPUs whose micro-batch is too large for them."""
    training = f"stages__{STAGE}__training"
    batch = {f"{training}__micro_batch": 8, f"{training}__global_batch": 512}
    config = changed(full_size(), **batch, engine__recompute="none")
    return resolve(changed(config, **values), BIG_DISK)


def test_three_changes_are_named_and_each_fits():
    config = large_batch()
    assert needed_bytes(config, STAGE) > 80 * GIB
    found = changes_that_fit(config, STAGE, 80 * GIB)
    assert len(found) == 3
    assert all(change.needed_bytes <= 80 * GIB for change in found)
    assert found[0].overrides == "engine.recompute=full"
    assert found[1].overrides == f"stages.{STAGE}.training.micro_batch=4 engine.mesh.tensor=8 engine.mesh.data=4"


def test_no_change_contains_another():
    words = [set(change.overrides.split()) for change in changes_that_fit(large_batch(), STAGE, 80 * GIB)]
    assert not any(one < other for one in words for other in words)


def test_changes_keep_the_number_of_ranks_and_divide_the_model():
    for change in changes_that_fit(large_batch(), STAGE, 60 * GIB):
        sizes = {"tensor": 4, "context": 2, "pipeline": 4, "data": 8}
        for key, value in (word.split("=") for word in change.overrides.split()):
            if key.startswith("engine.mesh."):
                sizes[key.removeprefix("engine.mesh.")] = int(value)
        assert math.prod(sizes.values()) == 256


def test_advice_says_what_is_needed_and_what_would_fit():
    text = advice(large_batch(), STAGE, 80 * GIB)
    assert "and a device has 80.0 GiB" in text
    assert "engine.recompute=full" in text


def test_advice_where_the_model_sees_no_reason():
    assert "look for other processes" in advice(large_batch(), STAGE, 10**15)


def test_advice_where_nothing_fits():
    assert "it takes more ranks" in advice(large_batch(), STAGE, GIB)
