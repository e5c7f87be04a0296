"""`recsys benchmark retrieval` from end to end, on catalogues of a few hundred items."""

import csv
import importlib.util
import sys
from itertools import product

import pytest
import torch

from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.retrieval.soft_search import soft_search

SMALL = [
    *["--items", 200, 400, "--interests", 1, 2, 4, "--dim", 8, "--k", 5, "--users", 12, "--batch", 8],
    *["--repeats", 6, "--seconds", 5, "--device", "cpu"],
]
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs FAISS")


def table(report: str, heading: str) -> list[list[str]]:
    """The rows of the first Markdown table below a heading."""
    lines = report.split(f"## {heading}", 1)[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]


@needs_faiss
def test_report_table_and_pictures_are_written_and_hold_every_cell(recsys, tmp_path):
    output = tmp_path / "deep" / "latency report.md"
    done = recsys("benchmark", "retrieval", *SMALL, "--hnsw_limit", 300, "--output", output)
    assert done.status == 0, done.err
    names = {"latency report.md", "latency report.csv", "latency report-latency.png", "latency report-recall.png"}
    assert {path.name for path in output.parent.iterdir()} == names
    cells = list(csv.DictReader(output.with_suffix(".csv").open()))
    probes = {"200": (1, 2, 4), "400": (1, 2, 4, 8)}
    expected = set(product(("200", "400"), ("exact",), ("",), "124"))
    expected |= {(items, "ivf", f"nprobe={n}", k) for items in probes for n in probes[items] for k in "124"}
    expected |= set(product(("200", "400"), ("hnsw",), [f"efSearch={n}" for n in (16, 32, 64, 128)], "124"))
    assert {(c["items"], c["index"], c["parameters"], c["interests"]) for c in cells} == expected
    assert len(cells) == len(expected)

    report = output.read_text()
    assert len(table(report, "What soft search costs: one user")) == 3 * (3 + 2)
    assert len(table(report, "What soft search costs: batches of 8")) == 3 * (3 + 2)
    assert len(table(report, "Recall at equal latency")) == 2 * 3 * 3
    left_out = [cell for cell in cells if cell["left_out"]]
    assert {(cell["items"], cell["index"]) for cell in left_out} == {("400", "hnsw")}
    assert [row[:2] + row[3:] for row in table(report, "Left out")] == [
        ["400", "hnsw", "1, 2, 4", "building takes too long above --hnsw_limit 300 items"]
    ] * 4
    for cell in cells:
        if not cell["left_out"]:
            assert (cell["calls"], cell["batch_calls"], cell["recall_users"]) == ("6", "6", "6")
            assert float(cell["p50_ms"]) > 0
            assert float(cell["queries_per_second"]) == pytest.approx(
                float(cell["users_per_second"]) * int(cell["interests"])
            )
            assert float(cell["recall"]) == 1 if cell["index"] == "exact" else 0 < float(cell["recall"]) <= 1
            assert int(cell["index_bytes"]) >= 4 * 8 * int(cell["items"])
    assert "![latency report-latency.png](latency%20report-latency.png)" in report
    assert str(tmp_path) not in report
    assert "Nothing." not in report


@needs_faiss
def test_searching_more_lists_finds_more(recsys, tmp_path):
    output = tmp_path / "x.md"
    assert recsys("benchmark", "retrieval", *SMALL, "--indexes", "ivf", "--repeats", 12, "--output", output).status == 0
    cells = list(csv.DictReader(output.with_suffix(".csv").open()))
    recall = {
        int(c["parameters"][7:]): float(c["recall"]) for c in cells if (c["items"], c["interests"]) == ("400", "1")
    }
    assert recall[1] < recall[8] == 1.0


