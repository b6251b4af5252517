"""What group Fisher pruning is worth: a small ResNet on real handwritten digits, against pruning at random and by magnitude.

Data: the 1797 digits of 8 x 8 pixels that come with scikit-learn (E. Alpaydin, C. Kaynak, UCI Optical Recognition
of Handwritten Digits); the last 360 are held out.
"""

import csv
import gzip
import io
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algo.count import count
from algo.fisher import FisherPruner
from benchmarks import Table
from models import create_model
from models.weights import distribution_file

__all__ = ["run"]

SEEDS = 3
TARGETS = (0.5, 0.25)
EPOCHS, TUNE_EPOCHS = 12, 6
HELD_OUT = 360


class RandomPruner(FisherPruner):
    """The same loop and the same saving, importance drawn at random."""

    def _flush(self) -> None:
        self._scores = None
        self._fisher = torch.rand_like(self._fisher)


class MagnitudePruner(FisherPruner):
    """Importance of a unit: mean square of the weights that read it."""

    def _flush(self) -> None:
        self._scores = None
        parts = [self._magnitudes(index) for index in range(len(self.graph.prunable))]
        self._fisher = torch.cat(parts)

    def _magnitudes(self, index: int) -> Tensor:
        group = self.graph.prunable[index]
        total = torch.zeros(group.units)
        for name, positions in group.inputs.items():
            weight = self.model.get_submodule(name).weight.detach()
            by_input = weight.movedim(1, 0).flatten(1).square().mean(1)
            total += by_input[positions].sum(1)
        return total


METHODS = {"Fisher": FisherPruner, "magnitude": MagnitudePruner, "random": RandomPruner}


def _data() -> tuple[Tensor, Tensor]:
    """Images (N, 3, 16, 16) of mean 0 and deviation 1, enlarged, and labels (N,)."""
    text = gzip.decompress(distribution_file("scikit-learn", "digits.csv.gz").read_bytes()).decode()
    rows = torch.tensor([[float(cell) for cell in row] for row in csv.reader(io.StringIO(text))])
    images = rows[:, :64].reshape(-1, 1, 8, 8)
    images = F.interpolate((images - images.mean()) / images.std(), scale_factor=2, mode="bilinear")
    return images.repeat(1, 3, 1, 1), rows[:, 64].long()


def _train(model: nn.Module, data: tuple[Tensor, Tensor], lr: float, epochs: int, pruner: FisherPruner | None = None) -> None:
    """SGD with a cosine; with a pruner, epochs go on until its target is reached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    images, labels = (part[:-HELD_OUT] for part in data)
    steps = len(images) // 64
    schedule = None if pruner else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    while epochs > 0:
        for batch in torch.randperm(len(images))[: steps * 64].split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if pruner is not None:
                pruner.step()
                if pruner.done:
                    return
        epochs -= pruner is None


@torch.no_grad()
def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = (part[-HELD_OUT:] for part in data)
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def _network() -> nn.Module:
    return create_model("resnet18", width=16, blocks=(1, 1, 1), num_classes=10)


def run() -> list[Table]:
    """Accuracy after pruning to a half and a quarter of the MACs, at once and after fine-tuning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, results = _data(), {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        dense = _network()
        _train(dense, data, 0.05, EPOCHS)
        results.setdefault(("dense", 1.0), []).append((100.0, 100.0, None, _accuracy(dense, data)))
        for name, kind in METHODS.items():
            for target in TARGETS:
                results.setdefault((name, target), []).append(_prune(dense, data, kind, target))
    torch.set_num_threads(threads)
    rows = [(name, *map(_mean, zip(*runs))) for (name, _), runs in results.items()]
    columns = ("channels chosen by", "MACs left (%)", "parameters left (%)", "accuracy at once (%)", "after fine-tuning (%)")
    note = (
        f"ResNet of three basic blocks on 8 x 8 digits, mean of {SEEDS} seeds; one unit every 4 iterations at a learning rate of "
        f"0.005, importance per MACs saved, the same for all; then {TUNE_EPOCHS} epochs."
    )
    return [Table("Pruning while training", columns, tuple(rows), note)]


def _prune(
    dense: nn.Module, data: tuple[Tensor, Tensor], kind: type[FisherPruner], target: float
) -> tuple[float, float, float, float]:
    """MACs and parameters left, accuracy at once and after fine-tuning, all in percent."""
    model = _network()
    model.load_state_dict(dense.state_dict())
    images = data[0][:2]
    pruner = kind(model.train(), images, target=target, interval=4)
    _train(model, data, 0.005, 1, pruner)
    at_once = _accuracy(model, data)
    pruner.finish()
    _train(model, data, 0.02, TUNE_EPOCHS)
    before, after = count(dense, images), count(model, images)
    left = 100 * after.macs / before.macs, 100 * after.parameters / before.parameters
    return *left, at_once, _accuracy(model, data)


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
