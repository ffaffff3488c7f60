"""``lowrank completions bash|zsh``: a script by which a shell completes commands, options, folders and overrides.

Everything it knows is written into it when it is made, from the parser and ``conf/``: completing starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lowrank.rules import FLAG, RULES

FOLDER, FILE, OVERRIDE, KEY, NOTHING = "@folder", "@file", "@override", "@key", "@nothing"
HYDRA = "hydra"  # a group, but not of ours


def completions(parser: argparse.ArgumentParser, conf: Path, shell: str) -> str:
    """The script for ``shell``, bash or zsh."""
    return "\n".join([*HEADS[shell], *commands(parser), *overrides(conf), DRIVERS[shell]])


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A function that sets ``flags``, ``valued`` and ``places`` for a command, such as ``inspect``, and fails where
    there is none of that name."""
    yield "_lowrank_command() {\n    case $1 in"
    for name, one in walk("", parser):
        flags: list[str] = []
        valued: list[str] = []
        for action in one._actions:
            flags += action.option_strings
            if action.option_strings and action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
                valued += [f"{flag}:{kind(action)}" for flag in action.option_strings]
        places = [kind(a) + ("*" if a.nargs in ("*", "+") else "") for a in one._actions if not a.option_strings]
        told = {"flags": flags, "valued": valued, "places": places}
        sets = "; ".join(f"{variable}='{' '.join(words)}'" for variable, words in told.items())
        yield f"        '{name}') {sets} ;;"
    yield "        *) return 1 ;;\n    esac\n}"


def walk(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of every command, and of the commands of a command: ``config explain``."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items():
                yield from walk(f"{name} {word}".strip(), one)


def kind(action: argparse.Action) -> str:
    """What completes an argument: one of the kinds above, or words between bars."""
    if action.choices is not None:
        return "|".join(str(word) for word in action.choices)
    if action.dest == "overrides" and action.metavar is None:
        return OVERRIDE
    if action.dest in ("key", "keys"):
        return KEY
    if action.dest == "adapters":
        return FOLDER
    if action.type is not Path:
        return NOTHING
    return FILE if action.option_strings else FOLDER


def overrides(conf: Path) -> Iterator[str]:
    """The groups and keys of ``conf``, and a function that sets ``values`` to what one may be."""
    choices = {
        folder.name: sorted(choices_of(folder))
        for folder in sorted(conf.iterdir())
        if folder.is_dir() and folder.name != HYDRA
    }
    keys = sorted({key for name in choices for key in keys_of(conf / name, name)} | set(root(conf)))
    several = [f"{name}=" for name, names in choices.items() if len(names) > 1]
    within = sorted({f"{key.partition('.')[0]}." for key in keys if "." in key})
    yield f"_lowrank_groups='{' '.join([*several, *within, *(f'{key}=' for key in keys if '.' not in key)])}'"
    yield f"_lowrank_keys='{' '.join(f'{key}=' for key in keys if '.' in key)}'"
    yield "_lowrank_values() {\n    values=\n    case $1 in"
    for name, words in {**choices, **{key: words for key in keys if (words := allowed(key))}}.items():
        yield f"        {name}) values='{' '.join(words)}' ;;"
    yield "    esac\n}"


def choices_of(folder: Path) -> Iterator[str]:
    """``methods/lora``; a name that begins with ``_`` is a part of others."""
    for path in folder.rglob("*.yaml"):
        name = path.relative_to(folder).with_suffix("")
        if not any(part.startswith("_") for part in name.parts):
            yield name.as_posix()


def keys_of(folder: Path, group: str) -> Iterator[str]:
    """Of all choices of a group. An experiment has those of others."""
    for path in folder.rglob("*.yaml") if group != "experiment" else ():
        yield from flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, group)


def root(conf: Path) -> Iterator[str]:
    """The keys beside the groups."""
    tree = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))
    for name, value in tree.items():
        if name not in ("defaults", HYDRA):
            yield from flat(value, name) if isinstance(value, dict) else [name]


