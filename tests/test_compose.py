"""Composition: Hydra's refusals in our words, and nothing of Hydra left behind."""

import shutil
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from lowrank.compose import compose, discard, find_conf, report, translate
from lowrank.errors import ConfigError, DataError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("override", ["optim.lrr=1", "+optim.lrr=1", "++optim.lrr=1"])
def test_a_misspelt_key_reads_the_same_however_it_is_given(override: str) -> None:
    said = refusal(override)
    assert said.startswith("optim.lrr: unknown key. Did you mean 'lr'? Allowed: lr, weight_decay, groups, in_")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lop.steps=1", "lop: unknown key. Did you mean 'loop'? Allowed: model, quant, adapter, data, optim, schedule"),
        ("modle=hf", "modle: unknown key. Did you mean 'model'?"),
        ("+modle=hf", "modle: unknown key. Did you mean 'model'?"),
        ("adapter.rr=1", "adapter.rr: unknown key. Did you mean 'r'? Allowed: targets, exclude, r, alpha,"),
        ("loop.seed.x=1", "loop.seed.x: unknown key."),
        ("eval.generate.topp=1", "eval.generate.topp: unknown key. Did you mean 'top_p'?"),
        ("hydra.rnu.dir=x", "hydra.rnu: unknown key. Did you mean 'run'?"),
        ("model=smolm2", "model: 'smolm2' is not a choice. Did you mean 'smollm2'? Allowed: hf, smollm2, tiny_gpt2,"),
        ("experiment=dem", "experiment: 'dem' is not a choice. Did you mean 'demo'? Allowed: "),
        (
            "schedule=polynomial",
            "schedule: 'polynomial' is not a choice. Write schedule.kind=polynomial. Allowed: constant, cosine,",
        ),
        ("hydra/launcher=isolate", "hydra/launcher: 'isolate' is not a choice. Did you mean 'isolated'?"),
        ("model=null", "model: null is not a choice. Allowed: hf, smollm2, tiny_gpt2, tiny_llama."),
        ("+model=hf", "model: chosen already. Write model=hf, without '+'."),
        ("model=hf", "model.name: missing; a folder or a hub id. Write model.name=…."),
        ("data=jsonl", "data.path: missing; a file. Write data.path=…."),
        ("model.name=x", "model.name: only with model=hf."),
        ("data.fields.response=x", "data.fields: only with data=jsonl or data=csv."),
        ("optim.amsgrad=true", "optim.amsgrad: not set by this choice of optim; to set it write '+optim.amsgrad=…'."),
        (
            "schedule.options.power=2",
            "schedule.options.power: not there yet; to add it write '+schedule.options",
        ),
        ("loop.seed", "loop.seed: not a valid override (no '=' in it). Write key=value"),
        ("loop.seed=[1", "loop.seed=[1: not a valid override (no viable alternative at input '[1'). Write key=value"),
        ("adapter.targets={'q':{r:8}}", "adapter.targets={'q':{r:8}}: not a valid override"),
        (
            "adapter.targets={a:{r:8},'*':{r:4}}",
            "adapter.targets={a:{r:8},'*':{r:4}}: not a valid override (no viable alternative at input "
            "'{a:{r:8},'*''). Write a mapping's keys without quotes",
        ),
        ("loop.seed=1,2", "loop.seed: '1,2' is several values. Add -m to run one job for each."),
        ("loop.seed=range(1,3)", "loop.seed: 'range(1,3)' is several values. Add -m to run one job for each."),
        ("+loop.seed=3", "loop.seed: there already. Write it without '+'."),
        ("~loop.sed", "loop.sed: unknown key; nothing to delete."),
        ("~loop.seed", "loop.seed: missing; an integer, 0 or more. Write loop.seed=…."),
        ("loop.seed=${data.sed}", "loop.seed: Interpolation key 'data.sed' not found."),
        ("loop.seed=${loop.seed}", "loop.seed: Recursive interpolation detected."),
        ("hydra.run.dir=[1]", "hydra.run.dir: Cannot convert 'list' to string: '[1]'."),
    ],
)
def test_what_hydra_refuses_is_said_in_our_words(override: str, said: str) -> None:
    assert refusal(override).startswith(said)


def test_composing_inside_a_hydra_program_leaves_its_state_alone() -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(find_conf())):
        before = GlobalHydra.instance().hydra
        assert compose(["model=tiny_llama"]).model.kind == "tiny_llama"
        assert GlobalHydra.instance().hydra is before
    assert not GlobalHydra.instance().is_initialized()


def test_a_configuration_folder_of_ones_own_adds_a_choice(tmp_path: Path) -> None:
    shutil.copytree(find_conf(), tmp_path / "conf")
    (tmp_path / "conf/adapter/mine.yaml").write_text("_target_: lowrank.adapters.LoRA\ntargets: q_proj\nr: 3\n")
    found = compose(["adapter=mine"], tmp_path / "conf")
    assert (found.adapter.targets, found.adapter.options) == ("q_proj", {"r": 3})


def test_broken_yaml_is_named_with_its_place(tmp_path: Path) -> None:
    shutil.copytree(find_conf(), tmp_path / "conf")
    (tmp_path / "conf/loop/default.yaml").write_text("steps: [1\nepochs: 2\n")
    with pytest.raises(ConfigError, match=r"^not valid YAML: .*default\.yaml.*line 2"):
        compose([], tmp_path / "conf")


def test_a_bug_is_not_translated() -> None:
    bug = ValueError("shapes differ")
    with pytest.raises(ValueError, match="shapes differ") as caught:
        translate(bug)
    assert caught.value is bug


def test_our_errors_end_with_their_code_and_a_bug_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOWRANK_DEBUG", raising=False)
    monkeypatch.setenv("LOWRANK_CAUSE", str(tmp_path / "cause"))
    assert report(DataError("a.csv:3: too short")) == 4
    assert capsys.readouterr().err == "a.csv:3: too short\n"
    assert (tmp_path / "cause").read_text() == "a.csv:3: too short"
    assert report(ZeroDivisionError("division by zero")) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert (tmp_path / "cause").read_text() == "ZeroDivisionError: division by zero"


def test_discarding_removes_empty_folders_up_to_outputs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "outputs/day/run").mkdir(parents=True)
    (tmp_path / "elsewhere/run").mkdir(parents=True)
    discard(tmp_path / "outputs/day/run")
    discard(tmp_path / "elsewhere/run")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    (tmp_path / "elsewhere/run").mkdir()
    (tmp_path / "elsewhere/run/kept").touch()
    discard(tmp_path / "elsewhere/run")
    assert (tmp_path / "elsewhere/run/kept").exists()