def test_the_exact_index_alone_needs_no_faiss_and_no_report(recsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = recsys("benchmark", "retrieval", *SMALL, "--indexes", "exact")
    assert done.status == 0, done.err
    assert "400 items, exact: K=4 takes" in done.out
    assert list(tmp_path.iterdir()) == []


@needs_faiss
def test_the_seed_decides_what_is_drawn(recsys, tmp_path):
    recalls = []
    for seed in (1, 1, 2):
        output = tmp_path / "x.md"
        given = ["--indexes", "ivf", "--items", 200, "--repeats", 12, "--seed", seed, "--output", output]
        assert recsys("benchmark", "retrieval", *SMALL, *given).status == 0
        recalls.append([cell["recall"] for cell in csv.DictReader(output.with_suffix(".csv").open())])
    assert recalls[0] == recalls[1] != recalls[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--indexes", "annoy"], "no index 'annoy'; --indexes takes exact, ivf, hnsw"),
        (["--k", 201], "--k 201 is more than the 200 items"),
        (["--interests", 0], "--interests 0 must be at least 1"),
        (["--items", "many"], "'many' is no whole number"),
        (["--items", 1.5], "'1.5' is no whole number"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--output", "x.csv"], "x.csv must be a file that ends in .md"),
        (["--speed", "fast"], "unrecognized arguments"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(recsys, given, message):
    assert message in recsys("benchmark", "retrieval", *SMALL, *given).error


def test_another_benchmark_is_refused(recsys):
    assert "invalid choice: 'training'" in recsys("benchmark", "training").error


def test_a_gpu_that_is_not_there_is_an_error(recsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cuda", "both"):
        given = [*SMALL[:-1], device]
        assert f"--device {device}: torch sees no GPU" in recsys("benchmark", "retrieval", *given).error


def test_faiss_that_is_not_there_is_named_before_anything_is_measured(recsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "recsys_lightning.retrieval.faiss_index", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("recsys_lightning.analysis.latency.synthetic_catalogue", None)
    assert "faiss" in recsys("benchmark", "retrieval", *SMALL, "--indexes", "exact", "ivf").error


def test_a_report_that_cannot_be_written_is_refused_at_once(recsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert (
        "choose another folder"
        in recsys("benchmark", "retrieval", *SMALL, "--output", tmp_path / "file" / "x.md").error
    )


def test_large_sizes_may_be_written_with_an_exponent(recsys):
    assert "is more than the 30 items" in recsys("benchmark", "retrieval", "--items", "3e1", "1e6").error


def test_help_names_every_option(recsys, capsys):
    done = recsys("benchmark", "--help")
    assert done.status == 0
    for option in ("items", "interests", "indexes", "device", "dim", "k", "users", "batch", "repeats", "seconds"):
        assert f"--{option}" in done.out


@needs_faiss
def test_cells_are_left_out_by_name_where_memory_is_short(recsys, tmp_path, monkeypatch):
    monkeypatch.setattr("recsys_lightning.analysis.latency.free_memory", lambda: 10_000)
    output = tmp_path / "x.md"
    assert recsys("benchmark", "retrieval", *SMALL, "--output", output).status == 0
    cells = list(csv.DictReader(output.with_suffix(".csv").open()))
    reasons = {(c["items"], c["index"]): c["left_out"] for c in cells}
    assert reasons["400", "exact"].startswith("the vectors alone need")
    assert reasons["200", "exact"] == ""
    assert "GB are free" in reasons["200", "hnsw"]


def test_the_threads_are_those_of_every_search(recsys, monkeypatch):
    seen = set()

    def counting(*given: object) -> Recommendations:
        seen.add(torch.get_num_threads())
        return soft_search(*given)

    monkeypatch.setattr("recsys_lightning.analysis.latency.soft_search", counting)
    for threads in (1, 2):
        seen.clear()
        assert recsys("benchmark", "retrieval", *SMALL, "--indexes", "exact", "--threads", threads).status == 0
        assert seen == {threads}


def test_cells_that_take_longer_than_their_seconds_are_left_out_by_name_and_the_report_is_written(recsys, tmp_path):
    output = tmp_path / "x.md"
    given = ["--indexes", "exact", "--items", 200, "--seconds", 1e-9, "--output", output]
    assert recsys("benchmark", "retrieval", *SMALL, *given).status == 0
    cells = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert [cell["calls"] for cell in cells] == ["0"] * 3
    assert all("one user: a call took" in cell["left_out"] for cell in cells[:1])
    assert all("one user: not tried" in cell["left_out"] for cell in cells[1:])
    assert [row[3] for row in table(output.read_text(), "Left out")] == ["1", "2, 4"]


def test_what_was_measured_is_on_disk_before_the_end(recsys, tmp_path, monkeypatch):
    output = tmp_path / "x.md"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recsys_lightning.analysis.latency_report.markdown_report", stop)
    given = [*SMALL, "--indexes", "exact", "--output", output]
    assert recsys("benchmark", "retrieval", *given).status == 130
    assert len(list(csv.DictReader(output.with_suffix(".csv").open()))) == 6
