"""`recsys audit` on runs that were just trained: honest ones pass, and each planted leak is found."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.sequences import SequenceDataset
from recsys_lightning.data.splits import training_part
from recsys_lightning.semantic_ids.table import SemanticIds


def lines(out: str) -> dict[str, tuple[str, str]]:
    """The status and the detail of each check that was printed, by name."""
    found = {}
    for line in out.splitlines():
        if line.startswith(("pass ", "FAIL ", "not checked ")):
            name, _, detail = line[13:].partition(": ")
            found[name] = (line[:13].strip(), detail)
    return found


def failed(outcome) -> dict[str, str]:
    """The details of the checks that failed; the exit status must say so."""
    found = {name: detail for name, (status, detail) in lines(outcome.out).items() if status == "FAIL"}
    assert outcome.status == bool(found), outcome.err
    return found


def saved_yaml(path: Path, edit) -> None:
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def trained(trained, trained_once) -> Path:
    """The copy of the trained runs, of which COBRA's names the copied tokenizer."""
    for name in ("config.yaml", "results.json"):
        path = trained / "cobra" / name
        path.write_text(path.read_text().replace(str(trained_once / "rqvae"), str(trained / "rqvae")))
    return trained


@pytest.fixture
def popularity(trained, write_yaml, cobra, recsys) -> Path:
    """The folder of a popularity run over the data of the trained runs."""
    run = trained / "popularity"
    config = yaml.safe_load((trained / "cobra.yaml").read_text()) | {"run_dir": str(run)}
    config["model"]["init_args"]["model"] = {"class_path": "Popularity"}
    assert recsys("fit", "-c", write_yaml(config)).status == 0
    return run


# ------------------------------------------------------------------------------------------------------ honest runs


def test_honest_runs_pass_every_check(trained, popularity, recsys):
    outcome = recsys("audit", trained / "cobra", trained / "rqvae", popularity)
    assert outcome.status == 0, outcome.out + outcome.err
    assert failed(outcome) == {}
    assert outcome.out.count("0 FAIL") == 3
    names = {run: report(trained / run) for run in ("cobra", "rqvae", "popularity")}
    data = ["split", "scrambling", "training batches", "item statistics", "evaluation", "item texts"]
    assert list(names["popularity"]) == [
        *data,
        "facts in the checkpoint",
        "negatives and losses",
        "model selection",
        "rows of the run",
        "provenance",
    ]
    assert [name for name in names["cobra"] if name not in names["popularity"]] == ["semantic IDs", "tokenizer batches"]
    absent = {"scrambling", "facts in the checkpoint", "rows of the run", "tokenizer batches"}
    assert list(names["rqvae"]) == [name for name in names["cobra"] if name not in absent]


def report(run: Path) -> dict[str, dict]:
    """The checks in ``audit.json`` by name."""
    return {check["name"]: check for check in json.loads((run / "audit.json").read_text())["checks"]}


def test_what_is_printed_is_written_with_figures_and_fingerprints(trained, recsys):
    run = trained / "cobra"
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    outcome = recsys("audit", run)
    written = json.loads((run / "audit.json").read_text())
    printed = lines(outcome.out)
    assert {check["name"]: (check["status"], check["detail"]) for check in written["checks"]} == printed
    counted = {status: sum(found == status for found, _ in printed.values()) for status in ("pass", "not checked")}
    last = outcome.out.splitlines()[-1]
    assert last.startswith(f"{counted['pass']} pass, 0 FAIL, {counted['not checked']} not checked")
    assert last.endswith(f"written to {run / 'audit.json'}")
    assert outcome.out.splitlines()[0] == str(run)
    assert written["passed"] is True
    results = json.loads((run / "results.json").read_text())
    assert written["data"] == {name: results["data"][name] for name in ("fingerprint", "text_fingerprint")}
    assert set(written["code"]) == {"version", "sha256", "commit"}
    assert report(run)["split"]["figures"]["users"] == 60
    assert report(run)["negatives and losses"]["figures"]["loss"] == 8, "two losses of 4 batches"
    assert {path: path.read_bytes() for path in before} == before, "an audit changes nothing else"


