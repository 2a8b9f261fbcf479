"""Pruning and distillation do not depend on the layout. One launch of four ranks does it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, smaller_world, worlds
from tiny import GLOBAL_BATCH, LENGTH, MICRO_BATCH, MODEL, OPTIM, TIED, Layout, Tensors, batches, tiny_engine

from data.batch import Batch
from data.logits import LogitsManifest, LogitsReader, StoredLogits
from data.logits_server import LogitsServer, ServedLogits
from data.storage import Store
from parallel import loss
from parallel.device import this_device
from parallel.distillation import Distillation, FromReader, FromTeacher, read_likeliest
from parallel.engine import Engine, Match, Objective, StepResult, TensorSource
from parallel.importance import Importance
from parallel.initial import InitialWeights
from parallel.pruning import PrunedWeights, most_important
from parallel.weight_importance import magnitude_importance
from parallel.weight_names import logical_shapes
from train.worker import Place

if TYPE_CHECKING:
    from recipes.board import Board

LIMIT_SECONDS = 240.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)

# Weights large enough that parts differ, and that a student has something to learn.
PARENT = replace(MODEL, name="parent", init_std=0.2)
PRUNED = replace(
    PARENT,
    name="pruned",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=2,
    num_kv_heads=2,
)
LAYOUTS = {
    "tensor x data": Layout(tensor=2, data=2),
    "sequence x pipeline": Layout(tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
    "pipeline x context": Layout(pipeline=2, context=2),
    "data": Layout(data=4, zero_stage=1, overlap=True),
    "deepspeed zero 2": Layout(backend="deepspeed", tensor=2, data=2, zero_stage=2),
    "deepspeed pipeline": Layout(backend="deepspeed", pipeline=2, data=2, zero_stage=1),
    "one": Layout(),
}
OBSERVED = {
    "interleaved x data": Layout(pipeline=2, virtual_pipeline=2, data=2),
    "sequence x context": Layout(tensor=2, context=2, sequence_parallel=True),
}
LESSONS = {
    "forward": (Distillation(temperature=2.0, weight=0.7), 0),
    "reverse": (Distillation(divergence="reverse"), 0),
    "top 16": (Distillation(weight=0.9), 16),
    "reverse of 16": (Distillation(divergence="reverse", temperature=2.0, weight=0.7), 16),
}
Lesson = Callable[[Sequence[Batch]], Sequence[Objective]]
# A student's layers and what they are held against, on the same ranks where there are two stages.
PAIRS = {0: 1, 1: 3}
STEPS = 4
CALIBRATION = 500
SAID = LogitsManifest(
    format_version=1,
    about={},
    vocab_size=PARENT.vocab_size,
    tokens=LENGTH,
    top_k=16,
    stored_as="fp32",
    num_samples=GLOBAL_BATCH * STEPS,
)
STUDENTS, TEACHER = Layout(data=2), Layout(tensor=2)


def everything(folder: str) -> dict[str, Any]:
    """Run on each of four ranks."""
    found: dict[str, Any] = {"served": _learn_from_service(f"{folder}/served")}
    for size in (4, 1):
        with smaller_world(size, f"world of {size}") as inside:
            if not inside:
                continue
            for name, layout in {**LAYOUTS, **OBSERVED}.items():
                if layout.mesh.world_size == size:
                    with _slices(None if name == "one" else 16, layout):
                        found[name] = _on_mesh(layout, f"{folder}/{name}", train=name in LAYOUTS)
            if size == 1:
                found["nothing lost"] = {model.name: _cut_what_does_nothing(model) for model in (PARENT, TIED)}
    return found


@contextmanager
def _slices(num_tokens: int | None, layout: Layout) -> Iterator[None]:
    """Let losses look at so many of the 32 tokens of a row at a time (None: at all)."""
    limit = loss.LOGIT_BYTES
    if num_tokens is not None:
        loss.LOGIT_BYTES = 4 * MICRO_BATCH * PARENT.vocab_size // layout.tensor * num_tokens
    try:
        yield
    finally:
        loss.LOGIT_BYTES = limit


def _on_mesh(layout: Layout, folder: str, *, train: bool) -> dict[str, Any]:
    from parallel import groups

    groups.enter_mesh(layout.mesh, virtual_pipeline=layout.virtual_pipeline)
    source = InitialWeights(PARENT, 1)
    teacher = tiny_engine(layout, PARENT, optim=None)
    teacher.load_weights(source)
    calibration = batches(CALIBRATION, layout.mesh, teacher.coordinate.data)
    importance = teacher.observe(calibration)
    found: dict[str, Any] = {
        "importance": {name: scores.numpy() for name, scores in importance.tensors().items()},
        "magnitude": {name: s.numpy() for name, s in magnitude_importance(source, PARENT).tensors().items()},
    }
    if train:
        pruned = PrunedWeights(source, PARENT, PRUNED, most_important(importance, PARENT, PRUNED))
        for name, (objective, top_k) in LESSONS.items():
            student = tiny_engine(layout, PRUNED)
            student.load_weights(pruned)
            if name == "forward":
                saved = Tensors.gather(list(student.weights())).tensors
                found["pruned"] = {weight: tensor.numpy() for weight, tensor in saved.items()}
            lesson = FromTeacher(teacher, objective, top_k)
            found[name] = _taught(student, lesson)
            student.close()
        found["recorded"] = _learn_from_recording(layout, teacher, pruned, folder)
        found["hidden states"] = _learn_hidden_states(layout, teacher, pruned)
    teacher.close()
    groups.leave_mesh()
    return found


def _taught(student: Engine, lesson: Lesson, steps: range = range(STEPS)) -> list[StepResult]:
    results = []
    for step in steps:
        mine = batches(step, student.mesh, student.coordinate.data)
        results.append(student.step(mine, lesson(mine), learning_rate=OPTIM.learning_rate))
    return results


def _learn_from_recording(layout: Layout, teacher: Engine, pruned: PrunedWeights, folder: str) -> list[StepResult]:
    """Write the teacher's 16 likeliest tokens down, and train on what is read of them."""
    _record(teacher, folder)
    mesh = layout.mesh
    stored = StoredLogits.open(folder)
    student = tiny_engine(layout, PRUNED)
    student.load_weights(pruned)
    steps = _taught(student, FromReader(stored, Distillation(weight=0.9), mesh, this_device(), GLOBAL_BATCH))
    student.close()
    stored.close()
    return steps


