"""The benchmark of COBRA's speed runs and writes what it measured; the figures themselves are no test."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("cobra_speed.py")
TOY = {
    "users": 2,
    "items": 3,
    "tokens": 5,
    "dim": 8,
    "feedforward": 16,
    "decoder_layers": 2,
    "decoder_heads": 2,
    "encoder_heads": 2,
    "vocabulary": 40,
    "codes": 4,
    "catalogue": 30,
    "beams": 3,
}


def test_the_benchmark_writes_its_tables(tmp_path, monkeypatch, capsys):
    """On the way it also checks that generation finds what it finds without a cache."""
    output = tmp_path / "speed.md"
    options = [word for name, value in TOY.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--repeats", "1", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = output.read_text()
    assert "users 2, items 3, tokens 5, dim 8" in written
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    compared = [row for row in rows if row[0].startswith(("training step", "generate,", "the same"))][:5]
    assert len(compared) == 5
    for _, ours, theirs, ratio, *_ in compared:
        assert float(ratio) == pytest.approx(float(theirs) / float(ours), rel=0.02, abs=0.06)
