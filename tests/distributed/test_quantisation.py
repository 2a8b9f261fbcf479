"""INT8: the same whatever the layout, and the same in transformers once exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, smaller_world
from tiny import MODEL, Layout, batches, tiny_engine

from parallel.initial import InitialWeights
from parallel.quantisation import QuantisedWeights
from parallel.weight_names import logical_shapes

pytest.importorskip("compressed_tensors")
WILD = replace(MODEL, name="wild", init_std=0.3)
KEPT = (1,)
LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "one": Layout(),
}
SCHEMES = ("w8a16", "w8a8")


def everything(directory: str) -> dict[str, Any]:
    """Run on each of two ranks."""
    found: dict[str, Any] = {}
    for size in (2, 1):
        with smaller_world(size, f"world of {size}") as inside:
            for name, layout in LAYOUTS.items():
                if inside and layout.mesh.world_size == size:
                    found[name] = {scheme: _scores(layout, scheme) for scheme in SCHEMES}
            if inside and size == 1:
                found["float"] = _scores(Layout(), None)
                for scheme in SCHEMES:
                    _export(Path(directory) / scheme, scheme)
    return found


def _weights() -> QuantisedWeights:
    return QuantisedWeights(InitialWeights(WILD, 1), logical_shapes(WILD), KEPT)


def _scores(layout: Layout, scheme: str | None) -> list[float]:
    from parallel import groups

    groups.enter_mesh(layout.mesh)
    engine = tiny_engine(layout, WILD, optim=None)
    engine.load_weights(InitialWeights(WILD, 1) if scheme is None else _weights())
    if scheme == "w8a8":
        engine.round_inputs(KEPT)
    rows = engine.score(batches(0, layout.mesh, 0))
    engine.close()
    groups.leave_mesh()
    return (rows.loss_B / rows.num_tokens_B.clamp_min(1)).tolist()


def _export(directory: Path, scheme: str) -> None:
    from safetensors.torch import save_file

    from recipes.compressed_tensors import compressed_tensors, mark_quantised
    from recipes.export import hugging_face_config
    from recipes.quantise import Quantisation

    directory.mkdir()
    weights, quantisation = _weights(), Quantisation(scheme=scheme, kept_layers=KEPT)
    # As an export stage has it: the rounded weights, read back as floats.
    tensors = {name: weights.read(name, (0,) * len(size), size) for name, size in logical_shapes(WILD).items()}
    save_file(compressed_tensors(tensors, quantisation), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hugging_face_config(WILD, torch.float32)))
    mark_quantised(directory, quantisation, WILD.num_layers)


def _scores_in_transformers(directory: Path) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    means = []
    for batch in batches(0, Layout().mesh, 0):
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.tokens_BS)).logits
        labels, mask = torch.from_numpy(batch.labels_BS), torch.from_numpy(batch.loss_mask_BS)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        means += ((nll.view_as(mask) * mask).sum(1) / mask.sum(1).clamp_min(1)).tolist()
    return means


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, Any]:
    return run_ranks(everything, 2, str(directory))[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_rounding_does_not_depend_on_the_layout(found, name, scheme):
    # A sum in another order can move one input across a rounding border, by one step of 127.
    assert found[name][scheme] == pytest.approx(found["one"][scheme], abs=1e-4 if scheme == "w8a16" else 2e-2)


def test_each_rounding_costs_something_and_little(found):
    assert found["one"]["w8a16"] != found["float"] and found["one"]["w8a8"] != found["one"]["w8a16"]
    assert found["one"]["w8a8"] == pytest.approx(found["float"], rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_says_in_transformers_what_it_says_here(found, directory, scheme):
    theirs = _scores_in_transformers(directory / scheme)
    assert theirs == pytest.approx(found["one"][scheme], abs=1e-4 if scheme == "w8a16" else 2e-2)
    assert theirs != pytest.approx(found["float"], abs=1e-6), "INT8 is what was loaded"
