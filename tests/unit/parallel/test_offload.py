"""What layers keep goes to host memory and comes back; a block of two-product layers stands for a model's."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from parallel import offload

NUM_LAYERS, SIZE = 6, 160  # a layer's input is 100 KiB


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2 * SIZE, SIZE) / 16)

    def forward(self, hidden: Tensor) -> Tensor:
        left, right = (hidden @ self.weight.t()).chunk(2, dim=-1)  # views of one storage
        return hidden + left.sin() * right.transpose(0, 1)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer() for _ in range(NUM_LAYERS)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Counted:
    """Host buffers that were made, and how many of them are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[weakref.ref[Tensor]] = []
        make = offload.host_buffer

        def counted(device: Tensor) -> Tensor:
            buffer = make(device)
            self.buffers.append(weakref.ref(buffer))
            return buffer

        monkeypatch.setattr(offload, "host_buffer", counted)

    @property
    def alive(self) -> int:
        return sum(each() is not None for each in self.buffers)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def made(*, offloaded: bool) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    block = Block()
    if offloaded:
        offload.offload_activations([SimpleNamespace(decoder=block)])
    return block, torch.randn(SIZE, SIZE)


def gradients(block: Block, *inputs: Tensor) -> list[Tensor]:
    """Of several micro-batches under way at once, as a pipeline has them: all forward, then all back, first one first.

    A pipeline's schedule is as free in this as autograd.
    """
    for output in [block(each) for each in inputs]:
        output.square().sum().backward()
    return [layer.weight.grad for layer in block.layers]


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_gradients_are_the_same_to_the_last_bit(counted, num_micro_batches):
    found = []
    for offloaded in (False, True):
        block, hidden = made(offloaded=offloaded)
        found.append(gradients(block, *(hidden + each for each in range(num_micro_batches))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # Of a layer: its input, the product that both halves are views of, and the sine. The last layer had nobody after
    # it, except where another micro-batch came.
    assert len(counted.buffers) == 3 * (num_micro_batches * NUM_LAYERS - 1)
    assert counted.alive == 0


def test_all_but_two_layers_are_off_the_device(monkeypatch):
    stores: list[weakref.ref[Tensor]] = []
    make = offload._Storage.__init__

    def watched(self, layer, device):
        make(self, layer, device)
        stores.append(weakref.ref(device))

    monkeypatch.setattr(offload._Storage, "__init__", watched)
    block, hidden = made(offloaded=True)
    output = block(hidden)
    on_device = [number // 3 for number, store in enumerate(stores) if store() is not None]
    assert on_device == [4, 4, 4, 5, 5, 5]
    output.sum().backward()
    assert all(store() is None for store in stores)


def test_layer_below_is_on_its_way_before_it_is_read(monkeypatch):
    order = []
    load, tensor = offload._Layer._load, offload._Saved.tensor

    def loading(self):
        if not self._is_on_device:
            order.append(("load", id(self)))
        load(self)

    def reading(self):
        order.append(("read", id(self.storage.layer)))
        return tensor(self)

    monkeypatch.setattr(offload._Layer, "_load", loading)
    monkeypatch.setattr(offload._Saved, "tensor", reading)
    block, hidden = made(offloaded=True)
    block(hidden).sum().backward()
    loads = [place for place, (kind, _) in enumerate(order) if kind == "load"]
    assert len(loads) == NUM_LAYERS - 2
    for place in loads:
        layer = order[place][1]
        others = [other for kind, other in order[place:] if kind == "read" and other != layer]
        first = next(at for at, each in enumerate(order) if each == ("read", layer))
        assert place < first
        assert others or layer == order[loads[-1]][1], "another layer is still computing"


def test_nothing_moves_without_gradients_and_nothing_is_left_of_a_pass_that_was_given_up(counted):
    block, hidden = made(offloaded=True)
    with torch.no_grad():
        block(hidden)
    assert counted.buffers == []
    block(hidden)
    gc.collect()
    assert len(counted.buffers) == 3 * (NUM_LAYERS - 1)
    assert counted.alive == 0


def test_small_tensors_and_weights_stay(monkeypatch, counted):
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 2 * SIZE * SIZE * 4 + 1)
    block, hidden = made(offloaded=True)
    gradients(block, hidden)
    assert counted.buffers == []
