"""The configuration read: a strict parse, and errors that name the key, the value and what is allowed.

``parse`` turns the composed YAML into a frozen ``Config``. Every key and value is checked before torch is
imported; only then are the classes that ``_target_`` names looked at, because the options of ``adapter`` and
``optim`` are those of their constructors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import reduce
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowrank.classes import check_adapter, check_optimizer, find, options, resolve
from lowrank.errors import ConfigError, RefusedError, nearest
from lowrank.kinds import check_schedule
from lowrank.relations import OWNERS, RELATIONS
from lowrank.rules import ANY, FLAG, RULES, SWEEP, read_group, refuse, unknown_key
from lowrank.schema import FREE, GROUPS, NESTED, OPEN, Config, Sweep
from lowrank.secrets import redacted_tree

__all__ = ["Config", "key_error", "parse", "planning", "resolve", "sentence", "sweeping"]

PLAN, OF_SWEEP = "plan", "sweep"  # the keys beside the groups
ROOT = (*GROUPS, "experiment", PLAN, OF_SWEEP)  # what a command line may begin with


def parse(node: DictConfig | Mapping[str, Any]) -> Config:
    """The configuration of a composed YAML tree. Raises ConfigError for the first key or value that is wrong."""
    whole = plain(node)
    planning(whole)
    sweeping({OF_SWEEP: whole.get(OF_SWEEP, {})})
    tree = {key: value for key, value in whole.items() if key not in (PLAN, OF_SWEEP)}
    if "experiment" in tree:
        raise ConfigError("experiment: the first line of an experiment's file must be '# @package _global_'.")
    check_keys("", tree, ROOT)
    config = Config(**{name: read(cls, name, tree.get(name)) for name, cls in GROUPS.items()})
    for path, kinds in OWNERS.items():
        group, _, key = path.partition(".")
        owner = getattr(config, group)
        name = names(type(owner), group)[key]
        if owner.kind not in kinds and getattr(owner, name) != defaults(type(owner))[name]:
            raise misplaced(path)
    for path, holds, wanted in RELATIONS:
        if not holds(config):
            raise refuse(path, reduce(getattr, path.split("."), config), wanted)
    check_schedule(config.schedule.kind, config.schedule.warmup, config.schedule.options)
    adapter = config.adapter
    check_adapter(adapter.target, adapter.targets, adapter.options)
    optim = config.optim
    check_optimizer(optim.target, {"lr": optim.lr, "weight_decay": optim.weight_decay}, optim.options)
    if config.track.kind == "own":
        find(str(config.track.target), "track")
    return config


def planning(node: DictConfig | Mapping[str, Any]) -> bool:
    """Whether a composed YAML tree asks for the dry run: ``plan`` is no part of a configuration, but what is done with
    it. Raises ConfigError where it is neither true nor false."""
    return bool(FLAG.read(PLAN, node.get(PLAN, False)))


def sweeping(node: DictConfig | Mapping[str, Any]) -> Sweep:
    """What a composed YAML tree says of ``-m``. Raises ConfigError for the first key or value that is wrong."""
    values = mapping(OF_SWEEP, plain(node).get(OF_SWEEP, {}))
    check_keys(OF_SWEEP, values, names(Sweep, OF_SWEEP))
    return Sweep(**{key: SWEEP[f"{OF_SWEEP}.{key}"].read(f"{OF_SWEEP}.{key}", value) for key, value in values.items()})


def load(path: Path) -> Config:
    """The configuration of a run directory's config.yaml. Raises RefusedError where the file cannot be read."""
    try:
        node = OmegaConf.create(path.read_text(encoding="utf-8"))
        if not isinstance(node, DictConfig):
            raise ValueError("not a mapping of keys")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RefusedError(f"{path}: cannot be read: {' '.join(str(error).split())}.") from error
    return parse(node)


def to_yaml(config: Config) -> str:
    """A run directory's config.yaml, without secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redacted_tree(config.to_dict())))


def plain(node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Plain containers with every interpolation resolved; a mandatory value that nobody gave stays ``???``."""
    try:
        node = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
        tree = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    return mapping("configuration", tree)


