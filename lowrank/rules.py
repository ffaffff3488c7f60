"""What each value of the configuration may be, as data: one rule a key, and the few relations between keys.

``config.parse`` reads these tables; a new key is a row here, a field there and a line in its YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lowrank.errors import ConfigError, did_you_mean


def show(value: Any) -> str:
    """A value as a user writes it in YAML, cut to one readable line."""
    text = written(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def written(value: Any) -> str:
    match value:
        case None | True | False:
            return str(value).lower().replace("none", "null")
        case list():
            return f"[{', '.join(map(written, value))}]"
        case dict():
            return f"{{{', '.join(f'{name}: {written(one)}' for name, one in value.items())}}}"
        case int() if abs(value) >= 10**80:  # Python refuses to write what is longer than a few thousand digits
            return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    return repr(value)


def refuse(path: str, value: Any, wanted: str, names: tuple[str, ...] = ()) -> ConfigError:
    """``adapter.r: 0 is not allowed; a positive integer.``"""
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return ConfigError(f"{path}: {show(value)} is not allowed; {wanted}.{hint}")


def unknown_key(path: str, allowed: Iterable[str]) -> ConfigError:
    """``optim.lrr: unknown key. Did you mean 'lr'? Allowed: lr, weight_decay, …``"""
    names = list(allowed)
    listed = f" Allowed: {', '.join(names)}." if names else ""
    return ConfigError(f"{path}: unknown key.{did_you_mean(path.rpartition('.')[2], names)}{listed}")


@dataclass(frozen=True)
class Rule:
    """``wanted`` ends the sentence "… is not allowed; …"; ``names`` are a choice's, for the nearest match."""

    wanted: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    names: tuple[str, ...] = ()

    def read(self, path: str, value: Any) -> Any:
        """The value, converted. Raises ConfigError where it is not accepted."""
        if not self.accepts(value):
            error = refuse(path, value, self.wanted, self.names)
            if isinstance(value, (bool, int, float)) and self.accepts(written(value)):
                raise ConfigError(f"{error} As a text: \"{path}='{written(value)}'\".")
            raise error
        return self.convert(value)


