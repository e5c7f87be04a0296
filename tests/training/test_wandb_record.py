import signal
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.preemption import Stopped
from recsys_lightning.training.record import RunRecord
from recsys_lightning.training.wandb_logger import RUN_ID_FILE, WandbRunLogger, run_id
from recsys_lightning.training.wandb_record import (
    COLUMNS,
    log_best,
    mark_preempted,
    model_class,
    recommendation_rows,
    summarize,
    tags_of,
    wandb_loggers,
)


class Spy(WandbLogger):
    """A W&B logger that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict, int]] = []
        self.preempted = 0
        self._run = SimpleNamespace(summary={}, mark_preempting=self._preempt)

    @property
    def experiment(self):
        return self._run

    def log_metrics(self, metrics, step=None) -> None:
        self.logged.append((dict(metrics), step))

    def _preempt(self) -> None:
        self.preempted += 1


@pytest.fixture
def spy() -> Spy:
    pytest.importorskip("wandb")
    return Spy()


def trainer_with(*loggers, first=True, checkpoint=None, doing=TrainerFn.FITTING):
    state = SimpleNamespace(fn=doing)
    return SimpleNamespace(
        loggers=list(loggers), is_global_zero=first, checkpoint_callback=checkpoint, state=state, global_step=7
    )


def test_tags_name_what_is_known_and_fit_into_what_wandb_takes():
    assert tags_of("beauty", "COBRA", "8a9176d") == ["dataset:beauty", "model:COBRA", "commit:8a9176d"]
    assert tags_of(None, "COBRA", None) == ["model:COBRA"]
    assert [len(tag) for tag in tags_of("x" * 100, None, None)] == [64]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ({"class_path": "a.RecommenderModule", "init_args": {"model": {"class_path": "b.COBRA"}}}, "COBRA"),
        ({"class_path": "a.TokenizerModule", "init_args": {"tokenizer": {"class_path": "b.RQVAE"}}}, "RQVAE"),
        ({"class_path": "mine.Module"}, "Module"),
        (None, None),
    ],
)
def test_the_model_is_named_by_the_class_within_the_module(module, name):
    assert model_class({"model": module}) == name


def test_a_row_of_the_table_is_one_place_of_one_users_list():
    fields = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["Ah", None, "Ce"]})
    catalog = Catalog(fields, torch.tensor([0, 1, 1, 1]).numpy())
    batch = SequenceBatch(
        user=torch.tensor([1, 0]),
        history=torch.tensor([[1, 2], [3, 0]]),
        target=torch.tensor([[3, 0], [2, 1]]),
        seen=torch.tensor([[1, 2], [3, 0]]),
    )
    lists = Recommendations(torch.tensor([[2, 3], [1, 0]]), torch.tensor([[0.5, 0.25], [0.75, -torch.inf]]))
    rows = recommendation_rows(batch, lists, catalog, ["anna", "ben"])
    assert COLUMNS == ("user", "history", "answer", "rank", "item", "title", "score", "seen", "hit")
    assert rows == [
        ["ben", "Ah\nb", "Ce", 1, "b", "b", 0.5, True, False],
        ["ben", "Ah\nb", "Ce", 2, "c", "Ce", 0.25, False, True],
        ["anna", "Ce", "b\nAh", 1, "a", "Ah", 0.75, False, True],  # a list that has ended has no second place
    ]


@pytest.mark.parametrize(("mode", "before", "now", "best"), [("max", 0.4, 0.3, 0.4), ("min", 0.4, 0.3, 0.3)])
def test_the_objective_is_the_better_of_this_validation_and_those_before(spy, mode, before, now, best):
    checkpoint = ModelCheckpoint(monitor="val/x", mode=mode)
    trainer = trainer_with(spy, checkpoint=checkpoint)
    log_best(trainer, {"val/x": now})
    checkpoint.best_model_score = torch.tensor(before)
    log_best(trainer, {"val/x": now})
    assert [step for _, step in spy.logged] == [7, 7]
    first, second = (metrics for metrics, _ in spy.logged)
    assert first == {"best/val/x": now, "objective": now}
    assert second == pytest.approx({"best/val/x": best, "objective": best})


def test_only_a_fit_has_an_objective_to_log(spy):
    checkpoint = ModelCheckpoint(monitor="val/x")
    log_best(trainer_with(spy, checkpoint=checkpoint, doing=TrainerFn.VALIDATING), {"val/x": 1.0})
    log_best(trainer_with(spy, checkpoint=checkpoint), {"val/y": 1.0})
    log_best(trainer_with(spy), {"val/x": 1.0})
    assert not spy.logged


def test_only_a_fit_changes_what_the_summary_says_of_the_best_validation(spy):
    results = {"config": {"checkpoint": {"monitor": "val/x"}}, "metrics": {"val/x": 0.5}, "seconds": 3.0, "epochs": 2}
    summarize(trainer_with(spy), "fit", results)
    assert spy.experiment.summary == {"best/val/x": 0.5, "objective": 0.5, "seconds": 3.0, "epochs": 2}
    later = results | {"metrics": {"val/x": 0.1, "test/x": 0.2, "test-unseen/x": 0.3}, "seconds": 4.0}
    summarize(trainer_with(spy), "test", later)
    expected = {"best/val/x": 0.5, "objective": 0.5, "seconds": 4.0, "epochs": 2, "test/x": 0.2, "test-unseen/x": 0.3}
    assert spy.experiment.summary == expected
    spy.experiment.summary.clear()  # an offline command knows nothing of those before it
    summarize(trainer_with(spy), "test", later)
    assert spy.experiment.summary["objective"] == 0.1


def test_other_processes_log_nothing(spy):
    assert wandb_loggers(trainer_with(spy)) == [spy]
    assert wandb_loggers(trainer_with(spy, first=False)) == []


@pytest.mark.parametrize(("number", "marked"), [(signal.SIGUSR1, 1), (signal.SIGUSR2, 1), (signal.SIGTERM, 0)])
def test_a_sweep_hands_out_again_what_a_scheduler_has_interrupted_and_not_what_it_ended_itself(spy, number, marked):
    mark_preempted(trainer_with(spy), Stopped(128 + number))
    assert spy.preempted == marked
    mark_preempted(trainer_with(spy), ValueError(128 + number))
    assert spy.preempted == marked


def test_a_run_folder_keeps_its_id_and_wandbs_own_variable_comes_first(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = run_id(tmp_path)
    assert first == run_id(tmp_path) == (tmp_path / RUN_ID_FILE).read_text().strip()
    assert first != run_id(tmp_path.parent)
    monkeypatch.setenv("WANDB_RUN_ID", "sweeprun")
    assert run_id(tmp_path) == "sweeprun"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert run_id(tmp_path) == "sweeprun", "so that a test after the sweep adds to its run"


def test_a_process_that_is_not_the_first_begins_no_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = WandbRunLogger(str(tmp_path))
    logger.experiment.log({"a": 1})  # a run that does nothing
    logger.finalize("success")
    assert not list(tmp_path.iterdir())


def test_a_run_is_named_after_its_folder_unless_wandb_is_told_otherwise(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_NAME", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert WandbRunLogger("/data/runs/cobra/beauty")._wandb_init["name"] == "cobra/beauty"
    assert WandbRunLogger("runs/x", name="mine")._wandb_init["name"] == "mine"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert WandbRunLogger("runs/x")._wandb_init["name"] is None
    assert WandbRunLogger("runs/x")._wandb_init["project"] is None


def test_the_recommendations_of_a_test_are_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr("recsys_lightning.training.record.log_recommendations", lambda *_: asked.append(1))
    for number in range(3):
        RunRecord.on_test_batch_end(SimpleNamespace(), None, None, None, None, number)
    assert asked == [1]
