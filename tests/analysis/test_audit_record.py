"""The audit's checks of a run's files: selection by validation metrics, the rows it noted, its data and settings."""

import copy

import pytest

from recsys_lightning.analysis.audit_check import Check, not_checked, verdict
from recsys_lightning.analysis.audit_record import check_evidence, check_provenance, check_selection

CONFIG = {
    "seed_everything": 1,
    "run_dir": "runs/x",
    "trainer": {"max_epochs": 3, "callbacks": None, "default_root_dir": "runs/x", "logger": None},
    "model": {"class_path": "RecommenderModule", "init_args": {"model": {"init_args": {"search": {"num_beams": 20}}}}},
    "data": {"init_args": {"raw_dir": "raw", "cache_dir": "cache", "max_history": 20}},
    "checkpoint": {"monitor": "val/ndcg@10", "mode": "max", "dirpath": "runs/x/checkpoints"},
    "early_stopping": {"monitor": "val/ndcg@10", "patience": 3},
    "ckpt_path": None,
}


def saved(checkpoint: str | None, stopping: str | None, state: str | None = "as the key") -> dict:
    """A checkpoint as Lightning writes it."""
    name = f"ModelCheckpoint{{'monitor': {checkpoint!r}, 'mode': 'max', 'train_time_interval': datetime.timedelta(1)}}"
    return {
        "state_dict": {},
        "callbacks": {
            f"EarlyStopping{{'monitor': {stopping!r}, 'mode': 'max'}}": {"wait_count": 0},
            name: {"monitor": checkpoint if state == "as the key" else state, "best_model_path": "best.ckpt"},
            "RunRecord": {},
        },
    }


def edited(config: dict, *keys: str, value: object) -> dict:
    result = copy.deepcopy(config)
    node = result
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    return result


# ---------------------------------------------------------------------------------------------------------- outcomes


def test_a_check_is_one_line_that_begins_with_its_status():
    assert str(verdict("split", [], "fine")) == "pass         split: fine"
    assert str(verdict("split", ["bad", "worse"], "fine")) == "FAIL         split: bad; worse"
    assert str(not_checked("split", "no data")) == "not checked  split: no data"
    assert verdict("split", [], "fine", {"users": 3}) == Check("split", "pass", "fine", {"users": 3})


# --------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("metric", ["val/ndcg@10", "val-unseen/recall@10", "val/tail/recall@10", "train/loss", None])
def test_selection_without_test_metrics_passes(metric):
    config = edited(edited(CONFIG, "checkpoint", "monitor", value=metric), "early_stopping", "monitor", value=metric)
    check = check_selection(config, saved(metric, metric))
    assert check.status == "pass", check
    assert check.detail == f"by {metric!r}, in config.yaml and in the checkpoint"


@pytest.mark.parametrize("metric", ["test/ndcg@10", "test-unseen/ndcg@10", "ndcg@10", "value/ndcg@10"])
@pytest.mark.parametrize("section", ["checkpoint", "early_stopping"])
def test_selection_or_stopping_by_another_metric_is_found(section, metric):
    metrics = {"checkpoint": "val/ndcg@10", "early_stopping": "val/ndcg@10"} | {section: metric}
    check = check_selection(edited(CONFIG, section, "monitor", value=metric), saved(*metrics.values()))
    assert check.status == "FAIL"
    assert f"{section}.monitor is {metric!r}, no validation metric" in check.detail


def test_a_scheduler_or_a_further_callback_that_goes_by_a_test_metric_is_found():
    scheduler = edited(CONFIG, "model", "init_args", "lr_scheduler", value={"monitor": "test/loss"})
    check = check_selection(scheduler, saved("val/ndcg@10", "val/ndcg@10"))
    assert check.detail == "model.init_args.lr_scheduler.monitor is 'test/loss', no validation metric"
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "test/recall@5"}}]
    check = check_selection(
        edited(CONFIG, "trainer", "callbacks", value=callbacks), saved("val/ndcg@10", "val/ndcg@10")
    )
    assert check.detail == "trainer.callbacks.0.init_args.monitor is 'test/recall@5', no validation metric"


@pytest.mark.parametrize(
    ("checkpoint", "detail"),
    [
        (saved("test/ndcg@10", "val/ndcg@10"), "the checkpoint's ModelCheckpoint went by 'test/ndcg@10'"),
        (saved("val/ndcg@10", "test/ndcg@10"), "the checkpoint's EarlyStopping went by 'test/ndcg@10'"),
        (saved("val/ndcg@10", "val/ndcg@10", "test/x"), "the checkpoint's ModelCheckpoint went by 'test/x'"),
        (
            saved("val/recall@5", "val/ndcg@10"),
            "checkpoint.monitor is 'val/ndcg@10', but the checkpoint's ModelCheckpoint went by 'val/recall@5'",
        ),
        (
            saved("val/ndcg@10", "val/recall@5"),
            "early_stopping.monitor is 'val/ndcg@10', but the checkpoint's EarlyStopping went by 'val/recall@5'",
        ),
    ],
)
def test_a_checkpoint_that_went_by_something_else_than_its_settings_is_found(checkpoint, detail):
    check = check_selection(CONFIG, checkpoint)
    assert check.status == "FAIL"
    assert detail in check.detail


