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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import omegaconf
import yaml  # type: ignore[import-untyped]
from hydra import errors as refusals
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lowrank import config
from lowrank.disk import discard_empty as discard
from lowrank.errors import ConfigError, Interrupted, LowrankError, OutOfMemory, out_of_memory
from lowrank.given import CHOSEN, Given, check_folders, check_given, whole_targets, words_of
from lowrank.places import Composed, find_conf, frames, met_with, placed, within
from lowrank.rules import unknown_key
from lowrank.schema import GROUPS, Config
from lowrank.secrets import redacted
from lowrank.wording import in_a_list, malformed, no_such_choice, printable, reword

MACHINE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
HYDRA, OMEGACONF = Path(hydra.__file__).parent, Path(omegaconf.__file__).parent


def compose(overrides: list[str], config_dir: Path | None = None) -> Config:
    """The configuration of ``python train.py OVERRIDES``. Raises ConfigError."""
    node, about = apart(overrides, config_dir)
    try:
        return config.parse(node)
    except ConfigError as error:
        raise placed(error, made_of({}, about)) from error


def composed(overrides: list[str]) -> Composed:
    """The configuration of ``python train.py OVERRIDES``, not checked, and what it was made of. Raises ConfigError."""
    node, about = apart(overrides)
    return made_of(config.plain(node), about)


def shown(overrides: list[str]) -> str:
    """The same as YAML, interpolations as they are written: what ``--cfg job`` prints. Raises ConfigError."""
    return OmegaConf.to_yaml(compose_node(overrides))


def compose_node(overrides: list[str], config_dir: Path | None = None) -> DictConfig:
    """The composed YAML tree. Raises ConfigError."""
    return apart(overrides, config_dir)[0]