def test_the_rows_that_a_fit_noted_are_found_again(trained, recsys):
    path = trained / "cobra" / "results.json"
    results = json.loads(path.read_text())
    assert lines(recsys("audit", trained / "cobra").out)["rows of the run"][0] == "pass"
    results["evidence"]["train_rows"] = "0" * 64
    path.write_text(json.dumps(results))
    assert failed(recsys("audit", trained / "cobra")) == {
        "rows of the run": "the run had other train_rows than a recount of its settings gives"
    }
    del results["evidence"]
    path.write_text(json.dumps(results))
    outcome = recsys("audit", trained / "cobra")
    assert failed(outcome) == {}
    assert outcome.out.splitlines()[-1].partition(";")[0].endswith("1 not checked (rows of the run)")


@pytest.fixture
def by_user(trained, write_yaml, recsys) -> Path:
    """The folder of a popularity run over a user split, evaluated on several answers a user."""
    run = trained / "by-user"
    config = yaml.safe_load((trained / "cobra.yaml").read_text()) | {"run_dir": str(run)}
    config["data"]["init_args"]["split"] = {"class_path": "UserSplit", "init_args": {"val_users": 0.3, "seed": 4}}
    config["model"]["init_args"]["model"] = {"class_path": "Popularity"}
    assert recsys("fit", "-c", write_yaml(config)).status == 0
    return run


def test_an_honest_run_over_a_user_split_passes_every_check(by_user, recsys):
    outcome = recsys("audit", by_user)
    assert outcome.status == 0, outcome.out + outcome.err
    assert {status for status, _ in lines(outcome.out).values()} == {"pass"}
    found = report(by_user)["split"]
    assert found["figures"]["evaluated"] == 18 + 6
    assert "18 others are validated and 6 tested, on what comes after the first 80% of theirs" in found["detail"]


def test_histories_of_held_out_users_that_reach_training_are_found(by_user, recsys, monkeypatch):
    setup = SequenceDataModule.setup

    def leaky(self, stage=None):
        setup(self, stage)
        interactions = self._prepared().interactions
        before_answers = replace(self._split, train_stop=self._split.val_start)
        counts = training_part(interactions, before_answers).counts(interactions.num_items)
        self._catalog = replace(self._catalog, train_counts=counts)

    monkeypatch.setattr(SequenceDataModule, "setup", leaky)
    found = failed(recsys("audit", by_user))
    assert {"item statistics", "negatives and losses"} <= set(found)
    assert "change with the held-out items" in found["item statistics"]


# ----------------------------------------------------------------------------------------------------------- options


def test_the_checkpoint_can_be_chosen_and_is_the_best_even_of_a_resumed_run(trained, recsys):
    run = trained / "cobra"
    saved_yaml(run / "config.yaml", lambda config: config.update(ckpt_path=str(run / "gone.ckpt")))
    (run / "checkpoints" / "last.ckpt").unlink()
    assert recsys("audit", run).status == 0
    (run / "checkpoints" / "best.ckpt").rename(run / "checkpoints" / "last.ckpt")
    assert "no checkpoint" in recsys("audit", run).error
    assert recsys("audit", run, "--ckpt_path", "last").status == 0


def test_settings_can_be_changed_as_for_any_command(trained, recsys, tmp_path):
    cache = tmp_path / "another cache"
    assert recsys("audit", trained / "cobra", "--data.cache_dir", cache).status == 0
    assert list(cache.glob("synthetic-*"))
    error = recsys("audit", trained / "cobra", "--data.max_histori", "3").error
    assert "did you mean" in error
    found = failed(recsys("audit", trained / "cobra", "--data.source.init_args.seed", "7"))
    assert "results.json has fingerprint" in found["provenance"]


def test_a_run_that_was_moved_is_audited_where_it_is(trained, recsys):
    (trained / "cobra").rename(trained / "moved")
    assert recsys("audit", trained / "moved").status == 0
    assert (trained / "moved" / "audit.json").is_file()
    assert not (trained / "cobra").exists()


def test_a_run_of_a_gpu_and_of_a_logger_is_audited_without_them(trained, recsys):
    def elsewhere(config):
        config["trainer"] |= {"accelerator": "cuda", "devices": 8, "logger": {"class_path": "CSVLogger"}}
        config["trainer"]["logger"]["init_args"] = {"save_dir": str(trained / "logs")}

    saved_yaml(trained / "cobra" / "config.yaml", elsewhere)
    found = failed(recsys("audit", trained / "cobra"))
    assert set(found) == {"provenance"}, "these are not the settings that the results tell of"
    assert not (trained / "logs").exists()


