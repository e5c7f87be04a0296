"""`recsys compare`: results of runs side by side, with all that is needed to judge and repeat them."""

import copy
import json
import math
from pathlib import Path

import pytest
import yaml

from recsys_lightning.analysis.compare import (
    best_cells,
    body,
    header,
    markdown_report,
    markdown_table,
    rows,
)
from recsys_lightning.analysis.groups import Group, Run, Score, group_runs
from recsys_lightning.analysis.published import TABLE_2, published_rows
from recsys_lightning.cli import main
from recsys_lightning.errors import InputError

COBRA = {
    "run": "runs/cobra/beauty",
    "model": "COBRA",
    "seed": 7,
    "metrics": {
        "val/recall@5": 0.0612,
        "test/recall@5": 0.04321,
        "test/ndcg@5": 0.0298,
        "test-unseen/recall@5": 0.05,
        "test-unseen/ndcg@5": 0.0355,
    },
    "data": {
        "source": "amazon2014-beauty",
        "num_users": 22363,
        "fingerprint": "0123456789abcdef" * 4,
        "text_encoder": "SentenceTransformer folder:ab12 max_tokens=None normalize=True",
    },
    "seconds": 130.5,
    "seconds_by_command": {"fit": 120.4, "test": 10.1},
    "hardware": {"devices": 1, "gpu": "NVIDIA H200", "cpu": "x86_64", "cpu_cores": 16, "torch": "2.13.0"},
    "code": {"version": "0.1.0", "sha256": "fedcba9876543210" * 4, "commit": "751c3ed0a1b2-dirty"},
    "epochs": 12,
    "steps": 1056,
    "parameters": 3_456_789,
    "config": {"seed_everything": 7, "model": {"init_args": {"warmup_steps": 500}}},
}
POPULARITY = {
    **COBRA,
    "run": "runs/popularity/beauty",
    "model": "Popularity",
    "seed": None,
    "metrics": {"test/recall@5": 0.0075, "val/recall@5": 0.01},
    "data": {**COBRA["data"], "text_encoder": None},
    "hardware": {**COBRA["hardware"], "gpu": None},
    "code": {**COBRA["code"], "commit": None},
    "config": {"seed_everything": None},
}
METRICS = ["recall@5", "ndcg@5"]
NAMES = ("runs/cobra/beauty", "runs/popularity/beauty")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two run folders, by their paths from the working directory."""
    monkeypatch.chdir(tmp_path)
    made = [Path(name) for name in NAMES]
    for folder, results in zip(made, (COBRA, POPULARITY), strict=True):
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    return made


def cells(report: str, first: str) -> list[list[str]]:
    """The rows of the Markdown tables of a report whose first cell is `first`."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    return [line for line in lines if line[0] == first]


def groups_of(*results: dict) -> list[Group]:
    return group_runs([Run(result["run"], Path(result["run"]), result) for result in results])


def report_of(*results: dict) -> str:
    groups = groups_of(*results)
    table = markdown_table(header(METRICS), body(rows(groups, "test", METRICS)))
    return markdown_report("Beauty", "recsys compare x", groups, [table])


def test_a_run_has_a_row_over_all_items_and_one_over_unseen_ones():
    assert header(METRICS) == ["run", "model", "split", "seeds", "recall@5", "ndcg@5"]
    assert body(rows(groups_of(COBRA, POPULARITY), "test", METRICS)) == [
        ["runs/cobra/beauty", "COBRA", "test", "1", "0.0432", "0.0298"],
        ["runs/cobra/beauty", "COBRA", "test-unseen", "1", "0.0500", "0.0355"],
        ["runs/popularity/beauty", "Popularity", "test", "1", "0.0075", "-"],
    ]


def test_a_metric_of_0_is_a_value_and_not_a_gap():
    found = body(rows(groups_of({**COBRA, "metrics": {"test/ndcg@5": 0.0}}), "test", ["ndcg@5"]))
    assert [row[4:] for row in found] == [["0.0000"]]


def test_a_metric_of_no_user_is_no_value():
    metrics = {"test/ndcg@5": 0.1, "test/cold-item/ndcg@5": math.nan}
    found = body(rows(groups_of({**COBRA, "metrics": metrics}), "test", ["ndcg@5", "cold-item/ndcg@5"]))
    assert [row[4:] for row in found] == [["0.1000", "-"]]


