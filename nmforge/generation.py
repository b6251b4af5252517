"""Generation of text on the simulated accelerator: a program for the prompt, and one for each further token.

Both compute the layers of a `models.llama.Llama` or `models.llama_adapter.LlamaAdapter` whole, head included. The host looks
up embeddings and angles and takes the likeliest token. The cache of keys and values is int8 in the accelerator's memory: the
prompt's program makes its first rows, each step puts one row more into it by a product of a selection (places, 1) with the
new row, and all other rows keep their bytes. From one step to the next the host makes a step's result the next one's operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compiler.compile import compile_model
from compiler.program import Program
from hw.arch import Arch
from models.llama import Block, Llama, Prompt, rotation
from models.llama_adapter import LlamaAdapter
from sim.simulate import simulate

__all__ = ["FlatStep", "Generation", "Generator", "Prefill", "Step", "generate"]

Engine = Literal["reference", "isa", "verilator"]
Turn = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines and sines (1, S, channels) of queries, then of keys, the sines with the sign of their channel."""


class Layer(nn.Module):
    """A block on (1, S, C), heads side by side; pairs of channels half a head apart, in the order of the weights of queries and
    keys. With ``places`` the keys and values are those of a cache with the new rows put in."""

    def __init__(self, block: Block, prompt: Prompt | None) -> None:
        super().__init__()
        own, width = block.attention, block.attention.head_dim
        self.width, self.groups = width, own.groups
        self.heads, self.kv_heads = own.wq.out_features // width, own.wk.out_features // width
        self.block = block
        apart = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
        self.wq, self.wk = (_ordered(layer, apart) for layer in (own.wq, own.wk))
        swap = torch.cat([torch.arange(width // 2, width), torch.arange(width // 2)])
        self.register_buffer("swap_q", _all_heads(swap, self.heads))
        self.register_buffer("swap_k", _all_heads(swap, self.kv_heads))
        self.adapted = prompt is not None
        self.prompt_key: Tensor
        self.prompt_value: Tensor
        if prompt is not None:
            with torch.no_grad():
                key, value = (self._heads(layer(prompt.tokens)) for layer in (self.wk, own.wv))
                key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value))
                self.register_buffer("prompt_key", key)
                self.register_buffer("prompt_value", value * prompt.gate.tanh())

    def forward(
        self, x: Tensor, turn: Turn, memory: tuple[Tensor, Tensor] | None, places: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.block.attention_norm(x)
        q, k, v = self.wq(normed), self.wk(normed), self.block.attention.wv(normed)
        q = q * turn[0] + q.index_select(-1, self.swap_q) * turn[1]
        k = k * turn[2] + k.index_select(-1, self.swap_k) * turn[3]
        if memory is not None and places is not None:
            k, v = memory[0] + places @ k, memory[1] + places @ v
        query = self._heads(q)
        key, value = (self._heads(part).repeat_interleave(self.groups, 1) for part in (k, v))
        mask = None if keep is None else keep[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=memory is None)
        if self.adapted:
            mixed = mixed + F.scaled_dot_product_attention(query, self.prompt_key, self.prompt_value)
        x = x + self.block.attention.wo(mixed.transpose(1, 2).flatten(2))
        return x + self.block.feed_forward(self.block.ffn_norm(x)), k, v

    def _heads(self, x: Tensor) -> Tensor:
        """(1, S, heads * d) -> (1, heads, S, d)."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)


def _ordered(layer: nn.Linear, order: Tensor) -> nn.Linear:
    """A layer with the channels of each head in another order."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    rows = _all_heads(order, layer.out_features // len(order))
    made.weight = nn.Parameter(layer.weight.detach()[rows], requires_grad=False)
    pattern = getattr(layer, "nm_pattern", None)
    if pattern is not None:
        made.nm_pattern = pattern
    return made


def _all_heads(order: Tensor, heads: int) -> Tensor:
    return (torch.arange(heads)[:, None] * len(order) + order).flatten()


class _Decoder(nn.Module):
    """The layers of a model, on embeddings; without ``head`` the results end before norm and logits."""

    def __init__(self, model: Llama | LlamaAdapter, *, head: bool = True) -> None:
        super().__init__()
        base = model.base if isinstance(model, LlamaAdapter) else model
        prompts = model.prompts() if isinstance(model, LlamaAdapter) else [None] * len(base.layers)
        self.layers = nn.ModuleList(Layer(cast(Block, layer), prompt) for layer, prompt in zip(base.layers, prompts, strict=True))
        self.config = base.config
        self.head = nn.Sequential(base.norm, base.output) if head else nn.Identity()

    def angles(self, positions: Tensor) -> Turn:
        """Tables of positions (S,)."""
        turn, heads = rotation(positions, self.config), self.config.heads
        cos, sin = torch.cat([turn.cos, turn.cos], -1)[None], torch.cat([-turn.sin, turn.sin], -1)[None]
        groups = heads // self.config.groups
        return cos.repeat(1, 1, heads), sin.repeat(1, 1, heads), cos.repeat(1, 1, groups), sin.repeat(1, 1, groups)


class Prefill(_Decoder):
    """Embeddings (1, S, C) of a prompt -> logits (1, S, vocabulary), and keys and values (1, S, G * d) of each layer."""

    def __init__(self, model: Llama | LlamaAdapter, length: int, *, head: bool = True) -> None:
        super().__init__(model, head=head)
        for number, table in enumerate(self.angles(torch.arange(length))):
            self.register_buffer(f"turn{number}", table)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for layer in self.layers:
            x, key, value = layer(x, (self.turn0, self.turn1, self.turn2, self.turn3), None, None, None)
            kept += [key, value]
        return self.head(x), *kept


class Step(_Decoder):
    """One token: its embedding (1, 1, C), its angles, its place (1, P, 1) and the places it sees (1, P), keys and values
    (1, P, G * d) of each layer -> logits (1, 1, vocabulary) and the new keys and values."""

    def forward(self, x: Tensor, turn: Turn, place: Tensor, keep: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            x, key, value = layer(x, turn, (cache[2 * number], cache[2 * number + 1]), place, keep)
            kept += [key, value]
        return self.head(x), *kept


class FlatStep(nn.Module):
    """A `Step` whose arguments are tensors: x, the four of the angles, place, keep, and those of the cache."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        cos, sin, cos_k, sin_k, place, keep, *cache = rest
        return self.step(x, (cos, sin, cos_k, sin_k), place, keep, cache)


@dataclass(frozen=True)
class Generation:
    """tokens : the new ones. cycles : of the prompt's program and of each step's (None by an engine without time). bit_exact :
    whether every byte of every run agreed with the integer reference (None: not compared). bytes_checked : how many."""

    tokens: list[int]
    cycles: list[int | None]
    bit_exact: bool | None
    bytes_checked: int


class Generator:
    """The two programs of a model, for prompts of ``length`` tokens and up to ``places`` tokens in all.

    Parameters
    ----------
    model
        Its weights are compiled as they are; shorter prompts are padded behind, which changes nothing for the tokens before.
    calibration
        Prompts of ``length`` tokens; they are continued by the float model, so that the cache's values are seen, too.
    options
        For `nmforge.compile`.

    Raises
    ------
    ValueError
        More places than positions, no room for a new token, calibration prompts of another length.
    """

    def __init__(
        self, model: Llama | LlamaAdapter, *, length: int, places: int, calibration: Sequence[Sequence[int]],
        arch: str | Arch = "sta1024", **options: Any,
    ) -> None:  # fmt: skip
        self.model = model
        self.base = model.base if isinstance(model, LlamaAdapter) else model
        if not 1 <= length < places <= self.base.config.positions:
            raise ValueError(
                f"length and places must rise, up to the model's {self.base.config.positions} positions: {length!r}, {places!r}"
            )
        if not calibration or any(len(prompt) != length for prompt in calibration):
            raise ValueError(f"calibration must hold prompts of length = {length} tokens")
        self.length, self.places = length, places
        self.prefill_module, self.step_module = Prefill(model, length).eval(), Step(model).eval()
        embedded = [self.embed(prompt) for prompt in calibration]
        batches = [batch for prompt in calibration for batch in self._float_steps(prompt)]
        self.prefill = _whole(compile_model(self.prefill_module, (embedded[0],), calibration=embedded, arch=arch,
                                            host="forbid", **options))
        self.step = _whole(compile_model(FlatStep(self.step_module), batches[0], calibration=batches, arch=arch, host="forbid",
                                         **options))

    def generate(self, prompt: Sequence[int], *, new_tokens: int, engine: Engine = "isa") -> Generation:
        """Continue a prompt by the likeliest token, ``new_tokens`` times.

        Raises
        ------
        ValueError
            An empty prompt, one longer than ``length``, or more tokens than there are places.
        """
        if not 1 <= len(prompt) <= self.length or new_tokens < 1 or len(prompt) + new_tokens - 1 > self.places:
            raise ValueError(
                f"a prompt must have 1 to {self.length} tokens, and prompt and new tokens at most {self.places} places, "
                f"not {len(prompt)} and {new_tokens}"
            )
        padded = [*prompt, *[prompt[-1]] * (self.length - len(prompt))]
        runs = [simulate(self.prefill, self.embed(padded), engine=engine)]
        logits, *kept = cast(list[Tensor], list(runs[0].outputs))
        cache = [F.pad(part[:, : len(prompt)], (0, 0, 0, self.places - len(prompt))) for part in kept]
        tokens = [int(logits[0, len(prompt) - 1].argmax())]
        while len(tokens) < new_tokens:
            runs.append(simulate(self.step, self.inputs(tokens[-1], len(prompt) + len(tokens) - 1, cache), engine=engine))
            logits, *cache = cast(list[Tensor], list(runs[-1].outputs))
            tokens.append(int(logits[0, 0].argmax()))
        exact = [run.bit_exact for run in runs]
        return Generation(tokens, [run.cycles for run in runs], None if None in exact else all(exact),
                          sum(run.bytes_checked for run in runs))

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Embeddings (1, S, C) of tokens."""
        with torch.no_grad():
            return self.base.tok_embeddings(torch.tensor([list(tokens)]))

    def inputs(self, token: int, position: int, cache: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the step of a token at a position reads."""
        turn = self.step_module.angles(torch.tensor([position]))
        place = F.one_hot(torch.tensor([position]), self.places).float()[..., None]
        keep = (torch.arange(self.places) <= position)[None]
        return self.embed([token]), *turn, place, keep, *cache

    @torch.no_grad()
    def _float_steps(self, prompt: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """What the steps after a prompt read, in float: up to eight of them."""
        logits, *kept = self.prefill_module(self.embed(prompt))
        cache = [F.pad(part, (0, 0, 0, self.places - self.length)) for part in kept]
        for position in range(self.length, min(self.places, self.length + 8)):
            batch = self.inputs(int(logits[0, -1].argmax()), position, cache)
            yield batch
            logits, *cache = FlatStep(self.step_module)(*batch)


def _whole(program: object) -> Program:
    if not isinstance(program, Program):
        raise TypeError(f"the model's layers must be one program, not a {type(program).__name__}")
    return program


def generate(
    model: Llama | LlamaAdapter, prompt: Sequence[int], *, new_tokens: int, arch: str | Arch = "sta1024", engine: Engine = "isa",
    calibration: Sequence[Sequence[int]] | None = None, **options: Any,
) -> Generation:  # fmt: skip
    """Compile a model for a prompt's length, and continue the prompt on the accelerator; see `Generator`.

    ``calibration``: prompts of that length; without, the prompt itself.
    """
    generator = Generator(
        model, length=len(prompt), places=len(prompt) + new_tokens, calibration=calibration or [prompt], arch=arch, **options
    )
    return generator.generate(prompt, new_tokens=new_tokens, engine=engine)
