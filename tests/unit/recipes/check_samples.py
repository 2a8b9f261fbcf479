"""Sound configurations and machines for the tests of the rules, and ways to spoil them."""

from dataclasses import replace
from functools import cache

from conf import load
from conf.errors import ConfigError
from conf.schema import MeshConfig
from recipes import check
from recipes.machine import GIB, Machine

LAPTOP = Machine(cores=2, memory_bytes=16 * GIB, free_disk_bytes=lambda path: 100 * GIB)
BIG_DISK = replace(LAPTOP, free_disk_bytes=lambda path: 10**15)
FOUR_GPUS = replace(LAPTOP, cores=64, gpus=("H100",) * 4, gpu_memory_bytes=80 * GIB)


@cache
def composed(recipe, *overrides):
    return load.compose([f"recipe={recipe}", *overrides])


def changed(config, **values):
    """`changed(config, engine__mesh__tensor=2)`: the same with a nested field replaced; `stages__NAME__...` too."""
    for path, value in values.items():
        config = _with(config, path.split("__"), value)
    return config


def _with(node, path, value):
    if not path:
        return value
    first, *rest = path
    if isinstance(node, dict):
        return {**node, first: _with(node.get(first), rest, value)}
    return replace(node, **{first: _with(getattr(node, first), rest, value)})


def rehearsal(recipe="business_module", **values):
    return changed(composed(recipe), **values)


def full_size(recipe="business_module", **values):
    """At full size, with everything a user has to fill in."""
    config = composed(recipe, "cluster=h200_ray")
    sources = {name: replace(source, path=f"s3://data/{name}") for name, source in config.data.sources.items()}
    data = replace(config.data, tokenizer="shipped:tokenizer", sources=sources)
    return changed(replace(config, data=data, init=None if recipe == "foundation" else "given"), **values)


def problems_of(config, machine=LAPTOP):
    """Path -> messages, joined."""
    try:
        check.check(config, machine)
    except ConfigError as error:
        found = {}
        for problem in error.problems:
            found[problem.path] = " ".join(filter(None, [found.get(problem.path), problem.message]))
        return found
    return {}


def assert_told(config, path, *words, machine=LAPTOP):
    found = problems_of(config, machine)
    assert path in found, f"nothing is said of {path}: {found}"
    for word in words:
        assert word in found[path]


def layout(config, **axes):
    """With these axes, the others 1."""
    ones = {"tensor": 1, "context": 1, "pipeline": 1, "virtual_pipeline": 1, "data": None}
    return changed(config, engine__mesh=MeshConfig(**ones | axes))
