"""A fit and a test that knew no server, and what `wandb sync` makes of their files afterwards: one whole run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import yaml
from conftest import LOGGER, rqvae, sasrec

from recsys_lightning.cli import main
from recsys_lightning.training.record import code_fingerprint


@pytest.fixture(scope="module")
def synced(in_account, wandb_command, server, tmp_path_factory):
    """The folder of a run of SASRec, and what the server knows of it."""
    folder = tmp_path_factory.mktemp("offline")
    file = sasrec(folder)
    tags = ("--trainer.logger.init_args.tags", "[mine]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        import wandb

        wandb.teardown()
        assert main(["fit", "-c", str(file), "-c", str(LOGGER), *tags]) == 0
        assert main(["test", "-c", str(file), "-c", str(LOGGER), *tags]) == 0
    assert not server.operations, "nothing is sent from offline"
    run_folder = folder / "sasrec"
    parts = sorted((run_folder / "wandb").glob("offline-run-*"))
    done = wandb_command("sync", "--yes", *parts, cwd=folder)
    assert done.returncode == 0, done.stderr
    (name,) = server.runs
    return SimpleNamespace(
        folder=run_folder,
        run=server.runs[name],
        parts=parts,
        config=yaml.safe_load((run_folder / "config.yaml").read_text()),
        results=json.loads((run_folder / "results.json").read_text()),
    )


def test_a_test_belongs_to_the_run_of_its_fit(synced):
    assert len(synced.parts) == 2
    assert (synced.folder / "wandb-run-id.txt").read_text().strip() == synced.run.name
    assert synced.run.exit_codes == [0, 0]
    assert {"train/loss", "val/ndcg@10"} <= {key for line in synced.run.history for key in line}
    assert any("recommendations" in line for line in synced.run.history)


def test_the_whole_resolved_configuration_is_there(synced):
    config = dict(synced.run.config)
    of_test = config.pop("test")
    assert config == synced.config
    assert of_test["ckpt_path"] == str(synced.folder / "checkpoints" / "best.ckpt")
    assert of_test["model"] == synced.config["model"]


def test_the_run_has_tags_for_data_set_model_and_commit_beside_the_users_own(synced):
    commit = code_fingerprint()["commit"]
    expected = {"mine", "dataset:synthetic", "model:SASRec", *([f"commit:{commit}"] if commit else [])}
    assert set(synced.run.tags) == expected


def test_the_objective_is_the_best_validation_and_not_the_last(synced):
    values = [line["val/ndcg@10"] for line in synced.run.history if "val/ndcg@10" in line]
    objective = [line["objective"] for line in synced.run.history if "objective" in line]
    assert len(values) == 4
    assert values[-1] < max(values), "else this test could not tell the best from the last"
    assert objective == pytest.approx([max(values[: n + 1]) for n in range(4)])
    assert synced.run.summary["objective"] == pytest.approx(max(values))
    assert synced.run.summary["best/val/ndcg@10"] == pytest.approx(max(values))
    best = {f"best/{k}": v for k, v in synced.results["metrics"].items() if k.startswith("val")}
    assert {key: synced.run.summary[key] for key in best} == pytest.approx(best)


def test_the_summary_holds_the_test_and_what_the_run_has_cost(synced):
    summary, results = synced.run.summary, synced.results
    tested = {key: value for key, value in results["metrics"].items() if key.startswith("test")}
    assert {key: summary[key] for key in tested if math.isfinite(tested[key])} == pytest.approx(
        {key: value for key, value in tested.items() if math.isfinite(value)}
    )
    for key in ("seconds", "epochs", "steps", "parameters"):
        assert summary[key] == results[key] > 0


def test_the_table_of_recommendations_is_of_users_with_their_history_and_answer(synced):
    (name,) = [name for name in synced.run.files if "recommendations" in name]
    table = json.loads(synced.run.files[name])
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    ranks = pl.read_parquet(synced.folder / "ranks-test.parquet")
    users = {row["user"] for row in rows}
    assert len(users) == 8
    for user in users:
        mine = [row for row in rows if row["user"] == user]
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        assert [row["score"] for row in mine] == sorted((row["score"] for row in mine), reverse=True)
        answer = ranks.filter(pl.col("user_id") == user)
        hits = {row["item"] for row in mine if row["hit"]}
        assert hits == {row["item"] for row in mine} & set(answer["item_id"])
        assert all(row["seen"] == (row["title"] in row["history"].split("\n")) for row in mine)
        assert {row["answer"] for row in mine if row["hit"]} <= {row["title"] for row in mine if row["hit"]}


def test_a_new_fit_in_the_folder_is_a_new_run_and_a_tokenizer_shows_its_codebooks(
    in_account, wandb_command, server, tmp_path, monkeypatch
):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    file, known = rqvae(tmp_path), set(server.runs)
    for _ in range(2):
        assert main(["fit", "-c", str(file), "-c", str(LOGGER)]) == 0
    parts = [*tmp_path.glob("rqvae*/wandb/offline-run-*")]
    assert wandb_command("sync", "--yes", *parts, cwd=tmp_path).returncode == 0
    ids = {path.read_text().strip() for path in tmp_path.glob("rqvae*/wandb-run-id.txt")}
    assert len(ids) == 2
    assert set(server.runs) - known == ids
    for name in ids:
        histograms = [
            line["codebook/items_per_code@1"]
            for line in server.runs[name].history
            if "codebook/items_per_code@1" in line
        ]
        assert sum(histograms[0]["values"]) == 4, "of how many items each of the 4 codes has"
        assert [name for name in server.runs[name].files if "codebook" in name and name.endswith("table.json")]
        assert "model:RQVAE" in server.runs[name].tags
        assert server.runs[name].summary["objective"] == server.runs[name].summary["best/val/loss"]


def test_without_an_account_the_cure_is_said_in_one_line(in_account, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    assert main(["fit", "-c", str(rqvae(tmp_path)), "-c", str(LOGGER)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("recsys: error: W&B: ")
    assert "WANDB_MODE=offline" in last
    wandb.teardown()


def test_without_wandb_the_logger_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    from recsys_lightning.training import wandb_logger

    monkeypatch.setattr(wandb_logger.importlib.util, "find_spec", lambda _: None)
    assert main(["fit", "-c", str(rqvae(tmp_path)), "-c", str(LOGGER)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "recsys_lightning[wandb]"' in line
    assert not Path(tmp_path / "rqvae").exists()
