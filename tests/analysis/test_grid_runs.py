"""Runs have folders of their own, know from them what is left to do, and are not taken for what they no longer are."""

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from recsys_lightning.analysis.grid import Grid, load_grid
from recsys_lightning.analysis.grid_runs import GridRun, chosen, differences, expand, identity, recorded, refuse_changed
from recsys_lightning.errors import InputError

TEXT = """
base: base.yaml
seeds: [1, 2]
first:
  ids: {set: {codes: 8}}
  rare: {}
variants:
  whole: {set: {file: "{ids}/table", flag: true, nothing: null, widths: [3, 4]}}
  part: {weights: whole, set: {beams: 1}}
  other: {}
"""


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Grid:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("run_dir: x\n")
    Path("grid.yaml").write_text(TEXT)
    return load_grid(Path("grid.yaml"))


@pytest.fixture
def runs(grid) -> dict[str, GridRun]:
    return expand(grid, Path("runs"), ["--data.raw_dir", "raw"])


def leave(run: GridRun, commands: str, config: dict | None = None, last: bool = True) -> None:
    """Leave what commands would: `fit`, `fit test`, or `begun` for a fit that was broken off."""
    config = config or {}
    (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    if last:
        with zipfile.ZipFile(run.folder / "checkpoints/last.ckpt", "w") as file:
            file.writestr("data", "")
    if commands != "begun":
        metrics = {"val/recall@5": 0.1} | ({"test/recall@5": 0.2} if "test" in commands else {})
        parts = {part: {} for part in ("run", "model", "seed", "data", "hardware", "code")}
        results = {**parts, "metrics": metrics, "config": config}
        results["seconds_by_command"] = dict.fromkeys(commands.split(), 1.0)
        (run.folder / "results.json").write_text(json.dumps(results))


# ---------------------------------------------------------------------------------------------------------- expansion


def test_every_variant_runs_once_a_seed_in_a_folder_of_its_own_and_what_comes_first_runs_once(runs):
    names = ["ids", "rare", "whole-seed1", "part-seed1", "other-seed1", "whole-seed2", "part-seed2", "other-seed2"]
    assert list(runs) == names
    assert [run.folder for run in runs.values()] == [Path("runs") / name for name in names]


def test_the_command_line_of_a_run(runs):
    assert runs["whole-seed2"].command("fit") == [
        *("fit", "-c", "base.yaml", "--file=runs/ids/table", "--flag=true", "--nothing=null", "--widths=[3, 4]"),
        *("--seed_everything=2", "--run_dir=runs/whole-seed2", "--trainer.enable_progress_bar=false"),
        *("--data.raw_dir", "raw", "--ckpt_path=auto"),
    ]
    assert not any("seed" in word for word in runs["ids"].command("fit")), "it has the seed of its base"


def test_a_variant_of_other_weights_is_a_test_of_the_checkpoint_of_the_same_seed(runs):
    part = runs["part-seed2"]
    assert part.left() == ["test"]
    assert part.command("test")[-1] == "--ckpt_path=runs/whole-seed2/checkpoints/best.ckpt"
    assert part.needs == ("ids", "whole-seed2")


def test_chosen_entries_bring_what_they_need(grid, runs):
    assert [run.name for run in chosen(grid, runs, ["part"])] == [
        *("ids", "whole-seed1", "part-seed1", "whole-seed2", "part-seed2")
    ]
    assert chosen(grid, runs, []) == list(runs.values())
    with pytest.raises(InputError, match="no entry 'wole'; did you mean 'whole'"):
        chosen(grid, runs, ["wole"])


# ------------------------------------------------------------------------------------------------------- what is left


def test_what_is_left_of_a_run_is_read_from_its_folder(runs):
    run = runs["whole-seed1"]
    assert run.left() == ["fit", "test"]
    leave(run, "begun")
    assert run.left() == ["fit", "test"]
    leave(run, "fit")
    assert run.left() == ["test"]
    leave(run, "fit test")
    assert run.left() == []


def test_what_others_build_on_is_trained_and_not_tested(runs):
    assert runs["ids"].left() == ["fit"]
    leave(runs["ids"], "fit")
    assert runs["ids"].left() == []


def test_a_test_alone_does_not_stand_for_a_training(runs):
    leave(runs["whole-seed1"], "test")
    assert runs["whole-seed1"].left() == ["fit", "test"]
    leave(runs["part-seed1"], "test")
    assert runs["part-seed1"].left() == []


def test_a_fit_goes_on_where_it_was_broken_off_also_if_slurm_starts_it_again(runs):
    assert runs["whole-seed1"].command("fit")[-1] == "--ckpt_path=auto"
    assert "--ckpt_path=auto" not in runs["whole-seed1"].command("test"), "a test takes the best"


# ------------------------------------------------------------------------------------------------- what has changed


def test_what_is_recorded_of_a_run(runs):
    run = runs["whole-seed1"]
    assert recorded(run) == []
    leave(run, "begun", {"a": 1}, last=False)
    assert recorded(run) == [], "nothing that a new fit would not move aside"
    (run.folder / "checkpoints/resume.ckpt").write_bytes(b"PK, and then the power went")
    assert recorded(run) == [], "it is cut off"
    leave(run, "begun", {"a": 1})
    assert recorded(run) == [{"a": 1}]
    (run.folder / "checkpoints/last.ckpt").rename(run.folder / "checkpoints/resume.ckpt")
    assert recorded(run) == [{"a": 1}], "of a fit that was stopped before its first validation"
    leave(run, "fit test", {"a": 1})
    assert recorded(run) == [{"a": 1}, {"a": 1}], "of the fit and of the last command"


def test_differences_are_keys_with_both_values():
    old = {"model": {"init_args": {"dim": 8, "paths": "both"}}, "seed": 1}
    new = {"model": {"init_args": {"dim": 9, "paths": "both"}}, "seed": 2}
    assert differences(old, new, ()) == [("model.init_args.dim", 8, 9), ("seed", 1, 2)]
    assert differences(old, old, ()) == []


def test_where_a_run_lies_and_what_it_shows_is_no_difference():
    old = {
        "seed": 1,
        "run_dir": "a",
        "ckpt_path": "a/last.ckpt",
        "trainer": {"default_root_dir": "a", "logger": [{"class_path": "W"}], "enable_progress_bar": False},
        "checkpoint": {"dirpath": "a/checkpoints"},
        "data": {"init_args": {"raw_dir": "/a", "cache_dir": "c"}},
    }
    assert differences(old, {"seed": 1, "run_dir": "b", "data": {"init_args": {"raw_dir": "/b"}}}, ()) == []
    assert identity(old) == identity({"seed": 1, "nothing": None})
    assert identity({"trainer": {"max_epochs": 2}}) != identity({"trainer": {"max_epochs": 3}})


def test_a_setting_that_the_program_has_gained_since_is_no_difference_unless_someone_writes_it():
    old = {"model": {"init_args": {"dim": 8}}}
    new = {"model": {"init_args": {"dim": 8, "queue": 0}}}
    assert differences(old, new, {"model.dim"}) == []
    assert differences(old, new, {"model.queue"}) == [("model.init_args.queue", None, 0)]
    assert differences(new, old, ()) == [("model.init_args.queue", 0, None)], "what it had and has no more is one"


def test_a_run_with_other_settings_is_refused_with_key_folder_and_cure(runs):
    changes = {"ids": [], "whole-seed1": [("model.dim", 8, 9), ("seed", 1, 2)], "other-seed1": [("x", 1, 2)]}
    with pytest.raises(InputError) as error:
        refuse_changed(runs, changes)
    assert str(error.value) == (
        "runs/whole-seed1 was run with model.dim=8 and 1 more key, the grid now has 9: set it back, give the variant "
        "another name, or move that folder away to run it again (1 more run with other settings)"
    )


def test_a_run_whose_ground_is_gone_is_refused(runs):
    """Its settings name the folder of the other run only, not what was in it."""
    leave(runs["ids"], "fit")
    leave(runs["whole-seed1"], "fit test")
    refuse_changed(runs, {"ids": [], "whole-seed1": []})
    (runs["ids"].folder / "results.json").unlink()
    with pytest.raises(InputError, match="runs/whole-seed1 was built on runs/ids, which is no longer finished: move"):
        refuse_changed(runs, {"whole-seed1": []})
