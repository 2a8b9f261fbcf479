"""Smaller shapes of a model that hold a target and that engines and Hugging Face accept. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from conf.schema import ModelConfig

Cut = Literal["width", "depth", "mixed"]
Measure = Literal["parameters", "memory", "latency"]

# Of the shapes that hold the target, those nearly as large as the largest are worth a look.
WORTH_A_LOOK = 0.96
# The least that is left of any one dimension: what is cut deeper is lost for good (Muralidharan et al. 2024).
LEAST_KEPT = 0.5
# A student this near to its target is of the right size; among those the shape decides.
ON_TARGET = 0.05
# Sizes of one dimension that are looked at.
MOST_STEPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What shapes are made of.

    Attributes:
        hidden_multiple: hidden sizes are multiples of it.
        ffn_multiple: feed-forward sizes are.
        kv_heads_multiple: numbers of key-value heads are (tensor ranks share them out).
        layers_multiple: numbers of layers are (pipeline ranks do).
        experts_multiple: numbers of experts are (expert ranks do). Students keep those their teacher has.
    """

    hidden_multiple: int
    ffn_multiple: int
    kv_heads_multiple: int
    layers_multiple: int
    experts_multiple: int = 1


def size_of(model: ModelConfig, measure: Measure) -> float:
    """How large a model is: parameters, or bytes of bf16 weights and of one full row's keys and values.

    Latency is measured, not computed; its stand-in here is what a token is multiplied by.
    """
    if measure == "parameters":
        return float(model.num_parameters)
    if measure == "latency":
        return float(model.num_matmul_parameters)
    keys_and_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.max_sequence_length
    return 2.0 * (model.num_parameters + keys_and_values)


def is_exportable(model: ModelConfig) -> bool:
    """Whether Hugging Face's Llama (or Mixtral) takes the shape."""
    return _heads_divide(model.hidden_size, model.num_attention_heads, model.num_kv_heads)


def _heads_divide(hidden: int, heads: int, groups: int) -> bool:
    return hidden % heads == 0 and heads % groups == 0


def smaller_shapes(parent: ModelConfig, cut: Cut, grid: Grid) -> Iterator[ModelConfig]:
    """Every smaller shape on the grid, the parent's own left out."""
    hidden = _steps(parent.hidden_size, grid.hidden_multiple) if cut != "depth" else [parent.hidden_size]
    ffn = _steps(parent.ffn_hidden_size, grid.ffn_multiple) if cut != "depth" else [parent.ffn_hidden_size]
    groups = _steps(parent.num_kv_heads, grid.kv_heads_multiple) if cut != "depth" else [parent.num_kv_heads]
    experts = _numbers_of_experts(parent, grid) if cut != "depth" else [parent.num_experts]
    layers = _steps(parent.num_layers, grid.layers_multiple) if cut != "width" else [parent.num_layers]
    per_group = parent.num_attention_heads // parent.num_kv_heads
    for num_layers, num_groups, num_experts, hidden_size, ffn_size in product(layers, groups, experts, hidden, ffn):
        # Most of a fine grid ends here: before there is a model of it.
        if not _heads_divide(hidden_size, num_groups * per_group, num_groups):
            continue
        shape = replace(
            parent,
            num_layers=num_layers,
            num_kv_heads=num_groups,
            num_attention_heads=num_groups * per_group,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_size,
        ).with_experts(num_experts)
        if shape != parent:
            yield shape


def shapes_that_hold(
    parent: ModelConfig, *, cut: Cut, measure: Measure, removed: float, grid: Grid
) -> list[ModelConfig]:
    """Shapes with at least `removed` of the parent's size gone, and hardly more; largest first, or none."""
    limit = (1.0 - removed) * size_of(parent, measure)
    sized = [(size_of(shape, measure), shape) for shape in smaller_shapes(parent, cut, grid)]
    small_enough = [(size, shape) for size, shape in sized if size <= limit]
    largest = max((size for size, _ in small_enough), default=0.0)
    chosen = [(size, shape) for size, shape in small_enough if size >= WORTH_A_LOOK * largest]
    return [shape for _, shape in sorted(chosen, key=lambda pair: -pair[0])]


