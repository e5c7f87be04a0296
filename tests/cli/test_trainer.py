"""`recsys prepare | fit | validate | test | predict` end to end on a tiny synthetic catalogue."""

import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from recsys_lightning import __version__
from recsys_lightning.cli import main
from recsys_lightning.data.sources import Synthetic


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def val_metrics(run: Path) -> dict[str, float]:
    return {name: value for name, value in results(run)["metrics"].items() if name.startswith("val")}


# ------------------------------------------------------------------------------------------------ help and version


def test_help_and_a_mistyped_command_answer_without_loading_torch_or_lightning():
    code = (
        "import sys; from recsys_lightning.cli import main; "
        "assert main(['--help']) == 0; assert main(['fitt']) == 2; assert main(['--version']) == 0; "
        "assert not {'torch', 'lightning', 'jsonargparse', 'polars'} & set(sys.modules), sys.modules.keys()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert "commands:" in done.stdout
    assert f"recsys {__version__}" in done.stdout
    assert done.stderr == "recsys: error: no command 'fitt'; `recsys --help` lists them; did you mean 'fit'?\n"


def test_fit_help_and_version_exit_with_0(recsys):
    outcome = recsys("fit", "--help")
    assert outcome.status == 0
    for key in ("--run_dir", "--model", "--data", "--trainer.max_epochs", "--checkpoint.monitor"):
        assert key in outcome.out
    assert recsys("fit", "--version").out == f"recsys {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("--model.help RecommenderModule", "--model.warmup_steps"),
        ("--model.help COBRA", "--model.model.decoder.num_layers"),
        ("--model.help=RQVAE", "--model.tokenizer.num_codes"),
        ("--data.help SequenceDataModule", "--data.max_history"),
        ("--data.help Synthetic", "--data.source.num_users"),
    ],
)
def test_help_on_a_class_lists_the_keys_that_set_it(recsys, arguments, key):
    outcome = recsys("fit", *arguments.split())
    assert outcome.status == 0
    assert key in outcome.out
    assert "--model.model.catalog" not in outcome.out, "the catalogue is not the user's to give"


def test_help_on_an_unknown_class_names_the_nearest(recsys):
    error = recsys("fit", "--model.help", "RecommenderModul").error
    assert error == "no LightningModule 'RecommenderModul' for model; did you mean 'RecommenderModule'?"


def test_print_config_resolves_interpolation_from_the_command_line(recsys, write_yaml, cobra, edit):
    config = write_yaml(edit(cobra, "model.init_args.warmup_steps", "${trainer.max_epochs}"))
    outcome = recsys("fit", "-c", config, "--trainer.max_epochs=7", "--print_config")
    assert outcome.status == 0
    assert yaml.safe_load(outcome.out)["model"]["init_args"]["warmup_steps"] == 7


# --------------------------------------------------------------------------------------------------------- prepare


def test_prepare_fills_the_cache_prints_the_figures_and_needs_no_model(recsys, write_yaml, cobra, tmp_path):
    outcome = recsys("prepare", "-c", write_yaml({"data": cobra["data"]}))
    assert outcome.status == 0, outcome.err
    for row in ("users", "60", "density", "text encoder", "TfidfSVD"):
        assert row in outcome.out
    assert any((tmp_path / "cache").iterdir())
    assert not (tmp_path / "cobra").exists()
    # An experiment's own file will do as well, before its semantic IDs exist.
    assert recsys("prepare", "-c", write_yaml(cobra)).status == 0