def apart(overrides: list[str], config_dir: Path | None = None) -> tuple[DictConfig, DictConfig]:
    """The composed YAML tree, and Hydra's own part of it, which says what it is made of."""
    folder = (config_dir or find_conf()).resolve()
    try:
        with fresh_hydra(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            node = hydra.compose("config", overrides=understood(overrides), return_hydra_config=True)
    except Exception as error:
        raise translate(error) from error
    keys: Any = [key for key in node if key != "hydra"]
    return OmegaConf.masked_copy(node, keys), node.hydra


def understood(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line that takes overrides, as Hydra is to read them.

    Raises ConfigError for what it would silently take for something else. What its grammar does not know it says.
    """
    overrides, folders = words_of(arguments)
    parser, given = OverridesParser.create(), []
    for text in overrides:
        try:
            one = parser.parse_override(text)
        except refusals.HydraException:
            continue
        value = one.value()  # of a sweep what it is made of
        values = tuple(getattr(value, "list", (value,)))
        given.append(Given(text, one.key_or_group, values, one.is_sweep_override(), one.is_delete()))
    check_given(given, find_conf())
    check_folders(folders)
    return whole_targets(arguments)


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
    if gone := [one.key_or_group for one in given if one.is_delete() and one.key_or_group in choices]:
        raise ConfigError(f"{gone[0]}: missing; a run has one choice of each group.")
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
    parent, _, name = key.rpartition(".")
    try:
        if not override.is_delete():
            OmegaConf.update(tree, key, override.value(), merge=False, force_add=True)
            return
        within = OmegaConf.select(tree, parent)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    except (ValueError, TypeError) as error:
        raise in_a_list(key) from error
    if not isinstance(within, DictConfig) or name not in within:
        raise ConfigError(f"{key}: unknown key; nothing to delete.")
    del within[name]


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
        case ConfigError() if HydraConfig.initialized():
            return placed(error, made_of({}, HydraConfig.get()))
        case LowrankError():
            return error
        case KeyboardInterrupt():
            return Interrupted("interrupted.")
        case refusals.OverrideParseException():
            return ConfigError(malformed(error.override, str(error)))
        case refusals.MissingConfigException(options=[_, *_]):
            return ConfigError(missing_choice(error))
        case refusals.HydraException() | OmegaConfBaseException() if isinstance(cause, OmegaConfBaseException):
            return of_omegaconf(cause)
        case refusals.HydraException():
            return ConfigError(reword(str(error)))
        case yaml.MarkedYAMLError():
            return ConfigError(f"not valid YAML: {error.problem}{error.problem_mark or ''}.")
        case yaml.YAMLError() | UnicodeError() if file := met_with(error, HYDRA, "full_path"):
            return ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}.")
        case RecursionError() if any(within(frame, HYDRA) for frame in frames(error)):
            return ConfigError(
                "configuration: nested too deeply, or a file that names itself in its own defaults list."
            )
        case ValueError() | TypeError() | AttributeError() | AssertionError() if raised_in(error, HYDRA):
            return ConfigError(reword(str(error) or "what Hydra makes of it is no configuration"))
        case ValueError() | TypeError() if raised_in(error, OMEGACONF) and (one := met_with(error, HYDRA, "override")):
            return in_a_list(one.key_or_group)
        case Exception() if out_of_memory(error):
            return OutOfMemory(f"out of memory: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
        case BrokenPipeError():
            return LowrankError("standard output: nobody reads it any more.")
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


@contextmanager
def of_job(folder: Path) -> Iterator[None]:
    """``reporting`` of the process of one run. In a job of a launcher that calls ``train.py``'s function itself, in a
    process of its own (joblib, submitit), an error is printed there too and raised again, naming the job, for the
    launcher to take back: to leave such a process would lose what the others have done."""
    if not called_by_launcher():
        with reporting(folder):
            yield
        return
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        discard(folder)
        code, said = report(error), f"{type(error).__name__}: {error}"
        kind = next((cls for cls in LowrankError.__subclasses__() if cls.exit_code == code), LowrankError)
        raise kind(f"{folder}: {said if kind is LowrankError else translate(error)}") from None


def called_by_launcher() -> bool:
    """Whether a launcher of somebody else's called ``train.py``'s function: ours starts ``train.py``."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def report(error: BaseException) -> int:
    """``told``; returns the exit code. A sweep asks for the cause in the file that ``LOWRANK_CAUSE`` names."""
    code, cause = told(error)
    if path := os.environ.get("LOWRANK_CAUSE"):
        Path(path).write_text(cause, encoding="utf-8")
    return code


def told(error: BaseException) -> tuple[int, str]:
    """Prints one block for what we understand and the full traceback for a bug; the exit code and the cause."""
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
    return code, cause


def of_omegaconf(error: OmegaConfBaseException) -> ConfigError:
    if not isinstance(error, (ConfigKeyError, ConfigAttributeError)) or not error.full_key:
        return ConfigError(config.sentence(error))
    parent = error.parent_node
    if not isinstance(parent, DictConfig) or error.full_key.startswith("hydra."):
        return unknown_key(error.full_key, [str(key) for key in parent] if isinstance(parent, DictConfig) else [])
    tree = OmegaConf.to_container(parent._get_root(), resolve=False)
    assert isinstance(tree, dict)
    return config.key_error(error.full_key, {str(key): value for key, value in tree.items()})


def missing_choice(error: refusals.MissingConfigException) -> str:
    path, inside = str(error.missing_cfg_file), re.match(r"In '(\S+?)'", str(error))
    group = path.partition("/")[0]
    below = [f.relative_to(find_conf() / group).with_suffix("") for f in (find_conf() / group).glob("*/[!_]*.yaml")]
    options = [*(error.options or ()), *(str(name) for name in sorted(below) if group in CHOSEN)]
    return no_such_choice(path, list(dict.fromkeys(options)), inside and inside[1])


def made_of(tree: Mapping[str, Any], about: DictConfig) -> Composed:
    """``about``: Hydra's own part of a composed tree."""
    folders = [Path(source.path) for source in about.runtime.config_sources if source.schema == "file"]
    choices: Any = OmegaConf.to_container(about.runtime.choices, resolve=False)
    overrides: Any = OmegaConf.to_container(about.overrides.task, resolve=False)  # as they were written
    return Composed(tree, choices, folders, overrides)


def raised_in(error: BaseException, library: Path) -> bool:
    return [within(frame, library) for frame in frames(error)][-1:] == [True]