def student_shape(teacher: ModelConfig, ratio: float, grid: Grid) -> ModelConfig:
    """The shape of a `ratio`-th of the teacher's parameters (or nearest to it) that is most like the teacher.

    Layers and width shrink together. Heads keep their size and their grouping.

    Raises:
        ValueError: no shape fits the grid.
    """
    target = teacher.num_parameters / ratio

    def distance(student: _Student) -> tuple[float, float]:
        kept = [
            student.narrowest.num_layers / teacher.num_layers,
            student.narrowest.hidden_size / teacher.hidden_size,
            student.ffn_hidden_size / teacher.ffn_hidden_size,
        ]
        off_target = abs(student.num_parameters / target - 1.0)
        return (0.0 if off_target < ON_TARGET else off_target, max(kept) / min(kept))

    return min(_students(teacher, ratio, grid), key=distance).shape


def student_shapes(teacher: ModelConfig, ratio: float, grid: Grid) -> Iterator[ModelConfig]:
    """Shapes on the grid up to the teacher's, each with the feed-forward size that comes nearest to the target."""
    return (student.shape for student in _students(teacher, ratio, grid))


@dataclass(frozen=True, slots=True)
class _Student:
    """A shape that is not made before it is chosen: thousands are looked at."""

    narrowest: ModelConfig
    """Of the least feed-forward size."""
    ffn_hidden_size: int
    num_parameters: int

    @property
    def shape(self) -> ModelConfig:
        return replace(self.narrowest, ffn_hidden_size=self.ffn_hidden_size)


def _students(teacher: ModelConfig, ratio: float, grid: Grid) -> Iterator[_Student]:
    target = teacher.num_parameters / ratio
    per_group = teacher.num_attention_heads // teacher.num_kv_heads
    most = teacher.ffn_hidden_size // grid.ffn_multiple
    for layers, groups, hidden in product(
        _thinned(range(grid.layers_multiple, teacher.num_layers + 1, grid.layers_multiple)),
        _thinned(range(grid.kv_heads_multiple, teacher.num_kv_heads + 1, grid.kv_heads_multiple)),
        _thinned(range(grid.hidden_multiple, teacher.hidden_size + 1, grid.hidden_multiple)),
    ):
        if not most or not _heads_divide(hidden, groups * per_group, groups):
            continue
        narrowest = replace(
            teacher,
            num_layers=layers,
            num_kv_heads=groups,
            num_attention_heads=groups * per_group,
            hidden_size=hidden,
            ffn_hidden_size=grid.ffn_multiple,
        )
        parameters, each = narrowest.num_parameters, 3 * layers * teacher.num_experts * hidden * grid.ffn_multiple
        more = min(max(0, round((target - parameters) / each)), most - 1)
        yield _Student(narrowest, (1 + more) * grid.ffn_multiple, parameters + more * each)


def _steps(size: int, multiple: int) -> list[int]:
    """Multiples from half the size up, and the size itself."""
    return sorted({size, *_thinned([n for n in range(multiple, size, multiple) if n >= LEAST_KEPT * size])})


def _numbers_of_experts(parent: ModelConfig, grid: Grid) -> list[int]:
    """Those that leave a token its experts; 1 in a dense model."""
    if parent.experts is None:
        return [1]
    steps = _steps(parent.num_experts, grid.experts_multiple)
    return [number for number in steps if number >= parent.experts.num_experts_per_token]


def _thinned(sizes: Sequence[int]) -> Sequence[int]:
    """At most so many of them that all combinations can be looked at, the largest among them."""
    return sizes[:: -max(1, -(-len(sizes) // MOST_STEPS))]