def test_a_checkpoint_that_does_not_say_what_it_went_by_is_not_checked():
    assert check_selection(CONFIG, {"state_dict": {}}).status == "not checked"
    assert check_selection(edited(CONFIG, "checkpoint", "monitor", value="test/x"), {"state_dict": {}}).status == "FAIL"


# ---------------------------------------------------------------------------------------------------------- evidence

NOTED = {"train_rows": "a" * 64, "val_rows": "b" * 64, "train_counts": "c" * 64}


def test_rows_as_noted_pass():
    assert check_evidence({"evidence": NOTED | {"more": "d"}}, NOTED).status == "pass"


@pytest.mark.parametrize("key", NOTED)
def test_a_run_that_noted_other_rows_is_found(key):
    check = check_evidence({"evidence": NOTED | {key: "0" * 64}}, NOTED)
    assert (check.status, check.detail) == ("FAIL", f"the run had other {key} than a recount of its settings gives")


@pytest.mark.parametrize("results", [None, {}, {"evidence": None}, {"evidence": {"val_rows": "b" * 64}}])
def test_a_run_that_noted_no_rows_is_not_checked(results):
    check = check_evidence(results, NOTED)
    assert check.status == "not checked"
    assert "train_rows" in check.detail


# -------------------------------------------------------------------------------------------------------- provenance

DATA = {"fingerprint": "1" * 64, "text_fingerprint": None}
RESULTS = {"data": DATA | {"num_users": 3}, "code": {"sha256": "9"}, "config": CONFIG}


def test_results_of_these_data_settings_and_code_pass():
    check = check_provenance(CONFIG, {}, RESULTS, DATA, "9")
    assert (check.status, check.detail) == ("pass", "data and settings as in results.json")


def test_other_code_is_a_note_and_no_failure():
    check = check_provenance(CONFIG, {}, RESULTS, DATA, "8")
    assert (check.status, check.detail) == (
        "pass",
        "data and settings as in results.json; note: audited with other code than trained",
    )


@pytest.mark.parametrize("key", DATA)
def test_results_of_other_data_are_found(key):
    check = check_provenance(CONFIG, {}, RESULTS, DATA | {key: "2" * 64}, "9")
    assert check.status == "FAIL"
    assert check.detail == f"results.json has {key} {str(DATA[key])[:12]}, the data have 222222222222"


@pytest.mark.parametrize(
    ("keys", "value", "shown"),
    [
        (("seed_everything",), 2, "seed_everything"),
        (("trainer", "max_epochs"), 9, "trainer.max_epochs"),
        (("data", "init_args", "max_history"), 5, "data.max_history"),
        (("model", "init_args", "new"), None, "model.new"),
        (("checkpoint", "monitor"), "val/x", "checkpoint.monitor"),
    ],
)
def test_results_of_other_settings_are_found(keys, value, shown):
    check = check_provenance(CONFIG, {}, RESULTS | {"config": edited(CONFIG, *keys, value=value)}, DATA, "9")
    assert check.status == "FAIL"
    assert check.detail == f"results.json has other settings than config.yaml: {shown}"


@pytest.mark.parametrize(
    "keys",
    [
        ("run_dir",),
        ("ckpt_path",),
        ("trainer", "default_root_dir"),
        ("checkpoint", "dirpath"),
        ("data", "init_args", "raw_dir"),
        ("data", "init_args", "cache_dir"),
    ],
)
def test_where_files_lie_is_no_setting(keys):
    check = check_provenance(CONFIG, {}, RESULTS | {"config": edited(CONFIG, *keys, value="elsewhere")}, DATA, "9")
    assert check.status == "pass"


def test_settings_of_a_later_command_that_the_folder_explains_are_a_note():
    tested = edited(CONFIG, "model", "init_args", "model", "init_args", "search", "num_beams", value=50)
    check = check_provenance(CONFIG, {"config-test.yaml": tested}, RESULTS | {"config": tested}, DATA, "9")
    assert check.status == "pass"
    assert check.detail.endswith(
        "note: measured with settings of config-test.yaml that are not those of the fit: model.model.search.num_beams"
    )
    other = edited(tested, "seed_everything", value=3)
    assert (
        check_provenance(CONFIG, {"config-test.yaml": other}, RESULTS | {"config": tested}, DATA, "9").status == "FAIL"
    )


def test_a_run_without_results_is_not_checked():
    assert check_provenance(CONFIG, {}, None, DATA, "9").status == "not checked"
