"""Every value that a shipped sweep may draw is one that the experiment takes, and lands where its key says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys_lightning.cli import main
from recsys_lightning.training.wandb_record import OBJECTIVE

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


def sweep_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def values_of(parameter: dict[str, Any]) -> list[Any]:
    """What a parameter may be: all of its values, or both ends of its range."""
    if "values" in parameter:
        return parameter["values"]
    return [parameter["value"]] if "value" in parameter else [parameter["min"], parameter["max"]]


def draws(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As few draws as hold every value of every parameter."""
    values = {key: values_of(parameter) for key, parameter in sweep["parameters"].items()}
    for number in range(max(map(len, values.values()))):
        yield {key: options[number % len(options)] for key, options in values.items()}


def command_of(sweep: dict[str, Any], file: Path) -> list[str]:
    """The words that the agent would run, after the program."""
    words = [str(file) if word == "${args_json_file}" else word for word in sweep["command"]]
    assert words[:2] == ["${env}", "${program}"], "the agent replaces words, not parts of them"
    assert sweep["program"] == "recsys"
    return words[2:]


def at(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, `init_args` left out as on the command line."""
    node: Any = config
    for part in key.split("."):
        node = node["init_args"] if isinstance(node, dict) and "init_args" in node else node
        node = node[part]
    return node


CASES = [
    pytest.param(path, draw, id=f"{path.stem}-{n}") for path in SWEEPS for n, draw in enumerate(draws(sweep_of(path)))
]


def test_there_is_a_sweep_of_each_trained_model():
    assert {path.stem for path in SWEEPS} >= {"cobra", "sparc", "rqvae"}


@pytest.mark.parametrize(("path", "draw"), CASES)
def test_a_draw_of_a_sweep_is_what_the_run_is_built_from(path, draw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3d4")
    file = tmp_path / "config-a1b2c3d4.json"
    file.write_text(json.dumps(draw))  # as the agent does
    sweep = sweep_of(path)
    assert main([*command_of(sweep, file), "--print_config"]) == 0, capsys.readouterr().err
    config = yaml.safe_load(capsys.readouterr().out)
    assert {key: at(config, key) for key in draw} == draw
    assert config["run_dir"].endswith("/a1b2c3d4"), "runs at the same time have folders of their own"
    folders = [logger["init_args"]["save_dir"] for logger in config["trainer"]["logger"]]
    assert set(folders) == {config["run_dir"]}
    assert sweep["metric"] == {"name": OBJECTIVE, "goal": f"{config['checkpoint']['mode']}imize"}
    assert config["checkpoint"]["monitor"] == config["early_stopping"]["monitor"]


def test_a_sweep_with_a_wrong_key_or_value_is_told_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3d4")
    sweep = sweep_of(ROOT / "experiments" / "sweeps" / "cobra.yaml")
    file = tmp_path / "config.json"
    for wrong, said in (
        ({"model.model.search.taus": 0.5}, "no key 'model.model.search.taus'"),
        ({"model.model.search.fusion": "globel"}, "did you mean 'global'?"),
    ):
        file.write_text(json.dumps(wrong))
        assert main([*command_of(sweep, file), "--print_config"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert f"({file}, line 1)" in error
        assert len(error.splitlines()) == 1
