"""From the command line to a typed configuration, and to `config.json` and back.

Hydra composes; the strict decoder fills the dataclasses of `schema/` and reports every fault at once. Nothing past
this file sees Hydra. It is imported where it is used, since ranks only ever read `config.json`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import TypeAdapter, ValidationError

from conf import faults, help
from conf.errors import ConfigError, Problem, UserError
from conf.schema import RunConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).resolve().parent
RESERVED = ("overrides", "full_size")
_PLACE_OVERRIDE = re.compile(r"[+~]*(launcher|seed|runs_dir|model|engine|data|cluster|tracking)\b")
_PLAIN_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def main(run: Callable[[RunConfig], int], finish: Callable[[], None] = lambda: None) -> None:
    """Compose what the command line asks for, call `run` with it (once a job of a sweep), then `finish`, and exit.

    Faults of the configuration, and any `UserError` of `run`, are printed and exit with 2. A sweep goes on after a job
    that failed (1), and ends with one that was stopped or refused (anything else).
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    given = parser.parse_args()
    if given.help:
        print(help.text(_config_dirs(given.config_dir)))
        sys.exit(0)
    overrides = list(given.overrides)
    asks_hydra = vars(given) | {"overrides": [], "config_dir": None} != vars(parser.parse_args([]))
    asks_hydra = asks_hydra or any(text.lstrip("+~").startswith("hydra") for text in overrides)
    codes: list[int] = []

    def start(config: RunConfig) -> None:
        codes.append(1)
        try:
            codes[-1] = run(config)
        except UserError as error:
            _refuse(error)
        if codes[-1] not in (0, 1):
            sys.exit(codes[-1])

    _register_resolvers()
    try:
        _require_directory(given.config_dir)
        if given.cfg == "job":
            _decode(_compose(overrides, given.config_dir), overrides)
        if given.multirun:
            _check_jobs(overrides, given.config_dir)
        if asks_hydra:
            _hydra_main(overrides, start)
        else:
            # Hydra's own entry composes twice, the first time to learn that it is no sweep.
            with _hydra(given.config_dir):
                start(_decode(_compose(overrides, given.config_dir), overrides))
        finish()
    except _composition_errors() as error:
        _refuse(ConfigError(_diagnose(error, overrides, config_dir=given.config_dir, sweep=given.multirun)))
    except UserError as error:
        _refuse(error)
    except OSError as error:
        if codes:
            raise
        _refuse(ConfigError([Problem("runs_dir", f"the record of the sweep cannot be written there ({error})")]))
    sys.exit(max(codes, default=0))


