"""Commands that speak to the server while they run: those on one folder speak of one run."""

import json

import pytest
from conftest import LOGGER, sasrec

from recsys_lightning.cli import main


@pytest.fixture(scope="module")
def resumed(in_account, server, tmp_path_factory):
    """A run that was fitted, fitted on and tested, and its folder."""
    folder = tmp_path_factory.mktemp("online")
    file = ("-c", str(sasrec(folder)), "-c", str(LOGGER))
    tags = ("--trainer.logger.init_args.tags", "[mine]")
    assert main(["fit", *file, "--trainer.max_epochs", "4", *tags]) == 0
    assert main(["fit", *file, "--ckpt_path", "last"]) == 0
    assert main(["test", *file]) == 0
    (run,) = server.runs.values()
    return folder / "sasrec", run


def test_a_fit_that_goes_on_and_a_test_add_to_the_run_of_the_fit(resumed):
    folder, run = resumed
    assert (folder / "wandb-run-id.txt").read_text().strip() == run.name
    assert run.exit_codes == [0, 0, 0]
    steps = [line["_step"] for line in run.history]
    assert steps == list(range(len(steps))), "each adds behind what was there"
    assert len([line for line in run.history if "val/ndcg@10" in line]) == 4
    assert {"mine", "model:SASRec"} <= set(run.tags)


def test_the_best_of_both_fits_stays_in_the_summary(resumed):
    folder, run = resumed
    values = [line["val/ndcg@10"] for line in run.history if "val/ndcg@10" in line]
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert run.summary["objective"] == run.summary["best/val/ndcg@10"] == pytest.approx(max(values))
    assert run.summary["test/recall@10"] == pytest.approx(metrics["test/recall@10"])
    assert run.config["trainer"]["max_epochs"] == 8
    assert run.config["test"]["ckpt_path"].endswith("best.ckpt")


def test_the_server_knew_all_that_was_asked(resumed, server):
    assert not server.unknown
