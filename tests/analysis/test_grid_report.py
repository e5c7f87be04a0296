"""The report of a grid has a row a variant, in the order of the grid, and says what is not in it and why."""

import json
from pathlib import Path

import polars as pl
import pytest

from recsys_lightning.analysis.grid import Grid, load_grid
from recsys_lightning.analysis.grid_report import report
from recsys_lightning.analysis.grid_runs import GridRun, expand

TEXT = """
title: Small
base: base.yaml
seeds: [1, 2]
set: {trainer.max_epochs: 3}
first:
  ids: {base: ids.yaml, set: {codes: 8}}
variants:
  whole: {}
  part: {weights: whole, set: {model.beams: 1}}
  other: {base: ids.yaml, set: {model.paths: dense}}
metrics: [recall@5, ndcg@10]
report: out/small.md
"""


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Grid:
    monkeypatch.chdir(tmp_path)
    for name in ("base.yaml", "ids.yaml"):
        Path(name).write_text("run_dir: x\n")
    Path("grid.yaml").write_text(TEXT)
    return load_grid(Path("grid.yaml"))


@pytest.fixture
def runs(grid, write_run) -> dict[str, GridRun]:
    """All finished: every user's answer is in place 1 for `whole`, in place 6 for `part`, nowhere for `other`."""
    expanded = expand(grid, Path("runs/small"))
    for run in expanded.values():
        if not run.entry.first:
            ranks = [{"whole": 1, "part": 6, "other": 0}[run.entry.name]] * 40
            write_run(run.folder, ranks, ranks, run.seed)
    return expanded


def test_there_is_a_row_a_variant_and_all_are_tested_against_the_first(grid, runs):
    made = report(grid, runs, {}, "recsys ablate grid.yaml")
    numbers = pl.read_csv(made.files[Path("out/small.csv")])
    found = numbers.filter((pl.col("split") == "test") & (pl.col("metric") == "recall@5"))
    assert found["run"].to_list() == ["whole", "part", "other"]
    assert found["mean"].to_list() == [1.0, 0.0, 0.0]
    assert found["n"].to_list() == [2, 2, 2], "seeds of a variant are one row"
    assert found["baseline"].to_list() == [None, "whole", "whole"]
    assert found["difference"].to_list() == [None, -1.0, -1.0]


def test_the_report_says_what_each_variant_changes(grid, runs):
    text = report(grid, runs, {}, "recsys ablate grid.yaml").files[Path("out/small.md")].decode()
    assert text.startswith("# Small\n\nWritten by `recsys ablate grid.yaml`.")
    for line in (
        "| every variant | from base.yaml | `trainer.max_epochs=3` |",
        "| whole | trained | - |",
        "| part | tested with the weights of whole | `model.beams=1` |",
        "| other | trained, from ids.yaml | `model.paths=dense` |",
        "| ids | trained once, from ids.yaml | `codes=8` |",
        "![Small](small.png)",
        "## Difference from whole, over the same users",
    ):
        assert line in text, line


def test_settings_are_shown_in_full_once_and_then_by_what_differs(grid, runs):
    for run in list(runs.values())[1:]:
        path = run.folder / "results.json"
        results = json.loads(path.read_text())
        results["config"] |= {"trainer": {"max_epochs": 3}, "run_dir": str(run.folder)}
        path.write_text(json.dumps(results))
    text = report(grid, runs, {}, "x").files[Path("out/small.md")].decode()
    assert text.count("max_epochs: 3") == 1
    details = text.partition("<summary>settings of whole-seed2</summary>")[2].partition("</details>")[0]
    assert "as whole-seed1, but for:\n  seed_everything: 2\n```" in details


def test_the_picture_is_one(grid, runs):
    assert report(grid, runs, {}, "x").files[Path("out/small.png")].startswith(b"\x89PNG")


def test_what_is_not_finished_is_named_and_the_rest_compared(grid, runs):
    missing = {
        "whole-seed1": "failed: no memory",
        "whole-seed2": "failed: no memory",
        "other-seed2": "not run: needs a",
    }
    made = report(grid, runs, missing, "x")
    numbers = pl.read_csv(made.files[Path("out/small.csv")]).filter(pl.col("metric") == "recall@5")
    assert dict(numbers.filter(pl.col("split") == "test").select("run", "n").iter_rows()) == {"part": 2, "other": 1}
    assert set(numbers["baseline"].unique()) == {None, "part"}, "the first that there is"
    assert "Not in this table: `whole-seed1`, failed: no memory." in made.remarks
    assert "Not in this table: `other-seed2`, not run: needs a." in made.files[Path("out/small.md")].decode()


def test_rows_by_different_code_are_told(grid, runs):
    path = runs["part-seed1"].folder / "results.json"
    path.write_text(path.read_text().replace("1" * 64, "2" * 64))
    remarks = report(grid, runs, {}, "x").remarks
    assert "The runs of `part` were made by different versions of the code." in remarks
    assert "The rows were made by different versions of the code: see the last column below." in remarks


def test_the_rows_of_the_paper_stand_beside_if_asked_for(grid, runs):
    Path("grid.yaml").write_text(TEXT + "published: beauty\n")
    text = report(load_grid(Path("grid.yaml")), runs, {}, "x").files[Path("out/small.md")].decode()
    assert "| arXiv:2503.02453 Table 2 | COBRA | test |" in text
    assert "`whole` reaches this share of COBRA's row in the paper: recall@5" in text


def test_without_a_report_there_are_tables_only(grid, runs):
    Path("grid.yaml").write_text(TEXT.replace("report: out/small.md", ""))
    made = report(load_grid(Path("grid.yaml")), runs, {}, "x")
    assert made.files == {}
    assert len(made.tables) == 2