def _hydra_main(overrides: Sequence[str], start: Callable[[RunConfig], None]) -> None:
    """Let Hydra act on the whole command line: sweeps, `--cfg`, `--info` and what else it has."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def task(composed: DictConfig) -> None:
        # Of a sweep, these are the overrides of this one job.
        start(_decode(composed, [str(text).removeprefix("++") for text in HydraConfig.get().overrides.task]))

    sys.argv[1:] = [_forced(word) if word in overrides else word for word in sys.argv[1:]]
    # Without this Hydra prints faults in its own words and exits with 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    hydra.main(config_path=str(CONF), config_name="config", version_base=None)(task)()


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> RunConfig:
    """The configuration of a command line, e.g. `["recipe=foundation", "seed=1"]`.

    Args:
        overrides: as typed.
        config_dir: further recipes and group options, as `--config-dir`. Within `main`, those given there are known.

    Raises:
        ConfigError: with every fault.
    """
    try:
        return _decode(_compose(overrides, config_dir), overrides)
    except _composition_errors() as error:
        raise ConfigError(_diagnose(error, overrides, config_dir=config_dir, sweep=False)) from error


def compose_like(config: RunConfig, recipe: str) -> RunConfig:
    """Another recipe for the same model, data, engine and place as `config`, at the same scale.

    Raises:
        ConfigError: there is no such recipe, or what it needs differs from what `config` has.
    """
    kept = [text for text in config.overrides if _PLACE_OVERRIDE.match(text)]
    return replace(
        compose([f"recipe={recipe}", f"scale={config.scale}", *kept]),
        action=config.action,
        launcher=config.launcher,
        seed=config.seed,
        runs_dir=config.runs_dir,
        model=config.model,
        engine=config.engine,
        data=config.data,
        cluster=config.cluster,
        tracking=config.tracking,
    )


def recipe_names(config_dir: Path | None = None) -> list[str]:
    """Recipes that can be asked for; within `main`, also those of its `--config-dir`."""
    with _hydra(config_dir) as group_options:
        return group_options("recipe")


def write(config: RunConfig, path: Path) -> None:
    """Write `config.json`."""
    path.write_bytes(_decoder().dump_json(config, indent=2) + b"\n")


def read(path: Path) -> RunConfig:
    """Read `config.json`.

    Raises:
        ConfigError: the file is missing or does not fit the schema; with every fault.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError([Problem(str(path), f"cannot be read: {error.strerror}")]) from error
    try:
        return _decoder().validate_json(text, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        if details[0]["type"] == "json_invalid":
            problems = [Problem(str(path), f"is not JSON: {details[0]['msg']}")]
        else:
            problems = faults.problems_of(details, json.loads(text), groups=())
            problems = [Problem(f"{path}: {problem.path}", problem.message) for problem in problems]
        raise ConfigError(problems) from error


@cache
def _decoder() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _decode(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Fill the dataclasses; a rehearsal carries what it rehearses."""
    from omegaconf import OmegaConf

    config, problems = _decode_at(composed)
    full_size = None
    if composed.scale == "rehearsal":
        at_full_size = composed.copy()
        OmegaConf.update(at_full_size, "scale", "full")
        full_size, more = _decode_at(at_full_size)
        problems += [Problem(each.path, f"at scale=full, {each.message}") for each in more if each not in problems]
    if problems:
        raise ConfigError(problems)
    assert config is not None
    typed = tuple(overrides)
    return replace(config, overrides=typed, full_size=full_size and replace(full_size, overrides=typed))


def _decode_at(composed: DictConfig) -> tuple[RunConfig | None, list[Problem]]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        said = str(error.msg).strip().splitlines()[0]
        return None, [Problem(error.full_key or "", said.rpartition("resolving interpolation: ")[2])]
    assert isinstance(resolved, dict)
    values = {str(key): value for key, value in resolved.items()}
    if reserved := [key for key in RESERVED if key in values]:
        return None, [Problem(key, "is filled in by the program and cannot be given.") for key in reserved]
    try:
        return _decoder().validate_json(json.dumps(_whole_numbers(values)), strict=True), []
    except ValidationError as error:
        return None, faults.problems_of(error.errors(include_url=False), values, help.groups([CONF]))


def _whole_numbers(value: object) -> object:
    """60e9 is a float to YAML and a count to a person; fields of either kind take the int."""
    match value:
        case float() if math.isfinite(value) and value.is_integer():
            return int(value)
        case dict():
            return {key: _whole_numbers(item) for key, item in value.items()}
        case list():
            return [_whole_numbers(item) for item in value]
        case _:
            return value


def _forced(override: str) -> str:
    """Let Hydra take any key: the decoder knows which exist, and names all that do not at once."""
    plain = _PLAIN_OVERRIDE.match(override)
    if plain is None or override.startswith("hydra.") or plain[0][:-1] in help.groups([CONF]):
        return override
    return f"++{override}"


@contextmanager
def _hydra(config_dir: Path | str | None) -> Iterator[Callable[[str], list[str]]]:
    """Hydra made ready (or the one already running within `main`); yields the options of a group."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    def group_options(group: str) -> list[str]:
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))

    if GlobalHydra.instance().is_initialized():
        yield group_options
        return
    _register_resolvers()
    version.setbase(None)
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None:
        further = f"file://{Path(config_dir).resolve()}"
        search_path.prepend("command-line", further, anchor=SearchPathQuery(provider="schema"))
    Hydra.create_main_hydra2("train", search_path)
    try:
        yield group_options
    finally:
        GlobalHydra.instance().clear()


def _compose(overrides: Sequence[str], config_dir: Path | str | None) -> DictConfig:
    import hydra

    _require_directory(config_dir)
    # Typed twice, the last counts: a resumed run composes what it began with and then what is typed now.
    last = {override.partition("=")[0]: position for position, override in enumerate(overrides)}
    typed = [overrides[position] for position in sorted(last.values())]
    with _hydra(config_dir):
        return hydra.compose("config", [_forced(override) for override in typed])


