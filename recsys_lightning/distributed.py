"""What the processes of one run tell each other, in plain `torch.distributed`; a single process talks to nobody."""

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Which process of its node this is, from 0, by what torchrun, the Trainer or srun has told it."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def gather_rows(x: Tensor, gradient: bool = False) -> Tensor:
    """The rows of all processes, in the order of their ranks, on every process.

    Call it on every process, each with its own number of rows, which may be none. Without `torch.distributed` it is
    `x` itself.

    Args:
        x: (n, ...); n may differ between processes, the shape of a row and the type may not.
        gradient: pass the gradient back: a row gets the sum of what it is used for on all processes. All of them must
            then run backward.

    Returns:
        (sum of n, ...) on the device of `x`.

    Raises:
        ValueError: rows of different shape or type, on every process; nothing has been exchanged.
    """
    if world_size() == 1:
        return x
    if gradient:
        gathered: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call] # torch left it so
        return gathered
    return _gather(x)[0]


def row_weight(count: int, device: torch.device) -> float | Tensor:
    """What turns means over the `count` rows of each process into one whose mean over processes is that of all rows.

    Processes that share out a batch have different numbers of rows to learn from; the plain mean of their means would
    favour rows of processes that have few.
    """
    if world_size() == 1:
        return 1.0
    return count * world_size() / sum_over_processes(torch.tensor(float(count), device=device)).clamp_min(1)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of what each process gives, of one shape and type, on the device of `x` and without a gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().to(_meeting_device(x.device), copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(x.device)


def copy_first_state(module: nn.Module) -> None:
    """Give a module on every process the state that it has on the first: all that is in its `state_dict`.

    Call it on every process. What is learned by each of them from the same data may differ by rounding, or by more
    where their processors differ.
    """
    if world_size() == 1:
        return
    mine = module.state_dict() if rank() == 0 else {}
    state = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in mine.items()}]
    dist.broadcast_object_list(state, src=0)
    module.load_state_dict(state[0])


class _GatherRows(torch.autograd.Function):
    """`gather_rows` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered, lengths = _gather(x)
        ctx.lengths = lengths
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        where = _meeting_device(grads[0].device)
        total = grads[0].to(where, copy=True).contiguous()
        dist.all_reduce(total)
        return torch.split(total, ctx.lengths)[rank()].to(grads[0].device)


def _gather(x: Tensor) -> tuple[Tensor, list[int]]:
    """The rows of all processes, and how many each has."""
    where = _meeting_device(x.device)
    lengths = _lengths(x, where)
    # As bytes, since the back ends differ in the types that they carry; padded, since gloo gathers equal shapes only.
    width = math.prod(x.shape[1:])
    sent = torch.zeros(max(lengths), width * x.element_size(), dtype=torch.uint8, device=where)
    sent[: len(x)] = x.detach().contiguous().reshape(len(x), width).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in lengths]
    dist.all_gather(received, sent)
    rows = torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)])
    return rows.flatten().view(x.dtype).reshape(sum(lengths), *x.shape[1:]).to(x.device), lengths


def _lengths(x: Tensor, where: torch.device) -> list[int]:
    """The number of rows of each process, once it is sure that the rows are alike."""
    kind = (x.dtype, *x.shape[1:])
    # Both ends of the hash must agree on every process, so it is made of text and never of `hash`, which is salted.
    code = int.from_bytes(repr(kind).encode(), "big") % (2**61 - 1)
    mine = torch.tensor([len(x), code], device=where)
    each = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(each, mine)
    lengths, codes = torch.stack(each).T.tolist()
    if len(set(codes)) > 1:
        raise ValueError(f"rows to gather must have one shape and type on all processes; here {x.dtype} {kind[1:]}")
    return [int(length) for length in lengths]


def _meeting_device(device: torch.device) -> torch.device:
    """Where the back end can exchange: NCCL on the GPU only, gloo on the CPU."""
    backend = dist.get_backend()
    if backend == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device