def sentence(error: OmegaConfBaseException) -> str:
    """``loop.seed: Interpolation key 'data.sed' not found.``"""
    what = str(error).splitlines()[0].strip().rstrip(".")
    if what == "Cannot merge DictConfig with ListConfig":
        key = str(error.full_key)
        wanted = RULES[key].wanted if key in RULES else "a mapping of its keys"
        what = f"a {'mapping' if key in RULES else 'list'} is not allowed; {wanted}"
    return f"{error.full_key or 'configuration'}: {what}."


def mapping(path: str, node: Any) -> dict[str, Any]:
    if node is None or node == "???":
        raise ConfigError(f"{path}: missing; choose one, or give a mapping of its keys.")
    if not isinstance(node, dict):
        raise refuse(path, node, "a mapping of its keys")
    return {str(key): value for key, value in node.items()}


def read(cls: type, where: str, node: Any) -> Any:
    """An instance of ``cls`` from a mapping, each value checked by its rule; an open group's rest is ``options``."""
    values = mapping(where, node)
    keys = names(cls, where)
    rest = {key: value for key, value in values.items() if key not in keys}
    found: dict[str, Any] = {}
    if where in OPEN:
        found["options"] = {key: read_value(f"{where}.{key}", value) for key, value in rest.items()}
    else:
        check_keys(where, rest, keys)
    for key, name in keys.items():
        path = f"{where}.{key}"
        if key not in values and name in defaults(cls):
            found[name] = defaults(cls)[name]
        elif path in NESTED:
            found[name] = read(NESTED[path], path, values.get(key))
        else:
            found[name] = read_value(path, values.get(key, "???"))
    return cls(**found)


def read_value(path: str, value: Any) -> Any:
    rule = RULES.get(path, ANY)
    if value == "???":
        raise ConfigError(f"{path}: missing; {rule.wanted.removesuffix(', or null')}. Write {path}=….")
    found = rule.read(path, value)
    return [read_group(f"{path}[{i}]", group) for i, group in enumerate(found)] if path == "optim.groups" else found


def names(cls: type, where: str) -> dict[str, str]:
    """YAML key → field of ``cls``, without the ``options`` of an open group."""
    found = {f.name: f.name for f in fields(cls)}
    if "target" in found:
        found = {"_target_": found.pop("target"), **found}
    return {key: name for key, name in found.items() if not (where in OPEN and key == "options")}


def defaults(cls: type) -> dict[str, Any]:
    """Field → its default, for the fields that have one."""
    given = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    return given | {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}


def check_keys(where: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    for key in values:
        if key not in allowed:
            raise unknown_key(f"{where}.{key}" if where else key, allowed)


def misplaced(path: str) -> ConfigError:
    """A key that belongs to other choices of its group."""
    group = path.partition(".")[0]
    return ConfigError(f"{path}: only with {' or '.join(f'{group}={kind}' for kind in OWNERS[path])}.")


def key_error(path: str, tree: Mapping[str, Any]) -> ConfigError:
    """What to say of a key that the composed YAML ``tree`` does not have: unknown, of another choice, or addable."""
    where, _, key = path.rpartition(".")
    if path in OWNERS:
        return misplaced(path)
    if "/" in path:
        return ConfigError(f"{path}: no such group. Of a key write {path.replace('/', '.')}=….")
    if any(path.startswith(f"{free}.") for free in FREE):
        return ConfigError(f"{path}: not there yet; to add it write '+{path}=…'.")
    cls = NESTED.get(where) or GROUPS.get(where) or (Sweep if where == OF_SWEEP else None)
    allowed = [name for name in names(cls, where) if name != "_target_"] if cls else [] if where else list(ROOT)
    target = str(tree.get(where, {}).get("_target_")) if where in OPEN else ""
    if target:
        allowed += [name for name in options(target, where) if name not in allowed]
    if key in allowed:
        return ConfigError(f"{path}: not set by this choice of {where}; to set it write '+{path}=…'.")
    error = unknown_key(path, allowed)
    return ConfigError(f"{error} These are {target}'s.") if where in OPEN and not nearest(key, allowed) else error
