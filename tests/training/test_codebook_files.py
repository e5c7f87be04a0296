"""What stands in the files of the codebooks, and what loggers are shown, is what was counted."""

import json
import time

import polars as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.health import codebook_state
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.codebook_files import (
    EVENTS_FILE,
    USAGE_FILE,
    CodebookEvent,
    CodebookFiles,
    num_events,
    show_usage,
)

CODES = torch.tensor([[0, 0], [0, 1], [0, 2], [2, 0], [2, 1]])  # padding first: items have codes 0, 0, 2, 2 and so on


def state():
    return codebook_state(SemanticIds(CODES, 3, "", "by hand"))


def event(step: int) -> CodebookEvent:
    before = {"perplexity": 1.0, "dead_codes": 2}
    return CodebookEvent(
        epoch=1, step=step, level=1, finding="dead_codes", action="warn", codes=(), before=before, after={}, message="!"
    )


def test_usage_has_a_row_a_code_a_check(tmp_path):
    files = CodebookFiles(tmp_path / "new folder")
    files.add_usage(0, 10, state().usage.counts)
    files.add_usage(1, 20, state().usage.counts * 2)
    found = pl.read_parquet(tmp_path / "new folder" / USAGE_FILE)
    assert found.columns == ["epoch", "step", "level", "code", "items"]
    first = [(0, 10, 1, 0, 2), (0, 10, 1, 1, 0), (0, 10, 1, 2, 2), (0, 10, 2, 0, 1), (0, 10, 2, 1, 2), (0, 10, 2, 2, 1)]
    assert found.rows() == first + [(1, 20, *row[2:4], 2 * row[4]) for row in first]


def test_an_epoch_that_is_checked_again_takes_the_place_of_what_was_known_of_it(tmp_path):
    """Also where no optimizer counts steps, as of codebooks that learn by moving averages alone."""
    files = CodebookFiles(tmp_path)
    for epoch in (0, 1, 2, 1):
        files.add_usage(epoch, 0, state().usage.counts)
    found = pl.read_parquet(tmp_path / USAGE_FILE)
    assert found["epoch"].unique().sort().to_list() == [0, 1]
    assert found.height == 2 * 2 * 3


def test_events_are_one_object_a_line(tmp_path):
    files = CodebookFiles(tmp_path)
    assert num_events(tmp_path) == 0
    files.add_events([])
    assert not (tmp_path / EVENTS_FILE).exists()
    files.add_events([event(1), event(2)])
    files.add_events([event(3)])
    lines = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = ["epoch", "step", "level", "finding", "action", "codes", "before", "after", "message"]
    assert list(lines[0]) == names
    assert lines[0]["before"] == {"perplexity": 1.0, "dead_codes": 2}
    assert num_events(tmp_path) == 3


def test_a_training_that_goes_on_keeps_what_is_before_it_and_a_new_one_nothing(tmp_path):
    files = CodebookFiles(tmp_path)
    for step in (1, 2, 3):
        files.add_usage(step, step, state().usage.counts)
        files.add_events([event(step)])
    resumed = CodebookFiles(tmp_path, resumed_at=2)
    resumed.add_usage(4, 4, state().usage.counts)
    resumed.add_events([event(4)])
    assert pl.read_parquet(tmp_path / USAGE_FILE)["step"].unique().sort().to_list() == [1, 2, 4]
    assert [json.loads(line)["step"] for line in (tmp_path / EVENTS_FILE).read_text().splitlines()] == [1, 2, 4]
    CodebookFiles(tmp_path)
    assert not list(tmp_path.iterdir())
    CodebookFiles(tmp_path, resumed_at=2)


@pytest.mark.parametrize(
    ("name", "content"), [(USAGE_FILE, b"PAR1 no"), (EVENTS_FILE, b'{"step": 1}\n{"st'), (EVENTS_FILE, b"[]\n")]
)
def test_damaged_files_of_a_training_that_goes_on_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path / name} .*remove it"):
        CodebookFiles(tmp_path, resumed_at=2)


def test_three_hundred_checks_of_3_times_256_codes_are_under_a_megabyte_and_quickly_written(tmp_path):
    files = CodebookFiles(tmp_path)
    counts = torch.randint(0, 100, (300, 3, 256), generator=torch.Generator().manual_seed(0))
    files.usage = pl.DataFrame(
        {
            "epoch": torch.arange(299).repeat_interleave(768).tolist(),
            "step": torch.arange(299).repeat_interleave(768).tolist(),
            "level": torch.arange(1, 4).repeat_interleave(256).repeat(299).tolist(),
            "code": torch.arange(256).repeat(3 * 299).tolist(),
            "items": counts[:-1].flatten().tolist(),
        }
    ).cast(files.usage.schema)
    start = time.process_time()
    files.add_usage(299, 299, counts[-1])
    assert time.process_time() - start < 1
    assert pl.read_parquet(tmp_path / USAGE_FILE).height == 300 * 768
    assert (tmp_path / USAGE_FILE).stat().st_size < 1_000_000


# --------------------------------------------------------------------------------------------------------- loggers


def test_tensorboard_gets_histograms_of_the_items_a_code_and_a_table(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    show_usage([logger], state(), 7)
    logger.finalize("success")
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    (first,) = read.Histograms("codebook/items_per_code@1")
    assert first.step == 7
    assert (first.histogram_value.num, first.histogram_value.min, first.histogram_value.max) == (3, 0, 2)
    assert first.histogram_value.sum == 4, "items"
    text = read.Tensors("codebook/usage/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 1 | 3 | 1 | 2.0 | 0.631 |" in text


def test_wandb_gets_histograms_and_a_table_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True, settings=wandb.Settings(silent=True))
    logged, log = {}, logger.experiment.log
    monkeypatch.setattr(logger.experiment, "log", lambda values: logged.update(values) or log(values))
    show_usage([logger], state(), 7)
    logger.experiment.finish()
    (table,) = tmp_path.rglob("media/table/codebook/*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["level", "code", "items"]
    assert found["data"] == [[1, 0, 2], [1, 1, 0], [1, 2, 2], [2, 0, 1], [2, 1, 2], [2, 2, 1]]
    assert logged["trainer/global_step"] == 7
    one = logged["codebook/items_per_code@1"]
    assert isinstance(one, wandb.Histogram)
    filled = [(start, count) for start, count in zip(one.bins, one.histogram, strict=False) if count]
    assert [count for _, count in filled] == [1, 2], "one code has no item, two have two"
    assert filled[0][0] == 0


def test_a_logger_that_holds_numbers_alone_is_left_alone(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    show_usage([logger], state(), 7)
    logger.save()
    assert {path.name for path in tmp_path.iterdir()} <= {"hparams.yaml"}
