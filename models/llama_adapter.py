"""LLaMA-Adapter: learned prompts in the upper layers of a frozen LLaMA, behind gates that start at zero.

Ref: R. Zhang et al., LLaMA-Adapter, arXiv 2303.16199, section 3 (eq. 1 to 8), and the authors' code (OpenGVLab/LLaMA-Adapter,
alpaca_finetuning_v1), which differs from the paper and is followed here: the gate goes through tanh, scores are divided by the
square root of a head's channels rather than of all, and a gate has one value a head.

In a layer with a prompt, attention is that of the base plus tanh(gate) * softmax(q k_a / sqrt(d)) v_a, with k_a and v_a the
prompt through the layer's own frozen weights, without rotation. That is the code's concatenation of two softmaxes, written as
the sum of its parts, and a gate of zero gives the base to the bit.

Shapes: B sequences, S tokens, C hidden channels, K prompt tokens, L layers with a prompt (the upper ones), H heads, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checks import check_positive
from models.info import Input, ModelInfo, Published
from models.llama import Cache, Llama, Prompt, build_llama
from models.registry import describe_models, register_model
from models.vit import ViT
from models.weights import check_fit, read_weights

__all__ = ["ADAPTERS", "AdapterConfig", "ClassTokens", "LlamaAdapter"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """``length`` prompt tokens (K) in each of the ``layers`` upper layers (L); ``bottleneck`` is the inner width of the image
    projection, which only a multi-modal adapter has."""

    length: int = 10
    layers: int = 30
    bottleneck: int = 96

    def __post_init__(self) -> None:
        check_positive(self)


ADAPTERS = {
    "llama_adapter_7b": ("llama_7b", AdapterConfig()),
    "llama_adapter_tiny": ("llama_tiny", AdapterConfig(length=4, layers=3, bottleneck=8)),
    "llama_adapter_small": ("llama_small", AdapterConfig(length=10, layers=5)),
}
"""Base and adapter of each named model."""


class LlamaAdapter(nn.Module):
    """A frozen `Llama` and an adapter: (B, S) token numbers, and images if it has an encoder -> (B, S, vocabulary) logits.

    Parameters
    ----------
    base
        Is frozen: its parameters get ``requires_grad=False``.
    encoder
        An image encoder, (B, ...) -> global features (B, F), frozen as well, such as `ClassTokens` of a `ViT`; with ``features``
        = F. Features of several scales are concatenated in F.

    Members
    -------
    adapter_query
        Embedding of K * L rows of C: the prompts, lowest layer first.
    gates
        L parameters (1, H, 1, 1), zero at first.
    projection
        Features -> C, added to each prompt token (multi-modal only). The paper gives its size (0.6 M), not its shape: a
        bottleneck of two linear layers with SiLU between is ours.

    Raises
    ------
    ValueError
        More adapted layers than layers, or only one of encoder and features.
    """

    def __init__(
        self, base: Llama, config: AdapterConfig, *, encoder: nn.Module | None = None, features: int | None = None
    ) -> None:
        super().__init__()
        sizes = base.config
        if config.layers > sizes.layers:
            raise ValueError(f"layers must be at most the {sizes.layers} layers of the base, not {config.layers}")
        if (encoder is None) != (features is None):
            raise ValueError("an image encoder and the number of its features go together: give both or neither")
        self.config = config
        self.base = base.requires_grad_(False)
        self.encoder = None if encoder is None else encoder.requires_grad_(False)
        self.adapter_query = nn.Embedding(config.length * config.layers, sizes.hidden)
        self.gates = nn.ParameterList(torch.zeros(1, sizes.heads, 1, 1) for _ in range(config.layers))
        self.projection = None if features is None else nn.Sequential(
            nn.Linear(features, config.bottleneck), nn.SiLU(), nn.Linear(config.bottleneck, sizes.hidden)
        )  # fmt: skip

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None, *, images: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Cache]:
        """As `Llama.forward`; ``images`` go to the encoder, one a sequence.

        Raises
        ------
        ValueError
            Images without an encoder, or not one a sequence.
        """
        image = None if images is None else self.image_features(images, len(tokens))
        return self.base(tokens, positions, cache, self.prompts(image))

    def image_features(self, images: Tensor, batch: int) -> Tensor:
        """Projected features (B, 1, C) of images."""
        if self.encoder is None or self.projection is None:
            raise ValueError("this adapter takes no images: build it with encoder= and features=")
        if len(images) != batch:
            raise ValueError(f"one image a sequence: {len(images)} images for {batch} sequences")
        with torch.no_grad():
            features = self.encoder(images)
        return self.projection(features)[:, None]

    def prompts(self, image: Tensor | None = None) -> list[Prompt | None]:
        """What each layer of the base attends to, lowest first: nothing below the adapted layers."""
        table = self.adapter_query.weight.unflatten(0, (self.config.layers, 1, self.config.length))
        tokens = table if image is None else table + image
        adapted = [Prompt(part, gate) for part, gate in zip(tokens, self.gates, strict=True)]
        return [*[None] * (self.base.config.layers - self.config.layers), *adapted]

    def new_cache(self, batch: int, places: int | None = None) -> Cache:
        """See `Llama.new_cache`."""
        return self.base.new_cache(batch, places)

    def train(self, mode: bool = True) -> LlamaAdapter:
        """As ever, but an image encoder stays in eval mode: its normalisation must not move."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    # -- the adapter's own file ---------------------------------------------------------------------------------------

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are learned, by the names of the authors' checkpoint."""
        first = self.base.config.layers - self.config.layers
        named: dict[str, nn.Parameter] = {"adapter_query.weight": self.adapter_query.weight}  # type: ignore[dict-item]
        named |= {f"layers.{first + number}.attention.gate": gate for number, gate in enumerate(self.gates)}
        if self.projection is not None:
            named |= {f"projection.{name}": value for name, value in self.projection.named_parameters()}
        return named

    def save_adapter(self, path: str | Path) -> None:
        """Write the learned parameters, and nothing of the base, to a safetensors file."""
        save_file({name: value.detach().contiguous() for name, value in self.adapter_parameters().items()}, path)

    def load_adapter(self, path: str | Path) -> None:
        """Read what `save_adapter` or the authors' script wrote; gates of layers without a prompt are ignored.

        Raises
        ------
        FileNotFoundError, ValueError
            No such file, or an adapter of another size: names the first key that differs and both shapes.
        """
        own = self.adapter_parameters()
        state = _known(read_weights(path), own, self.base.config.layers)
        check_fit(own, state, name="this adapter", where=path)
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


