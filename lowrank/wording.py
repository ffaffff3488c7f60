"""What Hydra says of an override or a file → what we say: the key, what is wrong, and what to write instead."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from lowrank.errors import ConfigError, did_you_mean
from lowrank.rules import RULES
from lowrank.schema import GROUPS

# The most specific first. \several and \groups: what ``more`` adds for this key.
PHRASES = (
    (r"Ambiguous value for argument '([^=]*)=(.*?)' 1\.", r"\1: '\2' is several values. \several"),
    (r"Sweep parameters '([^=]*)=(.*)' requires", r"\1: '\2' is several values. Add -m to run one job for each."),
    (r"Sweeping over Hydra's configuration is not supported : '([^=]*)=(.*)'", r"\1: '\2' is several values; one is."),
    (
        r"BasicSweeper does not support sweep type : INTERVAL_SWEEP",
        r"interval(…): only with hydra/sweeper=optuna, which searches. Values one by one: choice(…), range(…) or a,b.",
    ),
    (r"Multiple values for (\S+?)\. .*: (.*)'", r"\1: chosen already. Write \1=\2, without '+'."),
    (r"(\S+) appears more than once in the final defaults list", r"\1: chosen already. Write \1=…, without '+'."),
    (r"Could not append to config\. An item is already at '(.*?)'", r"\1: there already. Write it without '+'."),
    (r"Could not delete from config\. '(.*?)' does not exist", r"\1: unknown key; nothing to delete."),
    (
        r"Could not delete from config\. The value of '(.*?)' is (.*) and not (.*)\.",
        r"\1: is \2, not \3: nothing is deleted. Write ~\1.",
    ),
    (
        r"Config group override must be a string or a list\. Got (\w+)",
        r"configuration: a group takes the name of one of its choices, such as model=smollm2 (got \1).",
    ),
    (r"Could not delete '(.*?)'\. No match", r"\1: unknown group; nothing to delete."),
    (r"You must specify '(\S+?)', .*Available options: (.*)", r"\1: missing; one of \2."),
    (r"In '(\S+?)': Could not override '(\S+?)'\. No match", r"\1.yaml: defaults: '\2' is no group.\groups"),
    (
        r"(?:In '\S+?': )?Could not override '(\S*?)'\. (?:No match|Did you mean)",
        r"\1: no group goes there; write GROUP=CHOICE, such as model=smollm2.",
    ),
    (r"In '(\S+?)': Could not load '(\S+?)'", r"\1.yaml: defaults: no file '\2.yaml' in the configuration's folders."),
    (r"Invalid defaults list in '(\S+?)', (.*?)\.?$", r"\1.yaml: \2."),
    (r"In '?(\S+?)'?: (Too many keys in default item .*?)\.?$", r"\1.yaml: defaults: \2."),
    (
        r"In '(\S+?)': \w+ raised while composing config: Key '\S+' not in '\w+' full_key: (\S+).*",
        r"\2: unknown key. Set in \1.yaml.",
    ),
    (r"Error in call to target .*unexpected keyword argument '(\w+)'.*full_key: (\S+?)\.?$", r"\2.\1: unknown key."),
    (r"Error locating target '(\S+?)', .*full_key: (\S+?)\.?$", r"\2._target_: '\1' cannot be imported."),
    (r"Additional config directory '(.*)' not found", r"--config-dir: no folder '\1'."),
    (r"Primary config directory not found\. .* directory '(.*)' exists", r"--config-path: no folder '\1'."),
    (r"Cannot find primary config '(.*?)'", r"--config-name: no file '\1.yaml' in the configuration's folders."),
)
MORE_KINDS = {"schedule": " Other kinds of schedule: schedule.kind=NAME."}
LISTED = ("adapter.targets", "adapter.exclude", "quant.skip", "checkpoint.allow", "optim.betas", "optim.groups")
ADVICE = "Write key=value, and quote a value with special characters: \"key='a, b'\"."


def reword(message: str) -> str:
    """Hydra's refusal in our words; one that is not in the table keeps its own, in one line."""
    message = " ".join(message.split())
    for pattern, ours in PHRASES:
        if found := re.match(pattern, message):
            return found.expand(ours.replace(r"\several", "").replace(r"\groups", "")) + more(ours, found)
    return f"configuration: {message.rstrip('.')}."