def _record(teacher: Engine, folder: str) -> None:
    from recipes.logits import Recorder

    recorder = Recorder(teacher, Store.open(folder), SAID, temperature=1.0)
    mesh, place = teacher.mesh, teacher.coordinate
    done: list[int] = []
    recorder.run(lambda step: batches(step, mesh, place.data), STEPS, asked_to_stop=lambda: False, tell=done.append)
    assert done == [STEPS]


def _learn_from_service(folder: str) -> dict[str, Any]:
    """Two ranks learn from a teacher on two others, on another mesh: first from what it wrote down, then as it speaks.

    The third time they begin in the middle, as after a stop.
    """
    from parallel import groups
    from recipes.board import Board

    store = groups.host_store() if dist.get_rank() == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port, src=0)
    place = Place(rank=0, world_size=2, local_rank=0, ranks_on_node=4, master_address="localhost", master_port=port[0])
    with worlds((2, 2), "students and teacher") as number:
        layout = (STUDENTS, TEACHER)[number]
        groups.enter_mesh(layout.mesh)
        found = (_be_students if number == 0 else _be_teacher)(Board(place), folder)
        groups.leave_mesh()
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, found)
    return {"students": every[0], "teacher": every[2]}


def _be_students(board: Board, folder: str) -> dict[str, Any]:
    from recipes.lessons import FromService

    source = InitialWeights(PARENT, 1)
    pruned = PrunedWeights(source, PARENT, PRUNED, most_important(magnitude_importance(source, PARENT), PARENT, PRUNED))
    tells = dist.get_rank() == 0
    (server,) = board.servers(1)
    found: dict[str, Any] = {}
    for stage, first in (("recorded", 0), ("whole", 0), ("second half", STEPS // 2)):
        student = tiny_engine(STUDENTS, PRUNED)
        student.load_weights(pruned)
        said: LogitsReader = StoredLogits.open(folder)
        if stage != "recorded":
            said = ServedLogits([server], SAID, stage=stage, samples_per_step=GLOBAL_BATCH)
        reader = FromReader(said, Distillation(weight=0.9), STUDENTS.mesh, this_device(), GLOBAL_BATCH)
        lesson = reader if stage == "recorded" else FromService(reader, stage, board if tells else None)
        found[stage] = _taught(student, lesson, range(first, STEPS))
        student.close()
        said.close()
    dist.barrier()
    if tells:
        board.ask("heard", 0)
    return found


def _be_teacher(board: Board, folder: str) -> list[int]:
    """Returns how many samples were held after each step."""
    from recipes.teacher import Speaker

    teacher = tiny_engine(TEACHER, PARENT, optim=None)
    teacher.load_weights(InitialWeights(PARENT, 1))
    _record(teacher, folder)
    assert teacher.coordinate.data == 0
    server = LogitsServer("127.0.0.1") if dist.get_rank() == 0 else None
    if server is not None:
        board.open_server(0, server.address)
    held = []
    for stage, first in (("whole", 0), ("second half", STEPS // 2)):
        speaker = Speaker(
            engine=teacher,
            board=board,
            server=server,
            stage=stage,
            manifest=SAID,
            samples_per_step=GLOBAL_BATCH,
            steps_ahead=1,
            read=read_likeliest(1.0, SAID.top_k),
        )
        assert board.first_step(stage) == first
        for step in range(first, STEPS):
            speaker.wait_for_turn(step, first)
            speaker.speak(batches(step, teacher.mesh, 0))
            held.append(server.num_held if server is not None else 0)
    board.wait_until_asked("heard", 0)
    teacher.close()
    return held


def _learn_hidden_states(layout: Layout, teacher: Engine, pruned: PrunedWeights) -> dict[str, Any]:
    """Train a narrower student on its teacher's hidden states too, and once again with a stop in the middle."""
    lesson = FromTeacher(teacher, Distillation(), 0)
    targets = teacher.keep_outputs(PAIRS.values())
    match = Match(pairs=PAIRS, targets=targets, width=PARENT.hidden_size, distance="cosine", weight=2.0, seed=1)

    def student(weights: TensorSource) -> Engine:
        engine = tiny_engine(layout, PRUNED)
        engine.match_outputs(match)
        engine.load_weights(weights)
        return engine

    first = student(pruned)
    steps = _taught(first, lesson, range(STEPS // 2))
    weights, state = Tensors.gather(list(first.weights())), Tensors.gather(list(first.optimizer_state()))
    steps += _taught(first, lesson, range(STEPS // 2, STEPS))
    first.close()
    if layout.pipeline == 1:
        return {"steps": steps, "weights": list(weights.tensors)}
    again = student(weights)
    again.load_optimizer_state(state, num_steps=STEPS // 2)
    resumed = _taught(again, lesson, range(STEPS // 2, STEPS))
    again.close()
    return {"steps": steps, "weights": list(weights.tensors), "resumed": resumed}


def _cut_what_does_nothing(model: Any) -> dict[str, Any]:
    """Make parts of a model do nothing, cut as many, and see what the model says then."""
    from parallel import groups

    groups.enter_mesh(Layout().mesh)
    shape = replace(model, hidden_size=48, ffn_hidden_size=96, num_attention_heads=2, num_kv_heads=1, num_layers=4)
    parent = Tensors(_with_idle_parts(replace(model, init_std=0.2), shape))
    questions = batches(CALIBRATION, Layout().mesh, 0)
    engine = tiny_engine(Layout(), model, optim=None)
    engine.load_weights(parent)
    importance: Importance = engine.observe(questions)
    before = engine.score(questions)
    engine.close()
    engine = tiny_engine(Layout(), shape, optim=None)
    engine.load_weights(PrunedWeights(parent, model, shape, most_important(importance, model, shape)))
    after = engine.score(questions)
    engine.close()
    groups.leave_mesh()
    return {"before": before.loss_B.tolist(), "after": after.loss_B.tolist(), "tokens": after.num_tokens_B.tolist()}


def _with_idle_parts(model: Any, shape: Any) -> dict[str, torch.Tensor]:
    """Fresh weights with as many hidden channels, neurons and key-value groups idle as the shape lacks, at random."""
    random = np.random.default_rng(3)
    weights = InitialWeights(model, 1)
    tensors = {name: weights.read(name, (0,) * len(size), size) for name, size in logical_shapes(model).items()}
    idle = random.permutation(model.hidden_size)[shape.hidden_size :]
    for name, tensor in tensors.items():
        if name == "model.embed_tokens.weight":
            tensor[:, idle] = 0.0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[idle] = 0.0
        elif name.endswith("gate_proj.weight"):
            tensor[random.permutation(model.ffn_hidden_size)[shape.ffn_hidden_size :]] = 0.0
        elif name.endswith("v_proj.weight"):
            groups = random.permutation(model.num_kv_heads)[shape.num_kv_heads :]
            tensor.view(model.num_kv_heads, model.head_dim, -1)[groups] = 0.0
    return tensors


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("logits"))
    return {"folder": folder, **run_ranks(everything, 4, folder, limit_seconds=LIMIT_SECONDS)[0]}


@pytest.mark.parametrize("name", [name for name in {**LAYOUTS, **OBSERVED} if name != "one"])
@pytest.mark.parametrize("kind", ["importance", "magnitude"])
def test_scores_do_not_depend_on_the_layout(found, kind, name):
    for scores, one in found["one"][kind].items():
        # Magnitudes have no energy, and a dense layer is the only expert it has.
        assert one.std() > 0 or scores in ("energy_ND", "experts_LE"), (
            f"{scores} tell parts apart, so equal ones say something"
        )
        assert found[name][kind][scores] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_pruned_weights_do_not_depend_on_the_layout(found, name):
    one, other = found["one"]["pruned"], found[name]["pruned"]
    assert {weight: tensor.shape for weight, tensor in other.items()} == logical_shapes(PRUNED)
    for weight, tensor in one.items():
        assert other[weight] == pytest.approx(tensor, abs=1e-6), weight


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
@pytest.mark.parametrize("lesson", LESSONS)
def test_distilled_losses_do_not_depend_on_the_layout(found, lesson, name):
    one, other = found["one"][lesson], found[name][lesson]
    assert one[-1].loss < one[0].loss, "the student learns, so equal curves say something"
    for mine, its in zip(other, one, strict=True):
        assert mine.loss == pytest.approx(its.loss, abs=1e-5)
        assert mine.metrics == pytest.approx(its.metrics, abs=1e-5)
        assert mine.grad_norm == pytest.approx(its.grad_norm, abs=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_was_written_down_teaches_what_the_teacher_itself_does(found, name):
    online, recorded = found[name]["top 16"], found[name]["recorded"]
    assert [step.loss for step in recorded] == [step.loss for step in online]
    assert [step.metrics for step in recorded] == [step.metrics for step in online]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_what_is_written_down_does_not_depend_on_the_layout(found, name):
    """So a teacher may write on a mesh of its own, and its students read on theirs."""
    one, other = (StoredLogits.open(f"{found['folder']}/{each}") for each in ("one", name))
    samples = np.arange(one.manifest.num_samples)
    assert len(samples) == GLOBAL_BATCH * STEPS
    mine, its = other.read(samples), one.read(samples)
    assert (mine.ids_BSK != its.ids_BSK).mean() < 1e-3, "but where two are equally likely"
    assert mine.log_probabilities_BSK == pytest.approx(its.log_probabilities_BSK, rel=1e-5, abs=1e-5)
    one.close()
    other.close()


def test_a_teacher_on_other_ranks_and_another_mesh_teaches_what_it_wrote_down_to_the_last_bit(found):
    students, held = found["served"]["students"], found["served"]["teacher"]
    recorded, whole, half = students["recorded"], students["whole"], students["second half"]
    assert whole[-1].loss < whole[0].loss, "the student learns, so equal curves say something"
    assert [step.loss for step in whole] == [step.loss for step in recorded]
    assert [step.metrics for step in whole] == [step.metrics for step in recorded]
    assert len(half) == STEPS // 2, "a stage that goes on in the middle is taught from there"
    assert held == [GLOBAL_BATCH * count for count in (1, 2, 2, 2, 1, 2)], "a step ahead, and no more"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_hidden_states_are_learned_alike_under_every_layout(found, name):
    one, other = found["one"]["hidden states"]["steps"], found[name]["hidden states"]["steps"]
    assert one[-1].metrics["hidden_states"] < one[0].metrics["hidden_states"]
    for mine, its in zip(other, one, strict=True):
        assert mine.loss == pytest.approx(its.loss, abs=1e-5)
        assert mine.metrics == pytest.approx(its.metrics, abs=1e-5)
        assert mine.grad_norm == pytest.approx(its.grad_norm, abs=1e-4)


def test_loss_has_the_distance_of_hidden_states_in_it(found):
    for step in found["one"]["hidden states"]["steps"]:
        metrics = step.metrics
        assert step.loss == pytest.approx(metrics["divergence"] + 2.0 * metrics["hidden_states"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.pipeline > 1])
def test_projections_are_resumed_and_are_no_part_of_the_model(found, name):
    result = found[name]["hidden states"]
    assert [step.loss for step in result["resumed"]] == [step.loss for step in result["steps"][STEPS // 2 :]]
    assert result["weights"] and set(result["weights"]) == set(logical_shapes(PRUNED))


def test_a_few_logits_say_nearly_what_all_say(found):
    few, every = found["one"]["top 16"][0].metrics, found["one"]["hidden states"]["steps"][0].metrics
    assert few["cross_entropy"] == pytest.approx(every["cross_entropy"], abs=1e-6), "the same student"
    assert 0 < few["divergence"] < every["divergence"], "what is one outcome cannot differ within"


@pytest.mark.parametrize("model", [PARENT.name, TIED.name])
def test_cutting_what_does_nothing_changes_nothing(found, model):
    """Channels, neurons and heads found idle are those cut, and norms over fewer channels are rescaled."""
    result = found["nothing lost"][model]
    assert max(result["before"]) > 1.0
    assert result["after"] == pytest.approx(result["before"], rel=1e-4)
