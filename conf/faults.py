"""Faults of a composed configuration in words: the path as it is typed, what is wrong, the rule, and what was meant.

Works on the plain error records that the decoder of `load.py` collects; knows the schema, not the decoder.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from conf.errors import Problem
from conf.schema import RunConfig

_RULES = {
    "bool_type": "must be true or false",
    "dataclass_type": "must be a mapping",
    "dict_type": "must be a mapping, e.g. {{key: value}}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number, e.g. 4096 or 60e9",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "missing": "is missing; it has no default",
    "string_type": "must be text",
    "tuple_type": "must be a list, e.g. [specialise,export]",
    "union_tag_invalid": "must be one of {expected_tags}",
}


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Question naming the known word nearest to `word`, or nothing where none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def problems_of(
    errors: Sequence[Mapping[str, Any]], values: Mapping[str, object], groups: Sequence[str]
) -> list[Problem]:
    """Problems of the decoder's error records, in their order.

    Args:
        errors: records with `type`, `loc` and `ctx`, as pydantic gives them.
        values: the composed configuration.
        groups: names of the Hydra groups, which are also keys of the command line.
    """
    problems = []
    for error in errors:
        kind, types_on_way, path = error["type"], *_walk(error["loc"])
        if kind == "unexpected_keyword_argument":
            known = [name.name for name in dataclasses.fields(types_on_way[-1])]
            problem = _unknown_key(path, values, known, groups)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            problem = _unknown_stage(path, values, error.get("ctx", {}))
        else:
            problem = _bad_value(kind, path, values, error.get("ctx", {}))
        problems.append(problem)
    return problems


def _unknown_key(path: list[str], values: Mapping[str, object], known: list[str], groups: Sequence[str]) -> Problem:
    typed, value = list(path), _select(values, path)
    while isinstance(value, Mapping) and len(value) == 1:
        key, value = next(iter(value.items()))
        typed.append(str(key))
    if len(path) == 1:
        known = sorted({*known, *groups} - {"full_size", "overrides"})
    # `training.tokens` for `stages.specialise.training.tokens`
    whole = [leaf for leaf in _leaves(values) if leaf.endswith("." + ".".join(typed))]
    if whole:
        meant = f" Did you mean {' or '.join(repr(leaf) for leaf in whole[:3])}?"
    else:
        meant = did_you_mean(path[-1], known)
    where = f"'{'.'.join(path[:-1])}'" if len(path) > 1 else "a run"
    listed = "" if meant else f" It has {', '.join(known)}."
    return Problem(".".join(typed), f"{where} has no key '{path[-1]}'.{meant}{listed}")


def _unknown_stage(path: list[str], values: Mapping[str, object], context: Mapping[str, object]) -> Problem:
    """A stage without a kind that exists; without any, most likely a stage's name is misspelt."""
    stage = _select(values, path)
    kinds = str(context.get("expected_tags") or "'pretrain', 'specialise', 'evaluate', 'export'")
    if isinstance(stage, Mapping) and "kind" in stage:
        tag = str(stage["kind"])
        meant = did_you_mean(tag, [kind.strip("' ") for kind in kinds.split(",")])
        return Problem(".".join([*path, "kind"]), f"is {_show(tag)}; must be one of {kinds}.{meant}")
    others = _select(values, path[:-1])
    names = [str(name) for name in others if name != path[-1]] if isinstance(others, Mapping) else []
    meant = did_you_mean(path[-1], names)
    return Problem(
        ".".join(path), f"there is no stage '{path[-1]}'.{meant} A new stage needs a `kind`, one of {kinds}."
    )


def _bad_value(kind: str, path: list[str], values: Mapping[str, object], context: Mapping[str, object]) -> Problem:
    rule = _RULES.get(kind, f"does not fit ({kind})").format(**context)
    if kind == "missing":
        return Problem(".".join(path), f"{rule}. Add {'.'.join(path)}=VALUE.")
    value = _select(values, path)
    meant = ""
    if kind == "literal_error":
        meant = did_you_mean(
            str(value), [word.strip("'") for word in str(context["expected"]).replace(",", " ").split()]
        )
    return Problem(".".join(path), f"is {_show(value)}; {rule}.{meant}")


def _walk(location: Sequence[str | int]) -> tuple[list[type], list[str]]:
    """Dataclasses met on the way to a location, and its path without the tags that the decoder puts in for unions."""
    met: list[type] = [RunConfig]
    path: list[str] = []
    here: object = RunConfig
    for part in location:
        members = [kind for kind in get_args(here) if kind is not type(None)] if _is_union(here) else [here]
        if len(members) > 1:
            here = next(member for member in members if _tag_of(member) == part)
        else:
            here = _inside(members[0], part)
            path.append(str(part))
        if isinstance(here, type) and dataclasses.is_dataclass(here):
            met.append(here)
    return met, path


def _inside(kind: object, part: str | int) -> object:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return get_type_hints(kind).get(str(part), object)
    if get_origin(kind) in (dict, tuple):
        return get_args(kind)[1 if get_origin(kind) is dict else 0]
    return object


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _tag_of(kind: object) -> object:
    assert isinstance(kind, type)
    return get_args(get_type_hints(kind)["kind"])[0]


def _select(values: object, path: Sequence[str]) -> object:
    for part in path:
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and part.isdigit():
            values = values[int(part)]
    return values


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _show(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return repr(value)
