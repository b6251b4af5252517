"""What the processes of tests/algo/test_distributed.py run: python distributed_run.py FOLDER MODE. Rank 0 writes the result."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from algo.checkpoint import write_json, write_tensors
from algo.distributed import RankMismatchError, Spread, all_ranks, is_main, leave, processes, rank, world
from algo.sparsify import freeze_masks, sparsify
from algo.train import NonFiniteLossError, RunOptions, TrainConfig, train

BATCHES, ROWS = 6, 9  # an odd number of rows: the processes' shares differ


class Net(nn.Module):
    """A stack, so that sharding has blocks to work on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = F.gelu(block(x))
        return self.head(x)


def net() -> Net:
    torch.manual_seed(1)
    model = Net()
    sparsify(model, {"blocks.*": "2:4"})
    return model


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    x = torch.randn(BATCHES, ROWS, 16, generator=generator)
    return [(batch, batch[:, :3].argmax(1)) for batch in x]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def freeze_late(model: nn.Module, step: int, steps: int) -> None:
    if step >= steps // 2:
        freeze_masks(model)


def run(folder: Path, mode: str) -> None:
    model = net()
    groups, average = 2 if "accumulate" in mode else 1, 0.9 if "ema" in mode else 0.0
    config = TrainConfig(epochs=2, lr=0.01, schedule="cosine", accumulate=groups, ema=average)
    options = RunOptions(parallel="fsdp" if "fsdp" in mode else "ddp", check_every=2, save_every=2, log=folder)

    def stop(model: nn.Module, step: int, steps: int) -> None:
        freeze_late(model, step, steps)
        if "stop" in mode and step == 5:
            raise KeyboardInterrupt

    result = train(
        model, batches, loss_fn, config, before_step=stop, run=options, checkpoint=folder / "step.safetensors",
        evaluate=lambda trained: trained(batches(9)[0][0]).sum().item(),
    )
    # is every process's model the same, in full?
    states = all_ranks({name: value for name, value in model.state_dict().items()})
    same = all(torch.equal(states[0][name], other[name]) for other in states for name in other)
    write_tensors(folder / f"{mode}-{world()}.safetensors", model.state_dict())
    facts = {"losses": result.losses, "scores": result.scores, "same": same, "resumed": result.resumed_step}
    write_json(folder / f"{mode}-{world()}.json", facts)


def mismatch(folder: Path) -> None:
    model = net()
    spread = Spread(model)
    spread.check()
    if rank() == 1:
        with torch.no_grad():
            model.head.weight[0, 0] += 1
    try:
        spread.check()
    except RankMismatchError as error:
        if is_main():
            write_json(folder / "mismatch.json", {"error": str(error)})


def not_finite(folder: Path) -> None:
    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        value = loss_fn(model, batch)
        return value * float("nan") if rank() == 1 else value

    try:
        train(net(), batches, loss, TrainConfig())
    except NonFiniteLossError as error:
        errors = all_ranks(str(error))
        write_json(folder / "not_finite.json", {"errors": errors})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes():
        place, what = Path(sys.argv[1]), sys.argv[2]
        for mode in what.split(","):
            if mode == "mismatch":
                mismatch(place)
            elif mode == "not_finite":
                not_finite(place)
            else:
                try:
                    run(place / mode.removesuffix("-stop").removesuffix("-resume"), mode)
                except KeyboardInterrupt:
                    pass
    leave()
