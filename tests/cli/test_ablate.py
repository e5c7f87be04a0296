"""`recsys ablate` on a tiny grid: real processes once, then what it says of what it finds."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from recsys_lightning.analysis.grid_execute import Event
from recsys_lightning.analysis.grid_slurm import Array, Launch
from recsys_lightning.analysis.grid_tasks import Plan
from recsys_lightning.cli import main
from recsys_lightning.cli.ablate import _sigterm_raises

GRID = """
title: Tiny
base: cobra.yaml
seeds: [7]
set: {model.model.semantic_ids: "{ids}/semantic_ids.safetensors"}
first:
  ids: {base: rqvae.yaml}
variants:
  whole: {}
  top-1: {weights: whole, set: {model.model.search.num_beams: 1}}
report: out/tiny.md
"""
pytestmark = pytest.mark.timeout(900)  # processes that import torch, on a machine that may be busy
COMMAND = ("ablate", "tiny.yaml", "--trainer.log_every_n_steps", "2", "-j", "2")


@pytest.fixture(scope="module")
def ran_once(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A folder in which a grid was run, the exit status and what was printed."""
    folder = tmp_path_factory.mktemp("ablate")
    for name in ("cobra", "rqvae"):
        shutil.copy(trained_once / f"{name}.yaml", folder)  # they share the cache
    (folder / "tiny.yaml").write_text(GRID)
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        status = main(list(COMMAND))
    return folder, status, out.getvalue()


