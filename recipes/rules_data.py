"""Rules of the data plane: storage, tiers and shuffling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from conf.errors import Problem
from conf.schema import DiskTierConfig, MemoryTierConfig, RedisTierConfig, RunConfig, TrainingConfig
from data.kafka import is_topic
from data.mix import block_counts, num_lanes_of
from data.storage import SCHEMES
from data.stream import mixtures_of
from data.writer import BLOCK_TOKENS
from recipes.machine import Machine
from recipes.rules_layout import trainings_of
from recipes.rules_place import PLACEHOLDER
from train.quantities import byte_size

Rule = Callable[[RunConfig, Machine], Iterator[Problem]]
ROUNDED = 0.01
"""Share of a weight that it may be rounded by in silence."""
LEAST_WINDOW_BLOCKS = 20
"""Neighbours are then 0.95 as far apart as in a uniform shuffle."""


def schemes_are_known(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Sources are where something can be read from."""
    for name, source in config.data.sources.items():
        scheme, separator, _ = source.path.partition("://")
        if is_topic(source.path):
            rule = "a run reads datasets: python -m data.prepare --input TOPIC --output DIR makes one"
            yield Problem(f"data.sources.{name}.path", f"is the topic {source.path}, and {rule}.")
        elif separator and scheme not in SCHEMES:
            known = ", ".join(f"{known}://" for known in SCHEMES)
            yield Problem(f"data.sources.{name}.path", f"is {source.path}, of unknown scheme; known are {known}.")


def tiers_hold_the_working_set(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A cache smaller than what is mixed at a time would drop blocks before they are used up."""
    for place, tier in enumerate(config.data.tiers):
        for name, training in trainings_of(config).items():
            need = working_set_bytes(config, training, _share(config, tier))
            if tier.num_bytes < need:
                yield Problem(
                    f"data.tiers[{place}].num_bytes",
                    f"{tier.kind} tier of {byte_size(tier.num_bytes)}, and stage '{name}' mixes up to "
                    f"{byte_size(need)} at a time (data.shuffle); a tier must hold that. Make it larger, or lower "
                    "data.shuffle.window_blocks.",
                )
                break


def working_set_bytes(config: RunConfig, training: TrainingConfig, share: float) -> int:
    """Bytes of the blocks a share of the data ranks mixes at a time and reads ahead, at most."""
    shuffle = config.data.shuffle
    lanes = max(1.0, num_lanes_of(training.global_batch, shuffle.lanes) * share)
    blocks = lanes * shuffle.window_blocks * len(training.sources) + shuffle.readahead_blocks
    return int(blocks * BLOCK_TOKENS * (2 if config.model.vocab_size <= 1 << 16 else 4))


def _share(config: RunConfig, tier: object) -> float:
    """Share of all data ranks that one tier serves: a rank's, a node's, or everybody's."""
    data = config.engine.mesh.data or 1
    match tier:
        case MemoryTierConfig():
            return 1 / data
        case DiskTierConfig():
            ranks_of_others = config.engine.mesh.tensor * config.engine.mesh.context
            on_node = max(1, (config.cluster.ranks_per_node or 1) // ranks_of_others)
            return min(1.0, on_node / data)
        case _:
            return 1.0


def tiers_are_caches(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What a tier drops must be somewhere else, and secrets are not written down."""
    for place, tier in enumerate(config.data.tiers):
        place_of = tier.url if isinstance(tier, RedisTierConfig) else getattr(tier, "path", "")
        if PLACEHOLDER in place_of:
            yield Problem(f"data.tiers[{place}]", f"is still {place_of}; say where the {tier.kind} tier is.")
        if isinstance(tier, RedisTierConfig) and urlsplit(tier.url).password:
            yield Problem(
                f"data.tiers[{place}].url", "has a password in it; give REDIS_USERNAME and REDIS_PASSWORD instead."
            )
        if not isinstance(tier, DiskTierConfig):
            continue
        folder = Path(tier.path).expanduser().absolute()
        for name, source in config.data.sources.items():
            path = Path(source.path.removeprefix("file://")).expanduser().absolute()
            if "://" not in source.path.removeprefix("file://") and folder.is_relative_to(path):
                yield Problem(
                    f"data.tiers[{place}].path",
                    f"is {tier.path}, inside source '{name}'; files of a tier are removed. Name another folder.",
                )


def mixture_changes_ascend(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Mixtures follow one another at different steps."""
    for name, training in trainings_of(config).items():
        steps = [step for step, _ in mixtures_of(training)]
        if steps != sorted(set(steps)):
            yield Problem(
                f"stages.{name}.training.mixture_changes",
                f"begin at steps {steps[1:]}; each must begin after the one before it.",
            )


def shuffling_is_wide(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Enough blocks to mix, enough lanes for the data ranks."""
    shuffle, data = config.data.shuffle, config.engine.mesh.data or 1
    if shuffle.window_blocks < LEAST_WINDOW_BLOCKS:
        yield Problem(
            "data.shuffle.window_blocks",
            f"is {shuffle.window_blocks}; large sources are shuffled worse than below {LEAST_WINDOW_BLOCKS}.",
        )
    for training in trainings_of(config).values():
        lanes = num_lanes_of(training.global_batch, shuffle.lanes)
        if lanes < data:
            yield Problem(
                "data.shuffle.lanes",
                f"gives {lanes} lanes for {data} data ranks: each block is read by {-(-data // lanes)} ranks.",
            )
            return


def mixtures_are_held(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Sources get the shares their weights ask for; weights that are wide apart are rounded."""
    for name, training in trainings_of(config).items():
        for step, weights in mixtures_of(training):
            counts, total = block_counts(weights), sum(weights.values())
            for source, count in counts.items():
                given, wanted = count / sum(counts.values()), weights[source] / total
                if abs(given / wanted - 1) > ROUNDED:
                    yield Problem(
                        f"stages.{name}.training.{'mixture_changes' if step else 'mixture'}",
                        f"asks for {wanted:.3g} of '{source}' and gives {given:.3g}: weights are held in blocks of "
                        f"{sum(counts.values())} samples. Give it another weight, or join it with another source.",
                    )


RULES: tuple[Rule, ...] = (schemes_are_known, tiers_hold_the_working_set, tiers_are_caches, mixture_changes_ascend)
WARNINGS: tuple[Rule, ...] = (shuffling_is_wide, mixtures_are_held)
