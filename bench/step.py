"""A training step of one model, ours beside others': `python -m bench.step`, on one GPU, or small on a CPU.

On a GPU: Llama-3-8B's layer, 8 layers, 8,192 tokens, a vocabulary of 32k, 8 micro-batches a step, optimizer included,
one contender after the other. On a CPU: a small model in float32, the contenders taking turns step by step, so that
ratios hold on a busy machine. Prints medians, TFLOP/s (causal attention counted half), the ratio to the product of
matrices measured in the same run, memory, and where our step's time goes.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.kernels import kernel_table
from conf.schema import EngineConfig, MeshConfig, ModelConfig, OptimConfig
from data.batch import Batch
from parallel import groups
from parallel.engine import make_engine
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh

Step = Callable[[], float]
"""Takes a step and returns its loss."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPE = ModelConfig(
    name="llama-3-8b-layer",
    num_layers=8 if ON_GPU else 4,
    hidden_size=4096 if ON_GPU else 256,
    ffn_hidden_size=14336 if ON_GPU else 896,
    num_attention_heads=32 if ON_GPU else 4,
    num_kv_heads=8 if ON_GPU else 2,
    head_dim=128 if ON_GPU else 64,
    vocab_size=32_000 if ON_GPU else 2_048,
    max_sequence_length=8192 if ON_GPU else 256,
    rope_theta=500_000.0,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
OPTIM = OptimConfig(
    learning_rate=1e-4,
    final_learning_rate_ratio=0.1,
    schedule="cosine",
    warmup_fraction=0.0,
    decay_fraction=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_grad_norm=1.0,
)
ENGINE = EngineConfig(
    backend="megatron",
    mesh=MeshConfig(tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=1, expert=1),
    precision="bf16" if ON_GPU else "fp32",
    sequence_parallel=False,
    zero_stage=0,
    offload_optimizer="none",
    overlap=False,
    recompute="none",
)
NUM_MICRO_BATCHES = 8 if ON_GPU else 4
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a contender reached."""

    name: str
    seconds: list[float]
    loss: float
    memory_bytes: int | None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def batches() -> list[Batch]:
    """The micro-batches of every step: random tokens, one row each."""
    rows = np.random.default_rng(0).integers(
        SHAPE.vocab_size, size=(NUM_MICRO_BATCHES, 1, SHAPE.max_sequence_length + 1)
    )
    ones = np.ones((1, SHAPE.max_sequence_length), dtype=np.float32)
    places = np.arange(SHAPE.max_sequence_length)[None]
    return [
        Batch(
            tokens_BS=row[:, :-1],
            labels_BS=row[:, 1:],
            loss_mask_BS=ones,
            position_ids_BS=places,
            sample_ids_B=np.zeros(1, dtype=np.int64),
        )
        for row in rows
    ]


def on_device() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of the micro-batches, each (1, S)."""
    return [
        (torch.from_numpy(batch.tokens_BS).to(DEVICE), torch.from_numpy(batch.labels_BS).to(DEVICE))
        for batch in batches()
    ]


def ours(**changes: Any) -> Step:
    """Our engine."""
    engine = make_engine(SHAPE, replace(ENGINE, **changes), OPTIM, Mesh(), micro_batch=1)
    engine.load_weights(InitialWeights(SHAPE, 0))
    given, objective = batches(), CrossEntropy()
    return lambda: engine.step(given, objective, learning_rate=OPTIM.learning_rate).loss


def megatron(*, attention: str, compiled: bool = False) -> Step:
    """Megatron-core's own loop: its model, wrapper, loss, schedule and optimizer. `attention`: its own, or ours."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from parallel.attention import CausalAttention
    from parallel.cpu import adapt_megatron, tensors_as_on_cuda
    from parallel.model import transformer_config

    adapt_megatron()
    config = replace(transformer_config(SHAPE, ENGINE, Mesh()), perform_initialization=True)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if attention == "ours":
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    with tensors_as_on_cuda():
        model = GPTModel(
            config,
            spec,
            vocab_size=SHAPE.vocab_size,
            max_sequence_length=SHAPE.max_sequence_length,
            position_embedding_type="rope",
            rotary_base=SHAPE.rope_theta,
            share_embeddings_and_output_weights=False,
        ).to(DEVICE)
        if compiled:
            for layer in model.decoder.layers:
                layer.forward = torch.compile(layer.forward)
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=OPTIM.learning_rate,
                weight_decay=OPTIM.weight_decay,
                bf16=ON_GPU,
                params_dtype=DTYPE,
                clip_grad=OPTIM.clip_grad_norm,
            ),
            [wrapped],
            use_gloo_process_groups=False,
        )
    schedule, given = get_forward_backward_func(), on_device()
    length = SHAPE.max_sequence_length
    positions = torch.arange(length, device=DEVICE)[None]
    # Its own attention wants the mask written out where it cannot use its fused kernel.
    mask = None if attention == "ours" else torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE).triu(1)

    def forward(iterator: Iterator[Any], chunk: Any) -> Any:
        tokens, labels = next(iterator)
        return chunk(tokens, positions, mask, labels=labels), summed

    def summed(losses: torch.Tensor) -> Any:
        total = losses.sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=DEVICE), total.detach().clone()

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = schedule(
            forward_step_func=forward,
            data_iterator=iter(given),
            model=[wrapped],
            num_microbatches=len(given),
            seq_length=length,
            micro_batch_size=1,
            forward_only=False,
        )
        with tensors_as_on_cuda():  # it asserts types by name; some 0.1 ms
            optimizer.step()
        return (sum(losses) / (len(given) * length)).item()

    return step


def hugging_face(*, compiled: bool) -> Step:
    """LlamaForCausalLM, torch's AdamW on its fused kernel, and a loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.max_sequence_length,
        attn_implementation="sdpa",
    )
    with DEVICE:
        model = LlamaForCausalLM(config).to(DTYPE)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, weight_decay=0.1, fused=True)
    given = on_device()

    def step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=DEVICE)
        for tokens, labels in given:
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, labels.flatten()) / len(given)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad_norm)
        optimizer.step()
        return total.item()

    return step


