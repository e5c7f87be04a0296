"""`recsys demo`: one command, every step, one table with the bound."""

from pathlib import Path

import pytest

from recsys_lightning.analysis.groups import load_results
from recsys_lightning.cli import main
from recsys_lightning.data.sources import Synthetic

ROOT = Path(__file__).parents[2]
SMALL = {"num_users": 120, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 6}


def test_the_demo_ends_in_a_table_of_model_popularity_and_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    options = [f"--data.source.{name}={value}" for name, value in SMALL.items()]
    options += [
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        f"--data.cache_dir={tmp_path / 'cache'}",
    ]
    # 24 items have fewer words than the shipped demo's 400.
    options += ["--data.encoder=TfidfSVD", "--data.encoder.dim=8"]
    assert main(["demo", f"--run_dir={tmp_path}", "--data.source=Synthetic", *options]) == 0, capsys.readouterr().err
    table = (tmp_path / "table.md").read_text().splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:] for line in table[2:]}
    assert list(rows) == ["popularity", "COBRA", "upper bound"]
    for name, folder in (("popularity", "popularity"), ("COBRA", "cobra")):
        metrics = load_results(tmp_path / folder)["metrics"]
        names = ("recall@5", "recall@10", "recall@20", "ndcg@10")
        assert rows[name][:4] == [f"{metrics[f'test/{metric}']:.4f}" for metric in names]
    assert float(rows["COBRA"][4]) == pytest.approx(float(rows["COBRA"][1]) / float(rows["popularity"][1]), abs=0.01)
    # The bound by a loop over the test users: what the process itself would put first, given the item before.
    source = Synthetic(**SMALL)
    log = source.read(Path()).interactions
    expected = 0.0
    for items in log.group_by("user_id", maintain_order=True).agg("item_id")["item_id"]:
        chances = sorted(source.next_item_probabilities([items[-2]])[0].tolist(), reverse=True)
        expected += sum(chances[:10]) / SMALL["num_users"]
    assert float(rows["upper bound"][1]) == pytest.approx(expected, abs=1e-4)


def test_the_demo_needs_its_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert "run the demo from the root of a checkout" in capsys.readouterr().err
