"""`recsys demo`: every step on a synthetic catalogue, whose best possible result can be computed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from recsys_lightning.analysis.compare import markdown_table, terminal_table
from recsys_lightning.analysis.groups import load_results
from recsys_lightning.errors import InputError

FOLDER = Path("experiments/demo")
METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10")


def run(arguments: Sequence[str]) -> None:
    """Prepare, learn semantic IDs, train COBRA and popularity, evaluate, and print one table."""
    parser = argparse.ArgumentParser(prog="recsys demo", description=__doc__)
    parser.add_argument("--run_dir", default="runs/demo", help="folder of the demo's runs (default: %(default)s)")
    given, options = parser.parse_known_args(list(arguments[1:]))
    if not FOLDER.is_dir():
        raise InputError(f"no folder {FOLDER} here: run the demo from the root of a checkout")
    from recsys_lightning.cli.trainer import run as run_command

    runs = Path(given.run_dir)
    console = Console()
    ids = f"{runs}/rqvae/semantic_ids.safetensors"
    steps = [
        ("prepare", "cobra", []),
        ("fit", "popularity", []),
        ("test", "popularity", []),
        ("fit", "rqvae", []),
        ("fit", "cobra", [f"--model.init_args.model.init_args.semantic_ids={ids}"]),
        ("test", "cobra", [f"--model.init_args.model.init_args.semantic_ids={ids}"]),
    ]
    bound: dict[str, float] = {}
    for command, name, extra in steps:
        console.rule(f"recsys {command} -c {FOLDER}/{name}.yaml")
        line = [command, "-c", f"{FOLDER}/{name}.yaml", f"--run_dir={runs}/{name}", *extra, *options]
        module = run_command(line).datamodule
        if command == "prepare":
            bound = best_possible(module)
    measured = {
        "popularity": load_results(runs / "popularity")["metrics"],
        "COBRA": load_results(runs / "cobra")["metrics"],
        "upper bound": {f"test/{metric}": value for metric, value in bound.items()},
    }
    base = measured["popularity"]["test/recall@10"]
    head = ["model", *METRICS, "recall@10 / popularity's"]
    body = [
        [name, *(f"{values[f'test/{metric}']:.4f}" for metric in METRICS), f"{values['test/recall@10'] / base:.2f}"]
        for name, values in measured.items()
    ]
    console.print(terminal_table("test users, all items ranked, exact item ids", head, body))
    (runs / "table.md").write_text(markdown_table(head, body) + "\n")


def best_possible(module: object) -> dict[str, float]:
    """Expected metrics, over the test users, of a ranking by the true probabilities of the next item."""
    from recsys_lightning.data.datamodules import SequenceDataModule
    from recsys_lightning.data.sources import Synthetic

    if not isinstance(module, SequenceDataModule) or not isinstance(module.source, Synthetic):
        raise InputError("the upper bound is known for the Synthetic source only")
    dataset = module.dataset("test")
    raw_ids = module.catalog.raw_ids
    last = [raw_ids[item - 1] for item in dataset.items[dataset.stop - 1]]
    found = {}
    for metric in METRICS:
        name, k = metric.split("@")
        best = module.source.best_recall if name == "recall" else module.source.best_ndcg
        found[metric] = best(last, int(k))
    return found