def _known(state: Mapping[str, Tensor], own: Mapping[str, nn.Parameter], layers: int) -> dict[str, Tensor]:
    """Without the gates that the authors' file has for the layers below the prompts."""
    unused = {f"layers.{number}.attention.gate" for number in range(layers)} - set(own)
    return {name: value for name, value in state.items() if name not in unused}


class ClassTokens(nn.Module):
    """Global features of several depths of a `ViT`: images (B, channels, H, W) -> (B, len(depths) * C).

    They are the class token after each of the blocks ``depths`` (counted from 1), each normalised by the ViT's last norm.
    """

    def __init__(self, vit: ViT, depths: Sequence[int]) -> None:
        super().__init__()
        if not depths or not all(1 <= depth <= len(vit.blocks) for depth in depths):
            raise ValueError(f"depths must be in [1, {len(vit.blocks)}], the blocks of the ViT, not {list(depths)}")
        self.vit, self.depths = vit, tuple(depths)
        self.features = len(self.depths) * vit.config.hidden

    def forward(self, images: Tensor) -> Tensor:
        x, found = self.vit.embed(images), {}
        for number, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if number in self.depths:
                found[number] = self.vit.norm(x)[:, 0]
        return torch.cat([found[depth] for depth in self.depths], 1)


def _build(
    name: str, pretrained: bool | str | Path, dtype: torch.dtype | None, adapter: str | Path | None, overrides: dict[str, Any]
) -> LlamaAdapter:
    base, config = ADAPTERS[name]
    llama = build_llama(base, pretrained, dtype, overrides)
    model = LlamaAdapter(llama, config)
    if dtype is not None:
        model.to(dtype)
    if adapter is not None:
        model.load_adapter(adapter)
    return model


def _register(name: str, summary: str) -> Callable[..., nn.Module]:
    def builder(
        *,
        pretrained: bool | str | Path = False,
        dtype: torch.dtype | None = None,
        adapter: str | Path | None = None,
        **overrides: Any,
    ) -> nn.Module:
        return _build(name, pretrained, dtype, adapter, overrides)

    builder.__name__ = name
    builder.__doc__ = f"{summary} ``pretrained``: weights of the base; ``adapter``: file of the adapter."
    return register_model(builder)


llama_adapter_7b = _register("llama_adapter_7b", "LLaMA-7B with 10 prompt tokens in 30 layers, 1.2 M learned parameters.")
llama_adapter_tiny = _register("llama_adapter_tiny", "llama_tiny with 4 prompt tokens in 3 layers, for tests.")
llama_adapter_small = _register("llama_adapter_small", "llama_small with 10 prompt tokens in 5 layers.")

_TOKENS = (Input("tokens", (1, 128), torch.int64),)
describe_models(
    ("llama_adapter_7b",),
    ModelInfo(
        family="LLaMA-Adapter", paper="2303.16199", inputs=_TOKENS,
        note="learned: 30 x 10 x 4096 + 30 x 32 = 1,229,760 (paper: 1.2 M); the base is frozen",
    ),
    {"llama_adapter_7b": Published(source="LLaMA-7B and 1,229,760, counted in the authors' code", parameters=6_739_645_376)},
)  # fmt: skip
describe_models(
    ("llama_adapter_tiny", "llama_adapter_small"),
    ModelInfo(family="LLaMA-Adapter", paper="2303.16199", inputs=_TOKENS, note="ours"),
)