def test_help_says_what_the_exit_status_means(recsys):
    outcome = recsys("audit", "--help")
    assert outcome.status == 0
    assert "exit status" in outcome.out
    assert "--data.raw_dir" in outcome.out


# ----------------------------------------------------------------------------------------------------- planted leaks


def test_a_popularity_checkpoint_with_test_items_in_its_counts_is_found(popularity, recsys):
    path = popularity / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["recommender.counts"][3] += 1
    torch.save(checkpoint, path)
    found = failed(recsys("audit", popularity))
    assert list(found) == ["facts in the checkpoint"]
    assert found["facts in the checkpoint"].startswith("1 of 21 values of counts")


def test_a_data_module_that_counts_all_interactions_is_found(trained, popularity, recsys, monkeypatch):
    setup = SequenceDataModule.setup

    def leaky(self, stage=None):
        setup(self, stage)
        interactions = self._prepared().interactions
        counts = np.bincount(interactions.items, minlength=interactions.num_items + 1).astype(np.int64)
        self._catalog = replace(self._catalog, train_counts=counts)

    monkeypatch.setattr(SequenceDataModule, "setup", leaky)
    config = popularity / "config.yaml"
    assert recsys("fit", "-c", config, "--run_dir", trained / "leaky").status == 0
    found = failed(recsys("audit", trained / "leaky"))
    assert set(found) == {"item statistics", "negatives and losses"}
    monkeypatch.undo()
    # The code has been mended since: what the run has kept tells of it still.
    found = failed(recsys("audit", trained / "leaky"))
    assert {"facts in the checkpoint"} <= set(found) <= {"facts in the checkpoint", "rows of the run"}


@pytest.mark.parametrize(
    ("leak", "expected"),
    [
        ("held-out items in training batches", {"training batches"}),
        ("the test item in validation histories", {"evaluation"}),
        ("the answer in test histories", {"evaluation"}),
        ("a training row too long", {"split", "training batches", "rows of the run"}),
    ],
)
def test_data_sets_that_leak_are_found(popularity, recsys, monkeypatch, leak, expected):
    build, gather = SequenceDataset.__init__, SequenceDataset.__getitem__

    def leaky_build(self, interactions, split, stage, *settings):
        build(self, interactions, split, stage, *settings)
        self.stage, self.last = stage, split.test_stop[self.user] - 1  # the test item's position
        if leak == "a training row too long" and stage == "train":
            self.answer_stop = self.answer_stop + 1

    def leaky_gather(self, rows):
        batch = gather(self, rows)
        item = torch.from_numpy(self.items[self.last[np.asarray(rows)]])[:, None]
        if leak == "held-out items in training batches" and self.stage == "train":
            return replace(batch, seen=item)
        wanted = {"the test item in validation histories": "val", "the answer in test histories": "test"}.get(leak)
        return replace(batch, history=torch.cat([batch.history, item], 1)) if self.stage == wanted else batch

    monkeypatch.setattr(SequenceDataset, "__init__", leaky_build)
    monkeypatch.setattr(SequenceDataset, "__getitem__", leaky_gather)
    assert set(failed(recsys("audit", popularity))) == expected


def test_selection_by_a_test_metric_is_found(trained, recsys):
    run = trained / "cobra"
    saved_yaml(run / "config.yaml", lambda config: config["checkpoint"].update(monitor="test/ndcg@10"))
    found = failed(recsys("audit", run))
    assert "checkpoint.monitor is 'test/ndcg@10', no validation metric" in found["model selection"]
    assert "went by 'val/ndcg@10'" in found["model selection"]
    assert "checkpoint.monitor" in found["provenance"]


def test_semantic_ids_that_were_changed_by_hand_are_found_at_the_tokenizer_and_at_its_user(trained, recsys):
    path = trained / "rqvae" / "semantic_ids.safetensors"
    table = SemanticIds.load(path)
    codes = table.codes.clone()
    codes[4] = (codes[9] + 1) % 4
    replace(table, codes=codes).save(path)
    assert list(failed(recsys("audit", trained / "rqvae"))) == ["semantic IDs"]
    found = failed(recsys("audit", trained / "cobra"))
    assert list(found) == ["semantic IDs", "facts in the checkpoint"]
    assert found["semantic IDs"] == "the tokenizer's checkpoint makes the same codes of 19 of 20 item texts"