def _check_jobs(overrides: Sequence[str], config_dir: str | None) -> None:
    """Decode every job of a sweep, so that none starts where one of them is faulty."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if any(text.startswith("hydra/sweeper=") for text in overrides):
        return  # another sweeper has its own notion of which jobs there are
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.input_line)]
        for each in OverridesParser.create().parse_overrides(list(overrides))
    ]
    problems: dict[Problem, None] = {}
    for job in itertools.product(*choices):
        try:
            _decode(_compose(job, config_dir), job)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))


def _diagnose(
    error: Exception, overrides: Sequence[str], *, config_dir: Path | str | None, sweep: bool
) -> list[Problem]:
    """Every fault of a command line that Hydra refused, in our words."""
    problems: list[Problem] = []
    sound: list[str] = []
    with _hydra(config_dir) as group_options:
        recipes = group_options("recipe")
        for text in overrides:
            problem = _fault_of_override(text, group_options, sweep=sweep)
            if problem is None:
                sound.append(text)
            else:
                problems.append(problem)
                near = get_close_matches(text.removeprefix("recipe="), recipes, n=1)
                sound += [f"recipe={near[0]}"] if text.startswith("recipe=") and near else []
    if not any(text.startswith("recipe=") for text in overrides):
        problems.insert(0, Problem("recipe", f"is missing. Add recipe=NAME, one of {', '.join(recipes)}."))
    elif problems and not sweep and any(text.startswith("recipe=") for text in sound):
        # What is left (with the recipe that was meant) may compose, and have faults of its own to tell.
        try:
            _decode(_compose(sound, config_dir), sound)
        except ConfigError as further:
            problems += further.problems
        except _composition_errors() as further:
            problems.append(_in_words(further))
    return problems or [_in_words(error)]


def _fault_of_override(text: str, group_options: Callable[[str], list[str]], *, sweep: bool) -> Problem | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        meant = f" Did you mean recipe={text}?" if text in group_options("recipe") else ""
        return Problem(text, f"is not KEY=VALUE.{meant} A value with spaces or commas is quoted twice: 'key=\"a, b\"'.")
    key, options = override.key_or_group, group_options(override.key_or_group)
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator())
        if not sweep:
            a_list = f"{key}=[{','.join(values)}]"
            return Problem(key, f"has several values. Add -m to run one after another, or write {a_list} for a list.")
    else:
        values = [str(override.value())]
    unknown = [value for value in values if value not in options] if options and not override.is_delete() else []
    if unknown:
        meant = faults.did_you_mean(unknown[0], options)
        return Problem(key, f"there is no {key} '{unknown[0]}'.{meant} Choose from {', '.join(options)}.")
    return None


def _in_words(error: Exception) -> Problem:
    told = [str(part) for part in (error, error.__cause__) if part is not None]
    return Problem("", " ".join(" ".join(told).replace("++", "").split()))


def _refuse(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _register_resolvers() -> None:
    from omegaconf import OmegaConf

    def scaled(full_size: object, rehearsal: object, *, _root_: DictConfig) -> object:
        return rehearsal if _root_.scale == "rehearsal" else full_size

    def divide(total: int, size: int) -> int:
        if total % size:
            raise ValueError(f"{total} cannot be divided by {size} without a rest")
        return total // size

    def controlled(with_controls: object, without: object, *, _root_: DictConfig) -> object:
        return with_controls if _root_.controls else without

    OmegaConf.register_new_resolver("scaled", scaled, replace=True)
    OmegaConf.register_new_resolver("controlled", controlled, replace=True)
    OmegaConf.register_new_resolver("divide", divide, replace=True)


def _require_directory(config_dir: Path | str | None) -> None:
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError([Problem("--config-dir", f"there is no directory {config_dir}.")])


def _config_dirs(config_dir: str | None) -> list[Path]:
    return [CONF] if config_dir is None else [Path(config_dir), CONF]


def _composition_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    return (HydraException, OmegaConfBaseException, YAMLError)