def is_number(value: Any) -> bool:
    return (isinstance(value, float) and not math.isnan(value)) or is_integer(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def integer(wanted: str, low: int) -> Rule:
    return Rule(wanted, lambda v: is_integer(v) and v >= low)


def number(wanted: str, holds: Callable[[float], bool]) -> Rule:
    return Rule(wanted, lambda v: is_number(v) and holds(v), float)


def choice(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names, names=names)


def text(wanted: str) -> Rule:
    return Rule(wanted, lambda v: isinstance(v, str) and bool(v.strip()))


def texts(wanted: str) -> Rule:
    return Rule(wanted, lambda v: isinstance(v, list) and all(isinstance(item, str) and item for item in v))


def numbers(wanted: str, count: int, holds: Callable[[float], bool]) -> Rule:
    return Rule(wanted, lambda v: isinstance(v, list) and len(v) == count and all(is_number(x) and holds(x) for x in v))


def or_null(rule: Rule) -> Rule:
    return Rule(
        f"{rule.wanted}, or null",
        lambda v: v is None or rule.accepts(v),
        lambda v: None if v is None else rule.convert(v),
        rule.names,
    )


def is_targets(value: Any) -> bool:
    """A pattern, a list of patterns, or pattern → overrides (a mapping, or null for none)."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, dict)) or not patterns:
        return False
    overrides = patterns.values() if isinstance(patterns, dict) else ()
    return all(isinstance(p, str) and p.strip() for p in patterns) and all(
        o is None or isinstance(o, dict) for o in overrides
    )


def to_targets(value: Any) -> Any:
    return {p: o or {} for p, o in value.items()} if isinstance(value, dict) else value


def is_device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?", value) is not None


POSITIVE = integer("a positive integer", 1)
COUNT = integer("an integer, 0 or more", 0)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
POSITIVE_NUMBER = number("a positive number", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = number("a number, 0 or more", lambda v: 0 <= v < math.inf)
ANY = Rule("a value", lambda v: True)  # somebody else checks it

RULES: dict[str, Rule] = {
    "model.kind": choice("smollm2", "hf", "tiny_llama", "tiny_gpt2"),
    "model.name": or_null(text("a folder or a hub id")),
    "model.revision": or_null(text("a branch, a tag or a commit")),
    "model.dtype": choice("auto", "fp32", "bf16"),
    "quant.kind": choice("none", "nf4"),
    "quant.double": FLAG,
    "quant.compute_dtype": or_null(choice("fp32", "bf16", "fp16")),
    "quant.skip": texts("a list of patterns"),
    "adapter._target_": text("the dotted path of an Adapter class, such as lowrank.adapters.LoRA"),
    "adapter.targets": Rule(
        "a pattern, a list of patterns or a mapping of patterns to options", is_targets, to_targets
    ),
    "adapter.exclude": texts("a list of patterns"),
    "data.kind": choice("stdlib", "jsonl", "csv"),
    "data.path": or_null(text("a file")),
    "data.eval_path": or_null(text("a file")),
    "data.eval_fraction": number("a number between 0 and 1, both excluded", lambda v: 0 < v < 1),
    "data.fields.instruction": or_null(text("a column's name")),
    "data.fields.input": or_null(text("a column's name")),
    "data.fields.response": or_null(text("a column's name")),
    "data.fields.text": or_null(text("a column's name")),
    "data.template": choice("instruction", "chat", "plain"),
    "data.max_length": integer("an integer, 2 or more", 2),
    "data.limit": or_null(POSITIVE),
    "data.seed": COUNT,
    "data.train_on": choice("response", "all"),
    "data.on_empty": choice("error", "drop"),
    "data.on_malformed": choice("error", "drop"),
    "optim._target_": text("the dotted path of an Optimizer class, such as torch.optim.AdamW"),
    "optim.lr": POSITIVE_NUMBER,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.groups": Rule(
        "a list of {match, lr or lr_ratio, weight_decay}",
        lambda v: isinstance(v, list) and all(isinstance(g, dict) for g in v),
    ),
    "optim.groups.match": text("a pattern of parameter names, such as '*.B'"),
    "optim.groups.lr": POSITIVE_NUMBER,
    "optim.groups.lr_ratio": POSITIVE_NUMBER,
    "optim.groups.weight_decay": NOT_NEGATIVE,
    "optim.in_backward": FLAG,
    "optim.betas": numbers("two numbers, each from 0 up to, but not including, 1", 2, lambda v: 0 <= v < 1),
    "optim.eps": POSITIVE_NUMBER,
    "optim.momentum": number("a number from 0 up to, but not including, 1", lambda v: 0 <= v < 1),
    "schedule.kind": choice(
        *("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"),
        *("inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "exponential"),
    ),
    "schedule.warmup": number(
        "a number of steps, or a fraction below 1", lambda v: 0 <= v < 1 or (0 < v < math.inf and v == int(v))
    ),
    "schedule.options": Rule("a mapping", lambda v: isinstance(v, dict)),
    "loop.steps": or_null(POSITIVE),
    "loop.epochs": or_null(POSITIVE_NUMBER),
    "loop.micro_batch": or_null(POSITIVE),
    "loop.micro_batch_tokens": or_null(POSITIVE),
    "loop.packing": choice("best_fit", "in_order"),
    "loop.accumulate": POSITIVE,
    "loop.max_grad_norm": Rule(  # YAML's infinity is a text to Hydra's command line
        "a positive number (.inf measures without clipping)",
        lambda v: v == ".inf" or (is_number(v) and v > 0),
        lambda v: math.inf if v == ".inf" else float(v),
    ),
    "loop.precision": choice("auto", "fp32", "bf16", "fp16"),
    "loop.device": Rule("auto, cpu, cuda or cuda:N", is_device, names=("auto", "cpu", "cuda")),
    "loop.seed": COUNT,
    "loop.gradient_checkpointing": Rule(  # YAML reads a bare off as false
        "one of off, block, selective",
        lambda v: isinstance(v, bool) or v in ("off", "block", "selective"),
        lambda v: {False: "off", True: "block"}.get(v, v),
        ("off", "block", "selective"),
    ),
    "loop.offload": FLAG,
    "loop.compile": Rule(  # YAML reads a bare off as false
        "one of off, block",
        lambda v: v is False or v in ("off", "block"),
        lambda v: "off" if v is False else v,
        ("off", "block"),
    ),
    "loop.fast": FLAG,
    "loop.max_seconds": or_null(POSITIVE_NUMBER),
    "loop.on_nonfinite": choice("stop", "skip"),
    "loop.max_skipped": COUNT,
    "loop.trace_nonfinite": FLAG,
    "loop.average": or_null(number("a number above 0 and below 1", lambda v: 0 < v < 1)),
    "loop.patience": or_null(POSITIVE),
    "loop.prune": or_null(POSITIVE),
    "loop.diverged": or_null(number("a number above 1", lambda v: 1 < v < math.inf)),
    "loop.profile": or_null(POSITIVE),
    "eval.before": FLAG,
    "eval.every": COUNT,
    "eval.limit": or_null(POSITIVE),
    "eval.generate.limit": COUNT,
    "eval.generate.batch": POSITIVE,
    "eval.generate.max_new_tokens": POSITIVE,
    "eval.generate.do_sample": FLAG,
    "eval.generate.temperature": POSITIVE_NUMBER,
    "eval.generate.top_p": number("a number above 0, up to and including 1", lambda v: 0 < v <= 1),
    "eval.generate.num_return_sequences": POSITIVE,
    "eval.generate.seed": COUNT,
    "checkpoint.every": COUNT,
    "checkpoint.keep": POSITIVE,
    "checkpoint.resume": FLAG,
    "checkpoint.allow": texts("a list of what may differ on resume, such as [optim.lr, data]"),
    "checkpoint.background": FLAG,
    "track.kind": choice("none", "tensorboard", "wandb", "own"),
    "track.project": text("a project's name"),
    "track.name": or_null(text("a run's name")),
    "track._target_": or_null(text("the dotted path of a Tracker class")),
}

SWEEP: dict[str, Rule] = {  # beside the groups: what -m does with its jobs
    "sweep.together": POSITIVE,
    "sweep.metric": or_null(text("a dotted name in summary.json, such as eval.after.loss")),
    "sweep.resident": FLAG,
}


def read_group(where: str, group: dict[str, Any]) -> dict[str, Any]:
    """One rule of ``optim.groups``: match, and what it changes. Raises ConfigError where it is wrong."""
    prefix = "optim.groups."
    allowed = [path.removeprefix(prefix) for path in RULES if path.startswith(prefix)]
    for key in group:
        if key not in allowed:
            raise unknown_key(f"{where}.{key}", allowed)
    if "match" not in group:
        raise ConfigError(f"{where}.match: missing; {RULES[prefix + 'match'].wanted}.")
    if "lr" in group and "lr_ratio" in group:
        raise refuse(f"{where}.lr_ratio", group["lr_ratio"], "either lr or lr_ratio, which is times optim.lr")
    return {key: RULES[prefix + key].read(f"{where}.{key}", value) for key, value in group.items()}
