"""Importing torch and Megatron-core in seconds: without what Megatron would import in vain, and without the collector.

Nothing depends on it but time: Megatron imported in any other way is the same Megatron, some seconds later.
"""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Megatron looks for it to log what it generates, does without where it is not installed, and we generate nothing.
UNUSED = ("wandb",)
_LOCK = threading.Lock()


def import_framework() -> None:
    """Import torch and Megatron-core, in whichever thread comes first; the others wait.

    Leaves the garbage collector off, for more imports: what is only being made holds no garbage, and looking for it
    takes half of the time. Turn it on by `collect_garbage_of_work`.
    """
    gc.disable()
    with _LOCK, _unused_hidden(), _nothing_compiled():
        importlib.import_module("megatron.core")


def collect_garbage_of_work() -> None:
    """Turn the garbage collector on, for what is made from now on.

    What was imported is not looked through again: a full collection, as when an engine is closed, takes milliseconds
    instead of half a second, in which the other ranks would wait for this one.
    """
    gc.freeze()
    gc.enable()


@contextmanager
def _unused_hidden() -> Iterator[None]:
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: as if it were not installed
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Without CUDA, let Megatron's small functions be as they are: to decorate them loads a whole compiler."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    compile_function = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:
    return _as_it_is if function is None else function
