"""Our model is Hugging Face's Llama: same weights, same logits, same training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import MODEL as TINY
from tiny import OPTIM, TIED, Layout, batches, tiny_engine

from conf.schema import ModelConfig
from parallel.engine import LossSums
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.weight_names import logical_shapes

NUM_STEPS = 20
ENGINES = {"megatron": Layout(), "deepspeed": Layout(backend="deepspeed", zero_stage=2)}
LEARNING_RATE = 1e-3
# Weights large enough that attention is far from uniform, so that angles, scales and head order matter.
MODELS = [
    replace(TINY, name="untied", init_std=0.3, rope_theta=500.0, norm_epsilon=1e-3),
    replace(TIED, name="tied", init_std=0.3, num_kv_heads=4),
]


@dataclass(frozen=True)
class Watch(CrossEntropy):
    """Cross-entropy that keeps the logits it saw."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, logits_BSV: torch.Tensor, *args: Any) -> LossSums:
        self.seen.append(logits_BSV.detach().clone())
        return CrossEntropy.__call__(self, logits_BSV, *args)


def train_both() -> list[dict[str, Any]]:
    from parallel import groups

    groups.enter_mesh(Layout().mesh)
    try:
        return [
            {name: _ours(model, layout) for name, layout in ENGINES.items()} | {"theirs": _theirs(model)}
            for model in MODELS
        ]
    finally:
        groups.leave_mesh()


def _ours(model: ModelConfig, layout: Layout) -> Any:
    engine = tiny_engine(layout, model)
    engine.load_weights(InitialWeights(model, 2))
    watch = Watch()
    steps = [
        engine.step(batches(step, engine.mesh, 0), watch, learning_rate=LEARNING_RATE) for step in range(NUM_STEPS)
    ]
    engine.close()
    return {
        "logits": watch.seen[0].numpy(),
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
    }


def _theirs(model: ModelConfig) -> Any:
    llama = _llama(model)
    decayed = [parameter for parameter in llama.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in llama.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.epsilon,
    )
    logits, losses, grad_norms = [], [], []
    for step in range(NUM_STEPS):
        whole = batches(step, Layout().mesh, 0)
        tokens, labels, mask = (
            torch.cat([torch.from_numpy(getattr(batch, name)) for batch in whole])
            for name in ("tokens_BS", "labels_BS", "loss_mask_BS")
        )
        logits.append(llama(input_ids=tokens).logits)
        nll = torch.nn.functional.cross_entropy(logits[-1].flatten(0, 1), labels.flatten(), reduction="none")
        loss = (nll * mask.flatten()).sum() / mask.sum()
        adam.zero_grad()
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(llama.parameters(), OPTIM.clip_grad_norm).item())
        adam.step()
        losses.append(loss.item())
    return {"logits": logits[0][:2].detach().numpy(), "losses": losses, "grad_norms": grad_norms}


def _llama(model: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_sequence_length,
            rms_norm_eps=model.norm_epsilon,
            rope_theta=model.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tied_embeddings,
        )
    )
    weights = InitialWeights(model, 2)
    named = {name: weights.read(name, (0,) * len(shape), shape) for name, shape in logical_shapes(model).items()}
    missing, unexpected = llama.load_state_dict(named, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tied_embeddings else [])
    return llama


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(train_both, 1)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[model.name for model in MODELS])
def test_logits_are_those_of_llama(found, index, engine):
    ours, theirs = found[index][engine]["logits"], found[index]["theirs"]["logits"]
    assert abs(theirs).max() > 1.0, "there is something to compare"
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[model.name for model in MODELS])
def test_training_follows_llama_under_torch_adamw(found, index, engine):
    ours, theirs = found[index][engine], found[index]["theirs"]
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-5)
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-4)
