"""Rules about where a run happens: ranks and devices, memory, disks, and the files it reads."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from conf import load
from conf.errors import CheckpointError, DataError, Problem
from conf.faults import did_you_mean
from conf.schema import ModelConfig, RunConfig
from data.corpora import is_shipped, shipped
from data.tokenizer import Tokenizer
from parallel.plan.hardware import GPUS, Gpu, UnknownGpuError, gpu_named
from parallel.plan.operations import site_gpu
from recipes import fit
from recipes.chain import num_teacher_ranks
from recipes.machine import GIB, Machine, existing_parent
from recipes.rules_layout import mesh_of, trainings_of
from train.manifest import MANIFEST, decode_manifest
from train.quantities import byte_size
from train.rundir import RunDir, newest_finished

CPU_RANK_BYTES = int(0.6 * GIB)
"""What a rank holds on a CPU before there is a model: libraries, gloo, its place in Ray."""
MOST_RANKS_ON_FEW_CORES = 8
RAY_PORTS = 12
"""What a Ray of one node listens on, without its dashboard."""
PLACEHOLDER = "YOUR-"


def uses_gpu(config: RunConfig, machine: Machine) -> bool:
    """Whether ranks run on GPUs."""
    return config.cluster.device == "cuda" or (config.cluster.device == "auto" and bool(machine.gpus))


def state_bytes(config: RunConfig) -> int:
    """Least memory the fullest rank needs for weights, gradients and Adam; activations come on top."""
    model, engine, mesh = config.model, config.engine, mesh_of(config)
    embedding = model.vocab_size * model.hidden_size
    experts = model.num_expert_parameters
    layers = model.num_parameters - experts - embedding * (1 if model.tied_embeddings else 2)
    # The first pipeline rank holds the embedding and the last the output head; one rank of one holds both.
    ends = embedding * (2 if mesh.pipeline == 1 and not model.tied_embeddings else 1)
    dense = (layers // mesh.pipeline + ends) // mesh.tensor
    experts = experts // (mesh.pipeline * mesh.tensor * mesh.expert)
    parameters = dense + experts
    weights = 2 if engine.weight_precision == "bf16" else 4
    if not trainings_of(config):
        return parameters * weights
    gradients, adam = 4, 12 if engine.weight_precision == "bf16" else 8
    if engine.offload_optimizer == "nvme" or (engine.offload_optimizer == "cpu" and config.cluster.device != "cpu"):
        adam = 0
    from_stage = ((1, adam), (2, gradients), (3, weights))

    def held(parameters: int, replicas: int) -> int:
        return sum(parameters * size // (replicas if engine.zero_stage >= stage else 1) for stage, size in from_stage)

    return held(dense, mesh.num_replicas) + held(experts, mesh.num_expert_replicas)


def checkpoint_bytes(config: RunConfig) -> int:
    """About what one checkpoint takes on disk: weights, master weights and Adam's two moments."""
    return config.model.num_parameters * ((2 if config.engine.weight_precision == "bf16" else 4) + 12)


