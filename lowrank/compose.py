"""Hydra's composition of conf/ and overrides, and Hydra's refusals in our words.

``train.py``, the launcher and the commands that take overrides share it, so that a misspelt key reads the same
wherever it is refused.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
import yaml  # type: ignore[import-untyped]
from hydra import errors as refusals
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lowrank import config
from lowrank.errors import ConfigError, Interrupted, LowrankError, OutOfMemory, did_you_mean, out_of_memory
from lowrank.rules import unknown_key
from lowrank.schema import GROUPS, Config
from lowrank.secrets import redacted

MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
# What Hydra says of an override → what we say; the most specific first.
PHRASES = (
    (
        r"Ambiguous value for argument '([^=]*)=(.*?)' 1\.",
        r"\1: '\2' is several values. Add -m to run one job for each, or write a list: \1=[\2].",
    ),
    (r"Sweep parameters '([^=]*)=(.*)' requires", r"\1: '\2' is several values. Add -m to run one job for each."),
    (r"Multiple values for (\S+?)\. .*: (.*)'", r"\1: chosen already. Write \1=\2, without '+'."),
    (r"Could not append to config\. An item is already at '(.*?)'", r"\1: there already. Write it without '+'."),
    (r"Could not delete from config\. '(.*?)' does not exist", r"\1: unknown key; nothing to delete."),
    (
        r"Config group override must be a string or a list\. Got (\w+)",
        r"configuration: a group takes the name of one of its choices, such as model=smollm2 (got \1).",
    ),
)
NO_TARGETS = "++adapter.targets=null"  # "++", because of two overrides of one key a sweep keeps the second alone
MORE_KINDS = {"schedule": " Other kinds of schedule: schedule.kind=NAME."}


def compose(overrides: list[str], config_dir: Path | None = None) -> Config:
    """The configuration of ``python train.py OVERRIDES``. Raises ConfigError."""
    return config.parse(compose_node(overrides, config_dir))


def compose_node(overrides: list[str], config_dir: Path | None = None) -> DictConfig:
    folder = (config_dir or find_conf()).resolve()
    try:
        with fresh_hydra(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            return hydra.compose("config", overrides=whole_targets(overrides))
    except Exception as error:
        raise translate(error) from error


def whole_targets(overrides: Sequence[str]) -> list[str]:
    """``overrides``, so that a mapping of targets takes the place of the YAML's: Hydra would merge the two, and the
    user get the method's own targets beside those that were asked for. A list it would not put for a mapping at all."""
    found: list[str] = []
    for override in overrides:
        several = override.startswith("adapter.targets=") and ("{" in override or "[" in override)
        if several and found[-1:] != [NO_TARGETS]:
            found.append(NO_TARGETS)
        found.append(override)
    return found


def changed(base: Config, overrides: list[str], allowed: Sequence[str] = ()) -> Config:
    """``base`` with overrides in Hydra's grammar: ``data=jsonl`` takes the group anew, ``data.limit=5`` a key.

    Raises ConfigError for a group that is none of ``allowed`` (all are, where none is named), a misspelt key, or a
    value out of range.
    """
    given = read_overrides(overrides)
    groups = {text: one.key_or_group.partition(".")[0] for text, one in zip(overrides, given, strict=True)}
    for text, group in groups.items():
        if allowed and group not in allowed:
            raise ConfigError(f"{text}: only {' and '.join(allowed)} may differ from the run's.")
        if group not in GROUPS:
            raise unknown_key(group, GROUPS)
    tree = OmegaConf.create(base.to_dict())
    choices = {one.key_or_group for one in given if "." not in one.key_or_group}
    fresh = compose_node([text for text, group in groups.items() if group in choices]) if choices else {}
    for group in choices:
        tree[group] = OmegaConf.to_container(fresh[group], resolve=True)
    for one in given:
        if one.key_or_group.partition(".")[0] not in choices:
            put(tree, one)
    return config.parse(tree)


def read_overrides(overrides: list[str]) -> list[Override]:
    """Raises ConfigError for what Hydra's grammar does not know, and for several values of one key."""
    try:
        given = OverridesParser.create().parse_overrides(overrides)
    except Exception as error:
        raise translate(error) from error
    for one in given:
        if one.is_sweep_override():
            raise ConfigError(f"{one.key_or_group}: '{one.input_line}' is several values; one is needed.")
    return given


def put(tree: DictConfig, override: Override) -> None:
    """Carries out the override of one key; a mapping or list takes the place of the one that was there."""
    key = override.key_or_group
    if not override.is_delete():
        OmegaConf.update(tree, key, override.value(), merge=False, force_add=True)
        return
    parent, _, name = key.rpartition(".")
    within = OmegaConf.select(tree, parent)
    if not isinstance(within, DictConfig) or name not in within:
        raise ConfigError(f"{key}: unknown key; nothing to delete.")
    del within[name]


