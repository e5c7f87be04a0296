"""`wandb sweep` and `wandb agent` themselves, against a server on this machine that hands out three trials."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import LOGGER, rqvae
from wandb_server import PROJECT

pytestmark = pytest.mark.slow  # five processes that import torch, one after the other

TRIALS = [
    {"model.tokenizer.num_codes": 3, "model.optimizer.lr": 0.01, "model.tokenizer.sinkhorn": None},
    {"model.tokenizer.num_codes": 5, "model.optimizer.lr": 1e-05, "model.tokenizer.sinkhorn": 0.05},
    # So long that only the server can end it.
    {"model.tokenizer.num_codes": 2, "trainer.max_epochs": 100000},
]


@pytest.fixture(scope="module")
def swept(server, account, wandb_command, tmp_path_factory):
    """What came of a sweep of the tiny tokenizer, in the words of the client and of the server."""
    folder = tmp_path_factory.mktemp("sweep")
    file = rqvae(folder)
    command = ["${env}", "${program}", "fit", f"--config={file}", f"--config={LOGGER}", "--config", "${args_json_file}"]
    command += [f"--run_dir={folder}/runs/${{oc.env:WANDB_RUN_ID}}", "--ckpt_path=auto"]
    sweep = {
        "program": "recsys",
        "method": "random",
        "metric": {"name": "objective", "goal": "minimize"},
        "parameters": {key: {"values": [value]} for key, value in TRIALS[0].items()},
        "command": command,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    made = wandb_command("sweep", "--project", PROJECT, "sweep.yaml", cwd=folder)
    assert made.returncode == 0, made.stderr
    server.trials, server.stop = list(TRIALS), _has_come_back
    words = [str(Path(sys.executable).with_name("wandb")), "agent", "--forward-signals"]
    words.append(re.search(r"wandb agent (\S+)", made.stderr)[1])
    with (folder / "agent.log").open("w") as log:
        agent = subprocess.Popen(words, env=account, cwd=folder, stdout=log, stderr=log)
        interrupted, until = False, time.monotonic() + 900
        while agent.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
            if not interrupted and any(_is_endless(run) and "objective" in run.summary for run in server.runs.values()):
                interrupted = True
                agent.send_signal(signal.SIGUSR1)  # as a scheduler does some time before it takes the machine away
        agent.kill()
        agent.wait()
    server.stop = lambda _: False
    runs = {
        run.config["model"]["init_args"]["tokenizer"]["init_args"]["num_codes"]: run for run in server.runs.values()
    }
    return SimpleNamespace(folder=folder, agent=agent, runs=runs, log=(folder / "agent.log").read_text())


def _is_endless(run):
    return run.config.get("trainer", {}).get("max_epochs") == 100000


def _has_come_back(run):
    """Whether the run that was interrupted has trained on, and is to be ended now."""
    if not _is_endless(run) or not run.exit_codes:
        return False
    return run.history_at_exit < len([line for line in run.history if "objective" in line])


def test_each_trial_trains_with_the_values_that_the_server_gave(swept):
    assert sorted(swept.runs) == [2, 3, 5]
    for trial in TRIALS[:2]:
        run = swept.runs[trial["model.tokenizer.num_codes"]]
        module = run.config["model"]["init_args"]
        assert module["optimizer"]["init_args"]["lr"] == trial["model.optimizer.lr"]
        assert module["tokenizer"]["init_args"]["sinkhorn"] == trial["model.tokenizer.sinkhorn"]
        assert run.exit_codes == [0]
        trained = json.loads((swept.folder / "runs" / run.name / "results.json").read_text())
        assert trained["config"]["model"] == run.config["model"]


def test_the_figure_that_the_sweep_minimises_arrives(swept):
    for codes in (3, 5):
        run = swept.runs[codes]
        metrics = json.loads((swept.folder / "runs" / run.name / "results.json").read_text())["metrics"]
        assert run.summary["objective"] == pytest.approx(metrics["val/loss"])
        assert [line["objective"] for line in run.history if "objective" in line], "by which a sweep ends weak runs"


def test_a_run_whose_machine_was_taken_away_goes_on_when_the_sweep_hands_it_out_again(swept):
    run = swept.runs[2]
    resume = swept.folder / "runs" / run.name / "checkpoints" / "resume.ckpt"
    assert swept.log.count(f"SIGUSR1 after step {(first := _step(swept.log, 'SIGUSR1'))}: saved {resume}") == 1
    assert f"going on from {resume}" in swept.log
    assert first < _step(swept.log, "SIGTERM")
    epochs = [line["epoch"] for line in run.history if "val/loss" in line]
    assert epochs == list(range(len(epochs))), "none is lost or trained twice"


def test_a_run_that_the_sweep_ends_early_saves_what_it_has_and_is_not_handed_out_again(swept):
    run = swept.runs[2]
    assert len(run.exit_codes) == 2
    assert 0 not in run.exit_codes
    assert not run.preempted


def _step(log, name):
    return int(re.search(rf"{name} after step (\d+)", log)[1])


def test_the_agent_ends_when_it_is_told_to(swept, server):
    assert swept.agent.returncode == 0, swept.log
    assert not server.trials
    assert not server.unknown
