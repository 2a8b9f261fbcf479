"""Whatever was saved can be read back in any other cut, and nothing that was not saved can be read."""

from __future__ import annotations

import json
import math
import random
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from checkpoint_samples import MODEL, cut, sample_tensors, save_alone, save_together
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from conf.errors import CheckpointError
from train.box import Box
from train.checkpoint import Checkpoint, checkpoints_in, newest_verified
from train.manifest import decode_manifest
from train.tensor_file import DTYPE_CODES

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def box_pairs(draw: st.DrawFn) -> tuple[Box, Box]:
    dims = draw(st.integers(0, 3))
    corners = st.lists(st.integers(0, 4), min_size=dims, max_size=dims).map(tuple)
    return Box(draw(corners), draw(corners)), Box(draw(corners), draw(corners))


def indices(box: Box) -> set[tuple[int, ...]]:
    return {tuple(index) for index in (torch.ones(box.shape).nonzero() + torch.tensor(box.offset).long()).tolist()}


@given(box_pairs())
def test_overlap_and_difference_of_boxes_are_those_of_their_indices(boxes):
    one, other = boxes
    common, rest = one.overlap(other), one.minus(other)
    assert (indices(common) if common else set()) == indices(one) & indices(other)
    assert sum(box.num_elements for box in rest) == len(indices(one) - indices(other))
    assert set().union(*map(indices, rest)) == indices(one) - indices(other)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(list(DTYPE_CODES)), num_ranks=st.integers(1, 3), chance=st.randoms())
def test_any_cut_is_read_back_in_any_other_cut(shape, dtype, num_ranks, chance):
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    tensor = data.view(dtype).view(shape)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = save_together(Path(directory), 1, cut("some/tensor", tensor, num_ranks, chance))
        for wanted in [piece for rank in cut("some/tensor", tensor, 2, chance) for piece in rank]:
            found = checkpoint.weights.read("some/tensor", wanted.offset, tuple(wanted.tensor.shape))
            assert found.dtype == dtype and found.shape == wanted.tensor.shape
            assert bytes_of(found) == bytes_of(wanted.tensor)