def more(ours: str, found: re.Match[str]) -> str:
    if r"\groups" in ours:
        return did_you_mean(found[2].removeprefix("/"), [*GROUPS, "experiment"])
    if r"\several" in ours:
        listed = f", or write a list: {found[1]}=[{found[2]}]" if found[1].lstrip("+") in LISTED else ""
        return f"Add -m to run one job for each{listed}."
    return ""


def malformed(override: str, message: str) -> str:
    """An override that Hydra's grammar cannot read, and how to write it."""
    said = message.split("\nSee https")[0].split("\n")
    detail = next((line for line in said if not line.startswith(("Error parsing", "LexerNoViable", " "))), "")
    detail = re.sub(r"^\w+ while evaluating '.*?': ", "", detail.partition(" expecting ")[0])
    if "=" not in override:
        detail = "no '=' in it"
    elif override.partition("=")[0].strip("+~ ") == "":
        detail = "nothing in front of '='"
    key, _, value = override.partition("=")
    if re.search(r"""\{\s*['"]|,\s*(['"])[^'"]*\1\s*:""", override):
        advice = "Write a mapping's keys without quotes: 'adapter.targets={*.q_proj:{r:8}}'."
    elif is_text(key.lstrip("+"), value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        advice = f"As one text, quoted: \"{key}='{escaped}'\"."
    else:
        detail, advice = lookalike(override) or detail, ADVICE
    return f"{override}: not a valid override{f' ({detail})' if detail else ''}. {advice}"


def in_a_list(key: str) -> ConfigError:
    return ConfigError(f"{key}: inside a list; its items have numbers, the first is 0.")


def is_text(key: str, value: str) -> bool:
    """Whether a value that Hydra cannot read would be allowed if it were quoted."""
    allowed = key in RULES and RULES[key].accepts(value)
    return (allowed or key in ("hydra.run.dir", "hydra.sweep.dir")) and value[:1] not in ("", "[", "{", "(", "'", '"')


def lookalike(override: str) -> str:
    """The first character that is none of ASCII's, by its name, and the one it may have been meant for."""
    for character in override:
        if not character.isascii():
            name = unicodedata.name(character, f"U+{ord(character):04X}")
            meant = plain(character)
            return f"'{character}' is {name}" + (f", not '{meant}'" if meant.isascii() else "")
    return ""


def plain(character: str) -> str:
    if unicodedata.category(character) == "Pd" or character == "\N{MINUS SIGN}":
        return "-"
    digit = unicodedata.digit(character, None)
    return str(digit) if digit is not None else unicodedata.normalize("NFKC", character)


def no_such_choice(path: str, options: Sequence[str], inside: str | None) -> str:
    """``model: 'smolm2' is not a choice. Did you mean 'smollm2'? Allowed: …``; ``inside``: the file that chose it."""
    group, _, name = path.partition("/")
    if group == "hydra":
        second, _, name = name.partition("/")
        group = f"{group}/{second}"
    where = f" (in {inside}.yaml)" if inside not in (None, "config", "hydra/config") else ""
    options = [name for name in options if not name.startswith("_")]
    hint, more_kinds = did_you_mean(name, options), MORE_KINDS.get(group, "")
    if more_kinds and name in RULES[f"{group}.kind"].names:
        hint, more_kinds = f" Write {group}.kind={name}.", ""
    return f"{group}: '{name}' is not a choice{where}.{hint} Allowed: {', '.join(options)}.{more_kinds}"


def printable(text: str) -> str:
    """``text`` with a mark for each character that could move a terminal's cursor: it may quote a stranger's file."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
