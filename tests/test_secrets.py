"""What must not be told is not, in any spelling, and what is no secret stays as it is."""

from __future__ import annotations

import html
import json
import shlex
import time
from collections.abc import Callable
from urllib.parse import quote

import pytest

from lowrank.secrets import redacted, redacted_tree

PLANTED = {
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLz",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "DB_PASSWORD": "pa\"ss\\w'örd <&> 1",
    "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI+K7MDENG=",
    "service_credential": "line one\nline two",
    "MY_AUTH": "letmein",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


SPELT: list[Callable[[str], str]] = [
    lambda v: v,
    lambda v: json.dumps(v),
    lambda v: json.dumps(v, ensure_ascii=False),
    repr,
    html.escape,
]
SPELT += [lambda v: quote(v, safe=""), shlex.quote, lambda v: shlex.join(["train.py", f"track.name={v}"])]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("spell", SPELT)
def test_a_variable_s_value_is_hidden_however_it_is_written(name: str, spell: Callable[[str], str]) -> None:
    told = redacted(f"before {spell(PLANTED[name])} after")
    assert told.startswith("before ")
    assert told.endswith(" after")
    assert "***" in told
    for part in PLANTED[name].split("\n"):
        assert part not in told
        assert spell(part) not in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://ann:hunter2@host/x?y=1", "https://***@host/x?y=1"),
        ("clone https://ghtokenvalue@github.com/a", "clone https://***@github.com/a"),
        ("redis://:pw@h:6379", "redis://***@h:6379"),
        ("with hf_abcdefghijABCDEFGHIJ1234.", "with ***."),
        ("wandb: key 00112233445566778899aabbccddeeff00112233", "wandb: key ***"),
        ("export WANDB_API_KEY=00112233445566778899aabbccddeeff00112233", "export WANDB_API_KEY=***"),
        ("Authorization: Bearer abc.DEF-123", "Authorization: Bearer ***"),
        ("curl -H 'authorization: Basic YWxhZGRpbjpvcGVu'", "curl -H 'authorization: Basic ***'"),
        ("ghp_abcdefghijklmnopqrstuvwx", "***"),
        ("sk-abcdefghijklmnopqrstuvwx", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ('{"api_key": "a1b2c3d4e5"}', '{"api_key": "***"}'),
        ("--password=tr0ub4dor&3", "--password=***&3"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, told: str) -> None:
    assert redacted(text) == told
    assert redacted(told) == told


@pytest.mark.parametrize(
    "text",
    [
        "max_new_tokens=1024 target_tokens: 12345678 tokens_per_s 1e-10",
        "model.layers.0.self_attn.q_proj.adapter.A keys: key=value",
        "data.path=/tmp/a@b s3://bucket/a@b mail@example.org",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "commit 00112233445566778899aabbccddeeff00112233",
        "def login(password: str, token=None): return self.secret.value(password=args.password2)",
        "tokenizer=abc123456789 the token count is 1234567890123456",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TOKENIZERS_PARALLELISM", "a_long_value"), ("PWD", "/a_long_value"), ("AUTHOR", "a_long_value")),
        *(("MY_TOKEN", "false"), ("MY_TOKEN", "Disabled"), ("MY_TOKEN", "short"), ("MY_TOKEN", "100000")),
        *(("MY_KEY", "/"), ("SSH_AUTH_SOCK", "/usr/bin"), ("KEYBOARD", "a_long_value")),
    ],
)
def test_settings_files_and_short_values_are_no_secrets(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"of {value} told") == f"of {value} told"


def test_a_tree_keeps_its_shape_and_numbers_and_loses_its_secrets() -> None:
    tree = {
        "project": PLANTED["HF_TOKEN"],
        "hf_token": "abcdef",
        "pad_token": "<|endoftext|>",
        "list": [1, 0.5, None, True, f"x {PLANTED['MY_AUTH']} y", (PLANTED["MY_AUTH"],)],
        PLANTED["MY_AUTH"]: {"deep": "https://a:b@c"},
    }
    assert redacted_tree(tree) == {
        "project": "***",
        "hf_token": "***",
        "pad_token": "<|endoftext|>",
        "list": [1, 0.5, None, True, "x *** y", ("***",)],
        "***": {"deep": "https://***@c"},
    }


@pytest.mark.parametrize("piece", ["a.", "http://", "wandb ", "password=", "bearer ", "a://b:", "api_key=a", " ", "\n"])
def test_no_text_takes_long(piece: str) -> None:
    start = time.monotonic()
    redacted(piece * 100_000)
    assert time.monotonic() - start < 10