def test_slices_and_metrics_of_lists_are_named_without_the_stage():
    metrics = {"test/tail/recall@10": 0.01, "test/coverage@10": 0.4, "test/users": 22363.0, "test/novelty@10": 12.3456}
    metrics["test/semantic-id/recall@10"] = 0.07
    names = ["tail/recall@10", "coverage@10", "users", "novelty@10", "semantic-id/recall@10"]
    found = body(rows(groups_of({**COBRA, "metrics": metrics}), "test", names))
    assert [row[4:] for row in found] == [["0.0100", "0.4000", "22363", "12.35", "0.0700"]]


def test_the_stage_is_the_users_choice():
    found = rows(groups_of(COBRA, POPULARITY), "val", ["recall@5"])
    assert [row.scores[0] for row in found if row.split == "val"] == [Score((0.0612,)), Score((0.01,))]


def test_an_unknown_metric_names_those_there_are():
    with pytest.raises(InputError, match=r"recall@7.*test/recall@5.*recsys test.*--stage val"):
        rows(groups_of(COBRA, POPULARITY), "test", ["recall@7"])


# ------------------------------------------------------------------------------------------------------ seeds of a row


def of_seed(seed: int, metrics: dict[str, float], **settings: object) -> dict:
    """COBRA trained with another seed, and with other settings where there are any."""
    config = {**COBRA["config"], **settings, "seed_everything": seed}
    return {**COBRA, "run": f"runs/cobra/beauty-seed{seed}", "seed": seed, "metrics": metrics, "config": config}


def test_seeds_share_a_row_of_mean_and_deviation():
    runs = [of_seed(seed, {"test/recall@5": value}) for seed, value in ((42, 0.040), (43, 0.043), (44, 0.052))]
    row = ["runs/cobra/beauty-seed*", "COBRA", "test", "3", "0.0450 ± 0.0062"]
    assert body(rows(groups_of(*runs), "test", ["recall@5"])) == [row]


def test_a_metric_that_some_seeds_lack_says_of_how_many_it_is():
    runs = [of_seed(1, {"test/recall@5": 0.1}), of_seed(2, {"test/recall@5": 0.3}), of_seed(3, {"test/recall@10": 0.5})]
    assert body(rows(groups_of(*runs), "test", ["recall@5", "recall@10"]))[0][3:] == [
        "3",
        "0.2000 ± 0.1414 (n=2)",
        "0.5000 (n=1)",
    ]


# ---------------------------------------------------------------------------------------------------------- best values


def test_the_best_of_each_column_and_split_is_bold():
    worse = {**POPULARITY, "metrics": {"test/recall@5": 0.0075, "test/ndcg@5": 0.09, "test-unseen/recall@5": 0.2}}
    table = rows(groups_of(COBRA, worse), "test", METRICS)
    best = best_cells(table, METRICS)
    #         COBRA's recall, popularity's ndcg, popularity's unseen recall; unseen ndcg has one value only
    assert best == {(0, 4), (2, 5), (3, 4)}
    lines = markdown_table(header(METRICS), body(table), best).splitlines()[2:]
    assert [line.split(" | ")[4:] for line in lines] == [
        ["**0.0432**", "0.0298 |"],
        ["0.0500", "0.0355 |"],
        ["0.0075", "**0.0900** |"],
        ["**0.2000**", "- |"],
    ]


@pytest.mark.parametrize(
    ("metric", "best"),
    [("tail/recall@10", {1}), ("coverage@10", {1}), ("gini@10", {0}), ("collision_rate", {0}), ("novelty@10", set())],
)
def test_what_is_best_depends_on_the_metric(metric, best):
    results = [of_seed(1, {f"test/{metric}": value}, max_epochs=at) for at, value in enumerate((0.2, 0.4))]
    table = rows(groups_of(*results), "test", [metric])
    assert {line for line, _ in best_cells(table, [metric])} == best


