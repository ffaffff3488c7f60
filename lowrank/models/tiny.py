"""Two models to try things on in seconds: random weights, a tokenizer of bytes, no download.

The weights come from keyed generators by name and from exact arithmetic only (a uniform draw, shifted and
scaled), so they are the same bits on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank.keys import key
from lowrank.models.cache import prepared
from lowrank.models.quiet import quiet

BOS, EOS, PAD, TURN = "<|bos|>", "<|eos|>", "<|pad|>", "<|turn|>"  # tokens 256, 257, 258, 259
CHAT = (
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|eos|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
SPREAD = 0.1  # near 1/√64: attention and logits vary enough to make a leak or a wrong scale visible


def folder(kind: str) -> Path:
    """Where ``tiny_llama`` or ``tiny_gpt2`` lies in the cache; this file's digest is part of its name."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]

    def make(folder: Path) -> None:
        with quiet():
            (tiny_llama() if kind == "tiny_llama" else tiny_gpt2()).save_pretrained(folder)
            byte_tokenizer(adds_bos=kind == "tiny_llama").save_pretrained(folder)

    return prepared(f"{kind}-{version}", make)


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of 64, 4 query heads over 2 key/value heads, tied embeddings: 91 k parameters."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    return _drawn(LlamaForCausalLM, config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers of 64, 4 heads, learnt positions, Conv1D, dropout 0.1 as in GPT-2: 182 k parameters."""
    config = GPT2Config(
        vocab_size=260,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        bos_token_id=257,
        eos_token_id=257,
        pad_token_id=258,
    )
    return _drawn(GPT2LMHeadModel, config)


def _drawn(build: type[nn.Module], config: LlamaConfig | GPT2Config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        model = build(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:  # norms stay 1 and biases 0
            uniform = torch.rand(parameter.shape, generator=key(0, "tiny", name))
            parameter.data = (uniform - 0.5) * (SPREAD * 12**0.5)
    return model.eval()


def byte_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """Token n is byte n for n < 256; then the four special tokens. Any text comes back as it was."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, PAD, TURN])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 256)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if adds_bos else EOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable stand-in that byte-level tokenizers use for each byte, in the order of the bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