def test_semantic_ids_of_other_embeddings_are_found_although_the_model_refuses_them(trained, recsys):
    path = trained / "rqvae" / "semantic_ids.safetensors"
    replace(SemanticIds.load(path), embeddings_fingerprint="e" * 64).save(path)
    outcome = recsys("audit", trained / "cobra")
    assert list(failed(outcome)) == ["semantic IDs"]
    status, reason = lines(outcome.out)["negatives and losses"]
    assert status == "not checked"
    assert "were made from other item embeddings" in reason


def test_without_the_tokenizer_s_run_its_work_is_not_checked(trained, recsys):
    maker = trained / "rqvae"
    saved_yaml(maker / "config.yaml", lambda config: config["data"]["init_args"].update(old_setting=3))
    reasons = []
    for leave_out in (None, "checkpoints/best.ckpt", "config.yaml"):
        if leave_out is not None:
            (maker / leave_out).unlink()
        outcome = recsys("audit", trained / "cobra")
        assert failed(outcome) == {}
        status, reason = lines(outcome.out)["semantic IDs"]
        assert status == "not checked"
        reasons.append(reason.partition(", but ")[2])
    assert reasons[0].startswith(f"the run in {maker} cannot be opened: ")
    assert "old_setting" in reasons[0]
    assert reasons[1:] == [
        f"{maker} holds no checkpoints/best.ckpt",
        f"{maker} holds no config.yaml and no checkpoints/best.ckpt",
    ]


def test_a_tokenizer_of_other_data_is_found(trained, recsys):
    def other(config):
        config["data"]["init_args"]["source"]["init_args"]["seed"] = 7

    saved_yaml(trained / "rqvae" / "config.yaml", other)
    found = failed(recsys("audit", trained / "cobra"))
    assert "was trained on other data" in found["tokenizer batches"]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_is_said_in_one_line(trained, recsys, tmp_path):
    assert recsys("audit").error == "audit: name a run folder, before any options; see `recsys audit --help`"
    assert recsys("audit", "--data.raw_dir", "raw", trained / "cobra").error.startswith("audit: name a run folder")
    assert recsys("audit", trained / "cobr").error == (
        f"no run folder {trained / 'cobr'}; did you mean '{trained / 'cobra'}'?"
    )
    assert recsys("audit", tmp_path).error == f"{tmp_path} holds no config.yaml: it is no run that `recsys fit` wrote"


def test_all_folders_are_looked_for_before_the_first_is_audited(trained, recsys):
    outcome = recsys("audit", trained / "cobra", trained / "nothing")
    assert (outcome.status, outcome.out) == (2, "")


def test_without_a_checkpoint_the_command_that_makes_it_is_named(trained, recsys):
    run = trained / "cobra"
    (run / "checkpoints" / "best.ckpt").unlink()
    assert recsys("audit", run).error == (
        f"no checkpoint {run / 'checkpoints/best.ckpt'}: train first with `recsys fit -c {run / 'config.yaml'}`, "
        "or name one with --ckpt_path"
    )


def test_a_run_of_another_version_is_refused_by_the_key_that_is_unknown(trained, recsys):
    run = trained / "cobra"
    saved_yaml(run / "config.yaml", lambda config: config["data"]["init_args"].update(old_setting=3))
    error = recsys("audit", run).error
    assert "old_setting" in error
    assert str(run / "config.yaml") in error


def test_a_checkpoint_of_another_model_is_refused(trained, popularity, recsys):
    best = popularity / "checkpoints" / "best.ckpt"
    best.replace(trained / "cobra" / "checkpoints" / "best.ckpt")
    error = recsys("audit", trained / "cobra").error
    assert "the checkpoint was made with other model or data settings" in error


def test_a_checkpoint_that_could_run_code_is_not_opened(trained, recsys):
    run = trained / "cobra"
    torch.save({"state_dict": {}, "odd": SequenceDataModule}, run / "checkpoints" / "best.ckpt")
    assert "cannot read the checkpoint" in recsys("audit", run).error
