"""`recsys compare`: results of runs side by side, with all that is needed to judge and repeat them."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from recsys_lightning.analysis.compare import header, load_results, markdown_report, rows
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


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two run folders."""
    made = [tmp_path / "cobra", tmp_path / "popularity"]
    for folder, results in zip(made, (COBRA, POPULARITY), strict=True):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
    return made


def cells(report: str, first: str) -> list[list[str]]:
    """The rows of the Markdown tables of a report whose first cell is `first`."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("|")]
    return [line for line in lines if line[0] == first]


def report_of(runs: list[dict], title: str = "Beauty") -> str:
    return markdown_report(title, "recsys compare x", runs, header(METRICS), rows(runs, "test", METRICS))


def test_a_run_is_its_folder_or_its_results_file(folders):
    assert load_results(folders[0]) == COBRA
    assert load_results(str(folders[0])) == load_results(folders[0] / "results.json")


def test_a_run_has_a_row_over_all_items_and_one_over_unseen_ones():
    assert header(METRICS) == ["run", "model", "split", "recall@5", "ndcg@5"]
    assert rows([COBRA, POPULARITY], "test", METRICS) == [
        ["runs/cobra/beauty", "COBRA", "test", "0.0432", "0.0298"],
        ["runs/cobra/beauty", "COBRA", "test-unseen", "0.0500", "0.0355"],
        ["runs/popularity/beauty", "Popularity", "test", "0.0075", "-"],
    ]


def test_a_metric_of_0_is_a_value_and_not_a_gap():
    found = rows([{**COBRA, "metrics": {"test/ndcg@5": 0.0}}], "test", ["ndcg@5"])
    assert [row[3:] for row in found] == [["0.0000"]]


def test_the_stage_is_the_users_choice():
    found = rows([COBRA, POPULARITY], "val", ["recall@5"])
    assert [row[3] for row in found if row[2] == "val"] == ["0.0612", "0.0100"]


def test_an_unknown_metric_names_those_there_are():
    with pytest.raises(InputError, match=r"recall@7.*test/recall@5.*recsys test.*--stage val"):
        rows([COBRA, POPULARITY], "test", ["recall@7"])


def test_the_report_says_how_every_number_was_made():
    report = report_of([COBRA, POPULARITY])
    assert report.startswith("# Beauty\n")
    everything, unseen, provenance = cells(report, "runs/cobra/beauty")
    assert everything[2:] == ["test", "0.0432", "0.0298"]
    assert unseen[2:] == ["test-unseen", "0.0500", "0.0355"]
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
    provenance = cells(report_of([POPULARITY]), "runs/popularity/beauty")[1]
    assert provenance[1] == "-"
    assert provenance[6] == "1 x 16 CPU cores (x86_64), torch 2.13.0"
    assert provenance[8] == "none"
    assert "None" not in provenance[9]
    assert provenance[9].split() == ["0.1.0", "fedcba987654"]


# -------------------------------------------------------------------------------------------------------- the command


def test_compare_prints_a_table_and_writes_the_report(folders, tmp_path, capsys):
    output = tmp_path / "new" / "comparison.md"
    command = ["compare", *map(str, folders), "--metrics", *METRICS, "--title", "Beauty", "--output", str(output)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for word in ("Beauty", "COBRA", "Popularity", "0.0432", "0.0075", "-"):
        assert word in printed
    written = output.read_text()
    assert written.replace(f"recsys {' '.join(command)}", "recsys compare x") == report_of([COBRA, POPULARITY])


def test_published_rows_stand_below_ours(folders, capsys):
    assert main(["compare", str(folders[0]), "--metrics", "recall@5", "recall@50", "--published", "beauty"]) == 0
    printed = capsys.readouterr().out
    assert "0.0432" in printed
    assert "0.0537" in printed  # COBRA's Recall@5 in the paper
    assert published_rows("beauty", ["recall@5", "recall@50"])[-1][1:] == ["COBRA", "test", "0.0537", "-"]


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
        (lambda folder: None, "--metrics recall@7", "none of ['test/recall@7', 'test-unseen/recall@7'] in these runs"),
        (lambda folder: None, "--stage train", "compare: argument --stage: invalid choice: 'train'"),
        (lambda folder: None, "--stage val --published toys", "compare: the paper prints test metrics"),
        (lambda folder: None, "--metrik recall@5", "compare: unrecognized arguments: --metrik"),
    ],
    ids=[
        "no results",
        "cut off",
        "another JSON",
        "no metrics",
        "no such metric",
        "no such stage",
        "published",
        "no such option",
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