@pytest.fixture
def ran(ran_once, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, for this test to change; the working directory."""
    folder = shutil.copytree(ran_once[0], tmp_path / "ran")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def change(ran):
    """Replace a part of the grid."""

    def edit(old: str, new: str) -> None:
        text = Path("tiny.yaml").read_text()
        assert old in text
        Path("tiny.yaml").write_text(text.replace(old, new))

    return edit


# ---------------------------------------------------------------------------------------------------------- a real grid


def test_a_grid_runs_to_its_end(ran_once):
    _, status, out = ran_once
    assert status == 0
    assert "tiny: 3 runs: 3 finished\n" in out
    assert "[0/3] ids started fit\n" in out
    assert "whole-seed7 started test\n" in out


def test_the_report_compares_the_variants_by_name(ran_once):
    folder, _, _ = ran_once
    numbers = pl.read_csv(folder / "out/tiny.csv")
    assert numbers["run"].unique(maintain_order=True).to_list() == ["whole", "top-1"]
    text = (folder / "out/tiny.md").read_text()
    assert text.startswith("# Tiny\n\nWritten by `recsys ablate tiny.yaml --trainer.log_every_n_steps 2 -j 2`.")
    assert "Not in this table" not in text
    assert (folder / "out/tiny.png").is_file()


def test_runs_have_the_settings_of_the_grid_and_of_the_command_line(ran_once):
    runs = ran_once[0] / "runs/ablations/tiny"
    whole, ids = (yaml.safe_load((runs / name / "config.yaml").read_text()) for name in ("whole-seed7", "ids"))
    assert whole["seed_everything"] == 7
    assert ids["seed_everything"] == 1, "its own"
    assert whole["trainer"]["log_every_n_steps"] == ids["trainer"]["log_every_n_steps"] == 2
    cobra = whole["model"]["init_args"]["model"]["init_args"]
    assert cobra["semantic_ids"] == "runs/ablations/tiny/ids/semantic_ids.safetensors"


def test_other_settings_of_a_search_are_tested_with_the_weights_of_the_variant(ran_once):
    runs = ran_once[0] / "runs/ablations/tiny"
    assert not (runs / "top-1-seed7/checkpoints").exists(), "it has trained nothing"
    whole, top = (json.loads((runs / name / "results.json").read_text()) for name in ("whole-seed7", "top-1-seed7"))
    assert top["config"]["ckpt_path"] == "runs/ablations/tiny/whole-seed7/checkpoints/best.ckpt"
    beams = [run["config"]["model"]["init_args"]["model"]["init_args"]["search"]["num_beams"] for run in (whole, top)]
    assert beams == [4, 1]
    assert whole["metrics"]["test/coverage@20"] > top["metrics"]["test/coverage@20"]


# ------------------------------------------------------------------------------------------------- the second time


def test_a_failed_run_is_listed_stops_only_what_needs_it_and_makes_the_status_1(ran, change, recsys, monkeypatch):
    change("  top-1:", "  wide: {set: {model.model.dim: 32}}\n  wide-top-1: {weights: wide}\n  top-1:")
    change("{weights: wide}", "{weights: wide, set: {model.model.search.num_beams: 1}}")
    stub = "import sys; print('recsys: error: no memory for ' + sys.argv[-3]); sys.exit(2)"
    monkeypatch.setattr("recsys_lightning.cli.ablate.PROGRAM", (sys.executable, "-S", "-c", stub))
    outcome = recsys(*COMMAND)
    assert outcome.status == 1
    assert "tiny: 5 runs: 3 finished before, 1 failed, 1 not run\n" in outcome.out
    assert "failed: wide-seed7: no memory for --trainer.log_every_n_steps (runs/ablations/tiny/wide-se" in outcome.out
    assert "not run: wide-top-1-seed7: it needs wide-seed7\n" in outcome.out
    text = Path("out/tiny.md").read_text()
    assert "Not in this table: `wide-seed7`, failed: no memory for" in text
    assert "Not in this table: `wide-top-1-seed7`, not run: needs wide-seed7." in text
    assert pl.read_csv("out/tiny.csv")["run"].unique(maintain_order=True).to_list() == ["whole", "top-1"]


def test_finished_runs_are_skipped_and_compared_again(ran, recsys):
    before = Path("out/tiny.csv").read_text()
    Path("out/tiny.csv").unlink()
    outcome = recsys(*COMMAND)
    assert outcome.status == 0, outcome.err
    assert "tiny: 3 runs: 3 finished before\n" in outcome.out
    assert "[3/3] top-1-seed7 skipped, recall@5 0." in outcome.out
    assert Path("out/tiny.csv").read_text() == before


def test_a_dry_run_prints_what_is_left_and_changes_nothing(ran, recsys):
    Path("runs/ablations/tiny/top-1-seed7/results.json").unlink()
    before = sorted(str(path) for path in ran.rglob("*"))
    outcome = recsys(*COMMAND, "--dry-run")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "ids: finished" in lines
    assert "whole-seed7: finished" in lines
    test = lines[lines.index("top-1-seed7: to run (after ids, whole-seed7)") + 1]
    assert test.startswith(
        "  recsys test -c cobra.yaml --model.model.semantic_ids=runs/ablations/tiny/ids/semantic_ids"
    )
    assert test.endswith(" --ckpt_path=runs/ablations/tiny/whole-seed7/checkpoints/best.ckpt")
    assert sorted(str(path) for path in ran.rglob("*")) == before


def test_what_was_broken_off_would_go_on(ran, recsys):
    Path("runs/ablations/tiny/whole-seed7/results.json").unlink()
    shutil.rmtree("runs/ablations/tiny/top-1-seed7")
    lines = recsys(*COMMAND, "--dry-run").out.splitlines()
    fit, test = lines[lines.index("whole-seed7: to run (after ids)") + 1 :][:2]
    assert fit.startswith("  recsys fit ")
    assert fit.endswith("--ckpt_path=auto")
    assert test.startswith("  recsys test ")
    assert "ckpt_path" not in test


def test_a_dry_run_for_slurm_prints_what_would_be_submitted(ran, recsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # for that a machine needs no Slurm
    words = ("--runs", "new", "--launcher", "slurm", "--sbatch", "--partition=gpu", "--dry-run")
    first, second = (line for line in recsys(*COMMAND, *words).out.splitlines() if line.startswith("sbatch "))
    assert "--job-name=new-ID-0 --array=0-0%2 " in first
    assert "--partition=gpu" in first
    assert "--array=0-0%2 --output=new/.slurm/new-ID-1-%a.out --dependency=afterany:JOB0 " in second
    assert not (ran / "new").exists()


def test_only_runs_some_and_what_they_need(ran, recsys):
    outcome = recsys(*COMMAND, "--only", "whole", "--dry-run")
    assert outcome.out == "ids: finished\nwhole-seed7: finished\n"
    assert recsys(*COMMAND, "--only", "hole").error == "tiny.yaml: no entry 'hole'; did you mean 'whole'?"


def test_a_run_that_was_not_asked_for_is_named_in_the_report(ran, recsys):
    shutil.rmtree("runs/ablations/tiny/top-1-seed7")
    outcome = recsys(*COMMAND, "--only", "whole")
    assert outcome.status == 0
    assert "Not in this table: top-1-seed7, which was not asked for." in outcome.out


def test_runs_and_report_may_lie_elsewhere(ran, recsys):
    shutil.move("runs/ablations/tiny", "runs/ablations/moved")
    text = Path("runs/ablations/moved/whole-seed7/results.json").read_text()
    assert recsys(*COMMAND, "--runs", "runs/other", "--dry-run").out.count("to run") == 3
    # Where the semantic IDs lie is a setting of the run.
    Path("runs/ablations/moved/whole-seed7/results.json").write_text(text.replace("tiny/ids", "moved/ids"))
    config = Path("runs/ablations/moved/whole-seed7/config.yaml")
    config.write_text(config.read_text().replace("tiny/ids", "moved/ids"))
    shutil.rmtree("runs/ablations/moved/top-1-seed7")
    done = recsys(*COMMAND, "--runs", "runs/ablations/moved", "--report", "new/name.md", "--only", "whole")
    assert done.status == 0, done.err
    assert Path("new/name.csv").is_file()


# ----------------------------------------------------------------------------------------- refused before anything runs


def test_a_finished_run_whose_settings_have_changed_is_refused(ran, change, recsys):
    before = Path("runs/ablations/tiny/whole-seed7/results.json").read_bytes()
    change("set: {model", "set: {model.model.objective.temperature: 0.5, model")
    assert recsys(*COMMAND).error == (
        "runs/ablations/tiny/whole-seed7 was run with "
        "model.init_args.model.init_args.objective.temperature=0.0625, the grid now has 0.5: set it back, give the "
        "variant another name, or move that folder away to run it again (1 more run with other settings)"
    )
    assert Path("runs/ablations/tiny/whole-seed7/results.json").read_bytes() == before


def test_a_changed_base_file_is_a_changed_run(ran, recsys):
    base = yaml.safe_load(Path("cobra.yaml").read_text())
    base["model"]["init_args"]["warmup_steps"] = 3
    Path("cobra.yaml").write_text(yaml.safe_dump(base))
    error = recsys(*COMMAND).error
    assert error.startswith("runs/ablations/tiny/whole-seed7 was run with model.init_args.warmup_steps=0, the grid now")


def test_a_run_that_was_broken_off_with_other_settings_is_refused(ran, change, recsys):
    shutil.rmtree("runs/ablations/tiny/top-1-seed7")
    Path("runs/ablations/tiny/whole-seed7/results.json").unlink()
    change("set: {model", "set: {trainer.max_epochs: 9, model")
    error = recsys(*COMMAND).error
    assert error.startswith("runs/ablations/tiny/whole-seed7 was run with trainer.max_epochs=1, the grid now has 9: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_beams", "beams", "tiny.yaml: top-1: no key 'model.model.search.beams' of CobraSearch; did you"),
        (
            "search.num_beams: 1",
            "tokens.paths: dens",
            "tiny.yaml: top-1: 'dens' is no value for model.model.tokens.paths: it must",
        ),
        ("  top-1:", "  twin: {}\n  top-1:", "tiny.yaml: whole and twin are the same by all their settings; drop one"),
        ("weights: whole, set: {model.model.search.num_beams: 1}", "weights: whole", "tiny.yaml: whole and top-1 are"),
        ("seeds: [7]", "seeds: [7]\nmetrics: [recal@5]", "not 'recal@5'; did you mean recall?"),
        (
            "seeds: [7]",
            "seeds: [7]\nmetrics: [head/ndcg@7]",
            "the runs measure recall, ndcg, mrr, hit_rate, map at 5, 10",
        ),
        ("base: rqvae", "base: rqvea", "tiny.yaml: first.ids.base: no file rqvea.yaml; did you mean"),
    ],
)
def test_what_cannot_run_is_refused_at_once(ran, change, recsys, old, new, message):
    change(old, new)
    assert message in recsys(*COMMAND).error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run_dir", "x"], "tiny.yaml: ids: its settings give run_dir, which is the grid's to give; leave it out"),
        (["--seed_everything", "3"], "tiny.yaml: whole: its settings give seed_everything"),
        (["--ckpt_path", "last"], "tiny.yaml: ids: its settings give ckpt_path"),
        (["-j", "0"], "ablate: --jobs 0: must be at least 1; see `recsys ablate --help`"),
        (["--report", "a.txt"], "report: "),
        (["--launcher", "k8s"], "ablate: argument --launcher: invalid choice: 'k8s'"),
        (["--sbatch", "--partition=gpu"], "ablate: --sbatch is for --launcher slurm"),
        (
            ["--launcher", "slurm", "--sbatch", "--array=1"],
            "--sbatch: --array comes from the runs that are left, and -j",
        ),
        (["--launcher", "slurm"], "--launcher slurm: there is no sbatch on this machine; run it on a login node"),
    ],
)
def test_options_that_belong_to_the_grid_or_cannot_be_are_refused(ran, recsys, monkeypatch, words, message):
    monkeypatch.setenv("PATH", "/nowhere")
    assert message in recsys("ablate", "tiny.yaml", *words).error


def test_the_file_comes_first(ran, recsys):
    assert recsys("ablate", "--trainer.max_epochs", "1", "tiny.yaml").error.startswith("ablate: the following")
    assert recsys("ablate", "tin.yaml").error == "no grid tin.yaml; did you mean 'tiny.yaml'?"


def test_help_lists_the_options(recsys):
    outcome = recsys("ablate", "--help")
    assert outcome.status == 0
    assert "--dry-run" in outcome.out
    assert "ablate " in recsys("--help").out


def test_a_base_file_that_is_missing_is_refused(ran, change, recsys):
    change("base: cobra.yaml", "base: corba.yaml")
    assert recsys(*COMMAND).error == "tiny.yaml: base: no file corba.yaml; did you mean 'cobra.yaml'?"


@pytest.fixture
def slurm(monkeypatch) -> dict[str, object]:
    """A Slurm that does not exist: what it was asked for, and `story`, the events that it answers with."""
    told: dict[str, object] = {}

    def launch(root, wanted, runs, options, jobs):
        told.update(root=root, wanted=[run.name for run in wanted], options=options, jobs=jobs)
        array = Array("tiny-x-0", "7", Plan((("whole-seed7",),), {}), root)
        return Launch([array], [array])

    def watch(arrays, wanted, queue, pause):
        for event in told["story"]:
            if isinstance(event, BaseException):
                raise event
            yield Event(*event)

    monkeypatch.setattr("recsys_lightning.cli.ablate.grid_slurm.require_slurm", lambda: None)
    monkeypatch.setattr("recsys_lightning.cli.ablate.grid_slurm.launch", launch)
    monkeypatch.setattr("recsys_lightning.cli.ablate.watch", watch)
    return told


SLURM = ("ablate", "tiny.yaml", "--trainer.log_every_n_steps", "2", "--launcher", "slurm")


def test_slurm_is_given_the_options_and_what_it_says_decides_the_status(ran, slurm, recsys):
    slurm["story"] = [("ids", "skipped"), ("whole-seed7", "queued"), ("whole-seed7", "failed", "no GPU")]
    outcome = recsys(*SLURM, "-j3", "--sbatch", "--gres=gpu:1 -t 4", "--only", "whole")
    assert outcome.status == 1
    assert slurm["options"] == ["--gres=gpu:1", "-t", "4"]
    assert (slurm["root"], slurm["jobs"]) == (Path("runs/ablations/tiny"), 3)
    assert slurm["wanted"] == ["ids", "whole-seed7"]
    assert "submitted job 7, 1 tasks (squeue --name=tiny-x-0)\n" in outcome.out
    assert "[1/2] whole-seed7 queued\n" in outcome.out
    assert "failed: whole-seed7: no GPU (runs/ablations/tiny/whole-seed7.log)\n" in outcome.out
    slurm["story"] = [("ids", "skipped"), ("whole-seed7", "finished")]
    assert recsys(*SLURM).status == 0
    assert slurm["jobs"] is None, "Slurm decides how many at a time"


def test_jobs_outlive_the_command_that_waits_for_them(ran, slurm, recsys):
    slurm["story"] = [("ids", "started", "fit"), ("whole-seed7", "queued"), KeyboardInterrupt()]
    outcome = recsys(*SLURM)
    assert outcome.status == 130
    assert "tiny: 3 runs: 1 at work, 1 queued\n" in outcome.out
    assert "The jobs go on; the same command waits for them again. To end them: scancel 7\n" in outcome.out


def test_a_sigterm_unwinds_the_stack_so_that_processes_are_ended():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, _sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