def flat(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if name != "defaults" and str(name).replace("_", "").isalnum():
            yield from flat(value, f"{prefix}.{name}") if isinstance(value, dict) else [f"{prefix}.{name}"]


def allowed(key: str) -> list[str]:
    """The words that a key's value may be, where these are few: none of a number."""
    rule = RULES.get(key)
    if key.endswith("path"):
        return [FILE]
    if rule is FLAG or key == "plan":
        return ["true", "false"]
    return list(rule.names) if rule else []


HEADS = {
    "bash": ["# lowrank: completion for bash, version 4 or newer"],
    "zsh": ["#compdef lowrank", "# lowrank: completion for zsh"],
}
# What is common: which command the words before the cursor have named, and which kind of word comes next.
NEXT = """
_lowrank_next() {
    local word at= option= place=0 one
    _lowrank_command ''
    for word in "$@"; do
        if [[ -n $option ]]; then option=; continue; fi
        case $word in
            --*=*) ;;
            -*) [[ " $valued " == *" $word:"* ]] && option=$word ;;
            *) if _lowrank_command "${at:+$at }$word"; then at="${at:+$at }$word"; place=0
               else place=$((place + 1)); fi ;;
        esac
    done
    wanted=
    if [[ -n $option ]]; then
        one=" $valued"; one=${one##* $option:}; wanted=${one%% *}
        return
    fi
    one="$places "
    while (( place > 0 )) && [[ ${one%% *} != *'*' && -n $one ]]; do one=${one#* }; place=$((place - 1)); done
    wanted=${one%% *}; wanted=${wanted%'*'}
}"""
BASH = """
_lowrank() {
    local flags valued places wanted values list line=${COMP_LINE:0:COMP_POINT} given
    local current=${line##*[[:space:]]}
    read -ra given <<< "${line%"$current"}"
    COMPREPLY=()
    _lowrank_next "${given[@]:1}"
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$flags" -- "$current")
        return
    fi
    case $wanted in
        @folder) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
        @file) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
        @key) mapfile -t COMPREPLY < <(compgen -W "${_lowrank_keys//=/}" -- "$current") ;;
        @override) _lowrank_override ;;
        @nothing | '') ;;
        *) mapfile -t COMPREPLY < <(compgen -W "${wanted//|/ }" -- "$current") ;;
    esac
}
_lowrank_override() {
    local name=${current%%=*} value=${current#*=} place
    if [[ $current == *=* ]]; then
        _lowrank_values "${name##*+}"
        if [[ $values == @file ]]; then
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$value")
        else
            mapfile -t COMPREPLY < <(compgen -W "$values" -- "$value")
        fi
        [[ $COMP_WORDBREAKS == *=* ]] && return
        for place in "${!COMPREPLY[@]}"; do COMPREPLY[place]=$name=${COMPREPLY[place]}; done
        return
    fi
    list=$_lowrank_groups
    [[ $current == *.* ]] && list=$_lowrank_keys
    mapfile -t COMPREPLY < <(compgen -W "$list" -- "$current")
    if (( ${#COMPREPLY[@]} )); then compopt -o nospace
    else compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current"); fi
}
complete -F _lowrank lowrank"""
ZSH = """
_lowrank() {
    local flags valued places wanted values list current=$PREFIX
    _lowrank_next "${(@)words[2,CURRENT-1]}"
    if [[ $current == -* ]]; then
        compadd -- ${=flags}
        return
    fi
    case $wanted in
        @folder) _files -/ ;;
        @file) _files ;;
        @key) compadd -- ${=_lowrank_keys//=/} ;;
        @override) _lowrank_override ;;
        @nothing | '') ;;
        *) compadd -- ${(s:|:)wanted} ;;
    esac
}
_lowrank_override() {
    local name=${current%%=*}
    if [[ $current == *=* ]]; then
        _lowrank_values "${name##*+}"
        compset -P 1 '*='
        if [[ $values == @file ]]; then _files; else compadd -- ${=values}; fi
        return
    fi
    list=$_lowrank_groups
    [[ $current == *.* ]] && list=$_lowrank_keys
    compadd -S '' -- ${=list} || _files -/
}
if [[ $funcstack[1] == _lowrank ]]; then _lowrank "$@"; else compdef _lowrank lowrank; fi"""
DRIVERS = {"bash": NEXT + BASH, "zsh": NEXT + ZSH}
