"""INT8 and FP8: the same whatever the layout, and the same in transformers once exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks, smaller_world
from tiny import MODEL, Layout, batches, tiny_engine

from conf.schema import ExpertsConfig, ModelConfig
from parallel.initial import InitialWeights
from parallel.quantisation import QuantisedWeights
from parallel.smoothing import SmoothedWeights, smoothing_factors
from parallel.weight_names import logical_shapes

pytest.importorskip("compressed_tensors")
WILD = replace(MODEL, name="wild", init_std=0.3)
MIXTURE = replace(
    WILD,
    name="wild-mixture",
    num_layers=2,
    experts=ExpertsConfig(
        num_experts=4, num_experts_per_token=2, balance_loss=0.01, router_z_loss=0.001, capacity_factor=None
    ),
)
KEPT = (1,)
LAYOUTS = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "data": Layout(data=2),
    "one": Layout(),
}
SCHEMES = ("w8a16", "w8a8", "fp8")
# A sum in another order can move one input across a rounding border: by one step of 127, or by a sixteenth of itself.
CLOSE = {"w8a16": 1e-4, "w8a8": 2e-2, "fp8": 2e-2}
FAR_REACHING = 40.0


def everything(directory: str) -> dict[str, Any]:
    """Run on each of two ranks."""
    found: dict[str, Any] = {}
    for size in (2, 1):
        with smaller_world(size, f"world of {size}") as inside:
            for name, layout in LAYOUTS.items():
                if inside and layout.mesh.world_size == size:
                    found[name] = {scheme: _scores(layout, scheme) for scheme in SCHEMES} | _smoothed(layout)
            if inside and size == 1:
                found["float"] = _scores(Layout(), None)
                found["mixture"] = {scheme: _scores(Layout(), scheme, MIXTURE, ()) for scheme in (None, "w8a16")}
                _export(Path(directory) / "mixture", "w8a16", torch.float32, MIXTURE, ())
                found["overflow"] = _ranges_of_an_overflow()
                for scheme in SCHEMES:
                    for precision in (torch.float32, torch.bfloat16):
                        _export(Path(directory) / f"{scheme} {precision}", scheme, precision)
    return found


def _weights(scheme: str, model: ModelConfig, kept: tuple[int, ...]) -> QuantisedWeights:
    return QuantisedWeights(InitialWeights(model, 1), logical_shapes(model), scheme, kept)


class WithOutliers:
    """A model that says what WILD says, and some of whose channels reach far, as those of large models do."""

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        tensor = InitialWeights(WILD, 1).read(name, offset, shape).clone()
        if name.endswith("layernorm.weight"):
            tensor[torch.arange(offset[0], offset[0] + shape[0]) % 16 == 3] *= FAR_REACHING
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, torch.arange(offset[1], offset[1] + shape[1]) % 16 == 3] /= FAR_REACHING
        return tensor


def _smoothed(layout: Layout) -> dict[str, Any]:
    """What smoothing finds and does on a mesh."""
    from parallel import groups

    groups.enter_mesh(layout.mesh)
    engine = tiny_engine(layout, WILD, optim=None)
    questions, before = batches(0, layout.mesh, engine.coordinate.data), WithOutliers()
    engine.load_weights(before)
    ranges = engine.input_ranges(questions)
    factors = smoothing_factors(ranges, before, WILD, 0.5)
    after, found = SmoothedWeights(before, factors), {}
    for name, weights in {"plain": before, "smoothed": after}.items():
        engine.load_weights(weights)
        engine.round_inputs("w8a16", ())
        found[name] = engine.score(questions).loss_B.tolist()
        engine.load_weights(QuantisedWeights(weights, logical_shapes(WILD), "w8a8"))
        engine.round_inputs("w8a8", ())
        found[f"{name} w8a8"] = engine.score(questions).loss_B.tolist()
    engine.close()
    groups.leave_mesh()
    return found | {
        "ranges": {name: values.numpy() for name, values in ranges.items()},
        "factors": {name: values.numpy() for name, values in factors.items()},
    }


def _scores(layout: Layout, scheme: str | None, model: ModelConfig = WILD, kept: tuple[int, ...] = KEPT) -> list[float]:
    from parallel import groups

    groups.enter_mesh(layout.mesh)
    engine = tiny_engine(layout, model, optim=None)
    engine.load_weights(InitialWeights(model, 1) if scheme is None else _weights(scheme, model, kept))
    if scheme is not None:
        engine.round_inputs(scheme, kept)
    rows = engine.score(batches(0, layout.mesh, engine.coordinate.data))
    engine.close()
    groups.leave_mesh()
    return (rows.loss_B / rows.num_tokens_B.clamp_min(1)).tolist()


def _ranges_of_an_overflow() -> str:
    """What is said when an activation of layer 2 is not finite."""
    from parallel import groups

    class Overflowing(WithOutliers):
        def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
            tensor = super().read(name, offset, shape)
            return tensor * torch.nan if name == "model.layers.2.mlp.up_proj.weight" else tensor

    groups.enter_mesh(Layout().mesh)
    engine = tiny_engine(Layout(), WILD, optim=None)
    engine.load_weights(Overflowing())
    try:
        engine.input_ranges(batches(0, Layout().mesh, 0))
    except FloatingPointError as error:
        return str(error)
    finally:
        engine.close()
        groups.leave_mesh()
    return "nothing"


def _export(
    directory: Path, scheme: str, precision: torch.dtype, model: ModelConfig = WILD, kept: tuple[int, ...] = KEPT
) -> None:
    from safetensors.torch import save_file

    from recipes.compressed_tensors import compressed_tensors, mark_quantised
    from recipes.export import hugging_face_config
    from recipes.quantise import Quantisation

    directory.mkdir()
    weights, quantisation = _weights(scheme, model, kept), Quantisation(scheme=scheme, kept_layers=kept)
    # As an export stage has it: the rounded weights, read back as floats.
    tensors = {name: weights.read(name, (0,) * len(size), size) for name, size in logical_shapes(model).items()}
    layout = compressed_tensors(tensors, quantisation, precision)
    save_file(layout, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hugging_face_config(model, precision)))
    mark_quantised(directory, quantisation, model.num_layers)


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
    assert found[name][scheme] == pytest.approx(found["one"][scheme], abs=CLOSE[scheme])


def test_each_rounding_costs_something_and_little(found):
    assert found["one"]["w8a16"] != found["float"] and found["one"]["w8a8"] != found["one"]["w8a16"]
    assert found["one"]["w8a8"] == pytest.approx(found["float"], rel=0.05)
    assert found["one"]["fp8"] == pytest.approx(found["float"], rel=0.1)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_smoothing_does_not_depend_on_the_layout(found, name):
    for channels, ranges in found["one"]["ranges"].items():
        assert found[name]["ranges"][channels] == pytest.approx(ranges, rel=1e-5)
        assert np.array_equal(found[name]["factors"][channels], found["one"]["factors"][channels])
    assert found[name]["smoothed w8a8"] == pytest.approx(found["one"]["smoothed w8a8"], rel=5e-3)


def test_activations_that_are_not_finite_are_refused_with_their_layers(found):
    # Layer 3 is given what layer 2 made.
    assert "attention) are not finite in layers [3]" in found["overflow"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_smoothing_alone_changes_no_bit_of_what_a_model_says(found, name):
    assert found[name]["smoothed"] == found[name]["plain"]
    assert any((factors != 1.0).any() for factors in found[name]["factors"].values())


def test_smoothing_makes_rounding_cost_less_where_channels_reach_far(found):
    plain, one = np.array(found["one"]["plain"]), found["one"]
    costs = [np.abs(np.array(one[f"{name} w8a8"]) - plain).sum() for name in ("plain", "smoothed")]
    assert costs[1] < 0.5 * costs[0], costs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_says_in_transformers_what_it_says_here(found, directory, scheme):
    theirs = _scores_in_transformers(directory / f"{scheme} {torch.float32}")
    assert theirs == pytest.approx(found["one"][scheme], abs=CLOSE[scheme])
    assert theirs != pytest.approx(found["float"], abs=1e-6), "what was loaded is rounded"


def test_exported_experts_say_in_transformers_what_they_say_here(found, directory):
    theirs, ours = _scores_in_transformers(directory / "mixture"), found["mixture"]
    assert theirs == pytest.approx(ours["w8a16"], abs=CLOSE["w8a16"])
    assert theirs != pytest.approx(ours[None], abs=1e-4), "what was loaded is rounded"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exports_in_both_precisions_have_the_same_matrices(directory, scheme, found):
    from safetensors.torch import load_file

    one, other = (
        load_file(directory / f"{scheme} {precision}" / "model.safetensors")
        for precision in (torch.float32, torch.bfloat16)
    )
    assert one.keys() == other.keys()
    for name in one:
        if "_proj." in name and ".layers.1." not in name:
            assert torch.equal(one[name].float(), other[name].float()), name
