"""Activations in host memory: what layers keep for the backward pass leaves the device, and is back before it is read.

Two layers are on the device at a time: while one computes, the one before it is copied out; in the backward pass, while
one computes, the one below it is copied in. Copies run on a stream of their own. A layer's tensors move as whole
storages, so that those which share memory still do and every stride comes back: the numbers are the same to the bit.

torch's `save_on_cpu` copies each tensor in line with the computation, and a tensor saved twice twice. Megatron's own
moves inputs of modules it names, needs CUDA, and keeps state of the process that its schedules drive.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel.device import this_device

SMALLEST_BYTES = 2**16
"""Smaller storages stay: a copy has a cost of its own, and they are not what fills a device."""
LAYERS_ON_DEVICE = 2


def offload_activations(chunks: Iterable[Any]) -> None:
    """Let the layers of GPTModels keep what they save for the backward pass in host memory."""
    offloading = _Offloading()
    for chunk in chunks:
        block = chunk.decoder
        block.forward = offloading.around(block.forward)
        for layer in block.layers:
            layer.register_forward_pre_hook(offloading.begin_layer)


class _Offloading:
    """Where the saved tensors of a model's layers are, across its chunks and the micro-batches in flight."""

    def __init__(self) -> None:
        self._copies = _Copies()
        self._is_saving = False
        self._layer: _Layer | None = None
        self._on_device: deque[_Layer] = deque()

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of a block, watched."""

        def watched(*args: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **options)
            with self._saving():
                return forward(*args, **options)

        return watched

    @contextmanager
    def _saving(self) -> Iterator[None]:
        self._is_saving, self._layer = True, None
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._is_saving, self._layer = False, None

    def begin_layer(self, module: Any, *_: object) -> None:
        """What is saved from now on belongs to this layer; a layer that is recomputed is not one that begins."""
        if not self._is_saving:
            return
        if self._on_device:
            self._on_device[-1].copy_out()
        if len(self._on_device) == LAYERS_ON_DEVICE:
            self._on_device.popleft().leave_device()
        self._layer = _Layer(self._copies, list(module.parameters()), self._layer)
        self._on_device.append(self._layer)

    def _pack(self, tensor: Tensor) -> Any:
        return tensor if self._layer is None else self._layer.pack(tensor)


def host_buffer(device: Tensor) -> Tensor:
    """Host memory for a copy, page-locked where the device is a GPU: otherwise the host would wait for the copy."""
    return torch.empty_like(device, device="cpu", pin_memory=device.is_cuda)


class _Copies:
    """Copies between device and host, on a CUDA stream of their own; on a CPU, in line."""

    def __init__(self) -> None:
        self.device = this_device()
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Queue what is in the block after all that the computation has queued so far, beside what it will."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """What `wait` waits for: the copies queued so far."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the computation go on after the copies; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


class _Storage:
    """Memory that saved tensors share, as bytes: on the device, on the host, or on both while it is copied."""

    def __init__(self, layer: _Layer, device: Tensor) -> None:
        self.layer = layer
        self.device: Tensor | None = device
        self.host: Tensor | None = None

    def __del__(self) -> None:
        # Where a backward pass was given up, a copy may still write to memory that is used again from here on.
        self.layer.wait()


class _Saved:
    """One saved tensor: a view of a storage."""

    def __init__(self, storage: _Storage, tensor: Tensor) -> None:
        self.storage = storage
        self.dtype = tensor.dtype
        self.place = (tensor.storage_offset(), tensor.size(), tensor.stride())

    def tensor(self) -> Tensor:
        """The tensor, as it was."""
        self.storage.layer.be_on_device()
        device = self.storage.device
        assert device is not None
        view = torch.empty(0, dtype=self.dtype, device=device.device)
        return view.set_(device.untyped_storage(), *self.place)


def _unpack(saved: Any) -> Tensor:
    return saved.tensor() if isinstance(saved, _Saved) else saved


class _Layer:
    """What one layer saved of one micro-batch. Storages live as long as autograd keeps tensors in them."""

    def __init__(self, copies: _Copies, weights: list[Tensor], below: _Layer | None) -> None:
        self._copies = copies
        self._weights = weights
        self._below = below
        self._storages: list[weakref.ref[_Storage]] = []
        self._known: dict[tuple[int, int], weakref.ref[_Storage]] = {}
        self._is_on_device = True
        self._copied: torch.cuda.Event | None = None
        self._loaded: torch.cuda.Event | None = None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in place of a tensor; weights, small tensors and those of other classes stay."""
        if type(tensor) is not Tensor or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        memory = tensor.untyped_storage()
        if memory.nbytes() < SMALLEST_BYTES or memory.device.type not in ("cpu", "cuda"):
            return tensor
        if any(memory._cdata == weight.untyped_storage()._cdata for weight in self._weights):
            return tensor  # compiled layers save them under other names
        key = (memory._cdata, tensor._version)
        known = self._known.get(key)
        storage = None if known is None else known()
        if storage is None:
            device = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
            storage = _Storage(self, device)
            self._known[key] = weakref.ref(storage)
            self._storages.append(self._known[key])
        return _Saved(storage, tensor)

    def _alive(self) -> list[_Storage]:
        return [storage for storage in (each() for each in self._storages) if storage is not None]

    def copy_out(self) -> None:
        """Queue copies to the host."""
        self._known, self._weights = {}, []  # nothing more is saved here
        with self._copies.aside():
            for storage in self._alive():
                assert storage.device is not None
                storage.host = host_buffer(storage.device)
                storage.host.copy_(storage.device, non_blocking=True)
        self._copied = self._copies.mark()

    def leave_device(self) -> None:
        """Let go of the device's memory, which may be used again once the copies are done."""
        self._copies.wait(self._copied)
        self._is_on_device = False
        for storage in self._alive():
            storage.device = None

    def be_on_device(self) -> None:
        """Have everything there for the backward pass, and the layer below on its way."""
        self._load()
        self.wait()
        if self._below is not None:
            self._below._load()
            self._below = None

    def _load(self) -> None:
        if self._is_on_device:
            return
        coming = self._alive()
        for storage in coming:
            assert storage.host is not None
            storage.device = torch.empty_like(storage.host, device=self._copies.device)
        with self._copies.aside():
            for storage in coming:
                assert storage.device is not None
                assert storage.host is not None
                storage.device.copy_(storage.host, non_blocking=True)
                storage.host = None  # its allocator waits for the copy
        self._is_on_device, self._loaded = True, self._copies.mark()

    def wait(self) -> None:
        """Let the computation go on after what is being copied in."""
        self._copies.wait(self._loaded)
        self._loaded = None