def test_prepare_needs_data(recsys):
    assert recsys("prepare").error == "`recsys prepare` needs data: name a file with it by -c, or give --data"


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_fit_leaves_the_files_and_results_that_are_promised(trained_once):
    tokenizer, cobra = trained_once / "rqvae", trained_once / "cobra"
    assert {path.name for path in tokenizer.iterdir()} >= {"config.yaml", "results.json", "semantic_ids.safetensors"}
    assert {path.name for path in (cobra / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    found = results(cobra)
    assert found["model"] == "COBRA"
    assert found["seed"] == 1
    assert 0 <= found["metrics"]["val/ndcg@10"] <= 1
    assert set(found["data"]) >= {"num_users", "num_items", "num_interactions", "fingerprint"}
    assert found["data"]["num_users"] == 60
    assert found["config"]["trainer"]["max_epochs"] == 1
    assert found["hardware"]["accelerator"] == "cpu"
    assert found["seconds"] > 0
    assert found["epochs"] == 1
    config = yaml.safe_load((cobra / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"]["init_args"]["dim"] == 16


def test_metrics_csv_is_the_default_log_and_has_losses_and_metrics(trained_once):
    table = pl.read_csv(trained_once / "cobra" / "metrics.csv")
    assert table["train/loss"].drop_nulls().len() == 4, "one row a step: 60 users in batches of 16"
    assert table["val/ndcg@10"].drop_nulls().len() == 1


def test_test_and_validate_add_to_the_results_and_leave_the_training_log_alone(trained, recsys):
    run, config = trained / "cobra", trained / "cobra.yaml"
    log, fitted = (run / "metrics.csv").read_text(), val_metrics(run)
    assert recsys("test", "-c", config).status == 0
    assert recsys("validate", "-c", config).status == 0
    found = results(run)
    assert set(found["metrics"]) >= {"test/recall@5", "test-unseen/recall@5", "val/ndcg@10"}
    assert all(isinstance(value, float) for value in found["metrics"].values())
    assert {name: value for name, value in val_metrics(run).items() if name in fitted} == pytest.approx(fitted)
    assert set(found["seconds_by_command"]) == {"fit", "test", "validate"}
    assert (run / "metrics.csv").read_text() == log


def test_the_configuration_that_a_run_saved_runs_again(trained, recsys):
    assert recsys("test", "-c", trained / "cobra" / "config.yaml").status == 0
    assert "test/recall@5" in results(trained / "cobra")["metrics"]


def test_predictions_have_raw_ids_ranks_from_1_and_nothing_seen(trained, recsys):
    assert recsys("predict", "-c", trained / "cobra.yaml").status == 0
    table = pl.read_parquet(trained / "cobra" / "predictions.parquet")
    assert table.columns == ["user_id", "rank", "item_id", "score"]
    source = Synthetic(num_users=60, num_themes=2, topics_per_theme=2, items_per_topic=5)
    seen = source.read(Path()).interactions
    assert set(table["user_id"]) <= set(seen["user_id"])
    assert set(table["item_id"]) <= set(source.item_ids)
    assert table.join(seen, on=["user_id", "item_id"], how="inner").is_empty()
    for (_,), rows in table.group_by("user_id"):
        assert rows["rank"].to_list() == list(range(1, rows.height + 1))
        assert rows["score"].is_sorted(descending=True)
        assert rows["item_id"].n_unique() == rows.height


def test_a_tokenizer_predicts_nothing(trained, recsys):
    error = recsys("predict", "-c", trained / "rqvae.yaml").error
    assert error == "TokenizerModule recommends nothing to predict; `recsys fit` has written its semantic IDs"


def test_the_same_seed_gives_the_same_metrics(trained, recsys):
    config = trained / "cobra.yaml"
    assert recsys("fit", "-c", config, "--run_dir", trained / "again").status == 0
    assert val_metrics(trained / "again") == val_metrics(trained / "cobra")
    assert recsys("fit", "-c", config, "--run_dir", trained / "other", "--seed_everything", "2").status == 0
    assert results(trained / "other")["seed"] == 2


def test_a_resumed_run_goes_on_where_it_stopped_and_keeps_its_log(trained, recsys):
    run = trained / "cobra"
    outcome = recsys("fit", "-c", trained / "cobra.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert outcome.status == 0, outcome.err
    assert not (trained / "cobra.1").exists(), "a run that goes on is not moved aside"
    assert results(run)["epochs"] == 2
    assert results(run)["steps"] == 8
    table = pl.read_csv(run / "metrics.csv")
    assert table.filter(pl.col("train/loss").is_not_null())["step"].to_list() == list(range(8))
    assert table["val/ndcg@10"].drop_nulls().len() == 2


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_is_named_by_its_short_name(trained, recsys, name):
    other = "last" if name == "best" else "best"
    (trained / "cobra" / "checkpoints" / f"{other}.ckpt").unlink()
    assert recsys("test", "-c", trained / "cobra.yaml", "--ckpt_path", name).status == 0


# ------------------------------------------------------------------------------------------------------ run folders


def test_a_fit_moves_an_earlier_run_aside(trained, recsys):
    first = results(trained / "cobra")["finished"]
    outcome = recsys("fit", "-c", trained / "cobra.yaml")
    assert outcome.status == 0
    assert f"an earlier run in {trained / 'cobra'} was moved to {trained / 'cobra.1'}" in outcome.err
    assert results(trained / "cobra.1")["finished"] == first
    assert recsys("fit", "-c", trained / "cobra.yaml").status == 0
    assert (trained / "cobra.2" / "checkpoints" / "best.ckpt").is_file()


def test_a_fit_that_is_refused_leaves_the_earlier_run_where_it_is(trained, recsys):
    recsys("fit", "-c", trained / "cobra.yaml", "--data.batch_size", "0").error  # noqa: B018 - asserts
    recsys("fit", "-c", trained / "cobra.yaml", "--trainer.accelerator", "foo").error  # noqa: B018
    assert not (trained / "cobra.1").exists()


def test_a_fit_that_failed_before_its_first_step_is_not_kept(recsys, write_yaml, cobra, tmp_path):
    for _ in range(2):
        assert "no semantic IDs" in recsys("fit", "-c", write_yaml(cobra)).error
    assert sorted(path.name for path in tmp_path.glob("cobra*")) == ["cobra"]


def test_a_trial_run_moves_nothing(trained, recsys):
    assert recsys("fit", "-c", trained / "cobra.yaml", "--trainer.fast_dev_run", "1").status == 0
    assert not (trained / "cobra.1").exists()
    assert (trained / "cobra" / "metrics.csv").is_file()


def test_without_checkpointing_there_are_no_checkpoints(trained, recsys):
    arguments = ("--run_dir", trained / "bare", "--trainer.enable_checkpointing", "false")
    assert recsys("fit", "-c", trained / "cobra.yaml", *arguments).status == 0
    assert not (trained / "bare" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------------- codebooks


def test_a_fit_ends_with_the_state_of_the_codebooks_which_stands_in_the_results(trained, recsys):
    outcome = recsys("fit", "-c", trained / "rqvae.yaml", "--run_dir", trained / "healthy")
    assert outcome.status == 0, outcome.err
    found = results(trained / "healthy")
    assert [row["level"] for row in found["codebooks"]] == [1, 2]
    columns = {"level", "perplexity", "size", "entropy", "dead_codes", "gini", "residual_norm"}
    assert all(set(row) == columns for row in found["codebooks"])
    assert found["codebooks"][0]["size"] == 4
    assert found["collapsed"] is False
    assert "codebooks of best.ckpt" in outcome.out
    assert f"{found['codebooks'][0]['perplexity']:.1f}" in outcome.out
    assert "WARNING" not in outcome.out


def test_a_collapse_is_said_after_fit_and_again_after_test_and_stands_in_the_results(trained, recsys):
    # Nothing is above a share of 1: what is planted here is the bar.
    bar = ("--run_dir", trained / "ill", "--codebook_health.min_perplexity_share", "1")
    for command in ("fit", "test"):
        outcome = recsys(command, "-c", trained / "rqvae.yaml", *bar)
        assert outcome.status == 0, outcome.err
        warning = next(line for line in outcome.out.splitlines() if line.startswith("WARNING: "))
        assert warning.startswith("WARNING: the level-1 codebook of best.ckpt has collapsed: perplexity ")
        assert "\x1b" not in outcome.out, "no colours off a terminal"
        assert results(trained / "ill")["collapsed"] is True


def test_a_collapse_is_red_on_a_terminal(trained, recsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out = recsys("test", "-c", trained / "rqvae.yaml", "--codebook_health.min_perplexity_share", "1").out
    assert "\x1b[1;31mWARNING: the level-1 codebook" in out


def test_a_model_without_codebooks_says_nothing_of_them(trained_once):
    assert not {"codebooks", "collapsed"} & set(results(trained_once / "cobra"))


def test_a_wrong_codebook_setting_is_one_line(trained, recsys):
    error = recsys("fit", "-c", trained / "rqvae.yaml", "--codebook_health.gradient_every_n_steps", "-1").error
    assert "codebook_health.gradient_every_n_steps=-1 must be 0 (off) or more" in error


# ------------------------------------------------------------------------------------------ what is missing or wrong


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_without_a_checkpoint_the_command_that_makes_it_is_named(recsys, write_yaml, cobra, tmp_path, command):
    config = write_yaml(cobra)
    assert recsys(command, "-c", config).error == (
        f"no checkpoint {tmp_path / 'cobra/checkpoints/best.ckpt'}: train first with `recsys fit -c {config}`, "
        "or name one with --ckpt_path"
    )


def test_without_semantic_ids_the_command_that_makes_them_is_named(recsys, write_yaml, cobra, tmp_path):
    error = recsys("fit", "-c", write_yaml(cobra)).error
    assert error.startswith(
        f"no semantic IDs at {tmp_path / 'rqvae/semantic_ids.safetensors'}; make them with `recsys fit"
    )


def test_semantic_ids_of_other_embeddings_are_refused(trained, recsys):
    error = recsys("fit", "-c", trained / "cobra.yaml", "--data.encoder.dim", "6").error
    assert "were made from other item embeddings" in error
    assert "make them anew with `recsys fit" in error


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_with_a_short_line_and_status_130(trained, recsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("recsys_lightning.models.cobra.COBRA.losses", interrupt)
    outcome = recsys("fit", "-c", trained / "cobra.yaml")
    assert (outcome.status, outcome.err.splitlines()[-1]) == (130, "recsys: interrupted")
    monkeypatch.setattr("recsys_lightning.cli.trainer.read_settings", interrupt)
    outcome = recsys("fit", "-c", trained / "cobra.yaml")
    assert (outcome.status, outcome.err) == (130, "recsys: interrupted\n")


# ------------------------------------------------------------------------------ checkpoints against the command line


def test_the_hook_by_which_lightning_lets_checkpoints_override_the_command_line_still_has_its_name():
    # RecsysCLI overrides this private method to switch it off; renamed upstream, it would be on again.
    assert callable(LightningCLI._parse_ckpt_path)
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


def test_a_checkpoint_s_settings_do_not_override_the_command_line(trained, recsys):
    path = trained / "cobra" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    saved = yaml.safe_load((trained / "cobra" / "config.yaml").read_text())["model"]
    assert saved["init_args"]["model"]["init_args"]["search"]["num_beams"] == 4
    checkpoint["hyper_parameters"] = {"_class_path": saved["class_path"], **saved["init_args"]}
    torch.save(checkpoint, path)
    outcome = recsys("test", "-c", trained / "cobra.yaml", "--ckpt_path", path, "--model.model.search.num_beams=3")
    assert outcome.status == 0, outcome.err
    used = results(trained / "cobra")["config"]["model"]["init_args"]["model"]["init_args"]["search"]["num_beams"]
    assert used == 3


# --------------------------------------------------------------------------------------------------------- loggers


def test_tensorboard_is_a_key_away(trained, recsys):
    pytest.importorskip("tensorboard")
    run = trained / "tensorboard"
    logger = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", run)
    assert recsys("fit", "-c", trained / "cobra.yaml", "--run_dir", run, *logger).status == 0
    assert list(run.rglob("events.out.tfevents.*"))
    assert "val/ndcg@10" in results(run)["metrics"]


@pytest.mark.slow
def test_wandb_offline_is_a_key_away_and_needs_no_account(trained, recsys, monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(trained))
    run = trained / "wandb-run"
    logger = ("--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", run, "--trainer.logger.offline", "true")
    outcome = recsys("fit", "-c", trained / "cobra.yaml", "--run_dir", run, *logger)
    assert outcome.status == 0, outcome.err
    assert list(run.rglob("run-*.wandb"))


def test_a_program_may_call_main_again_and_again(trained, recsys):
    # Messages go to what sys.stderr is at the time of the call.
    for _ in range(2):
        outcome = recsys("fit", "-c", trained / "cobra.yaml")
        assert "was moved to" in outcome.err
    assert main([]) == 0


def test_a_logger_file_leaves_the_training_log_alone_too(trained, recsys):
    experiment, log = ["-c", trained / "cobra.yaml"], trained / "cobra" / "metrics.csv"
    csv = [{"class_path": "CSVLogger", "init_args": {"save_dir": "${run_dir}", "name": "", "version": ""}}]
    logger = trained / "logger.yaml"
    logger.write_text(yaml.safe_dump({"trainer": {"logger": csv}}))
    before = log.read_text()
    assert recsys("test", *experiment, "-c", logger).status == 0
    assert log.read_text() == before, "a test would begin the file anew"
    resumed = recsys("fit", *experiment, "-c", logger, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert resumed.status == 0, resumed.err
    assert len(log.read_text().splitlines()) > len(before.splitlines()) > 2, "a training that goes on keeps its rows"
