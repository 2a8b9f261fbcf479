"""The records of a made-up run that looks like a real one: a resumed specialise stage, evaluation, export."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

from conf.schema import (
    Budget,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvaluateStage,
    ExportStage,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PretrainStage,
    RunConfig,
    SourceConfig,
    SpecialiseStage,
    TrackingConfig,
    TrainingConfig,
)
from train.schedule import learning_rate

START = 1_770_000_000.0
SOURCES = ("business", "development", "creative")
OPTIM = OptimConfig(
    learning_rate=1e-3,
    final_learning_rate_ratio=0.1,
    schedule="cosine",
    warmup_fraction=0.05,
    decay_fraction=0.2,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_grad_norm=1.0,
)


def training(num_steps: int) -> TrainingConfig:
    return TrainingConfig(
        tokens=num_steps * 16 * 256,
        global_batch=16,
        micro_batch=4,
        sequence_length=256,
        mixture={"business": 0.8, "creative": 0.2},
        optim=OPTIM,
        z_loss=0.0,
        validate_every_steps=20,
        validation_tokens=16_384,
        checkpoint_every_steps=50,
        keep_checkpoints=2,
    )


def run_config(num_steps: int = 120) -> RunConfig:
    """A rehearsal of a two-stage training recipe, with its full size beside it."""
    model = ModelConfig(
        name="frontier-rehearsal",
        num_layers=4,
        hidden_size=192,
        ffn_hidden_size=512,
        num_attention_heads=6,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=8192,
        max_sequence_length=256,
        rope_theta=10_000.0,
        norm_epsilon=1e-5,
        init_std=0.02,
        tied_embeddings=False,
    )
    engine = EngineConfig(
        backend="megatron",
        mesh=MeshConfig(tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=None),
        precision="fp32",
        sequence_parallel=False,
        zero_stage=1,
        offload_optimizer="none",
        overlap=True,
        recompute="none",
    )
    evaluate = EvaluateStage(
        kind="evaluate",
        models=("init", "pretrain", "specialise"),
        sources=SOURCES,
        tokens=65_536,
        sequence_length=256,
        micro_batch=4,
        ngram_order=2,
        ngram_models=(),
        ngram_tokens=1_000_000,
        comparisons=None,
        targets={},
    )
    rehearsal = RunConfig(
        name="business_module",
        description="Specialise the foundation model on business text.",
        scale="rehearsal",
        action="run",
        launcher="gang",
        seed=1234,
        controls=False,
        runs_dir="runs",
        init=None,
        resume=None,
        order=("pretrain", "specialise", "evaluate", "export"),
        stages={
            "pretrain": PretrainStage(kind="pretrain", training=training(num_steps)),
            "specialise": SpecialiseStage(kind="specialise", training=training(num_steps)),
            "evaluate": evaluate,
            "export": ExportStage(kind="export", models=(), precision="bf16", speed_prompt_tokens=0),
        },
        model=model,
        engine=engine,
        data=DataConfig(
            tokenizer="shipped:bpe8k",
            sources={name: SourceConfig(path=f"shipped:{name}") for name in SOURCES},
            held_out_fraction=0.05,
            cache_dir="cache",
        ),
        cluster=ClusterConfig(
            name="local", kind="local", address=None, device="auto", num_nodes=1, ranks_per_node=None, node_labels={}
        ),
        tracking=TrackingConfig(mode="offline", project="frontier", entity=None, tags=("rehearsal",)),
        budget=Budget(gpu="H200 SXM", gpus=256, days=7.0, power_mw=1.0),
    )
    return replace(rehearsal, full_size=full_size_of(rehearsal))


def full_size_of(rehearsal: RunConfig) -> RunConfig:
    model = replace(
        rehearsal.model,
        name="frontier-70b",
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        max_sequence_length=8192,
    )
    mesh = MeshConfig(tensor=4, context=2, pipeline=4, virtual_pipeline=5, data=None)
    large = replace(training(1), tokens=170_000_000_000, global_batch=512, micro_batch=1, sequence_length=8192)
    return replace(
        rehearsal,
        scale="full",
        model=model,
        engine=replace(rehearsal.engine, mesh=mesh, precision="bf16", sequence_parallel=True, recompute="selective"),
        stages={
            **rehearsal.stages,
            "pretrain": PretrainStage(kind="pretrain", training=large),
            "specialise": SpecialiseStage(kind="specialise", training=large),
        },
        cluster=replace(rehearsal.cluster, name="h200", kind="ray", num_nodes=32, ranks_per_node=8),
    )


class SyntheticRun:
    """Collects records on a clock of its own."""

    def __init__(self, config: RunConfig, seed: int = 0) -> None:
        self.config = config
        self.random = random.Random(seed)
        self.clock = START
        self.records: list[dict[str, object]] = []
        self.loss = 9.1

    def add(self, kind: str, *, after: float = 0.0, **fields: object) -> None:
        self.clock += after
        self.records.append({"kind": kind, "time": self.clock, **fields})

    def start(self, restarts: int = 0) -> None:
        self.add(
            "run_started",
            run="business_module-20260202-024000-3f9a",
            recipe=self.config.name,
            scale=self.config.scale,
            machine="2 CPU cores, 24 GiB memory, no GPU",
            world_size=2,
            mesh="tensor 1 x context 1 x data 2 x pipeline 1",
            restarts=restarts,
        )

    def begin(self, stage: str, step: int = 0, num_steps: int = 0) -> None:
        self.add(
            "stage_started",
            after=4.0,
            stage=stage,
            stage_kind=self.config.stages[stage].kind,
            num_parameters=self.config.model.num_parameters,
            num_steps=num_steps,
            step=step,
            tokens_per_step=16 * 256 if num_steps else 0,
        )

    def train(self, stage: str, first: int, last: int, num_steps: int, floor: float) -> None:
        """Steps first + 1 to last, with validations and checkpoints where they are due."""
        for step in range(first + 1, last + 1):
            self.loss += (floor - self.loss) * 0.035
            seconds = 0.9 * math.exp(self.random.gauss(0, 0.04))
            self.add(
                "step",
                after=seconds,
                stage=stage,
                step=step,
                num_steps=num_steps,
                loss=self.loss + self.random.gauss(0, 0.07),
                learning_rate=learning_rate(OPTIM, step - 1, num_steps),
                grad_norm=0.4 + 2.2 * math.exp(-step / 15) + abs(self.random.gauss(0, 0.06)),
                tokens=step * 16 * 256,
                step_seconds=seconds,
                tokens_per_second=16 * 256 / seconds,
                model_tflops=0.11 / seconds,
                mfu=None,
                memory_bytes=612 * 2**20,
                metrics={"cross_entropy": self.loss},
            )
            if step % 20 == 0 or step == num_steps:
                self.validate(stage, step)
            if step % 50 == 0 or step == num_steps:
                path = f"/runs/business/stages/{stage}/checkpoints/step-{step:08d}"
                self.add(
                    "checkpoint",
                    stage=stage,
                    step=step,
                    path=path,
                    num_bytes=55_482_624,
                    seconds_blocked=0.05,
                    seconds=0.31,
                )

    def validate(self, stage: str, step: int) -> None:
        for source, offset in (("business", 0.05), ("creative", 0.55)):
            self.add(
                "validation",
                after=0.6,
                stage=stage,
                step=step,
                source=source,
                loss=self.loss + offset + self.random.gauss(0, 0.015),
                standard_error=0.03 + 0.02 * self.random.random(),
                accuracy=max(0.02, 0.62 - 0.08 * self.loss),
                num_tokens=16_384,
            )

    def evaluate(self) -> None:
        self.begin("evaluate")
        losses = {"init": 9.05, "pretrain": 4.35, "specialise": 3.61, "unigram": 6.71, "bigram": 5.32}
        for model, loss in losses.items():
            for number, source in enumerate(SOURCES):
                shift = 0.28 * number * (1.6 if model == "specialise" else 1.0)
                self.add(
                    "evaluation",
                    after=1.0,
                    stage="evaluate",
                    model=model,
                    source=source,
                    loss=loss + (shift if model != "init" else 0.0),
                    standard_error=0.021 + 0.006 * number,
                    accuracy=max(0.001, 0.63 - 0.08 * loss - 0.02 * number),
                    accuracy_standard_error=0.004,
                    num_tokens=65_536,
                    num_documents=214,
                )
        for model, baseline, gain, error in (
            ("specialise", "pretrain", 0.74, 0.022),
            ("specialise", "bigram", 1.71, 0.031),
            ("pretrain", "bigram", 0.97, 0.028),
        ):
            self.add(
                "comparison",
                stage="evaluate",
                model=model,
                baseline=baseline,
                source="business",
                gain=gain,
                standard_error=error,
            )
        self.add(
            "comparison",
            stage="evaluate",
            model="specialise",
            baseline="pretrain",
            source="creative",
            gain=0.05,
            standard_error=0.026,
        )
        self.add("stage_ended", stage="evaluate", seconds=16.0)


def finished_run(num_steps: int = 120) -> list[dict[str, object]]:
    """A run that was stopped in its second stage, resumed, and finished."""
    run = SyntheticRun(run_config(num_steps))
    run.start()
    run.begin("pretrain", num_steps=num_steps)
    run.train("pretrain", 0, num_steps, num_steps, floor=4.2)
    run.add("stage_ended", stage="pretrain", seconds=112.0)
    run.begin("specialise", num_steps=num_steps)
    stop = num_steps * 7 // 12
    kept = stop // 50 * 50
    run.train("specialise", 0, stop, num_steps, floor=3.5)
    run.add("message", level="warning", text="rank 1 was slow: its last step took 4.1 s where the others took 0.9 s")
    run.add("run_ended", status="stopped", exit_code=75, seconds=190.0)
    run.clock += 3600
    run.start(restarts=1)
    run.begin("specialise", step=kept, num_steps=num_steps)
    run.train("specialise", kept, num_steps, num_steps, floor=3.5)
    run.add("stage_ended", stage="specialise", seconds=66.0)
    run.evaluate()
    run.begin("export")
    run.add("export", after=0.8, stage="export", path="/runs/business/export", num_bytes=9_300_000)
    run.add("stage_ended", stage="export", seconds=0.8)
    run.add("run_ended", status="finished", exit_code=0, seconds=93.0)
    return run.records


def partial_run(num_steps: int = 120) -> list[dict[str, object]]:
    """A run whose first stage failed."""
    run = SyntheticRun(run_config(num_steps))
    run.start()
    run.begin("pretrain", num_steps=num_steps)
    run.train("pretrain", 0, num_steps // 3, num_steps, floor=4.2)
    run.add("message", level="error", text="rank 1 died: killed by signal 9")
    run.add("run_ended", status="failed", exit_code=1, seconds=44.0)
    return run.records


def write_run(run_dir: Path, records: list[dict[str, object]], config: RunConfig | None = None) -> Path:
    """Make a run directory of records and a configuration."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(asdict(config or run_config())))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir
