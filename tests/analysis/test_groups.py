"""Runs that differ in their seed alone are one group, and all others are not."""

import copy
import json
import math
from pathlib import Path

import pytest

from recsys_lightning.analysis.groups import Group, Run, group_runs, load_results, load_run, shown_path, warnings
from recsys_lightning.errors import InputError

COBRA = {
    "run": "runs/cobra/beauty",
    "model": "COBRA",
    "seed": 7,
    "metrics": {"test/recall@5": 0.04321},
    "data": {"source": "amazon2014-beauty", "fingerprint": "0123456789abcdef" * 4},
    "seconds_by_command": {"fit": 120.4, "test": 10.1},
    "hardware": {"devices": 1, "gpu": None, "cpu": "x86_64", "cpu_cores": 2, "torch": "2.13.0"},
    "code": {"version": "0.1.0", "sha256": "fedcba9876543210" * 4, "commit": None},
    "config": {"seed_everything": 7},
}


def groups_of(*results: dict) -> list[Group]:
    return group_runs([Run(result["run"], Path(result["run"]), result) for result in results])


def test_a_run_is_its_folder_or_its_results_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(COBRA["run"])
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(COBRA))
    assert load_results(folder) == COBRA
    assert load_results(str(folder)) == load_results(folder / "results.json")
    assert load_run(folder) == load_run(f"{folder}/results.json") == Run(COBRA["run"], folder, COBRA)


def test_a_shown_path_does_not_tell_where_on_a_machine_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path("runs/x") == "runs/x"
    assert shown_path(str(tmp_path / "runs/x")) == "runs/x"
    assert shown_path("/home/somebody/secret/models/minilm") == "models/minilm"


# --------------------------------------------------------------------------------------------------- seeds of a group


def seeded(seed: int, recall: float = 0.04, place: str = "runs/cobra/beauty-seed{}", **changes: object) -> dict:
    """A run that differs from its fellows wherever a seed shows."""
    folder = place.format(seed)
    config = {
        "seed_everything": seed,
        "run_dir": folder,
        "ckpt_path": f"{folder}/checkpoints/best.ckpt",
        "verbose": bool(seed % 2),
        "trainer": {"max_epochs": 3, "default_root_dir": folder, "logger": [{"save_dir": folder}]},
        "checkpoint": {"dirpath": f"{folder}/checkpoints", "monitor": "val/ndcg@10"},
        "data": {"init_args": {"seed": seed + 1, "k_core": 5, "source": {"init_args": {"seed": 0}}}},
        "model": {"init_args": {"semantic_ids": f"runs/rqvae/beauty-seed{seed}/semantic_ids.safetensors"}},
    }
    return {**COBRA, "run": folder, "seed": seed, "metrics": {"test/recall@5": recall}, "config": config, **changes}


def changed(result: dict, path: str, value: object) -> dict:
    """The same with another value in its configuration."""
    result = copy.deepcopy(result)
    *parents, last = path.split(".")
    part = result["config"]
    for key in parents:
        part = part[key]
    part[last] = value
    return result


def test_runs_that_differ_in_their_seed_alone_are_one_group_of_mean_and_deviation():
    values = (0.040, 0.043, 0.052)
    found = groups_of(*(seeded(seed, value) for seed, value in zip((42, 43, 44), values, strict=True)))
    assert [(group.name, len(group.runs)) for group in found] == [("runs/cobra/beauty-seed*", 3)]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    score = found[0].score("test/recall@5")
    assert (score.mean, score.sd) == (pytest.approx(mean, abs=1e-15), pytest.approx(deviation, abs=1e-15))


@pytest.mark.parametrize(
    "form", ["beauty-seed{}", "beauty-seed={}", "beauty-seed-{}", "seed{}/beauty", "beauty_SEED{}"]
)
def test_a_seed_inside_a_path_is_a_seed(form):
    change = "model.init_args.semantic_ids"
    runs = [changed(seeded(seed), change, f"runs/rqvae/{form.format(seed)}/ids.safetensors") for seed in (1, 12)]
    assert len(groups_of(*runs)) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer.max_epochs", 4),
        ("data.init_args.k_core", 6),
        ("data.init_args.source.init_args.seed", 1),  # another catalogue, not another training
        ("checkpoint.monitor", "val/recall@10"),
        ("model.init_args.semantic_ids", "runs/rqvae/sports-seed43/semantic_ids.safetensors"),
    ],
)
def test_runs_of_other_settings_are_groups_of_their_own(path, value):
    assert len(groups_of(seeded(42), changed(seeded(43), path, value))) == 2


def test_runs_of_another_model_or_on_other_data_are_groups_of_their_own_with_names_of_their_own():
    other = seeded(43, data={**COBRA["data"], "fingerprint": "f" * 64})
    assert [group.name for group in groups_of(seeded(42), other, seeded(44), seeded(45, model="SPARC"))] == [
        "runs/cobra/beauty-seed*",
        "runs/cobra/beauty-seed43",
        "runs/cobra/beauty-seed45",
    ]
    same_place = {**other, "run": "runs/cobra/beauty-seed42"}
    names = [group.name for group in groups_of(seeded(42), same_place)]
    assert names == ["runs/cobra/beauty-seed42", "runs/cobra/beauty-seed42 #2"]


def test_seeds_in_folders_without_a_common_name_are_named_after_the_first():
    runs = [seeded(1, place="runs/first"), seeded(2, place="runs/again"), seeded(3, place="elsewhere")]
    assert [group.name for group in groups_of(*runs)] == ["runs/first (3 runs)"]


def test_one_trained_model_never_counts_twice():
    twin = seeded(42, place="runs/copy-of-{}")
    with pytest.raises(InputError, match=r"runs/cobra/beauty-seed42 and runs/copy-of-42 are .* same seed \(42\)"):
        groups_of(seeded(42), seeded(43), twin)


def test_the_same_seed_on_semantic_ids_of_other_seeds_is_not_a_duplicate():
    path = "model.init_args.semantic_ids"
    runs = [changed(seeded(42, place=f"runs/{at}"), path, f"rqvae/seed{at}/ids.safetensors") for at in (1, 2)]
    assert [len(group.runs) for group in groups_of(*runs)] == [2]


def test_other_data_and_other_code_are_warned_of():
    assert warnings(groups_of(seeded(1), seeded(2), seeded(3, model="Popularity"))) == []
    elsewhere = seeded(3, model="Popularity", data={**COBRA["data"], "fingerprint": "fedcba987654" * 5})
    (warning,) = warnings(groups_of(seeded(1), elsewhere))
    assert "Not comparable" in warning
    assert "0123456789ab" in warning
    assert "fedcba987654" in warning
    (warning,) = warnings(groups_of(seeded(1), seeded(2, code={**COBRA["code"], "sha256": "0" * 64})))
    assert "different versions of the code" in warning
