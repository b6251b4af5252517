"""DG-Net: the blocks of a stage as nodes of a complete directed acyclic graph, whose edges are chosen for every sample.

Ref: K. Yuan et al., Dynamic Graph: Learning Instance-aware Connectivity for Neural Networks, arXiv 2010.01097. **A
reconstruction**: there is no public code, and of the paper's text only the abstract was at hand. From there: every stage is a
complete graph of its blocks, a router gives edge weights for each sample, edges above a threshold are kept, a batch has one
adjacency matrix (B, n, n) a stage; ResNet, ResNeXt, RegNet and MobileNetV2 are the bases. Our choices:

* node 0 is the block that changes the shape, the last node is the stage's output; node i computes
  ``x_i = f_i(sum_{j < i} A[i, j] x_j)``, without normalising over the edges; a node without edges reads zeros;
* one router a node, from the pixels' mean of x_0, so that a stage's graph is known before its nodes are computed:
  ``A[i, :i] = r(sigmoid(W_i mean(x_0) + b_i))`` with ``r(a) = a`` above the threshold, else 0;
* the threshold is 0.1; the gradient of a dropped edge is zero, or goes straight through;
* routers start near 0.9 for the edge from the node before and 0.15 for the others, so that the chain leads.

The paper's accuracies are not reproduced. With the chain alone (`FixedRouter`) it is the static network, bit for bit; blocks keep
the static network's key names.

Shapes: B images, C channels, H and W pixels, n nodes of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import mobilenet, regnet, resnet
from models.info import ModelInfo, image
from models.registry import describe_models, register_model
from models.vision import build_vision_model

__all__ = [
    "NETWORKS",
    "DynamicSequence",
    "FixedRouter",
    "Router",
    "RouterConfig",
    "StageDensity",
    "chain",
    "dynamic_graph",
    "edge_density",
    "graphs",
    "needed_nodes",
    "skip_edges",
    "threshold_edges",
]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How edges are chosen: ``threshold`` in [0, 1); ``straight_through`` gives dropped edges a gradient as if they were
    kept; ``chain_edge`` and ``skip_edge`` in (0, 1) are initial weights of the edge from the node before, and of the
    others."""

    threshold: float = 0.1
    straight_through: bool = False
    chain_edge: float = 0.9
    skip_edge: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), not {self.threshold!r}")
        for name in ("chain_edge", "skip_edge"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be above 0 and below 1, not {getattr(self, name)!r}")


def threshold_edges(weights: Tensor, threshold: float, *, straight_through: bool = False) -> Tensor:
    """Edge weights above the threshold as they are, the others zero; any shape."""
    kept = weights * (weights > threshold)
    return weights + (kept - weights).detach() if straight_through else kept


class Router(nn.Module):
    """Graphs of a stage from the output of its first node: (B, C, H, W) -> (B, n, n), strictly lower triangular, [0, 1]."""

    def __init__(self, channels: int, nodes: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.ModuleList(nn.Linear(channels, node) for node in range(1, nodes))
        for layer in self.fc:
            edges = cast(nn.Linear, layer)
            nn.init.normal_(edges.weight, std=0.01)
            nn.init.constant_(edges.bias, _logit(config.skip_edge))
            with torch.no_grad():
                edges.bias[-1] = _logit(config.chain_edge)

    def forward(self, x: Tensor) -> Tensor:
        config, nodes = self.config, len(self.fc) + 1
        mean = F.adaptive_avg_pool2d(x, 1).flatten(1)
        rows = [torch.zeros(len(x), nodes, dtype=x.dtype, device=x.device)]
        for layer in self.fc:
            edges = threshold_edges(layer(mean).sigmoid(), config.threshold, straight_through=config.straight_through)
            rows.append(F.pad(edges, (0, nodes - edges.shape[1])))
        return torch.stack(rows, 1)


class FixedRouter(nn.Module):
    """The same graph for every sample: an adjacency matrix (n, n), or a batch of them (B, n, n).

    Raises
    ------
    ValueError
        Not square, or not strictly lower triangular: an edge must come from an earlier node.
    """

    adjacency: Tensor

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        if adjacency.ndim not in (2, 3) or adjacency.shape[-1] != adjacency.shape[-2]:
            raise ValueError(f"an adjacency matrix must be (n, n) or (B, n, n), not {tuple(adjacency.shape)}")
        if adjacency.triu().any():
            raise ValueError("an adjacency matrix must be strictly lower triangular: edges come from earlier nodes")
        self.register_buffer("adjacency", adjacency, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency.expand(len(x), -1, -1)


def chain(nodes: int) -> Tensor:
    """The static network's graph, (n, n): each node reads the one before."""
    return torch.ones(nodes - 1).diag(-1)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


class DynamicSequence(nn.Module):
    """Modules in a row, of which some stretches are graphs: (B, C, H, W) -> (B, C', H', W').

    Parameters
    ----------
    parts
        The modules by name; they keep their names.
    stages
        Names of the nodes of each graph, consecutive parts; from the second on their inputs and outputs have one shape.

    Members
    -------
    routers
        By the name of a graph's first node.
    skip
        In eval mode, leave out edges of weight zero and nodes that nothing reads, sample by sample. The same results to
        rounding; what runs then depends on values, so that it cannot be exported.
    """

    def __init__(self, parts: Iterable[tuple[str, nn.Module]], stages: Sequence[Sequence[str]], config: RouterConfig) -> None:
        super().__init__()
        for name, part in parts:
            self.add_module(name, part)
        self.stages = {names[0]: tuple(names) for names in stages}
        self.order = [name for name in self._modules if not any(name in names[1:] for names in self.stages.values())]
        self.skip = False
        self.routers = nn.ModuleDict({
            first: Router(_channels(self.get_submodule(first)), len(names), config) for first, names in self.stages.items()
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
            if name in self.stages:
                x = self._run(x, self.routers[name](x), [self.get_submodule(node) for node in self.stages[name][1:]])
        return x

    def _run(self, first: Tensor, adjacency: Tensor, nodes: list[nn.Module]) -> Tensor:
        if adjacency.shape != (len(first), len(nodes) + 1, len(nodes) + 1):
            raise ValueError(f"{len(first)} samples and {len(nodes) + 1} nodes need as many graphs, not {tuple(adjacency.shape)}")
        if self.skip and not self.training:
            return _skipping(first, adjacency, nodes)
        outputs = [first]
        for number, node in enumerate(nodes, 1):
            edges = adjacency[:, number, :, None, None, None]
            total = edges[:, 0] * outputs[0]
            for source in range(1, number):
                total = total + edges[:, source] * outputs[source]
            outputs.append(node(total))
        return outputs[-1]


def _skipping(first: Tensor, adjacency: Tensor, nodes: list[nn.Module]) -> Tensor:
    """Nodes of the samples that need them, and edges that are not zero, in the order of the dense computation."""
    needed = needed_nodes(adjacency)
    outputs: list[Tensor | None] = [first]
    for number, node in enumerate(nodes, 1):
        rows = needed[:, number].nonzero().flatten()
        if not len(rows):
            outputs.append(None)
            continue
        total = first.new_zeros(len(rows), *first.shape[1:])
        for source, output in enumerate(outputs):
            edges = adjacency[rows, number, source]
            used = edges.nonzero().flatten()
            if len(used) and output is not None:
                total[used] += edges[used, None, None, None] * output[rows[used]]
        result = first.new_zeros(first.shape)
        result[rows] = node(total)
        outputs.append(result)
    last = outputs[-1]
    assert last is not None  # every sample needs the last node
    return last


def needed_nodes(adjacency: Tensor) -> Tensor:
    """Which nodes the last one depends on: (B, n, n) -> bool (B, n)."""
    needed = torch.zeros(adjacency.shape[:2], dtype=torch.bool, device=adjacency.device)
    needed[:, -1] = True
    for node in range(adjacency.shape[1] - 1, 0, -1):
        needed |= needed[:, node, None] & (adjacency[:, node] != 0)
    return needed


# -- any network of ours ---------------------------------------------------------------------------------------------------------


def dynamic_graph(model: nn.Module, config: RouterConfig | None = None) -> nn.Module:
    """Give the stages of a ResNet, ResNeXt, RegNet or MobileNetV2 dynamic graphs, in place; blocks and their key names stay.

    Parameters
    ----------
    model
        Of this package; trained weights are kept. Stages of one block stay as they are.

    Returns
    -------
    nn.Module
        ``model`` itself.

    Raises
    ------
    TypeError
        Another network.
    ValueError
        It has dynamic graphs already, or no stage of two blocks.
    """
    if any(isinstance(part, DynamicSequence) for part in model.modules()):
        raise ValueError(f"this {type(model).__name__} has dynamic graphs already")
    found = [(name, stages) for name, stages in _stages(model) if stages]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no stage of two blocks or more: there is no edge to choose")
    for name, stages in found:
        owner, _, own = name.rpartition(".")
        parts = model.get_submodule(name).named_children()
        device = next(model.parameters()).device
        setattr(model.get_submodule(owner), own, DynamicSequence(parts, stages, config or RouterConfig()).to(device))
    return model


def _stages(model: nn.Module) -> list[tuple[str, list[list[str]]]]:
    """Names of the sequences of blocks, and the nodes of the graphs in each."""
    if isinstance(model, resnet.ResNet):
        names = [f"layer{stage + 1}" for stage in range(len(model.config.blocks))]
    elif isinstance(model, regnet.RegNet):
        names = [f"trunk_output.{name}" for name, _ in model.trunk_output.named_children()]
    elif isinstance(model, mobilenet.MobileNetV2):
        return [("features", _mobilenet_stages(model.config))]
    else:
        kind = type(model).__name__
        raise TypeError(f"dynamic graphs are for ResNet, ResNeXt, RegNet and MobileNetV2 of this package, not {kind}")
    stages = [(name, [part for part, _ in model.get_submodule(name).named_children()]) for name in names]
    return [(name, [nodes] if len(nodes) > 1 else []) for name, nodes in stages]


def _mobilenet_stages(config: mobilenet.MobileNetConfig) -> list[list[str]]:
    stages, first = [], 1
    for _, _, blocks, _ in config.stages:
        if blocks > 1:
            stages.append([str(block) for block in range(first, first + blocks)])
        first += blocks
    return stages


def _channels(block: nn.Module) -> int:
    """Channels of a block's output: its last batch norm's."""
    return [part.num_features for part in block.modules() if isinstance(part, nn.BatchNorm2d)][-1]


def skip_edges(model: nn.Module, skip: bool = True) -> None:
    """Set `DynamicSequence.skip` in a whole network."""
    for part in model.modules():
        if isinstance(part, DynamicSequence):
            part.skip = skip


@torch.no_grad()
def graphs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run a network in the mode it is in, and give the graphs it chose: name of the stage's first block -> (B, n, n)."""
    found: dict[str, Tensor] = {}
    handles = [
        part.register_forward_hook(lambda _module, _args, adjacency, name=name: found.__setitem__(name, adjacency))
        for name, part in model.named_modules()
        if isinstance(part, Router | FixedRouter)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name.replace("routers.", ""): adjacency for name, adjacency in found.items()}


@dataclass(frozen=True)
class StageDensity:
    """One stage: ``edges`` of the complete graph, and the mean shares of edges kept and of nodes needed, in [0, 1]."""

    stage: str
    nodes: int
    edges: int
    density: float
    needed: float


def edge_density(chosen: dict[str, Tensor]) -> list[StageDensity]:
    """One row a stage of what `graphs` gives."""
    rows = []
    for stage, adjacency in chosen.items():
        nodes = adjacency.shape[1]
        edges = nodes * (nodes - 1) // 2
        kept = (adjacency != 0).sum((1, 2)).double().mean().item() / edges
        rows.append(StageDensity(stage, nodes, edges, kept, needed_nodes(adjacency).double().mean().item()))
    return rows


# -- named networks --------------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[..., nn.Module], Any, str]] = {
    "dgnet_resnet18": (resnet.ResNet, resnet.CONFIGS["resnet18"], "ResNet-18"),
    "dgnet_resnet50": (resnet.ResNet, resnet.CONFIGS["resnet50"], "ResNet-50"),
    "dgnet_resnext50": (resnet.ResNet, resnet.CONFIGS["resnext50_32x4d"], "ResNeXt-50 32x4d"),
    "dgnet_regnetx_400mf": (regnet.RegNet, regnet.CONFIGS["regnet_x_400mf"], "RegNetX-400MF"),
    "dgnet_mobilenetv2": (mobilenet.MobileNetV2, mobilenet.CONFIGS["mobilenet_v2"], "MobileNetV2"),
}
"""Name -> the base network. Options of the base and of `RouterConfig` may be given."""


def _register(name: str, kind: Callable[..., nn.Module], config: Any, title: str) -> Callable[..., nn.Module]:
    own = [field.name for field in fields(RouterConfig)]

    def builder(*, pretrained: bool | str | Path = False, **overrides: Any) -> nn.Module:
        known = [*own, *(field.name for field in fields(config))]
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"{name} has no option {unknown[0]!r}: it has {', '.join(known)}")
        options = RouterConfig(**{key: overrides.pop(key) for key in own if key in overrides})
        return build_vision_model(name, lambda changed: dynamic_graph(kind(changed), options), config, pretrained, overrides)

    builder.__name__ = name
    builder.__doc__ = f"{title} with a dynamic graph in each stage (a reconstruction)."
    return register_model(builder)


for _name, (_kind, _config, _title) in NETWORKS.items():
    _register(_name, _kind, _config, _title)


describe_models(
    tuple(NETWORKS),
    ModelInfo(
        family="DG-Net", paper="2010.01097", inputs=image(3, 224), reconstruction=True,
        note="no figures to compare with; routers add n (n - 1) / 2 edges of C + 1 parameters to a stage of n nodes",
    ),
)  # fmt: skip