def find_conf() -> Path:
    """conf/ beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else package / "conf"


@contextmanager
def fresh_hydra() -> Iterator[None]:
    """Composing inside a run that Hydra itself started must not meet that run's state."""
    outer = GlobalHydra.instance()
    GlobalHydra.set_instance(GlobalHydra.__new__(GlobalHydra))
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.set_instance(outer)


def translate(error: BaseException) -> LowrankError:
    """A refusal of Hydra, OmegaConf, YAML or the machine as one of our errors, which itself passes unchanged.

    Anything else is a bug, ours or a user's: it is raised again as it is.
    """
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    match error:
        case LowrankError():
            return error
        case KeyboardInterrupt():
            return Interrupted("interrupted.")
        case refusals.OverrideParseException():
            return ConfigError(malformed(error))
        case refusals.MissingConfigException(options=[_, *_]):
            return ConfigError(no_such_choice(error))
        case refusals.HydraException() | OmegaConfBaseException() if isinstance(cause, OmegaConfBaseException):
            return of_omegaconf(cause)
        case refusals.HydraException():
            return ConfigError(reword(str(error)))
        case yaml.MarkedYAMLError():
            return ConfigError(f"not valid YAML: {error.problem}{error.problem_mark or ''}.")
        case ValueError() if raised_in_hydra(error):
            return ConfigError(reword(str(error)))
        case Exception() if out_of_memory(error):
            return OutOfMemory(f"out of memory: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
        case OSError() if error.errno in MACHINE:
            return LowrankError(f"{error.filename}: {os.strerror(error.errno)}.")
    raise error


@contextmanager
def reporting(folder: Path | None = None) -> Iterator[None]:
    """An error inside ends the process, reported, with its exit code; ``folder`` goes if nothing is in it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if folder is not None:
            discard(folder)
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Prints one block for what we understand and the full traceback for a bug. Returns the exit code.

    A sweep asks for the cause in the file that ``LOWRANK_CAUSE`` names.
    """
    try:
        known = translate(error)
    except Exception:
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        code, cause = 1, redacted(f"{type(error).__name__}: {error}")
    else:
        if os.environ.get("LOWRANK_DEBUG") == "1":
            print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        code, cause = known.exit_code, printable(redacted(str(known)))
        print(cause, file=sys.stderr)
    if path := os.environ.get("LOWRANK_CAUSE"):
        Path(path).write_text(cause, encoding="utf-8")
    return code


def printable(text: str) -> str:
    """``text`` with a mark for each character that could move a terminal's cursor: it may quote a stranger's file."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def of_omegaconf(error: OmegaConfBaseException) -> ConfigError:
    if not isinstance(error, (ConfigKeyError, ConfigAttributeError)) or not error.full_key:
        return ConfigError(config.sentence(error))
    parent = error.parent_node
    if not isinstance(parent, DictConfig) or error.full_key.startswith("hydra."):
        return unknown_key(error.full_key, [str(key) for key in parent] if isinstance(parent, DictConfig) else [])
    tree = OmegaConf.to_container(parent._get_root(), resolve=False)
    assert isinstance(tree, dict)
    return config.key_error(error.full_key, {str(key): value for key, value in tree.items()})


def malformed(error: refusals.OverrideParseException) -> str:
    """An override that Hydra's grammar cannot read, and how to write it."""
    reason = str(error).split("\nSee https")[0].split("\n")
    detail = next((line for line in reason if not line.startswith(("Error parsing", "LexerNoViable", " "))), "")
    advice = "Write key=value, and quote a value with special characters: \"key='a, b'\"."
    if re.search(r"""\{\s*['"]|,\s*(['"])[^'"]*\1\s*:""", error.override):
        advice = "Write a mapping's keys without quotes: 'adapter.targets={*.q_proj:{r:8}}'."
    return f"{error.override}: not a valid override{f' ({detail})' if detail else ''}. {advice}"


def no_such_choice(error: refusals.MissingConfigException) -> str:
    """``model: 'smolm2' is not a choice. Did you mean 'smollm2'? Allowed: …``"""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    allowed = list(error.options or ())
    return (
        f"{group}: '{name}' is not a choice.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}."
        f"{MORE_KINDS.get(group, '')}"
    )


def reword(message: str) -> str:
    """Hydra's other refusals; one that is not in the table keeps its words, in one line."""
    message = " ".join(message.split())
    for pattern, ours in PHRASES:
        if found := re.match(pattern, message):
            return found.expand(ours)
    return f"configuration: {message.rstrip('.')}."


def raised_in_hydra(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(hydra.__file__).parent in Path(trace.tb_frame.f_code.co_filename).parents


def discard(folder: Path) -> None:
    """Removes ``folder`` if nothing is in it, and its parents up to outputs/ while they are empty too."""
    top = Path(os.environ.get("LOWRANK_OUTPUTS", "outputs")).resolve()
    parents = [p for p in folder.resolve().parents if p.is_relative_to(top)]
    for path in (folder, *parents):
        try:
            path.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