def contenders() -> dict[str, Callable[[], Step]]:
    """What is compared on this machine, by name."""
    found: dict[str, Callable[[], Step]] = {
        "ours": partial(ours, compile=ON_GPU),
        "megatron-core, our attention": partial(megatron, attention="ours", compiled=ON_GPU),
        "megatron-core as shipped": partial(megatron, attention="its own"),
        "Hugging Face": partial(hugging_face, compiled=ON_GPU),
    }
    if ON_GPU:
        found["ours fp8"] = partial(ours, compile=True, precision="fp8")
        found["ours fp8_rowwise"] = partial(ours, compile=True, precision="fp8_rowwise")
    return found


def time_step(step: Step) -> float:
    """Seconds of a step, with the device idle before and after."""
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def matmul_ceiling() -> float:
    """FLOP/s of a large product of matrices in the step's dtype."""
    rows, inner, columns = (8192, 8192, 8192) if ON_GPU else (1024, 1024, 1024)
    left = torch.randn(rows, inner, device=DEVICE, dtype=DTYPE)
    right = torch.randn(inner, columns, device=DEVICE, dtype=DTYPE)
    seconds = min(time_step(lambda: float((left @ right)[0, 0])) for _ in range(20))
    return 2.0 * rows * inner * columns / seconds


def one_after_the_other(names: Sequence[str], num_steps: int) -> list[Result]:
    """For a GPU, which has memory for one."""
    results = []
    for name in names:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = contenders()[name]()
        loss = step()
        step()
        seconds = [time_step(step) for _ in range(num_steps)]
        results.append(Result(name=name, seconds=seconds, loss=loss, memory_bytes=torch.cuda.max_memory_allocated()))
        if name == "ours":
            print(kernel_table(step))
        del step
    return results


def taking_turns(names: Sequence[str], num_steps: int) -> list[Result]:
    """For a CPU: each round is a step of every contender, in turning order."""
    steps = {name: contenders()[name]() for name in names}
    losses = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_steps):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            seconds[name].append(time_step(steps[name]))
    print(kernel_table(steps["ours"]))
    return [Result(name=name, seconds=seconds[name], loss=losses[name], memory_bytes=None) for name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(contenders()))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1 if not ON_GPU else torch.get_num_threads())
    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    print(f"device {torch.cuda.get_device_name() if ON_GPU else 'CPU, one core'}, {DTYPE}, torch {torch.__version__}")
    ceiling = matmul_ceiling()
    print(f"product of matrices {ceiling / 1e12:.3g} TFLOP/s")
    if importlib.util.find_spec("torchtitan") is None:
        print("torchtitan: not installed")
    results = (one_after_the_other if ON_GPU else taking_turns)(given.only, given.steps)
    tokens = NUM_MICRO_BATCHES * SHAPE.max_sequence_length
    flops = tokens * SHAPE.train_flops_per_token(SHAPE.max_sequence_length)
    print("| | ms a step | to ours, paired | tokens/s | TFLOP/s | of the product | memory GiB | first loss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        paired = statistics.median(a / b for a, b in zip(result.seconds, results[0].seconds, strict=True))
        rate = flops / result.median
        memory = "-" if result.memory_bytes is None else f"{result.memory_bytes / 2**30:.1f}"
        print(
            f"| {result.name} | {1e3 * result.median:.0f} | {paired:.2f} | {tokens / result.median:,.0f} "
            f"| {rate / 1e12:.3g} | {100 * rate / ceiling:.0f} % | {memory} | {result.loss:.3f} |"
        )
    groups.shut_down()


if __name__ == "__main__":
    main()
