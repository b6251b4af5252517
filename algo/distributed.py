"""Several processes, one result: who writes, how a batch is shared out, and how a model is spread.

`torchrun` starts the processes and `processes` joins them. Without it everything here is about a single process, and costs
nothing. A batch of the configuration is always the *whole* batch: each process takes its rows, weighted so that the averaged
gradient is that of the whole batch, however many processes there are.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "Ahead",
    "Parallel",
    "RankMismatchError",
    "Spread",
    "all_ranks",
    "barrier",
    "from_main",
    "is_main",
    "leave",
    "mean_of_ranks",
    "placed_like",
    "processes",
    "rank",
    "share",
    "to_device",
    "unwrap",
    "whole",
    "world",
]

Parallel = Literal["ddp", "fsdp"]


class RankMismatchError(RuntimeError):
    """Processes that should hold the same weights and masks do not."""


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 for the main one."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Is this the process that writes files and shows progress?"""
    return rank() == 0


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()


def all_ranks(value: Any) -> list[Any]:
    """The value of each process, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, in every process."""
    return all_ranks(value)[0]


def mean_of_ranks(value: Tensor) -> float:
    """Mean of a scalar over the processes, the same number in each."""
    if world() == 1:
        return value.item()
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / world()


@contextmanager
def processes(device: str = "cpu") -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the context lasts; alone, do nothing.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA if there is any). Each process gets a GPU of its own.

    Raises
    ------
    ValueError
        Unknown device, or CUDA that is not there.
    """
    if device not in ("cpu", "cuda", "auto"):
        raise ValueError(f"device must be cpu, cuda or auto, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this torch sees no CUDA device: use cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    joined = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield place
        barrier()  # none leaves while another still waits for it
    finally:
        if joined:
            dist.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End a process that torchrun started, at once: streams are flushed, the interpreter is not taken down.

    DistributedDataParallel leaks its process group (torch 2.13), whose threads then live on while the interpreter goes; now and
    then one of them aborts the process, after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch (a tensor, or tuples, lists and dicts of them)."""
    return _map(batch, lambda tensor: tensor.to(device, non_blocking=True))


def share(batches: Sequence[Any], index: int) -> tuple[Any, float]:
    """This process's rows of a batch, and their weight in the mean over processes.

    A sequence may have a method ``part(index, rank, world) -> (rows, number of rows of the whole batch)`` to load no more than
    its part; else rows are taken from the whole batch. With more processes than rows, some get a row of weight 0.
    """
    if world() == 1:
        return batches[index], 1.0
    part = getattr(batches, "part", None)
    if part is not None:
        rows, count = part(index, rank(), world())
        return rows, _rows(rows) * world() / count if rank() < count else 0.0
    batch = batches[index]
    count = _rows(batch)
    if rank() >= count:
        return _map(batch, lambda tensor: tensor[:1]), 0.0
    rows = _map(batch, lambda tensor: tensor[rank() :: world()])
    return rows, _rows(rows) * world() / count


class Ahead:
    """This process's rows of a sequence's batches in order, from one on; see `share`. A sequence that loads its parts has the
    next one loaded while the present one is used."""

    def __init__(self, batches: Sequence[Any], first: int) -> None:
        self.batches, self.number = batches, first
        self._pool = ThreadPoolExecutor(1) if hasattr(batches, "part") else None
        self._coming: Future[tuple[Any, float]] | None = None

    def next(self) -> tuple[Any, float]:
        """The rows and weight of the next batch."""
        coming, self._coming = self._coming, None
        found = coming.result() if coming is not None else share(self.batches, self.number)
        self.number += 1
        if self._pool is not None:
            if self.number < len(self.batches):
                self._coming = self._pool.submit(share, self.batches, self.number)
            else:
                self._pool.shutdown()
        return found


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows: gathered if it is sharded (every process must call this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, on the device and sharded as another is."""
    if isinstance(pattern, DTensor):
        return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return tensor.to(pattern.device)


class Spread:
    """A model as the processes train it.

    Parameters
    ----------
    model
        The caller's model: every process must have built the same one; rank 0's weights are taken.
    parallel
        ``"ddp"``: whole weights in each process, gradients averaged. ``"fsdp"``: weights, gradients and optimiser state
        sharded by rows (FSDP2) and gathered layer by layer in forward, so that masks are computed from whole weights.

    Members
    -------
    work
        Whose parameters are optimised: ``model``, or its sharded copy.
    called
        What a loss calls.
    """

    def __init__(self, model: nn.Module, parallel: Parallel = "ddp") -> None:
        if parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, not {parallel!r}")
        self.model = model
        self.work = self.called = model
        self.sharded = False
        if world() == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if parallel == "ddp":
            # Of convolutions whose gradient comes channels-last: a copy, not an error.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # Masks are computed, not communicated; so no buffers are broadcast.
            self.called = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
        else:
            self.work = self.called = _shard(copy.deepcopy(model))
            self.sharded = True

    def gathered(self) -> AbstractContextManager[object]:
        """Whole weights in ``work`` while a hook looks at them; what it does to weights is lost if they are sharded."""
        if self.sharded:
            for module in self.work.modules():
                unshard: Any = getattr(module, "unshard", None)
                if unshard is not None:
                    unshard()
        return nullcontext()

    def last_of_group(self, last: bool) -> AbstractContextManager[object]:
        """Exchange gradients only after the last batch of an accumulated group."""
        if self.sharded:
            cast(Any, self.work).set_requires_gradient_sync(last)
        elif isinstance(self.called, nn.parallel.DistributedDataParallel) and not last:
            return self.called.no_sync()
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """The whole state dict; every process must call this."""
        return {name: whole(value).detach() for name, value in self.work.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a whole state dict."""
        if not self.sharded:
            self.work.load_state_dict(dict(tensors))
            return
        self.settle(tensors)
        for name, value in self.work.state_dict().items():
            value.copy_(placed_like(tensors[name], value))
        for module in self.work.modules():  # attributes that mirror buffers
            sync: Any = getattr(module, "sync", None)
            if sync is not None:
                sync()

    def settle(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Bring the caller's model up to date; give it. Every process must call this."""
        if self.sharded:
            self.model.load_state_dict(dict(tensors) if tensors is not None else self.state())
        if world() > 1:
            for buffer in self.model.buffers():  # running statistics are each process's own: the main one's count
                dist.broadcast(buffer, 0)
        return self.model

    def check(self) -> None:
        """Compare weights and masks of all processes.

        Raises
        ------
        RankMismatchError
            They differ; names the first tensor.
        """
        if world() == 1:
            return
        own = _digests(self.work, self.sharded)
        for other, digests in enumerate(all_ranks(own)):
            for name, digest in own.items():
                if digests.get(name) != digest:
                    raise RankMismatchError(f"process {rank()} and process {other} differ in {name}: training stops here")


def _digests(model: nn.Module, sharded: bool) -> dict[str, str]:
    """A digest of each tensor that must be the same everywhere: masks, and weights that are not sharded."""
    found = {name: mask for name, mask in model.named_buffers() if mask.dtype == torch.bool}
    if not sharded:
        found |= {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in found.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world(),))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch
    return _rows(next(iter(values)))


def _map(batch: Any, change: Any) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, change) for value in batch)
    return batch
