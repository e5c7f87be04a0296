"""The benchmark of an evaluation runs and writes what it measured; the figures themselves are no test."""

import runpy
import sys
from pathlib import Path

import yaml

SCRIPT = Path(__file__).with_name("evaluation.py")


def test_the_benchmark_writes_its_table(tmp_path, monkeypatch, capsys):
    source = {"class_path": "Synthetic", "init_args": {"num_users": 60}}
    settings = {"source": source, "cache_dir": str(tmp_path / "cache"), "k_core": 0}
    config = {"data": {"class_path": "SequenceDataModule", "init_args": settings}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "speed.md"
    words = [str(SCRIPT), str(tmp_path / "experiment.yaml"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = output.read_text()
    assert "60 users" in written
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [4] * 4  # titles, rule and two rows
    assert all(float(value) >= 0 for row in rows[2:] for value in row[1:])
