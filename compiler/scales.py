"""Which tensor has which grid: 8 or 16 bits, scale, and the value that 0 stands for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from compiler import ops
from compiler.calibrate import Calibration
from compiler.graph import (
    Attention,
    Convolution,
    Fixed,
    Fold,
    Graph,
    Input,
    Linear,
    MatMul,
    MaxPool,
    Node,
    Pointwise,
    Product,
    Rearrange,
    Transpose,
)
from compiler.parameters import LOG2E_256

__all__ = ["Grids", "stored_name"]

SCORE_FLOOR = 2.0**-14
"""Smallest score multiplier: below it MASK_BIAS would not saturate a masked key's score."""
WIDE_MARGIN = 1 << 14
"""A 16-bit grid puts the largest calibrated magnitude here: half the range is left for larger values."""


def stored_name(graph: Graph, name: str) -> str:
    """The node behind an output that the host only rearranges."""
    node = graph.nodes[name]
    return node.inputs[0] if isinstance(node, Fold) else name


def moves_whole_rows(node: Node) -> bool:
    """Whether a node's rows are all whole rows of one operand."""
    if not isinstance(node, Rearrange) or len(node.inputs) != 1 or node.fill is not None:
        return False
    channels = node.shape[-1]
    whole = all((part.start, part.at, part.width) == (0, 0, channels) for part in node.parts)
    return whole and sum(len(part.to) for part in node.parts) * channels == math.prod(node.shape)


