"""Write the incoming model as a Hugging Face directory, a Llama or a Mixtral: weights, config, tokenizer, card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import EvaluateStage, ExportStage, ModelConfig, RunConfig, TargetConfig
from parallel.device import this_device
from recipes.compressed_tensors import compressed_tensors, mark_quantised
from recipes.model_card import model_card
from recipes.quantise import Quantisation, quantisation_of
from recipes.rules_compression import present
from recipes.speed import Speed, decode_speed_over, missing_packages, speeds_of, spread_of
from recipes.stage import StageInput, StageOutput
from recipes.targets import write_target
from train.checkpoint import Checkpoint
from train.metrics import MetricsWriter
from train.rundir import replace_text
from train.scores import Estimate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Hugging Face's own default; loaders read a file at a time.
FILE_BYTES = 5 * 2**30
UNKNOWN = Estimate(math.nan, 0.0)
QUARTILES = ("low", "median", "high")


def export(given: StageInput, stage: ExportStage) -> StageOutput:
    """Write a directory for each model."""
    given.announce(stage.kind)
    root = given.context.run.export
    models = present(given.context.config, stage.models)
    if not models:
        write_model(given, stage, given.open_incoming(), root)
    for name in models:
        quantisation = quantisation_of(given.context.run, name)
        write_model(given, stage, given.open_model(name), root / name, quantisation)
    if given.context.is_first:
        write_speeds(given, stage, {name: root / name for name in models})
    return StageOutput("finished", None)


def write_speeds(given: StageInput, stage: ExportStage, directories: dict[str, Path]) -> None:
    """A `speed` record for each model, and a `target` for each promise of speed."""
    metrics = MetricsWriter(given.context.run.metrics_file)
    speeds: dict[str, Speed] = {}
    if stage.speed_prompt_tokens and directories:
        if missing := missing_packages():
            text = f"speed is not measured: {' and '.join(missing)} missing. pip install -e .[serve]"
            metrics.write("message", level="info", text=text)
        else:
            speeds = speeds_of(directories, stage.speed_prompt_tokens)
    for name, speed in speeds.items():
        metrics.write(
            "speed",
            stage=given.name,
            model=name,
            device=this_device().type,
            prompt_tokens=stage.speed_prompt_tokens,
            prefill_seconds=dict(zip(QUARTILES, spread_of(speed.prefill_seconds), strict=True)),
            decode_seconds=dict(zip(QUARTILES, spread_of(speed.decode_seconds), strict=True)),
            memory_bytes=speed.memory_bytes,
            disk_bytes=sum(file.stat().st_size for file in directories[name].glob("*.safetensors")),
        )
    for name, target in speed_targets(given.context.config):
        known = target.model in speeds and target.baseline in speeds
        value = decode_speed_over(speeds[target.model], speeds[target.baseline]) if known else UNKNOWN
        write_target(metrics, given.name, name, target, value)


def speed_targets(config: RunConfig) -> Iterator[tuple[str, TargetConfig]]:
    """Promises of speed, by name, about models that there are."""
    for stage in (config.stages[name] for name in config.order):
        for name, target in stage.targets.items() if isinstance(stage, EvaluateStage) else ():
            both = (target.model, target.baseline)
            if target.quantity == "speed" and present(config, both) == both:
                yield name, target


def write_model(
    given: StageInput,
    stage: ExportStage,
    checkpoint: Checkpoint,
    directory: Path,
    quantisation: Quantisation | None = None,
) -> None:
    """Write one; files are shared out over the ranks, and no rank holds more than one file's tensors."""
    context = given.context
    directory.mkdir(parents=True, exist_ok=True)
    files = plan_files(checkpoint, DTYPES[stage.precision].itemsize)
    for index, (file, names) in enumerate(files.items()):
        if index % context.place.world_size == context.place.rank:
            dtype, whole = DTYPES[stage.precision], {name: whole_tensor(checkpoint, name) for name in names}
            if quantisation is None:
                tensors = {name: tensor.to(dtype) for name, tensor in whole.items()}
            else:
                tensors = compressed_tensors(whole, quantisation, dtype)
            save_file(tensors, directory / file, metadata={"format": "pt"})
    dist.barrier()
    if context.is_first:
        write_companions(given, checkpoint, directory, files, DTYPES[stage.precision])
        if quantisation is not None:
            mark_quantised(directory, quantisation, checkpoint.manifest.provenance.model.num_layers)
        MetricsWriter(context.run.metrics_file).write(
            "export",
            stage=given.name,
            path=str(directory),
            num_bytes=sum(file.stat().st_size for file in directory.iterdir() if file.is_file()),
        )


def plan_files(checkpoint: Checkpoint, itemsize: int) -> dict[str, list[str]]:
    """File name -> tensors in it, in the order of the manifest, each file at most `FILE_BYTES` (or one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in checkpoint.weights.shapes().items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if groups[-1] and size + num_bytes > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def whole_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A logical tensor, assembled from its pieces and verified."""
    shape = checkpoint.weights.shapes()[name]
    return checkpoint.weights.read(name, (0,) * len(shape), shape).contiguous()


def write_companions(
    given: StageInput, checkpoint: Checkpoint, directory: Path, files: dict[str, list[str]], dtype: torch.dtype
) -> None:
    """Everything beside the weights."""
    model = checkpoint.manifest.provenance.model
    if len(files) > 1:
        shapes = checkpoint.weights.shapes()
        total = sum(dtype.itemsize * torch.Size(shapes[name]).numel() for names in files.values() for name in names)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_json(directory / "model.safetensors.index.json", index)
    end_of_text = next(iter(given.datasets.values())).end_of_text_id
    token_ids = {"bos_token_id": None, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    write_json(directory / "config.json", hugging_face_config(model, dtype) | token_ids)
    write_json(directory / "generation_config.json", token_ids)
    shutil.copyfile(given.context.run.tokenizer_file, directory / "tokenizer.json")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.max_sequence_length,
        },
    )
    replace_text(directory / "README.md", model_card(given, checkpoint))


def hugging_face_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """`config.json` of a LlamaForCausalLM of this shape, or with experts of a MixtralForCausalLM."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_sequence_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if model.experts is None:
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": model.experts.num_experts,
        "num_experts_per_tok": model.experts.num_experts_per_token,
        "router_aux_loss_coef": model.experts.balance_loss,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "sliding_window": None,
    }


def write_json(file: Path, content: object) -> None:
    """Write a file whole or not at all."""
    replace_text(file, json.dumps(content, indent=2) + "\n")
