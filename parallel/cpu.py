"""Megatron-core on a machine without CUDA. The only file that knows there may be none; with CUDA it changes nothing.

Megatron-core 0.16.1 takes the accelerator for granted: it allocates on `device="cuda"`, asks `torch.cuda` for random
states and compares type names with `torch.cuda.FloatTensor`. Rather than patch torch for everybody, each of its modules
is given a torch of its own in which the accelerator is the CPU; the torch of the rest of the process stays as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from parallel.attention import chunks_of_rank

CPU = torch.device("cpu")
FACTORIES = ("tensor", "empty", "zeros", "ones", "full")


def adapt_megatron() -> None:
    """Make those modules of Megatron-core that are imported by now run on the CPU; does nothing with CUDA."""
    if torch.cuda.is_available():
        return
    substitute = _CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = substitute
            _undo_compilation(module)
            if name in SPECIAL_CARE:
                SPECIAL_CARE[name](module)


def adapt_deepspeed() -> None:
    """Keep DeepSpeed from probing for compilers and building a shared-memory collective; does nothing with CUDA.

    And let it have the mesh's groups.
    """
    if torch.cuda.is_available():
        return
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    deepspeed.ops.__compatible_ops__ = dict.fromkeys(ALL_OPS, False)
    deepspeed.comm.new_group = _shared(deepspeed.comm.comm.new_group)


def tensors_as_on_cuda() -> AbstractContextManager[object]:
    """While open, `tensor.type()` names CUDA types and `tensor.cuda()` is the tensor; for building models with."""
    return nullcontext() if torch.cuda.is_available() else _AsOnCuda()


class _CpuTorch(ModuleType):
    """torch, except that its accelerator is the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__.update(torch.__dict__)
        for name in FACTORIES:
            self.__dict__[name] = _on_cpu(getattr(torch, name))
        self.__dict__["cuda"] = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)  # what torch itself loads lazily