class Grids:
    """The tensors of one network, made one by one in the order of its operators."""

    def __init__(
        self, graph: Graph, calibration: Calibration, *, residual_bits: int, wide: bool, bits16: Collection[str] = ()
    ) -> None:
        self.graph = graph
        self.calibration = calibration
        self.residual_bits = residual_bits
        self.wide = wide
        self.bits16 = bits16
        self.tensors: dict[str, ops.QuantTensor] = {}
        self.meta: dict[str, str] = {}
        self.users = graph.users()
        self.outputs = tuple(stored_name(graph, name) for name in graph.outputs)
        self.offsets: dict[str, NDArray[np.float64]] = {}  # value at 0 of the channels, where it is not 0

    def tensor(self, node: Node, dtype: ops.TensorDtype, scale: float) -> ops.QuantTensor:
        shape = node.shape if len(node.shape) == 3 else (1, *node.shape)
        made = ops.QuantTensor(node.name, tuple(shape), dtype, float(scale))  # type: ignore[arg-type]
        self.tensors[node.name] = made
        return made

    def input(self, node: Input) -> None:
        read = self.users[node.name]
        added = any(not isinstance(user, Attention | MatMul) and not self.multiplies(user, node.name) for user in read)
        if added and (self.wide or node.name in self.bits16):
            self.tensor(node, "int16", max(self.calibration.peak(node.name, "out"), 1e-30) / WIDE_MARGIN)
        else:
            self.tensor(node, "int8", self.out_scale(node.name))

    def fixed(self, node: Fixed) -> NDArray[np.integer]:
        """Integers of a constant tensor: 8 bits where products or attention read it, else 16."""
        value = node.value.detach().double().reshape((-1, *node.shape[-2:]))
        value = value[:1] if bool((value == value[:1]).all()) else value
        peak = max(self.calibration.peak(node.name, "out"), 1e-30)
        small = self.needs8(node.name)
        tensor = self.tensor(node, "int8" if small else "int16", self.out_scale(node.name) if small else peak / 32767)
        limit = 127 if small else 32767
        return np.rint(value.numpy() / tensor.scale).clip(-limit, limit).astype(tensor.dtype)

    @staticmethod
    def multiplies(user: Node, name: str) -> bool:
        """Whether an operator multiplies or moves a tensor, rather than adding it to something."""
        if isinstance(user, Rearrange | Transpose | Product):
            return True
        if isinstance(user, MatMul):
            return name in user.inputs[:2]
        if isinstance(user, Linear) and user.wide:
            return False
        return isinstance(user, Linear | Convolution | MaxPool) and user.inputs[0] == name

    def needs8(self, name: str) -> bool:
        """Whether some operator takes 8 bits of the tensor: those that multiply it, or all of which it is the first operand."""
        read = self.users[name]
        return any(
            self.multiplies(user, name) or (isinstance(user, Attention) and name in user.inputs[:3]) for user in read
        ) or (bool(read) and all(self.streams(user, name) for user in read))

    @staticmethod
    def streams(user: Node, name: str) -> bool:
        """Whether a tensor is the operand of a Pointwise that comes with 8 bits."""
        first = isinstance(user, Pointwise) and user.inputs[0] == name and user.inputs.count(name) == 1
        return first and isinstance(user, Pointwise) and (user.post.residual or user.channels is not None)

    def is_wide(self, node: Node) -> bool:
        """Whether a result is kept in 16 bits."""
        if not isinstance(node, Linear | Convolution | Pointwise) or node.post.function is not None:
            return False
        read = self.users[node.name]
        if node.name in self.bits16 or (self.wide and node.name in self.graph.outputs):
            return True
        if node.post.norm is not None:
            added = any(
                isinstance(user, Linear | Convolution | Pointwise) and node.name in user.inputs[1:] for user in read
            )
            return added and (self.residual_bits == 16 or node.post.norm.groups > 1)
        if node.post.residual and not node.post.multiply:
            return True
        return bool(read) and not self.needs8(node.name) and node.name not in self.outputs

    def out(self, node: Linear | Convolution | Pointwise) -> ops.QuantTensor:
        """The result's tensor."""
        wide = self.is_wide(node)
        if node.post.norm is not None and self.may_shift(node):
            scale, offset = self.calibration.centred(node.name, "out")
            if wide:
                scale = max(self.peak(node, "out"), 1e-30) / WIDE_MARGIN
            self.shift(node.name, offset)
            return self.tensor(node, "int16" if wide else "int8", scale)
        if wide:
            summed = isinstance(node, Linear) and node.post.residual and not node.post.multiply and node.post.norm is None
            if summed and self.may_shift(node):
                self.shift(node.name, self.calibration.centred(node.name, "out")[1])  # for its 8 bits, which they all read
            return self.tensor(node, "int16", max(self.peak(node, "out"), 1e-30) / WIDE_MARGIN)
        if node.post.function is not None and node.post.norm is None and self.may_shift(node):
            scale, zero = self.calibration.from_low(node.name, "out")
            self.shift(node.name, np.full(node.shape[-1], zero))
            return self.tensor(node, "int8", scale)
        return self.tensor(node, "int8", self.out_scale(node.name))

    def may_shift(self, node: Node) -> bool:
        """Whether the value at 0 may be any: all readers have a bias to make up for it."""
        read = self.users[node.name]
        return (
            bool(read)
            and node.name not in self.outputs
            and all(self.shifts(user, node.name) or (moves_whole_rows(user) and self.may_shift(user)) for user in read)
        )

    @staticmethod
    def shifts(user: Node, name: str) -> bool:
        """Whether a reader's bias makes up for what 0 stands for."""
        return isinstance(user, Linear) and not (user.post.multiply and name in user.inputs[1:])

    def shift(self, name: str, offset: NDArray[np.float64]) -> None:
        """Let 0 of a tensor's channels stand for these values; rounded so that `meta` holds them exactly."""
        texts = [f"{value:.5g}" for value in offset]
        self.offsets[name] = np.array([float(text) for text in texts])
        self.meta[f"offset.{name}"] = " ".join(texts if len(set(texts)) > 1 else texts[:1])

    def out_scale(self, name: str) -> float:
        """Scale of an 8-bit tensor; coarser where the scores of an attention would be too fine."""
        scale = self.calibration.scale(name, "out")
        coarser = [1.0]
        for user in self.users[name]:
            if isinstance(user, Attention) and name in user.inputs[:2]:
                q, k = (self.calibration.scale(operand, "out") for operand in user.inputs[:2])
                coarser.append(1.001 * np.sqrt(SCORE_FLOOR / (q * k * user.scale * LOG2E_256)))
        return scale * max(coarser)

    def peak(self, node: Linear | Convolution | Pointwise, stage: str) -> float:
        """Largest magnitude of a value, and of what is added up to it."""
        found = [self.calibration.peak(node.name, stage)]
        if node.post.multiply:
            return found[0]
        if stage == "sum" or node.post.norm is None:
            offsets = [
                float(np.abs(self.offsets[name]).max()) for name in node.inputs[1:] if name in self.offsets
            ]
            found.append(self.calibration.peak(node.name, "product") + sum(offsets))
            found += [self.calibration.peak(name, "out") for name in node.inputs[1:]]
        return max(found)

    def image(self, name: str, size: tuple[int, int]) -> None:
        """Say that the rows of a tensor are the pixels of an image."""
        self.tensors[name] = replace(self.tensors[name], image=size)