def test_values_that_print_alike_are_equally_good_and_equal_rows_have_no_best():
    values = (0.04321, 0.04319, 0.01)
    results = [of_seed(1, {"test/recall@5": value}, max_epochs=at) for at, value in enumerate(values)]
    assert best_cells(rows(groups_of(*results), "test", ["recall@5"]), ["recall@5"]) == {(0, 4), (1, 4)}
    assert best_cells(rows(groups_of(*results[:2]), "test", ["recall@5"]), ["recall@5"]) == set()


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_says_how_every_number_was_made():
    report = report_of(COBRA, POPULARITY)
    assert report.startswith("# Beauty\n")
    everything, unseen, provenance = cells(report, "runs/cobra/beauty")
    assert everything[2:] == ["test", "1", "0.0432", "0.0298"]
    assert unseen[2:] == ["test-unseen", "1", "0.0500", "0.0355"]
    titles = cells(report, "run")[1]
    assert dict(zip(titles, provenance, strict=True)) == {
        "run": "runs/cobra/beauty",
        "seed": "7",
        "epochs": "12",
        "steps": "1056",
        "parameters": "3456789",
        "seconds": "fit 120, test 10",
        "hardware": "1 x NVIDIA H200, torch 2.13.0",
        "data": "amazon2014-beauty 0123456789ab",
        "text encoder": "SentenceTransformer folder:ab12 max_tokens=None normalize=True",
        "code": "0.1.0 751c3ed0a1b2-dirty fedcba987654",
    }
    assert report.count("<details>") == report.count("</details>") == 2
    settings = report.split("settings of runs/cobra/beauty</summary>")[1].split("```")[1].removeprefix("yaml\n")
    assert yaml.safe_load(settings) == COBRA["config"]


def test_the_report_does_without_a_gpu_a_seed_a_text_encoder_and_a_commit():
    provenance = cells(report_of(POPULARITY), "runs/popularity/beauty")[1]
    assert provenance[1] == "-"
    assert provenance[6] == "1 x 16 CPU cores (x86_64), torch 2.13.0"
    assert provenance[8] == "none"
    assert "None" not in provenance[9]
    assert provenance[9].split() == ["0.1.0", "fedcba987654"]


def test_a_report_does_not_tell_where_on_a_machine_things_are():
    model = {"init_args": {"semantic_ids": "/home/somebody/secret/rqvae/ids.safetensors"}}
    found = report_of(of_seed(1, {"test/recall@5": 0.04}, model=model))
    assert "somebody" not in found
    assert "rqvae/ids.safetensors" in found


# -------------------------------------------------------------------------------------------------------- the command


