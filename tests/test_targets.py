"""Targets from the configuration to the plan: several methods, excludes, and a mapping that replaces a YAML's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli import SMALL, train, write_rows

from lowrank import assemble
from lowrank.adapters.plan import InjectionPlan
from lowrank.compose import compose, find_conf, whole_targets
from lowrank.config import parse
from lowrank.errors import ConfigError


def planned(*overrides: str) -> InjectionPlan:
    return assemble.parts(compose(["model=tiny_llama", "loop.device=cpu", *overrides])).plan


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides)
    return str(caught.value)


def test_a_rule_of_a_mapping_may_be_of_another_class() -> None:
    mlp, norm = "{_target_:lowrank.adapters.IA3,feedforward:true}", "{_target_:lowrank.adapters.Full}"
    mixed = f"{{*.q_proj:{{r:8}},*.v_proj:null,*.mlp.*:{mlp},norm:{norm}}}"
    rows = planned("adapter.r=4", "adapter.dropout=0.5", f"adapter.targets={mixed}").rows
    found = {
        row.path.removeprefix("model.layers.0."): (row.method, row.options)
        for row in rows
        if "layers.1." not in row.path
    }
    assert found.keys() == {
        *("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        "model.norm.weight",
    }
    q, v, up = (found[name][1] for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
    assert (q["r"], v["r"], q["dropout"]) == (8, 4, 0.5)  # the group's options, but for those of the rule
    assert up == {"feedforward": True}  # another class has its own alone
    assert found["model.norm.weight"] == ("Full", {})


def test_a_configuration_of_several_methods_survives_its_own_dict() -> None:
    found = compose(
        ["adapter.targets={q_proj@0:{r:2},*.mlp.*:{_target_:lowrank.adapters.Full}}", "adapter.exclude=[*.bias]"]
    )
    assert parse(found.to_dict()) == found


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            "{_target_:lowrank.adapters.LoRAA}",
            "._target_: 'lowrank.adapters.LoRAA' cannot be imported; lowrank.adapters",
        ),
        ("{_target_:os.system}", "._target_: 'os.system' is not allowed; a subclass of lowrank.adapters.base.Adapter."),
        ("{_target_:lowrank.adapters.IA3,r:8}", ".r: unknown key. Allowed: feedforward."),
        ("{_target_:lowrank.adapters.LoRA,r:0}", ".r: 0 is not allowed; a positive integer."),
        ("{_target_:lowrank.adapters.LoRA,rr:1}", ".rr: unknown key. Did you mean 'r'?"),
        ("{_target_:3}", "._target_: '3' is not allowed; a dotted path such as"),
    ],
)
def test_a_rule_s_own_class_and_options_are_checked_by_name(rule: str, said: str) -> None:
    assert refusal(f"adapter.targets={{*.q_proj:{rule}}}").startswith(f"adapter.targets['*.q_proj']{said}")


def test_what_is_excluded_and_where_layers_end_is_in_the_plan() -> None:
    rows = planned("adapter.targets=['all-linear@0,1']", "adapter.exclude=[mlp,q_proj@1]").rows
    names = [".".join(row.path.split(".")[2:]) for row in rows]
    assert names == [f"0.self_attn.{n}_proj" for n in "qkvo"] + [f"1.self_attn.{n}_proj" for n in "kvo"]
    assert refusal("adapter.exclude=[q_porj]").startswith(
        "adapter.exclude: 'q_porj' matches no module. Nearest: 'q_proj'"
    )
    assert refusal("adapter.exclude=lm_head") == "adapter.exclude: 'lm_head' is not allowed; a list of patterns."


def test_a_comma_in_a_mapping_s_pattern_is_written_with_a_backslash() -> None:
    assert planned(r"adapter.targets={q_proj@0\,1:{r:2}}") == planned("adapter.targets={q_proj:{r:2}}")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A configuration folder whose method comes with a mapping of targets, as IA3 does."""
    shutil.copytree(find_conf(), tmp_path / "conf")
    yaml = "_target_: lowrank.adapters.LoRA\ntargets:\n  q_proj: {r: 2}\n  v_proj: {}\nexclude: []\nr: 3\n"
    (tmp_path / "conf/adapter/mine.yaml").write_text(yaml)
    return tmp_path / "conf"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"q_proj": {"r": 2}, "v_proj": {}}),
        (["adapter.targets={k_proj:{r:4}}"], {"k_proj": {"r": 4}}),  # not the YAML's beside it
        (["adapter.targets={v_proj:{r:4}}"], {"v_proj": {"r": 4}}),  # of which Hydra would keep q_proj
        (["+adapter.targets={k_proj:{r:4}}"], {"q_proj": {"r": 2}, "v_proj": {}, "k_proj": {"r": 4}}),
        (["adapter.targets.q_proj.r=5"], {"q_proj": {"r": 5}, "v_proj": {}}),
        (["adapter.targets={k_proj:{r:4}}", "adapter.targets.k_proj.r=5"], {"k_proj": {"r": 5}}),
        (["adapter.targets=[k_proj]"], ["k_proj"]),
    ],
)
def test_a_mapping_on_the_command_line_takes_the_place_of_the_yaml_s(
    own: Path, overrides: list[str], expected: object
) -> None:
    assert compose(["adapter=mine", *overrides], own).adapter.targets == expected


def test_taking_the_place_is_said_once() -> None:
    words = ["adapter=ia3", "adapter.targets={k_proj:{}}", "loop.steps=1"]
    once = whole_targets(words)
    assert once == ["adapter=ia3", "++adapter.targets=null", *words[1:]]
    assert whole_targets(once) == once  # a sweep's jobs get what the sweep was given
    assert whole_targets(["adapter.targets=q_proj"]) == ["adapter.targets=q_proj"]


def test_a_run_and_each_job_of_a_sweep_get_the_targets_that_were_asked_for(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    more = ["model=tiny_llama", "adapter=ia3", f"data.path={rows}", "loop.steps=1", "eval.before=false"]
    targets = "adapter.targets={k_proj:{}},{v_proj:{},k_proj@0:{feedforward:true}}"
    done = train("-m", *SMALL, *more, targets, f"hydra.sweep.dir={tmp_path / 'sweep'}", LOWRANK_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    plans = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/plan.json"))]
    ends = [{row["path"].rpartition(".")[2] for row in plan["rows"]} for plan in plans]
    assert sorted(map(sorted, ends)) == [["k_proj"], ["k_proj", "v_proj"]]
