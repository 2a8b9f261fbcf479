"""What recovery of a pruned model depends on: `python -m bench.recovery RUN weight=1.0 weight=0.5,shape=4x120x208x4x2`.

RUN is the directory of a module recipe's rehearsal. Its specialised model is continued, and for each variant pruned and
recovered, on one rank, on the run's text, for the tokens of the stage `recover`. Held-out accuracy on the module's own
domain is written beside that of the continued model. A variant is the stage `recover` but for what it names: `weight`
of the divergence, `temperature`, `rate` (peak learning rate), `teacher` (specialise or continued), and `shape` (layers
x hidden x FFN x heads x key-value heads; else that of the run's stage `prune`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from bench.experts import MESH, InMemory, whole
from bench.settings import engine_of
from conf import load
from conf.schema import EvaluateStage, ModelConfig, OptimConfig, RecoverStage, ShapeConfig
from data.batch import Batch
from data.held_out import held_out_batches
from data.stream import stream_of_stage
from parallel import groups
from parallel.distillation import Distillation, FromTeacher
from parallel.engine import Engine, Objective, TensorSource, make_engine
from parallel.loss import CrossEntropy
from parallel.pruning import PrunedWeights, most_important
from recipes.stage import open_datasets
from train.checkpoint import Checkpoint
from train.loop import score_documents
from train.rundir import RunDir
from train.schedule import learning_rate
from train.scores import DocumentScores

HELD_OUT_TOKENS = 60_000
CALIBRATION_STEPS = 16
"""Of the specialised model's own text, by which importance is measured."""
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads")
Lesson = Callable[[Sequence[Batch]], Objective | Sequence[Objective]]


class Bench:
    """A run's specialised model, what is cut out of it, and training either on the run's text."""

    def __init__(self, path: Path) -> None:
        run = RunDir(path)
        self.config = load.read(run.config_file)
        recover, evaluate = self.config.stages["recover"], self.config.stages["evaluate"]
        assert isinstance(recover, RecoverStage) and isinstance(evaluate, EvaluateStage)
        self.distillation, self.training = recover.distillation, recover.training
        self.datasets = open_datasets(run, self.config.data)
        specialised = made_by(run, "specialise")
        self.model, self.pruned = (
            checkpoint.manifest.provenance.model for checkpoint in (specialised, made_by(run, "prune"))
        )
        self.teachers: dict[str, TensorSource] = {"specialise": specialised.weights}
        (domain,) = {target.source for target in evaluate.targets.values() if target.source}
        self.held_out = held_out_batches(
            self.datasets[domain],
            tokens=HELD_OUT_TOKENS,
            sequence_length=self.training.sequence_length,
            micro_batch=self.training.micro_batch,
            data_rank=0,
            data_size=1,
        )
        teacher, text = self.asked("specialise"), stream_of_stage(self.config, "specialise", self.datasets)
        seen = [batch for step in range(CALIBRATION_STEPS) for batch in text.batches(step, 0, 1)]
        self.importance = teacher.observe(seen)
        teacher.close()

    def asked(self, name: str) -> Engine:
        """A teacher."""
        engine = make_engine(self.model, engine_of(), None, MESH, micro_batch=self.training.micro_batch)
        engine.load_weights(self.teachers[name])
        return engine

    def continue_teacher(self) -> DocumentScores:
        """Train the specialised model on, on labels."""
        (specialise, optim) = self.teachers["specialise"], self.training.optim
        scores, self.teachers["continued"], _ = self.train("continued", self.model, specialise, optim, labels)
        return scores

    def recover(self, variant: dict[str, str]) -> tuple[DocumentScores, float]:
        """Prune and recover; held-out scores and seconds of processor time a step.

        Raises:
            ValueError: the variant has a word that is none.
        """
        unknown = set(variant) - {"weight", "temperature", "rate", "teacher", "shape"}
        if unknown:
            raise ValueError(f"no such words: {', '.join(sorted(unknown))}")
        shape = self.pruned
        if "shape" in variant:
            sizes = dict(zip(SIZES, map(int, variant["shape"].split("x")), strict=True))
            shape = ShapeConfig(**sizes).applied_to(self.model)
        objective = Distillation(
            divergence=self.distillation.divergence,
            weight=float(variant.get("weight", self.distillation.weight)),
            temperature=float(variant.get("temperature", self.distillation.temperature)),
        )
        rate = float(variant.get("rate", self.training.optim.learning_rate))
        kept = most_important(self.importance, self.model, shape)
        start = PrunedWeights(self.teachers["specialise"], self.model, shape, kept)
        teacher = self.asked(variant.get("teacher", "specialise"))
        # Labels alone need no teacher, and its time is not theirs.
        lesson = FromTeacher(teacher, objective, 0) if objective.weight else labels
        optim = replace(self.training.optim, learning_rate=rate)
        scores, _, seconds = self.train("recover", shape, start, optim, lesson)
        teacher.close()
        return scores, seconds

    def train(
        self, stage: str, model: ModelConfig, weights: TensorSource, optim: OptimConfig, lesson: Lesson
    ) -> tuple[DocumentScores, TensorSource, float]:
        """Train on a stage's text; held-out scores, the weights, and seconds of processor time a step."""
        engine = make_engine(model, engine_of(), optim, MESH, micro_batch=self.training.micro_batch)
        engine.load_weights(weights)
        text, num_steps = stream_of_stage(self.config, stage, self.datasets), self.training.num_steps
        began = time.process_time()
        for step in range(num_steps):
            batches = text.batches(step, 0, 1)
            engine.step(batches, lesson(batches), learning_rate=learning_rate(optim, step, num_steps))
        seconds = (time.process_time() - began) / num_steps
        scores = score_documents(engine, self.held_out)
        tensors = {piece.name: piece.tensor.clone().view(piece.global_shape) for piece in whole(engine)}
        engine.close()
        return scores, InMemory(tensors), seconds


def labels(batches: Sequence[Batch]) -> Objective:
    """Cross-entropy."""
    return CrossEntropy()


def made_by(run: RunDir, stage: str) -> Checkpoint:
    """What a stage of the run made."""
    result = run.result(stage)
    assert result is not None and result.checkpoint is not None, f"{run.path} has no model of stage {stage}"
    return Checkpoint.open(Path(result.checkpoint))


def main() -> None:
    """Continue the teacher, recover by every variant, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a rehearsal whose stage prune is done")
    parser.add_argument("variant", nargs="+", help="word=value,...")
    given = parser.parse_args()
    groups.open_world(dist.HashStore(), rank=0, world_size=1)
    groups.enter_mesh(MESH)
    bench = Bench(given.run)
    continued = bench.continue_teacher()
    print(f"continued: loss {continued.loss().mean:.4f}, accuracy {continued.accuracy().mean:.4f}", flush=True)
    for text in given.variant:
        scores, seconds = bench.recover(dict(word.split("=", 1) for word in text.split(",")))
        kept = scores.accuracy_over(continued)
        print(
            f"{text}: loss {scores.loss().mean:.4f}, accuracy {scores.accuracy().mean:.4f}, "
            f"kept {kept.mean:.4f} +- {kept.standard_error:.4f}, {1e3 * seconds:.0f} ms a step",
            flush=True,
        )
    groups.shut_down()


if __name__ == "__main__":
    main()
