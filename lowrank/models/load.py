"""A model's configuration, skeleton, tokenizer and weights, from the folder that its kind and name lead to.

Nothing here runs code from a model's repository, and nothing asks the network once the folder is known.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowrank.errors import ConfigError, out_of_memory
from lowrank.models import hub, smollm2, tiny
from lowrank.models.quiet import quiet

GENERATION = "generation_config.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


class Model(Protocol):
    """What is read of the ``model`` group of the configuration."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...


def folder(model: Model) -> Path:
    """Where the model lies; prepared or downloaded on the first call. ConfigError where it cannot be had."""
    match model.kind:
        case "smollm2":
            return smollm2.folder()
        case "tiny_llama" | "tiny_gpt2":
            return tiny.folder(model.kind)
        case "hf":
            return hub.folder(model.name, model.revision)
    raise ConfigError(f"model.kind: '{model.kind}' is not allowed; smollm2, hf, tiny_llama or tiny_gpt2.")


def config(model: Model) -> PretrainedConfig:
    """The model's own configuration; no weight is read."""
    path = folder(model)
    try:
        with quiet():
            found = AutoConfig.from_pretrained(path, **LOCAL)
    except (OSError, ValueError) as error:  # not JSON, an unknown architecture, or code of its own
        reason = _first_line(error)
        if "trust_remote_code" in str(error):
            reason = "the model needs code from its repository, which is never run here."
        raise _refusal(model, f"cannot use {path / 'config.json'}: {reason}") from error
    quantised = getattr(found, "quantization_config", None)
    if quantised:
        how = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
        text = f"the weights in {path} are quantised already ({how}), which a base here is not read from."
        raise _refusal(model, f"{text} Name the model that they were made of, and quant=nf4.")
    return found


def skeleton(model: Model, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model on the meta device: names, shapes and types, no weights."""
    path, found = folder(model), config(model)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(model, f"{path} holds a {found.model_type}: no causal language model.")
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(found, dtype=dtype, trust_remote_code=False)
    if (path / GENERATION).is_file():  # its end tokens count wherever the skeleton is filled with weights
        bare.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return bare.eval()


def tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token. ConfigError without an end."""
    path = folder(model)
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(path, **LOCAL)
    except (OSError, ValueError) as error:
        raise _refusal(model, f"no usable tokenizer in {path}: {_first_line(error)}") from error
    if found.eos_token_id is None:
        raise _refusal(model, f"the tokenizer in {path} has no end token (eos_token).")
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def weights(model: Model, dtype: torch.dtype) -> nn.Module:
    """The causal language model on the CPU in ``dtype``, in evaluation mode, every weight read from file.

    Where the file's type is ``dtype`` the weights are views of the mapped file: loading reads nothing, and
    writing to them copies a page and leaves the file alone. ConfigError where the files lack a weight, hold
    one of another shape, or cannot be read.
    """
    path = folder(model)
    skeleton(model)  # what is wrong with the architecture is said before weights are read
    try:
        with quiet():
            # Mismatched shapes are let through to the report: transformers' own error does not name them.
            loaded, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **LOCAL
            )
    except (OSError, SafetensorError, UnpicklingError) as error:
        if out_of_memory(error):
            raise
        raise _refusal(model, f"cannot read the weights in {path}: {_first_line(error)}") from error
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:  # transformers would go on with random ones
        what = f"lack {len(lacking)} weights of config.json's shapes (first: {lacking[0]})"
        raise _refusal(model, f"the files in {path} {what}.")
    return loaded.eval()


def _refusal(model: Model, text: str) -> ConfigError:
    if model.kind == "hf":
        return ConfigError(f"model.name: {text}")
    return ConfigError(f"model={model.kind}: {text} Delete the folder and it is prepared again.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