def test_compare_prints_a_table_and_writes_the_report(folders, capsys):
    command = ["compare", *map(str, folders), "--metrics", *METRICS, "--title", "Beauty", "--output", "new/c.md"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for word in ("Beauty", "COBRA", "Popularity", "0.0432", "0.0075", "-"):
        assert word in printed
    written = Path("new/c.md").read_text()
    assert f"`recsys {' '.join(command)}`" in written
    assert "![Beauty](c.png)" in written
    unbold = written.replace("**", "")
    assert cells(unbold, NAMES[0]) == cells(report_of(COBRA, POPULARITY), NAMES[0])
    assert cells(written, NAMES[0])[0][4] == "**0.0432**"
    assert sorted(path.name for path in Path("new").iterdir()) == ["c.csv", "c.md", "c.png"]


def test_runs_without_ranks_are_compared_without_a_test_which_is_said(folders, capsys):
    """As runs of version 0.1.0 are."""
    assert main(["compare", *map(str, folders), "--metrics", *METRICS]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Difference from" not in printed
    for name in NAMES:
        assert f"no paired test of {name}: {name} has no ranks-test.parquet, which recsys test writes" in printed


def test_compare_warns_of_runs_on_other_data_in_table_and_report(folders, capsys):
    other = {**POPULARITY, "data": {**COBRA["data"], "fingerprint": "fedcba987654" * 5}}
    (folders[1] / "results.json").write_text(json.dumps(other))
    assert main(["compare", *map(str, folders), "--metrics", "recall@5", "--output", "c.md"]) == 0
    assert "Not comparable: the runs were measured on different data" in " ".join(capsys.readouterr().out.split())
    assert "**Not comparable**: the runs were measured on different data" in Path("c.md").read_text()


def test_names_in_a_table_are_not_read_as_markup(folders, capsys):
    Path("runs/[red]a|b").mkdir()
    Path("runs/[red]a|b/results.json").write_text(json.dumps(COBRA))
    assert main(["compare", "runs/[red]a|b", "--metrics", "recall@5", "--output", "c.md"]) == 0
    assert "[red]a|b" in capsys.readouterr().out
    assert "| runs/[red]a\\|b | COBRA |" in Path("c.md").read_text()


def test_published_rows_stand_below_ours(folders, capsys):
    assert main(["compare", str(folders[0]), "--metrics", "recall@5", "recall@50", "--published", "beauty"]) == 0
    printed = capsys.readouterr().out
    assert "0.0432" in printed
    assert "0.0537" in printed  # COBRA's Recall@5 in the paper
    assert body(published_rows("beauty", ["recall@5", "recall@50"]))[-1][1:] == ["COBRA", "test", "-", "0.0537", "-"]


def test_a_report_says_what_share_of_the_paper_a_run_reaches(folders, tmp_path):
    output = tmp_path / "c.md"
    assert main(["compare", str(folders[0]), "--published", "beauty", "--output", str(output)]) == 0
    # 0.04321 of 0.0537 and 0.0298 of 0.0395
    assert "share of COBRA's row in the paper: recall@5 80%, ndcg@5 75%." in output.read_text()


def test_the_papers_own_gains_over_tiger_follow_from_the_published_rows():
    """The paper's text: +18.3 % Recall@5 on Beauty, +15.5 % on Sports, +18.8 % on Toys over TIGER."""
    gains = {name: rows["COBRA"][0] / rows["TIGER"][0] - 1 for name, rows in TABLE_2.items()}
    assert {name: round(100 * gain, 1) for name, gain in gains.items()} == {
        "beauty": 18.3,
        "sports": 15.5,
        "toys": 18.8,
    }


def test_compare_reads_one_run_and_another_stage(folders, capsys):
    assert main(["compare", str(folders[0] / "results.json"), "--stage", "val", "--metrics", "recall@5"]) == 0
    printed = capsys.readouterr().out
    assert "0.0612" in printed
    assert "0.0432" not in printed


def break_file(text: str):
    def change(folder: Path) -> None:
        (folder / "results.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda folder: (folder / "results.json").unlink(), "", "no {file}: a run folder has one after `recsys fit`"),
        (break_file('{"metrics": {'), "", "{file} is not JSON: "),
        (break_file("[1, 2]"), "", "{file} holds no metrics"),
        (break_file('{"run": "x"}'), "", "{file} holds no metrics"),
        (break_file(json.dumps({**COBRA, "metrics": {"test/recall@5": "0.1"}})), "", "{file}: its metrics are not num"),
        (lambda folder: None, "--metrics recall@7", "none of ['test/recall@7', 'test-unseen/recall@7'] in these runs"),
        (lambda folder: None, "--stage train", "compare: argument --stage: invalid choice: 'train'"),
        (lambda folder: None, "--stage val --published toys", "compare: the paper prints test metrics"),
        (lambda folder: None, "--metrik recall@5", "compare: unrecognized arguments: --metrik"),
        (lambda folder: None, "--metrics recall@5 recall@5", "compare: --metrics recall@5 recall@5: one is named"),
        (lambda folder: None, "--baseline runs/no", "--baseline runs/no is none of the runs that are compared"),
        (lambda folder: None, "--resamples 99", "compare: --resamples 99: an interval needs at least 100"),
        (lambda folder: None, "--seed -1", "compare: --seed -1: must be 0 or more"),
        (lambda folder: None, "--output c.csv", "compare: --output c.csv: name the Markdown file"),
    ],
    ids=[
        "no results",
        "cut off",
        "another JSON",
        "no metrics",
        "no numbers",
        "no such metric",
        "no such stage",
        "published",
        "no such option",
        "twice",
        "baseline",
        "resamples",
        "seed",
        "output",
    ],
)
def test_compare_says_what_is_wrong_on_one_line(folders, capsys, change, options, says):
    change(folders[0])
    assert main(["compare", *map(str, folders), *options.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("recsys: error: " + says.format(file=folders[0] / "results.json"))
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_compare_without_a_folder_names_the_missing_file(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("key", sorted(COBRA))
def test_a_file_that_lacks_a_part_is_refused_or_shown_without_it(folders, tmp_path, capsys, key):
    """Never a traceback: results.json may be from an older version or made by hand."""
    results = copy.deepcopy(COBRA)
    del results[key]
    (folders[0] / "results.json").write_text(json.dumps(results))
    status = main(["compare", str(folders[0]), "--metrics", "recall@5", "--output", str(tmp_path / "c.md")])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) in ((0, 0), (2, 1))
    assert status == 0 or key in error


def test_help_exits_with_0(capsys):
    assert main(["compare", "--help"]) == 0
    assert "--output" in capsys.readouterr().out
