"""Small networks with parts for the host, and library models with random weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["LIBRARY", "Retriever", "library_model", "retriever"]

IDS = {"vocab_size": 50, "max_position_embeddings": 32}
WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Retriever(nn.Module):
    """Token numbers (2, 6) and mask -> scores (2, 3) and the best class (2,): look-up, encoder, mean pooling, argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)
        weight = mask[:, :, None].float()
        scores = self.head((hidden * weight).sum(1) / weight.sum(1))
        return scores, scores.argmax(-1)


def retriever() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The module, and token numbers and mask."""
    torch.manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return Retriever().eval(), (torch.randint(0, 20, (2, 6)), mask)


def _tokens(*, mask: bool = True) -> dict[str, Tensor]:
    found = {"input_ids": torch.randint(0, 50, (2, 6))}
    if mask:
        found["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    return found


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), _tokens(mask=False)


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.BertModel(transformers.BertConfig(**IDS, **WIDTH)), _tokens()


def _distilbert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.DistilBertConfig(**IDS, dim=16, hidden_dim=32, n_layers=2, n_heads=4)
    return transformers.DistilBertModel(config), _tokens()


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(**WIDTH, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(**IDS, **WIDTH, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config), _tokens(mask=False)


class _Causal(nn.Module):
    """`nn.TransformerEncoder` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)


LIBRARY: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "torch encoder, causal": lambda: (_Causal(), {"x": torch.randn(2, 6, 16)}),
    "bert": _bert,
    "distilbert": _distilbert,
    "vit": _vit,
    "gpt2": _gpt2,
    "llama": _llama,
}


def library_model(name: str) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """Module in eval mode, inputs, and its first output."""
    torch.manual_seed(0)
    module, inputs = LIBRARY[name]()
    module = module.eval()
    with torch.no_grad():
        output = module(**inputs)
    return module, inputs, output if isinstance(output, Tensor) else output[0]
