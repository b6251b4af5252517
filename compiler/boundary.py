"""Between the tensors of a module and those of its programs: names, shapes, and what is there in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from compiler.exported import module_path, source_line
from compiler.frontend import by_rows
from compiler.graph import Fold, Graph, Unfold
from compiler.host import HostOp, HostPart, host_part
from compiler.ops import QuantNetwork
from compiler.partition import Partition, Segment
from compiler.program import ModelTensor
from compiler.scales import stored_name

__all__ = ["argument", "comes_as_heads", "float_boundary", "model_tensor", "outside", "own_tensors", "segment_batches", "turning"]

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("trace", "passes", "calibrate", "lower"), how far it is, and its end if that is
known."""


def float_boundary(found: Partition, batches: Iterable[Any], report: Progress | None = None) -> list[dict[str, Tensor]]:
    """What goes to the accelerator in float, by exported name, for each batch of the module's inputs."""
    exported = found.exported
    needed = {node for stage in found.segments for node in stage.inputs.values()}
    wanted = {node.name for node in needed} | {node.name for node in exported.inputs}
    for node in reversed(exported.operators):
        if node in needed:
            needed.update(node.all_input_nodes)
    live = [node for node in exported.operators if node in needed and exported.constant(node) is None]
    whole = host_part(exported, live, exported.inputs, [])
    result = []
    for done, batch in enumerate(batches, 1):
        seen: dict[str, Tensor] = {}

        def observe(name: str, value: Any, seen: dict[str, Tensor] = seen) -> None:
            if name in wanted:
                seen[name] = value

        inputs = exported.bind(batch)
        whole.run(inputs, observe=observe)
        result.append({**{name: value for name, value in inputs.items() if name in wanted}, **seen})
        if report is not None:
            report("calibrate", done, None)
    return result


def segment_batches(stage: Segment, values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {
            name: by_rows(batch[node.name]) if comes_as_heads(stage, name) else batch[node.name]
            for name, node in stage.inputs.items()
        }
        for batch in values
    ]


def comes_as_heads(stage: Segment, name: str) -> bool:
    """Whether a graph's input is an exported tensor of heads, turned."""
    node = stage.graph.nodes[name]
    return (getattr(node, "given", None) or node.shape) != tuple(stage.inputs[name].meta["val"].shape)


def turning(turned: Mapping[str, Any]) -> HostPart:
    """A host part that turns heads into rows."""
    ops = []
    for node in turned.values():
        name, reference = node.name, {"ref": node.name}
        common: dict[str, Any] = {"kwargs": {}, "source": module_path(node), "line": source_line(node)}
        ops += [
            HostOp(name=f"{name}.turned", target="aten.transpose.int", args=[reference, 1, 2], **common),
            HostOp(name=f"{name}.rows", target="aten.flatten.using_ints", args=[{"ref": f"{name}.turned"}, 2], **common),
        ]
    names = [node.name for node in turned.values()]
    return HostPart(ops=tuple(ops), constants={}, inputs=tuple(names), outputs=tuple(f"{name}.rows" for name in names))


def outside(stage: Segment, name: str) -> str:
    """The exported node that a network's input stands for."""
    node = stage.graph.nodes[name]
    return stage.inputs[node.inputs[0] if isinstance(node, Unfold) else name].name


def model_tensor(graph: Graph, network: QuantNetwork, name: str, outside: str = "") -> ModelTensor:
    """An input or output as the model has it, by the name that it has outside: data are float32, masks have the dtype of
    the example."""
    node, tensor = graph.nodes[name], network.tensors[stored_name(graph, name)]
    image: tuple[int, ...] | None = None
    if isinstance(node, Unfold):
        image = (*node.out_size, *node.kernel, *node.stride, *node.padding, *node.dilation)
        node = graph.nodes[node.inputs[0]]
    elif isinstance(node, Fold):
        image = node.size
    return ModelTensor(
        name=outside or node.name,
        tensor=tensor.name,
        image=image,
        shape=tuple(getattr(node, "given", None) or node.shape),
        dtype=str(getattr(node, "dtype", "torch.float32")),
        scale=tensor.scale,
        kind="keymask" if tensor.dtype == "keymask" else "activation",
        inverted=tensor.dtype == "keymask" and network.meta.get(f"keep.{name}") == "0",
    )


def own_tensors(network: QuantNetwork, names: Sequence[str]) -> tuple[ModelTensor, ...]:
    """The network's integer tensors themselves as the model's."""
    tensors = [network.tensors[name] for name in names]
    return tuple(
        ModelTensor(
            name=tensor.name,
            tensor=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            scale=float(tensor.scale),
            kind="keymask" if tensor.dtype == "keymask" else "activation",
        )
        for tensor in tensors
    )
def argument(name: str, value: Tensor) -> ModelTensor:
    return ModelTensor(name=name, tensor=name, shape=tuple(value.shape), dtype=str(value.dtype), scale=1.0)