class _CpuCuda(ModuleType):
    """torch.cuda with one device, the CPU, whose work is always done and whose generator is torch's default one."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.__dict__.update(torch.cuda.__dict__)
        self.current_device: Callable[..., torch.device] = lambda: CPU
        self.synchronize: Callable[..., None] = lambda device=None: None
        self.manual_seed: Callable[[int], object] = torch.manual_seed
        self.get_rng_state: Callable[..., Tensor] = lambda device=None: torch.get_rng_state()
        self.set_rng_state: Callable[..., None] = lambda state, device=None: torch.set_rng_state(state)
        self.random: _CpuCuda = self
        self.Stream: Callable[..., _Queue] = lambda *args, **kwargs: _Queue()
        self.current_stream: Callable[..., _Queue] = lambda device=None: _Queue()
        self.stream: Callable[[_Queue], AbstractContextManager[None]] = lambda stream: nullcontext()


class _Queue:
    """A stream of work that is done when it is asked for, and so its own event."""

    def record_event(self) -> _Queue:
        return self

    def wait_stream(self, stream: _Queue) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _AsOnCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        # Optimizers sort parameters by the names of their types.
        return result.replace("torch.", "torch.cuda.") if func is Tensor.type and isinstance(result, str) else result


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _undo_compilation(module: ModuleType) -> None:
    # Small element-wise functions are decorated with torch.compile: seconds of C++ compiler in every rank.
    for name, value in list(vars(module).items()):
        original = getattr(value, "_torchdynamo_orig_callable", None)
        if callable(value) and original is not None:
            setattr(module, name, original)


def _use_cpu_random_state(module: Any) -> None:
    # Its own setter goes through torch.cuda.default_generators, which are empty.
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # It warns when code for the accelerator moved the CPU's generator, which here is the point.
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _slice_rotary_angles(module: Any) -> None:
    # Its own makes indices in pinned memory and moves them with `.cuda()`.
    def angles_of_context_rank(angles: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        chunks = angles.chunk(2 * group.size(), dim=dim)
        return torch.cat([chunks[chunk] for chunk in chunks_of_rank(group.rank(), group.size())], dim=dim)

    module.get_pos_emb_on_this_cp_rank = angles_of_context_rank


def _keep_sent_tensors(module: Any) -> None:
    # gloo reads the buffer after isend has returned, and Megatron frees it (`deallocate_output_tensor`) before it
    # waits: silently wrong activations. A detached alias keeps the storage as long as the request.
    send_and_receive = module._p2p_ops

    @functools.wraps(send_and_receive)
    def keep_and_send(**kwargs: Any) -> Any:
        for name in ("tensor_send_prev", "tensor_send_next"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name].detach()
        return send_and_receive(**kwargs)

    module._p2p_ops = keep_and_send


def _know_counts_on_host(module: Any) -> None:
    # All-to-all wants numbers of tokens as numbers; Megatron makes them such where it moves them from the GPU.
    def as_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    module.maybe_move_tensor_to_cpu = as_on_host


def _exchange_unequal_parts(module: Any) -> None:
    # gloo gathers and scatters equal parts only; a sum with zeros, or of all parts, says the same.
    gather, scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_parts(part: Tensor, group: ProcessGroup, sizes: list[int] | None = None, *rest: Any) -> Tensor:
        if sizes is None or group.size() == 1:
            return cast(Tensor, gather(part, group, sizes, *rest))
        whole = part.new_zeros((sum(sizes), *part.shape[1:]))
        _part(whole, sizes, group).copy_(part)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @functools.wraps(scatter)
    def scatter_parts(whole: Tensor, group: ProcessGroup, sizes: list[int] | None = None, *rest: Any) -> Tensor:
        if sizes is None or group.size() == 1:
            return cast(Tensor, scatter(whole, group, sizes, *rest))
        total = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return _part(total, sizes, group).clone()

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather_parts, scatter_parts


def _part(whole: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
    return torch.split(whole, sizes)[group.rank()]


def _differentiate_swiglu_in_few_passes(module: Any) -> None:
    # Its own goes through memory ten times, which is one kernel where it is compiled; torch's own kernel knows the
    # derivative of the gate. In float32 alone: elsewhere it would round other things than a GPU does.
    in_many_passes = module.swiglu_back

    def swiglu_back(gradient: Tensor, gate_up: Tensor) -> Tensor:
        if gate_up.dtype != torch.float32:
            return cast(Tensor, in_many_passes(gradient, gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return torch.cat((of_gate, gradient * torch.nn.functional.silu(gate)), dim=-1)

    module.swiglu_back = swiglu_back


def _rotate_in_few_passes(module: Any) -> None:
    # The same numbers with half the passes over memory: its own copies all of it to add the part that is not rotated,
    # which is empty.
    def rotated(tensor: Tensor, angles: Tensor, **options: Any) -> Tensor:
        assert angles.size(-1) == tensor.size(-1), "all of a head is rotated"
        half = angles.chunk(2, dim=-1)[0]
        cosine, sine = half.cos().to(tensor.dtype), half.sin().to(tensor.dtype)
        first, second = tensor.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    module._apply_rotary_pos_emb_bshd = rotated


def _share_mesh_groups(module: Any) -> None:
    destroy = module.destroy_model_parallel

    @functools.wraps(destroy)
    def destroy_and_forget() -> None:
        _GROUPS.clear()
        destroy()

    module.create_group, module.destroy_model_parallel = _shared(module.create_group), destroy_and_forget


# Of the mesh, by their ranks. A mesh has 17 groups, a pipeline of DeepSpeed's as many again, few of which differ in
# their ranks, and each of gloo's has a thread that wakes a hundred times a second. Calls on a group are matched by
# their order, which is the same on all its ranks whatever the calls are for.
_GROUPS: dict[tuple[int, ...], ProcessGroup] = {}


def _shared(create: Callable[..., ProcessGroup]) -> Callable[..., ProcessGroup]:
    @functools.wraps(create)
    def group_of(ranks: Iterable[int], *args: Any, **kwargs: Any) -> ProcessGroup:
        ranks = tuple(ranks)
        if ranks not in _GROUPS:
            _GROUPS[ranks] = create(list(ranks), *args, **kwargs)
        return _GROUPS[ranks]

    return group_of


SPECIAL_CARE = {
    "megatron.core.fusions.fused_bias_swiglu": _differentiate_swiglu_in_few_passes,
    "megatron.core.parallel_state": _share_mesh_groups,
    "megatron.core.tensor_parallel.random": _use_cpu_random_state,
    "megatron.core.models.common.embeddings.rope_utils": _rotate_in_few_passes,
    "megatron.core.models.common.embeddings.rotary_pos_embedding": _slice_rotary_angles,
    "megatron.core.pipeline_parallel.p2p_communication": _keep_sent_tensors,
    "megatron.core.transformer.moe.token_dispatcher": _know_counts_on_host,
    "megatron.core.tensor_parallel.mappings": _exchange_unequal_parts,
}
