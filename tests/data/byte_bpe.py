"""Small real tokenizers: byte-level BPE trained here, in the shapes that models come with."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "### Instruction:\nWrite a one-line docstring for this Python function.\n\n### Input:\n",
    "def area(width, height):\n    return width * height\n\n### Response:\nReturn the area of a rectangle.",
    "Grüße aus Köln, 你好, 🙂 and the rest of the world.",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe(*, bos: bool, chat_template: str | None = None, pad: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """300 merges over all bytes; ``bos`` adds a post-processor as Llama has. Padding is the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token=pad
    )
    wrapped.chat_template = chat_template
    return wrapped