def ports_are_free(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A private Ray and its ranks listen on ports of this machine; without them Ray tries for minutes."""
    if config.cluster.kind != "local":
        return
    assert config.cluster.ranks_per_node is not None, "rules are asked of resolved configurations"
    needed = RAY_PORTS + 2 * config.cluster.ranks_per_node
    with ExitStack() as held:
        for count in range(needed):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", 0))
            except OSError as error:
                yield Problem(
                    "cluster",
                    f"only {count} TCP ports of this machine are free ({error.strerror}), and a private Ray with "
                    f"{config.cluster.ranks_per_node} ranks takes {needed}. End what holds them (ss -tan), or widen "
                    "net.ipv4.ip_local_port_range.",
                )
                return


def cluster_is_of_one_kind(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Local is this machine alone; a Ray cluster has an address and a known number of ranks a node."""
    cluster = config.cluster
    if cluster.kind == "local":
        if cluster.num_nodes != 1:
            yield Problem(
                "cluster.num_nodes",
                f"is {cluster.num_nodes}, and cluster.kind=local is this machine alone. Set cluster.num_nodes=1, or "
                "cluster=h200_ray.",
            )
        if cluster.address is not None:
            yield Problem(
                "cluster.address",
                "is given, and cluster.kind=local starts a Ray of its own. Set cluster.address=null, or "
                "cluster.kind=ray to join that one.",
            )
    else:
        if cluster.kind == "ray" and cluster.address is None:
            yield Problem(
                "cluster.address", "is null; cluster.kind=ray joins a running Ray, e.g. cluster.address=auto."
            )
        if cluster.ranks_per_node is None:
            yield Problem(
                "cluster.ranks_per_node", "is null; other machines cannot be counted from here. Set it, e.g. to 8."
            )


def ray_train_keeps_no_places(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Ray Train gives no say over which rank is on which node."""
    mesh = mesh_of(config)
    if config.launcher == "ray_train" and config.cluster.num_nodes > 1 and mesh.data != mesh.world_size:
        yield Problem(
            "launcher",
            f"ray_train places ranks on nodes in any order, and {mesh} needs neighbours to be near. "
            "Set launcher=gang, or use the data axis alone.",
        )


def device_is_there(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A rank a GPU; a few ranks a core."""
    if config.cluster.kind != "local":
        return
    teachers = num_teacher_ranks(config)
    num_ranks = mesh_of(config).world_size + teachers
    axes = f"{mesh_of(config)}" + (f" and {teachers} ranks of a teacher are" if teachers else " is")
    if config.cluster.device == "cuda" and not machine.gpus:
        why = f" ({machine.gpu_fault})" if machine.gpu_fault else ""
        yield Problem(
            "cluster.device", f"is cuda, and there is no GPU here{why}. Set cluster.device=auto to rehearse on the CPU."
        )
    elif uses_gpu(config, machine) and num_ranks > len(machine.gpus):
        yield Problem(
            "engine.mesh",
            f"{axes} {num_ranks} ranks, and there are {len(machine.gpus)} GPUs here, one for each rank. "
            "Shrink an axis, or set cluster.device=cpu.",
        )
    most = max(MOST_RANKS_ON_FEW_CORES, machine.cores)
    if not uses_gpu(config, machine) and num_ranks > most:
        yield Problem(
            "engine.mesh",
            f"{axes} {num_ranks} ranks; {machine.cores} CPU cores take at most {most}. Shrink an axis, "
            "or rehearse another layout.",
        )


def training_fits_in_memory(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The fullest pipeline rank of every training stage fits its GPU, by the planner's memory model."""
    gpu = gpu_of(config, machine)
    if gpu is None:
        return
    told = fit.told_memory(config, gpu)
    if told is not None:
        yield Problem("engine.mesh", told)


def gpu_of(config: RunConfig, machine: Machine) -> Gpu | None:
    """The GPU that ranks get, with the memory it has; None on a CPU, and where nothing is known of it."""
    if not uses_gpu(config, machine):
        return None
    hardware = config.cluster.hardware
    is_local = config.cluster.kind == "local"
    name = machine.gpus[0] if is_local and machine.gpus else hardware.gpu if hardware else config.budget.gpu
    try:
        gpu = site_gpu(hardware) if hardware and not machine.gpus else gpu_named(name)
    except UnknownGpuError:
        if not is_local or not machine.gpu_memory_bytes:
            return None
        gpu = GPUS["H100"]  # only its memory is asked for
    if is_local and machine.gpus:
        return replace(gpu, name=f"{name} here", memory_bytes=machine.gpu_memory_bytes)
    return gpu


def state_fits_in_memory(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """On a CPU: weights, gradients and optimizer fit, even before activations."""
    if uses_gpu(config, machine) or config.cluster.kind != "local":
        return
    mesh, need = mesh_of(config), state_bytes(config)
    total = mesh.world_size * (CPU_RANK_BYTES + need) + num_teacher_ranks(config) * CPU_RANK_BYTES
    if total > machine.memory_bytes:
        yield Problem(
            "engine.mesh",
            f"{mesh.world_size} ranks need at least {byte_size(total)} ({byte_size(CPU_RANK_BYTES)} each to start, "
            f"{byte_size(need)} for weights, gradients and Adam), and this machine has "
            f"{byte_size(machine.memory_bytes)}. Use fewer ranks or a smaller model"
            + (", or drop scale=full to rehearse." if config.scale == "full" else "."),
        )


def directories_can_be_written(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Runs and prepared data have somewhere to go."""
    for path, text in (("runs_dir", config.runs_dir), ("data.cache_dir", config.data.cache_dir)):
        if "://" in text:
            yield Problem(path, f"is {text}; it must be a directory of a disk that every node sees.")
            continue
        parent = existing_parent(Path(text))
        if not parent.is_dir():
            yield Problem(path, f"is {text}, and {parent} is a file. Name a directory.")
        elif not os.access(parent, os.W_OK | os.X_OK):
            yield Problem(path, f"is {text}, and {parent} cannot be written by this user. Set {path}=DIR.")


def checkpoints_fit_on_disk(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What is kept, and the one being written before an old one goes, fits."""
    trainings = trainings_of(config)
    if not trainings or "://" in config.runs_dir:
        return
    copies = sum(training.keep_checkpoints for training in trainings.values()) + 1
    need, free = copies * checkpoint_bytes(config), machine.free_disk_bytes(Path(config.runs_dir))
    if need > free:
        yield Problem(
            "runs_dir",
            f"{config.runs_dir} has {byte_size(free)} free, and {copies} checkpoints of about "
            f"{byte_size(checkpoint_bytes(config))} take {byte_size(need)} (keep_checkpoints, and one being written). "
            "Free space, set runs_dir to another disk, or lower keep_checkpoints.",
        )


def tokenizer_fits(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The tokenizer can be read, and every id it gives has a row in the embedding."""
    location, vocab_size = config.data.tokenizer, config.model.vocab_size
    if PLACEHOLDER in location:
        yield _placeholder("data.tokenizer", location)
        return
    if "://" in location:
        yield Problem("data.tokenizer", f"is {location}; it must be a tokenizer.json on a disk that every node sees.")
        return
    try:
        tokenizer = Tokenizer.load(location)
    except DataError as error:
        yield Problem("data.tokenizer", str(error))
        return
    if tokenizer.vocab_size > vocab_size:
        tensor = config.engine.mesh.tensor
        least = -(-tokenizer.vocab_size // tensor) * tensor
        yield Problem(
            "model.vocab_size",
            f"is {vocab_size}, and {location} gives ids up to {tokenizer.vocab_size - 1}; the model needs a row for "
            f"each. Nearest: {least}.",
        )


def sources_are_there(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Corpora on this machine exist. What is behind a URI is looked at when it is opened."""
    for name, source in config.data.sources.items():
        path = f"data.sources.{name}.path"
        if PLACEHOLDER in source.path:
            yield _placeholder(path, source.path)
        elif is_shipped(source.path):
            try:
                shipped(source.path, ".parquet")
            except DataError as error:
                yield Problem(path, str(error))
        elif "://" not in source.path:
            place = Path(source.path).expanduser()
            if not place.exists():
                yield Problem(path, f"there is no {place.absolute()}. Give text, jsonl or parquet, or shipped:NAME.")
            elif place.is_dir() and not any(place.iterdir()):
                yield Problem(path, f"{place.absolute()} is an empty folder. Give text, jsonl or parquet.")


def init_is_a_model(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What the run starts from exists, and is a model of this shape."""
    init = config.init
    if init is None:
        return
    if init.startswith("recipe:"):
        yield from _problems_of_recipe(config, init.removeprefix("recipe:"))
        return
    path = Path(init).expanduser()
    if not path.is_dir():
        meant = f" Did you mean init=recipe:{init}?" if init in load.recipe_names() else ""
        yield Problem("init", f"there is no directory {path.absolute()}.{meant} Give a checkpoint or recipe:NAME.")
    elif not (path / MANIFEST).exists():
        found = _checkpoint_within(path)
        meant = f" Did you mean init={found}?" if found else ""
        yield Problem("init", f"{path.absolute()} is not a checkpoint (it has no {MANIFEST}).{meant}")
    else:
        try:
            saved = decode_manifest((path / MANIFEST).read_bytes(), path)[0].provenance.model
        except CheckpointError as error:
            yield Problem("init", str(error))
            return
        for field, was, now in _differences(saved, config.model):
            yield Problem(f"model.{field}", f"is {now}, and the model in {path} has {was}. Set model.{field}={was}.")


def _problems_of_recipe(config: RunConfig, recipe: str) -> Iterator[Problem]:
    recipes = load.recipe_names()
    if recipe not in recipes:
        meant = did_you_mean(recipe, recipes)
        yield Problem("init", f"there is no recipe '{recipe}'.{meant} Choose from {', '.join(recipes)}.")
    elif recipe == config.name:
        yield Problem("init", f"a run of {recipe} cannot start from its own recipe. Name a checkpoint: init=DIR.")
    elif config.scale == "full" and newest_finished(Path(config.runs_dir), recipe, config.model) is None:
        yield Problem(
            "init",
            f"is recipe:{recipe}, and {Path(config.runs_dir).absolute()} has no finished run of {recipe} with this "
            f"model. Name a checkpoint: init=RUNS_DIR/RUN/stages/STAGE/checkpoints/step-XXXXXXXX; or run "
            f"recipe={recipe} first, or set runs_dir to where its run is.",
        )


def _checkpoint_within(path: Path) -> Path | None:
    """The model of a run directory, or the newest checkpoint of a folder of them."""
    run = RunDir(path.absolute())
    if run.config_file.exists():
        final = run.final_checkpoint(load.read(run.config_file).order)
        return None if final is None else Path(final)
    newest = max(path.absolute().glob(f"step-*/{MANIFEST}"), default=None)
    return None if newest is None else newest.parent


def _differences(saved: ModelConfig, wanted: ModelConfig) -> Iterator[tuple[str, object, object]]:
    """Fields that say which weights there are."""
    for field in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "rope_theta",
        "norm_epsilon",
        "tied_embeddings",
    ):
        was, now = getattr(saved, field), getattr(wanted, field)
        if was != now:
            yield field, was, now
    for field in ("num_experts", "num_experts_per_token"):
        was, now = getattr(saved.experts, field, None), getattr(wanted.experts, field, None)
        if was != now:
            yield f"experts.{field}", was, now


def _placeholder(path: str, value: str) -> Problem:
    return Problem(path, f"is {value}, which stands for a place of yours. Set {path}=PLACE.")


def ranks_share_cores(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of ranks without a core or GPU of their own, and of GPUs without a rank."""
    num_ranks = mesh_of(config).world_size + num_teacher_ranks(config)
    if config.cluster.kind != "local":
        return
    if not uses_gpu(config, machine):
        if num_ranks > machine.cores:
            yield Problem(
                "engine.mesh",
                f"{num_ranks} ranks share {machine.cores} CPU cores, which is slow: a rehearsal of "
                "the layout, not of its speed.",
            )
        if machine.gpu_fault:
            yield Problem("cluster.device", f"no GPU is used: {machine.gpu_fault}")
    elif num_ranks < len(machine.gpus):
        yield Problem(
            "engine.mesh",
            f"{num_ranks} of {len(machine.gpus)} GPUs are used: the batches cannot be shared by more "
            "data ranks, or the mesh asks for no more.",
        )


def tracking_has_a_key(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn where W&B is asked to be online and there is no key in sight."""
    netrc = Path(machine.environment.get("HOME", "/")) / ".netrc"
    if config.tracking.mode == "online" and "WANDB_API_KEY" not in machine.environment and not netrc.exists():
        yield Problem(
            "tracking.mode",
            "is online, and WANDB_API_KEY is not set; W&B will refuse. The run goes on without it: metrics.jsonl and "
            "the report are always written.",
        )


RULES = (
    cluster_is_of_one_kind,
    ports_are_free,
    ray_train_keeps_no_places,
    device_is_there,
    training_fits_in_memory,
    state_fits_in_memory,
    directories_can_be_written,
    checkpoints_fit_on_disk,
    tokenizer_fits,
    sources_are_there,
    init_is_a_model,
)
WARNINGS = (ranks_share_cores, tracking_has_a_key)
