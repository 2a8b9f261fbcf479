"""The exported directory is the model: real text through transformers gives the logits our engine gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

OVERRIDES = (
    "recipe=foundation",
    "init=null",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.head_dim=16",
    "model.init_std=0.3",
    "engine.mesh.data=1",
)


MIXTURE = ("model=mixtral_8x7b",)


def export_fresh_models(directory: str, prepared_text: str) -> Any:
    """What `export_fresh_model` returns, of a dense model and of a mixture of experts."""
    cache = f"data.cache_dir={prepared_text}"
    return [
        export_fresh_model(f"{directory}/{name}", cache, *more) for name, more in (("llama", ()), ("mixtral", MIXTURE))
    ]


def export_fresh_model(directory: str, *overrides: str) -> Any:
    """Save fresh weights, export them, and return our logits and those of transformers, shape (B, S, V)."""
    import torch
    from test_hugging_face import Watch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conf import load
    from data.held_out import held_out_batches
    from parallel import groups
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.mesh import Mesh
    from recipes.driver import open_run, prepare_sources
    from recipes.export import export
    from recipes.stage import StageInput, open_datasets, tokenizer_identity
    from train import rundir
    from train.checkpoint import Provenance, checkpoint_name
    from train.saver import Saver
    from train.worker import Place, RankContext

    config = load.compose([*OVERRIDES, *overrides, f"runs_dir={directory}"])
    run = rundir.create(Path(directory), config.name)
    open_run(run, config)
    run.datasets_file.write_text(json.dumps(prepare_sources(config)))
    run.tokenizer_file.write_bytes((Path(load.CONF).parent / "data/corpora/tokenizer.json").read_bytes())
    datasets = open_datasets(run, config.data)
    stage, training = config.stages["export"], config.stages["pretrain"].training

    groups.enter_mesh(Mesh())
    engine = make_engine(config.model, config.engine, training.optim, Mesh(), micro_batch=2)
    engine.load_weights(InitialWeights(config.model, config.seed))
    provenance = Provenance(
        run=run.name,
        recipe=config.name,
        stage="pretrain",
        model=config.model,
        engine=config.engine,
        tokenizer=tokenizer_identity(datasets),
        data={},
        parents=(),
    )
    saver = Saver(run.checkpoints("pretrain"), rank=0, world_size=1, keep=1)
    saver.save(1, weights=engine.weights(), resume=[], provenance=provenance, samples=0, tokens=0)
    saver.wait()
    batch = held_out_batches(datasets["business"], tokens=400, sequence_length=128, micro_batch=2)[0]
    watch = Watch()
    engine.step([batch], watch, learning_rate=0.0)
    engine.close()

    place = Place(rank=0, world_size=1, local_rank=0, ranks_on_node=1, master_address="", master_port=0)
    checkpoint = run.checkpoints("pretrain") / checkpoint_name(1)
    context = RankContext(place=place, config=config, run=run)
    export(StageInput(context=context, name="export", incoming=checkpoint, datasets=datasets), stage)
    groups.leave_mesh()
    model = AutoModelForCausalLM.from_pretrained(run.export).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    with torch.no_grad():
        theirs = model(torch.from_numpy(batch.tokens_BS)).logits
    text = tokenizer.decode(batch.tokens_BS[0], skip_special_tokens=True)
    return watch.seen[0].numpy(), theirs.numpy(), text, type(model).__name__


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, prepared_text: Path) -> Any:
    return run_ranks(export_fresh_models, 1, str(tmp_path_factory.mktemp("runs")), str(prepared_text))[0]


@pytest.mark.parametrize(("index", "architecture"), [(0, "LlamaForCausalLM"), (1, "MixtralForCausalLM")])
def test_exported_model_gives_our_logits_on_real_text(exported: Any, index: int, architecture: str):
    ours, theirs, text, name = exported[index]
    assert name == architecture
    assert len(text.split()) > 20, "real text"
    assert abs(theirs).max() > 1.0, "there is something to compare"
    assert ours == pytest.approx(theirs, abs=1e-4)
