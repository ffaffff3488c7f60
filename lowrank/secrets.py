"""Ground floor of all that is told: what must not be, wherever it came from, becomes ``***`` on its way out.

A secret is the value of an environment variable whose name says so (``HF_TOKEN``, ``WANDB_API_KEY``), the password of a
URL, or what looks like a key by itself. What is written to a run directory, a log, a report or a traceback passes here.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
SHORTEST = 6  # characters: what is shorter would be found within other words

# TOKENIZERS_PARALLELISM holds no token, nor does max_new_tokens; PWD is a folder.
NAME = re.compile(
    r"TOKENS?(?!I[SZ])(_|\d|$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|BEARER|COOKIE"
    r"|KEYS?(_|\d|$)|(^|_)(AUTH|AUTHORIZATION|PASS|PAT|JWT)(_|\d|$)|_PWD(_|\d|$)",
    re.IGNORECASE,
)
# Of a key of ours less: an adapter's option may be called key, or pad_token.
KEY = re.compile(r"(API|ACCESS|SECRET|AUTH|HF)_?(KEY|TOKEN)|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
WORDS = {
    *("true", "false", "none", "null", "yes", "no", "on", "off", "enabled", "disabled", "enable", "disable"),
    *("default", "always", "never", "offline", "online", "dryrun", "optional", "required", "unset", "anonymous"),
}
PATTERNS = tuple(  # what "keep" matches stays; lengths are bounded, so that no text takes long
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<keep>\b[a-z][a-z0-9+.-]{1,20}://)[^\s/@\"'<>\\?#]{1,2000}(?=@)",  # https://user:password@host
        r"(?P<keep>\b(?:bearer|authorization:\s{0,4}\w{1,20})\s{1,4})[A-Za-z0-9._~+/=-]{8,}",
        r"(?P<keep>)\b(?:hf|api_org)_[A-Za-z0-9]{16,}",
        r"(?P<keep>\bwandb[^\n]{0,40}?)\b[0-9a-f]{40}\b",
        r"(?P<keep>)\bwandb_v1_\w{20,}",
        r"(?P<keep>)\bsk-[A-Za-z0-9_-]{20,}",
        r"(?P<keep>)\b(?:gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,})",
        r"(?P<keep>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        # api_key=…, "password": "…": of code and prose that name one, only what has letters and digits
        r"(?P<keep>(?:(?:api|access|secret|auth|hf)[_-]?(?:key|token)|password|passwd)[\"']?\s{0,2}[:=]\s{0,2}[\"']?)"
        r"(?=[^\s\"']{0,200}\d)(?=[^\s\"']{0,200}[a-z])[\w+/~!@#$%^=-]{8,}(?![\w.(\[])",
    )
)


def redacted(text: str) -> str:
    """``text`` without the secrets that it holds; the same text gives the same one."""
    return without(text, spellings(tuple(planted(os.environ))))


def without(text: str, secrets: tuple[str, ...]) -> str:
    for found in secrets:
        text = text.replace(found, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\g<keep>{HIDDEN}", text)
    return text


def redacted_tree(value: Any) -> Any:
    """The same mappings and lists with every text in them ``redacted``, keys too; of a key that says that it names a
    secret, the whole text."""
    return tree_without(value, spellings(tuple(planted(os.environ))))


def tree_without(value: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {
            without(key, secrets) if isinstance(key, str) else key: (
                HIDDEN
                if isinstance(key, str) and isinstance(one, str) and hidden(key, one)
                else tree_without(one, secrets)
            )
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        plain = type(value) in (list, tuple)
        return type(value)(tree_without(one, secrets) for one in value) if plain else value
    return without(value, secrets) if isinstance(value, str) else value


def hidden(key: str, value: str) -> bool:
    return KEY.search(key) is not None and len(value) >= SHORTEST


def planted(environment: Mapping[str, str]) -> Iterator[str]:
    """The values of the variables that hold secrets, the longest first: one may be part of another."""
    values = {value.strip() for name, value in environment.items() if secret(name, value)}
    return iter(sorted(values, key=lambda value: (-len(value), value)))


def secret(name: str, value: str) -> bool:
    """Whether a value so named is one: no setting (``true``, ``30``), and no file that is there, which holds it."""
    value = value.strip()
    if len(value) < SHORTEST or NAME.search(name) is None or value.lower() in WORDS:
        return False
    plain_number = re.fullmatch(r"[\d.,+-]{1,12}", value) is not None
    return not plain_number and not (value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value)))


@lru_cache(maxsize=8)
def spellings(values: tuple[str, ...]) -> tuple[str, ...]:
    """Each secret as it is and as JSON, Python, a shell, HTML and a URL write it."""
    found: dict[str, None] = {}
    for value in values:
        for one in (value, *value.splitlines()):
            if len(one.strip()) < SHORTEST:
                continue
            forms = [json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1], repr(one)[1:-1]]
            forms += [
                html.escape(one),
                quote(one, safe=""),
                quote(one),
                quote_plus(one),
                shlex.quote(one).strip("'"),
                one,
            ]
            found |= dict.fromkeys(forms)
    return tuple(sorted(found, key=len, reverse=True))
