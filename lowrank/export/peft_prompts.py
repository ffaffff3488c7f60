"""PEFT's types of the methods that adapt the backbone: one tensor, at no site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lowrank.adapters.methods.prefix import Prefix
from lowrank.adapters.methods.prompt import Prompt
from lowrank.export.peft_config import Field, count
from lowrank.export.peft_format import Folder, Format, Site, Tensors

PROMPT_NEUTRAL = frozenset({"num_layers", "num_attention_heads", "token_dim"})  # the tensor's shape says the same
PROMPT = {
    "num_virtual_tokens": count(None),
    "num_transformer_submodules": Field(1, lambda v: v is None or v == 1, "1: a decoder"),
}


class PrefixFormat(Format):
    """The keys and values themselves, (k, layers·2·width), also where a network makes them: it is not written."""

    peft_type = "PREFIX_TUNING"
    methods = (Prefix,)
    apart: ClassVar = {"prompt_embeddings": "embedding"}
    reads: ClassVar = PROMPT
    neutral = PROMPT_NEUTRAL | {"encoder_hidden_size", "prefix_projection"}

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        adapter = sites[0].adapter
        return {
            "num_virtual_tokens": adapter.virtual_tokens,
            "num_layers": adapter.layers,
            "num_attention_heads": adapter.heads,
            "token_dim": adapter.heads * adapter.width,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }

    def tensors_apart(self, adapter: Any) -> Tensors:
        kept = adapter.keys_and_values().detach()  # (layers, 2, heads, k, width)
        return {"prompt_embeddings": kept.permute(3, 0, 1, 2, 4).flatten(1)}

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        return {"length": folder.config["num_virtual_tokens"]}


class PromptFormat(Format):
    """P (k, hidden)."""

    peft_type = "PROMPT_TUNING"
    methods = (Prompt,)
    apart: ClassVar = {"prompt_embeddings": "embedding"}
    reads: ClassVar = PROMPT
    neutral = PROMPT_NEUTRAL | {
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    }

    def fields(self, sites: Sequence[Site], written: Mapping[str, Tensors]) -> dict[str, Any]:
        k, width = sites[0].adapter.embedding.shape
        return {
            "num_virtual_tokens": k,
            "token_dim": width,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }

    def options(self, folder: Folder, path: str, base: nn.Module) -> dict[str, Any]:
        return {"length": folder.config["num_virtual_tokens"], "init": "random"}
