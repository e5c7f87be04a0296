"""What an evaluation costs: from ready user vectors, and COBRA's beam search with BeamFusion, on real data.

    python tests/benchmarks/evaluation.py experiments/sasrec/beauty.yaml --cobra runs/cobra/beauty_cpu

CPU-seconds are those of the whole process over both cores. Written to experiments/results/evaluation_speed.md.
"""

import argparse
import cProfile
import platform
import pstats
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from recsys_lightning.analysis.compare import markdown_table
from recsys_lightning.cli.trainer import run
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.semantic_ids.trie import PrefixTrie
from recsys_lightning.training.checkpoints import trained_model
from recsys_lightning.training.evaluation import EvaluationSettings, Evaluator
from recsys_lightning.training.record import code_fingerprint

DIM = 128


class ReadyVectors(Recommender):
    """User and item vectors that are simply there: what is left is retrieval and evaluation."""

    def __init__(self, catalog: Catalog, num_users: int):
        super().__init__()
        self.num_items = catalog.num_items
        g = torch.Generator().manual_seed(0)
        self.register_buffer("items", torch.randn(catalog.num_items + 1, DIM, generator=g))
        self.register_buffer("users", torch.randn(num_users, DIM, generator=g))

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        return {}

    def encode_items(self, item_ids: Tensor) -> Tensor:
        return self.items[item_ids]

    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        found = index.search_with_ties(self.users[batch.user], k)
        return Recommendations(found.item_ids, found.scores)


def evaluate(model: Recommender, loader: DataLoader[SequenceBatch], evaluator: Evaluator, longest: int) -> int:
    """One evaluation of every user, as `RecommenderModule` does it; returns the number of users."""
    index = model.build_index()
    users = 0
    with torch.inference_mode():
        for batch in tqdm(loader, desc="users", unit="batch", leave=False):
            evaluator.update(batch, model.recommend(batch, longest + batch.seen.shape[1], index))
            users += len(batch)
        evaluator.compute()
        evaluator.rank_table()
    return users


def megabytes() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(call: Callable[[], object]) -> tuple[float, float, float]:
    """CPU-seconds, seconds and growth of peak memory in MiB of a call."""
    before, cpu, wall = megabytes(), time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall, megabytes() - before


def ready_vectors(data: SequenceDataModule) -> list[list[str]]:
    """Rows of the first table: retrieval and evaluation from ready vectors."""
    settings, loader = EvaluationSettings(), data.test_dataloader()
    lengths = data.data.interactions.lengths
    model = ReadyVectors(data.catalog, len(lengths)).eval()
    rows = []
    for name, thorough in (("ranking metrics, both columns", False), ("and slices and metrics of the lists", True)):
        evaluator = Evaluator(settings, data.catalog, lengths, thorough=thorough)
        cpu, wall, grown = measured(lambda e=evaluator: evaluate(model, loader, e, max(settings.ks)))
        rows.append([name, f"{cpu:.2f}", f"{wall:.2f}", f"{grown:.0f}"])
    return rows


def cobra_profile(folder: Path, beams: int, options: list[str]) -> tuple[list[list[str]], list[list[str]], str]:
    """COBRA's evaluation: totals, the costliest functions of ours, and the share of the trie."""
    words = [
        "audit",
        "-c",
        str(folder / "config.yaml"),
        f"--run_dir={folder}",
        "--ckpt_path=best",
    ]  # builds, runs nothing
    cli = run([*words, f"--model.model.search.num_beams={beams}", *options])
    data = cli.datamodule
    data.prepare_data()
    data.setup()
    model = trained_model(cli.model, data.catalog, Path(cli.config[cli.subcommand].ckpt_path))
    settings, loader = cli.model.evaluation, data.test_dataloader()
    evaluator = Evaluator(settings, data.catalog, data.data.interactions.lengths, model.prefix_trie)
    profile = cProfile.Profile()
    profile.enable()
    cpu, wall, grown = measured(lambda: evaluate(model, loader, evaluator, max(settings.ks)))
    profile.disable()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    package = str(Path(sys.modules["recsys_lightning"].__file__ or "").parent)
    ours = {key: value for key, value in stats.items() if key[0].startswith(package)}
    total = max(value[3] for value in stats.values())
    rows = [
        [f"`{Path(file).relative_to(package)}` {name}", str(calls), f"{within:.2f}", f"{within / total:.1%}"]
        for (file, _, name), (calls, _, _, within, _) in sorted(ours.items(), key=lambda item: -item[1][3])[:22]
    ]
    trie = sum(v[3] for (file, _, name), v in ours.items() if name == PrefixTrie.child_nodes.__name__)
    totals = [[f"COBRA, M={beams}, {len(data.data.user_ids)} users", f"{cpu:.1f}", f"{wall:.1f}", f"{grown:.0f}"]]
    return totals, rows, f"The trie lookup (`PrefixTrie.child_nodes`) takes {trie / total:.2%} of the time."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="whose data to evaluate on")
    parser.add_argument("--cobra", type=Path, help="a run folder with a trained COBRA")
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("experiments/results/evaluation_speed.md"))
    given, options = parser.parse_known_args()
    data = run(["prepare", "-c", given.experiment, *options]).datamodule
    head = ["what", "CPU-seconds", "seconds", "growth of peak memory, MiB"]
    code = code_fingerprint()
    parts = [
        "# What an evaluation costs",
        f"Written by `{shlex.join(['python', *sys.argv])}`.",
        f"{len(data.data.user_ids)} users, {data.catalog.num_items} items, full ranking, exact search (torch backend), "
        f"vectors of width {DIM}, lists of 50 places and all that a user has seen.",
        markdown_table(head, ready_vectors(data)),
    ]
    if given.cobra:
        totals, rows, trie = cobra_profile(given.cobra, given.beams, options)
        parts += [
            "## COBRA",
            f"Beam search over semantic IDs with M={given.beams}, BeamFusion, all metrics; `{given.cobra}`.",
            markdown_table(head, totals),
            trie,
            "Profile by cProfile: cumulative seconds, so a function holds what it calls.",
            markdown_table(["function", "calls", "seconds", "share"], rows),
        ]
    parts.append(
        f"Machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}. Code: {code['version']} {code['commit']} "
        f"{(code['sha256'] or '')[:12]}."
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n\n".join(parts) + "\n")
    sys.stdout.write(given.output.read_text())


if __name__ == "__main__":
    main()
