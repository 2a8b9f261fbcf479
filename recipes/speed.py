"""How fast and how large exported models are, run by transformers as whoever downloads them would: one row at a time.

Models take turns, round by round, so that what else a machine does meets all of them alike. They do so in a process of
their own: where there is a process group, `compressed_tensors` exchanges modules with its ranks, and waits for them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from parallel.device import this_device
from recipes.rules_compression import NEW_TOKENS
from train.scores import Estimate

ROUNDS = 5
PACKAGES = ("transformers", "compressed_tensors")


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of one model, round by round.

    Attributes:
        prefill_seconds: to read the prompt.
        decode_seconds: for each token after it, the median of a round.
        memory_bytes: of its weights as they are held.
    """

    prefill_seconds: list[float]
    decode_seconds: list[float]
    memory_bytes: int


def missing_packages() -> list[str]:
    """Packages that measuring needs and this environment lacks."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def speeds_of(directories: Mapping[str, Path], prompt_tokens: int) -> dict[str, Speed]:
    """Name -> speed of exported models. All are held at once, on the device that this rank computes on.

    Raises:
        RuntimeError: transformers cannot run one of them.
    """
    asked = {"prompt_tokens": prompt_tokens, "directories": {name: str(path) for name, path in directories.items()}}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.speed"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"transformers cannot run what was exported:\n{done.stderr}")
    # Whatever packages print comes before the last line.
    return {name: Speed(**values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}


def measure(directories: Mapping[str, Path], prompt_tokens: int) -> dict[str, Speed]:
    """What `speeds_of` returns, measured in this process."""
    models = {name: _loaded(directory) for name, directory in directories.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    vocabulary = min(model.config.vocab_size for model in models.values())
    random = torch.Generator().manual_seed(0)
    prompt_1S = torch.randint(vocabulary, (1, prompt_tokens), generator=random).to(this_device())
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            prefill, decode = _round(model, prompt_1S)
            if number:  # the first round warms up
                seconds[name][0].append(prefill)
                seconds[name][1].append(decode)
    # Only now: what is stored in eight bits may have been unfolded when it was first used.
    return {name: Speed(*seconds[name], _bytes_of(model)) for name, model in models.items()}


def spread_of(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, _, high = quantiles(seconds, n=4, method="inclusive")
    return low, median(seconds), high


def decode_speed_over(one: Speed, other: Speed) -> Estimate:
    """How many times as fast the first model writes, with its error over rounds."""
    ratios = torch.tensor(other.decode_seconds, dtype=torch.float64) / torch.tensor(one.decode_seconds)
    return Estimate(float(ratios.mean()), float(ratios.std() / len(ratios) ** 0.5))


def _loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").to(this_device()).eval()


def _bytes_of(model: Any) -> int:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def _round(model: Any, prompt_1S: Tensor) -> tuple[float, float]:
    """Seconds to read the prompt, and the median of those for a token after it."""
    began = _now()
    output = model(prompt_1S, use_cache=True, logits_to_keep=1)
    prefill, tokens = _now() - began, []
    for _ in range(NEW_TOKENS):
        token_11 = output.logits[:, -1:].argmax(dim=-1)
        began = _now()
        output = model(token_11, past_key_values=output.past_key_values, use_cache=True)
        tokens.append(_now() - began)
    return prefill, median(tokens)


def _now() -> float:
    if this_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Read what is asked for from standard input, and write speeds to standard output, as JSON."""
    asked = json.load(sys.stdin)
    directories = {name: Path(path) for name, path in asked["directories"].items()}
    speeds = measure(directories, asked["prompt_tokens"])
    print(json.dumps({name: asdict(speed) for name, speed in speeds.items()}))


if __name__ == "__main__":
    main()
