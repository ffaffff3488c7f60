"""The PEFT types that there are: a method that PEFT has too is one class, and its line here."""

from __future__ import annotations

from lowrank.export.peft_format import Format
from lowrank.export.peft_layers import IA3Format, LoHaFormat, LoKrFormat, OFTFormat, VeRAFormat
from lowrank.export.peft_lora import AdaLoRAFormat, LoRAFormat
from lowrank.export.peft_prompts import PrefixFormat, PromptFormat

LORA = LoRAFormat()  # whatever has no type of its own and can be a LoRA, is one
FORMATS: tuple[Format, ...] = (
    LORA,
    AdaLoRAFormat(),
    VeRAFormat(),
    IA3Format(),
    LoHaFormat(),
    LoKrFormat(),
    OFTFormat(),
    PrefixFormat(),
    PromptFormat(),
)