def bytes_of(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def test_every_byte_of_every_file_is_under_a_hash(tmp_path):
    checkpoint = save_alone(tmp_path, 1, sample_tensors())
    checkpoint.verify()
    for path in sorted(path for path in checkpoint.path.rglob("*") if path.is_file()):
        original = path.read_bytes()
        for position in range(0, len(original), max(1, len(original) // 97)):
            path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                Checkpoint.open(checkpoint.path).verify()
        path.write_bytes(original)
    Checkpoint.open(checkpoint.path).verify()


def test_reading_names_the_file_and_tensor_with_a_flipped_byte(tmp_path):
    tensors = sample_tensors()
    checkpoint = save_alone(tmp_path, 1, tensors)
    path = checkpoint.path / "weights/rank-00000.safetensors"
    contents = bytearray(path.read_bytes())
    wanted = bytes_of(tensors["model.norm.weight"])
    contents[contents.index(wanted) + 3] ^= 16
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: tensor model.norm.weight\[0:7\] is damaged"):
        checkpoint.weights.read("model.norm.weight", (0,), (1,))
    intact = checkpoint.weights.read("model.embed_tokens.weight", (0, 0), (12, 8))
    assert torch.equal(intact, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("harm", ["truncated", "longer", "missing"])
def test_file_of_another_size_is_refused(tmp_path, harm):
    checkpoint = save_alone(tmp_path, 1, sample_tensors())
    path = checkpoint.path / "resume/rank-00000.safetensors"
    match harm:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        case "missing":
            path.unlink()
    for read in (
        checkpoint.check_files,
        checkpoint.verify,
        lambda: checkpoint.resume.read("step", (), ()),
    ):
        with pytest.raises(CheckpointError, match=r"resume/rank-00000\.safetensors"):
            read()


def test_tensor_larger_than_what_is_read_at_once_is_checked_and_read(tmp_path):
    tensor = torch.randn(1001, 1003)
    checkpoint = save_alone(tmp_path, 1, {"large": tensor})
    checkpoint.verify()
    for rows in (slice(0, 1001), slice(7, 990), slice(1000, 1001)):
        assert torch.equal(
            checkpoint.weights.read("large", (rows.start, 3), (rows.stop - rows.start, 1000)), tensor[rows, 3:]
        )
    path = checkpoint.path / "weights/rank-00000.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 128
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"tensor large\[0:1001, 0:1003\] is damaged"):
        checkpoint.verify()


def test_safetensors_library_opens_the_files(tmp_path):
    tensors = sample_tensors()
    checkpoint = save_alone(tmp_path, 1, tensors)
    with safe_open(checkpoint.path / "weights/rank-00000.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            key = f"{name}@{','.join('0' * tensor.dim())}"
            assert torch.equal(file.get_tensor(key), tensor)
        assert len(list(file.keys())) == len(tensors)


def test_what_is_not_there_is_refused(tmp_path):
    checkpoint = save_alone(tmp_path, 1, sample_tensors())
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.wait; the nearest name is lm_head\.weight"):
        checkpoint.weights.read("lm_head.wait", (0,), (1,))
    with pytest.raises(CheckpointError, match=r"\[5:8\] is outside the tensor .* shape \(7,\)"):
        checkpoint.weights.read("model.norm.weight", (5,), (3,))


def test_another_model_is_refused_with_the_fields_that_differ(tmp_path):
    checkpoint = save_alone(tmp_path, 1, sample_tensors())
    checkpoint.require_model(replace(MODEL, name="other", max_sequence_length=99, init_std=1.0))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_model(replace(MODEL, num_layers=3, rope_theta=5e5))
    assert "num_layers is 2 in the checkpoint and 3 here" in str(caught.value)
    assert "rope_theta is 10000.0 in the checkpoint and 500000.0 here" in str(caught.value)
    assert "hidden_size" not in str(caught.value)


def test_newest_verified_passes_over_damage_and_incomplete_saves_and_says_why(tmp_path):
    for step in (10, 20, 30, 40):
        save_alone(tmp_path, step, sample_tensors(step))
    (tmp_path / "step-00000040" / "manifest.json").unlink()
    (tmp_path / "step-00000050.partial-1" / "weights").mkdir(parents=True)
    data = tmp_path / "step-00000030" / "resume/rank-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    newest = newest_verified(tmp_path)
    assert newest.checkpoint is not None and newest.checkpoint.manifest.step == 20
    assert len(newest.passed_over) == 1 and str(data) in newest.passed_over[0]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000010", "step-00000020", "step-00000030"]
    with pytest.raises(CheckpointError, match=r"no manifest\.json \(was its save cut short"):
        Checkpoint.open(tmp_path / "step-00000040")


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/weights/rank-00000.safetensors", "weights/rank-0/x"])
def test_file_name_that_leaves_the_checkpoint_is_refused(tmp_path, name):
    checkpoint = save_alone(tmp_path, 1, sample_tensors())
    path = checkpoint.path / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    body["weights"]["files"][0]["file"] = name
    body["sha256"] = sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with pytest.raises(CheckpointError, match=r"weights\.files\.0\.file: String should match pattern"):
        decode_manifest(json.dumps(body).encode(), path)


def test_verification_can_be_shared_among_ranks(tmp_path):
    tensor = torch.arange(64.0)
    checkpoint = save_together(tmp_path, 1, cut("w", tensor, 3, random.Random(1)))
    seen: list[list[int]] = [[], []]
    for share in range(2):
        checkpoint.verify(share, 2, on_file=seen[share].append)
    assert len(seen[0]) == len(seen[1]) == 3
    assert sum(map(sum, seen)) == checkpoint.num_bytes
