"""Runs on disk, finished and under way, as the report reads them."""

import json
import os

import polars as pl
import pytest
import yaml

from recsys_lightning.analysis.report_sources import (
    EVENTS,
    USAGE,
    best_validation,
    is_finished,
    model_name,
    read_source,
)
from recsys_lightning.errors import InputError

CONFIG = {
    "seed_everything": 7,
    "model": {"class_path": "a.RecommenderModule", "init_args": {"model": {"class_path": "b.SASRec"}}},
    "checkpoint": {"monitor": "val/recall@10", "mode": "max"},
}


@pytest.fixture
def under_way(tmp_path):
    """A run folder as it is while training: settings, and metrics whose last line is half written."""
    folder = tmp_path / "runs" / "sasrec" / "seed7"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    lines = ["epoch,step,train/loss,val/recall@10", "0,49,2.5,", "0,92,,0.10", "1,185,,0.30", "2,270,,0.20", "3,299,1."]
    (folder / "metrics.csv").write_text("\n".join(lines))
    return folder


def test_a_run_under_way_has_the_metrics_of_its_best_validation_so_far(under_way):
    source = read_source(under_way)
    assert not source.finished
    assert source.run.results["model"] == "SASRec"
    assert source.run.results["seed"] == 7
    assert source.run.results["metrics"] == {"val/recall@10": 0.3}


def test_a_line_that_is_still_being_written_is_not_read(under_way):
    source = read_source(under_way)
    assert source.curve("val/recall@10") == ([92, 185, 270], [0.1, 0.3, 0.2])
    assert source.curve("train/loss") == ([49], [2.5])
    assert source.curve("never logged") == ([], [])


def test_values_that_are_no_numbers_are_left_out_of_a_curve(under_way):
    (under_way / "metrics.csv").write_text("step,train/loss\n1,nan\n2,inf\n3,1.5\n")
    assert read_source(under_way).curve("train/loss") == ([3], [1.5])


@pytest.mark.parametrize("text", [None, "", "epoch,step,tra"])
def test_before_the_first_line_of_metrics_there_are_no_curves(under_way, text):
    (under_way / "metrics.csv").unlink()
    if text is not None:
        (under_way / "metrics.csv").write_text(text)
    source = read_source(under_way)
    assert source.metrics.is_empty()
    assert source.run.results["metrics"] == {}


def test_of_a_metric_that_should_be_small_the_smallest_counts():
    metrics = pl.DataFrame({"val/loss": [3.0, 1.0, 2.0], "val/cells": [4.0, 5.0, 6.0]})
    chosen = {"checkpoint": {"monitor": "val/loss", "mode": "min"}}
    assert best_validation(metrics, chosen) == {"val/loss": 1.0, "val/cells": 5.0}
    assert best_validation(metrics, {}) == {"val/loss": 2.0, "val/cells": 6.0}, "the last where nothing says which"


def test_tokenizers_and_recommenders_are_named_by_their_class():
    tokenizer = {"model": {"class_path": "x.TokenizerModule", "init_args": {"tokenizer": {"class_path": "y.RQVAE"}}}}
    assert model_name(tokenizer) == "RQVAE"
    assert model_name(CONFIG) == "SASRec"


def test_events_are_read_up_to_the_line_being_written_and_broken_lines_are_counted(under_way):
    good = json.dumps({"step": 5, "finding": "dead_codes"})
    (under_way / EVENTS).write_text(f'{good}\nnot json\n{good}\n{{"step": 9, "fin')
    source = read_source(under_way)
    assert [event["step"] for event in source.events] == [5, 5]
    assert source.remarks == ("1 lines of codebook-events.jsonl are not JSON and are left out.",)


def test_a_usage_file_that_is_half_written_or_of_others_is_named_and_left_out(under_way):
    (under_way / USAGE).write_bytes(b"PAR1 half")
    source = read_source(under_way)
    assert source.usage is None
    assert "codebook-usage.parquet cannot be read" in source.remarks[0]
    pl.DataFrame({"epoch": [1]}).write_parquet(under_way / USAGE)
    assert "lacks step, level, code, items" in read_source(under_way).remarks[0]


def test_results_older_than_the_settings_are_those_of_a_training_before(write_run, tmp_path):
    folder = write_run(tmp_path / "model" / "seed1", [1, 0, 3], [1, 0, 2], 1)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    os.utime(folder / "results.json", (1, 1))
    assert not is_finished(folder)
    assert not read_source(folder, live=True).finished
    assert read_source(folder).finished, "a report on what there is takes the results there are"
    os.utime(folder / "config.yaml", (1, 1))
    assert is_finished(folder)


@pytest.mark.parametrize("with_folder", [True, False])
def test_what_is_no_run_is_refused(tmp_path, with_folder):
    folder = tmp_path / "nothing"
    if with_folder:
        folder.mkdir()
    with pytest.raises(InputError, match=r"no config\.yaml" if with_folder else "no run folder"):
        read_source(folder)
