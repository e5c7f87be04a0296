"""The picture of a comparison: there, of the right size, with everything in it that is compared."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from recsys_lightning.analysis import figures
from recsys_lightning.analysis.compare import Row
from recsys_lightning.analysis.figures import _wrapped, comparison_png
from recsys_lightning.analysis.groups import Score
from recsys_lightning.analysis.paired import Interval
from recsys_lightning.analysis.published import published_rows
from recsys_lightning.cli import main

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
METRICS = ["recall@5", "ndcg@5"]


def table_of(number: int, name: str = "runs/model-{}", seeds: int = 1) -> list[Row]:
    return [
        Row(name.format(at), "COBRA", split, seeds, tuple(Score((0.01 * at + add,) * seeds) for add in (0.02, 0.01)))
        for at in range(number)
        for split in ("test", "test-unseen")
    ]


def pixels(picture: bytes) -> np.ndarray:
    return np.rint(matplotlib.image.imread(io.BytesIO(picture), format="png") * 255).astype(int)  # (height, width, 4)


def count(picture: bytes, colour: tuple[int, int, int]) -> int:
    return int((pixels(picture)[:, :, :3] == colour).all(-1).sum())


def intervals_of(table: list[Row], half: float = 0.004) -> dict:
    return {
        (row.name, row.split, metric): Interval(score.mean, score.mean - half, score.mean + half)
        for row in table
        for metric, score in zip(METRICS, row.scores, strict=True)
    }


@pytest.mark.parametrize("number", [1, 2, 9])
def test_a_picture_is_1200_pixels_wide_and_as_high_as_its_rows_need(number):
    table = table_of(number)
    found = pixels(comparison_png("Beauty", table, METRICS, intervals_of(table)))
    assert found.shape[1] == 1200
    assert found.shape[0] >= 100 + 45 * number
    assert (found[0] == 255).all()  # light, opaque


def test_both_splits_are_drawn_each_in_its_colour():
    table = table_of(2)
    both = comparison_png("", table, METRICS, {})
    all_items = comparison_png("", table[::2], METRICS, {})
    assert count(both, BLUE) > 200
    assert count(both, ORANGE) > 200
    assert count(all_items, ORANGE) == 0


def test_intervals_deviations_seeds_and_printed_numbers_leave_their_marks():
    table = table_of(2)
    bare = count(comparison_png("", table, METRICS, {}), BLUE)
    narrow, wide = (count(comparison_png("", table, METRICS, intervals_of(table, half)), BLUE) for half in (3e-3, 6e-3))
    assert bare < narrow < wide
    seeds = [row._replace(num_runs=2, scores=(Score((0.01, 0.05)), Score((0.02, 0.03)))) for row in table]
    alike = [row._replace(scores=(Score((0.03, 0.03)), Score((0.025, 0.025)))) for row in seeds]
    apart, together = (comparison_png("", table, METRICS, {}) for table in (seeds, alike))
    bluish = [int((pixels(found)[:, :, 0] < 120).sum()) for found in (apart, together)]
    assert bluish[0] > bluish[1] + 100  # dashed bars, which deviations of nothing do not have
    dark = (0x33, 0x33, 0x33)
    one, four = ([*table, *published_rows("beauty", METRICS)[:number]] for number in (1, 4))
    hollow = [count(comparison_png("", rows, METRICS, {}), dark) for rows in (one, four)]
    assert hollow[1] > hollow[0] + 6 * 20  # six more hollow markers


@pytest.mark.parametrize("metrics", [1, 2, 3, 5])
def test_every_metric_has_a_panel(metrics):
    row = Row("run", "COBRA", "test", 1, (Score((0.3,)),) * metrics)
    alone = count(comparison_png("", [row._replace(scores=row.scores[:1])], ["recall@1"], {}), BLUE)
    found = comparison_png("", [row], [f"recall@{k}" for k in range(1, metrics + 1)], {})
    # Its dot is as large as the one of the legend.
    assert count(found, BLUE) == pytest.approx(alone / 2 * (metrics + 1), rel=0.25)


@pytest.mark.parametrize("name", ["runs/{}-" + "a_rather/long-name" * 6, "runs/{}" + "unbroken" * 20, "runs/{}"])
def test_names_are_wrapped_whole_and_stay_inside_the_picture(name):
    text = name.format(1)
    lines = _wrapped(text).split("\n")
    assert "".join(lines) == text
    assert max(map(len, lines)) <= 34
    found = pixels(comparison_png("", table_of(9, name), METRICS, {}))
    assert (found[:, :4, :3] == 255).all()  # nothing is cut off at the left edge
    assert (found[:, -4:, :3] == 255).all()


def test_labels_do_not_overlap():
    """Measured as drawn: names of rows, ticks, titles and legend."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        save(figure, *arguments, **options)
        drawn.append(figure)

    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        table = [*table_of(9, "runs/{}-" + "a_rather/long-name" * 4), *published_rows("beauty", METRICS)]
        comparison_png("A title " * 12, table, METRICS, intervals_of(table[:18]))
    (figure,) = drawn
    boxes = [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert len(ticks) >= 3
        ticks += axes.yaxis.get_major_ticks()
        texts = [axes.title, *(tick.label1 for tick in ticks if tick.label1.get_visible())]
        boxes += [text.get_window_extent() for text in texts]
    assert len(boxes) >= 2 + 2 + 13 + 6  # legend and title, titles of panels, names, ticks
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= 1200
    assert not [(a, b) for at, a in enumerate(boxes) for b in boxes[:at] if a.overlaps(b)]


def test_drawing_leaves_matplotlibs_global_state_alone():
    """A notebook's own figures and backend stay what they are."""
    code = (
        "import sys; from recsys_lightning.analysis.figures import comparison_png;"
        "from recsys_lightning.analysis.compare import Row;"
        "from recsys_lightning.analysis.groups import Score;"
        "comparison_png('', [Row('a', 'b', 'test', 1, (Score((0.1,)),))], ['recall@5'], {});"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_the_report_embeds_the_picture_that_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"run": "x", "model": "COBRA", "seed": 1, "metrics": {"test/recall@5": 0.1}, "data": {}, "config": {}}
    run |= {"hardware": {"devices": 1, "gpu": "GPU", "torch": "2"}, "seconds_by_command": {}}
    run |= {"code": {"version": "0", "commit": None, "sha256": "0"}}
    Path("results.json").write_text(json.dumps(run))
    assert main(["compare", "results.json", "--output", "out/my report.md", "--metrics", "recall@5"]) == 0
    (image,) = re.findall(r"!\[.*\]\((.*)\)", Path("out/my report.md").read_text())
    picture = Path("out", image.replace("%20", " ")).read_bytes()
    assert pixels(picture).shape[1] == 1200
    assert count(picture, BLUE) > 0


def test_without_matplotlib_a_report_is_refused_before_any_work_and_a_table_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert main(["compare", str(tmp_path / "no run"), "--output", str(tmp_path / "c.md")]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["compare", str(tmp_path / "no run")]) == 2
    assert "no run" in capsys.readouterr().err
