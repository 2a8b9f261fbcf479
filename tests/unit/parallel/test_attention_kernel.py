"""The rule by which attention is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, list_flash_attention_impls

from parallel.attention_kernel import FLASH_IMPLEMENTATIONS, attention_kernel, kernel_for


def nothing(package: str) -> bool:
    return False


def everything(package: str) -> bool:
    return True


@pytest.mark.parametrize(("generation", "name"), [(9, "cuDNN"), (10, "cuDNN"), (8, "torch's own choice")])
def test_without_packages(generation, name):
    assert kernel_for(generation, nothing).name == name


@pytest.mark.parametrize(("generation", "name"), [(9, "FA3"), (10, "FA4")])
def test_flash_attention_of_the_generation_is_used_where_it_is_installed(generation, name):
    kernel = kernel_for(generation, everything)
    assert (kernel.name, kernel.flash) == (name, name)
    assert kernel.order[0] == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize("generation", [None, 8])
def test_elsewhere_torch_decides_whatever_is_installed(generation):
    assert kernel_for(generation, everything).order == ()


@pytest.mark.parametrize(
    ("generation", "installed", "name"),
    [
        (None, everything, "torch's own choice, document by document"),
        (7, everything, "torch's own choice, document by document"),
        (8, everything, "FlashAttention-2 with lengths of documents"),
        (9, nothing, "FlashAttention-2 with lengths of documents"),
        (9, everything, "FA3 with lengths of documents"),
        (10, everything, "FA4 with lengths of documents"),
    ],
)
def test_documents_are_one_call_where_flash_attention_runs(generation, installed, name):
    kernel = kernel_for(generation, installed)
    assert kernel.name_within_documents(torch.bfloat16, 128) == name
    for dtype, head_dim in ((torch.float32, 128), (torch.bfloat16, 12), (torch.bfloat16, 512)):
        assert kernel.name_within_documents(dtype, head_dim) == f"{kernel.name}, document by document"


def test_torch_knows_the_implementations_by_these_names():
    assert {name for name, _, _ in FLASH_IMPLEMENTATIONS} <= set(list_flash_attention_impls())


def test_a_cpu_leaves_it_to_torch():
    assert attention_kernel().name == "torch's own choice"
