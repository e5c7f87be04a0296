"""RQ-VAE on Amazon Beauty: the health of its codes, and its quantizer and speed against vector-quantize-pytorch.

    OMP_NUM_THREADS=1 python tests/benchmarks/rqvae.py

Three parts, written to experiments/results/rqvae.md with a table of the runs as CSV and a picture of their perplexity:

* what `recsys fit` writes, for each experiment and seed. A run that is already in the folder is not repeated;
* the residual quantizer alone against `ResidualVQ`, trained on the same embeddings by moving averages;
* the CPU-seconds of a training step of the whole RQ-VAE against the same autoencoder around `ResidualVQ`, in turns.

Without `pip install vector-quantize-pytorch` the last two parts are left out, and the report says so.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn

from recsys_lightning.analysis.compare import markdown_table
from recsys_lightning.analysis.figures import STYLES, dress, new_figure, png
from recsys_lightning.cli.trainer import run
from recsys_lightning.memory import keep_freed_memory
from recsys_lightning.models.rqvae import RQVAE
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.semantic_ids.health import reconstruction_error
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import rebuilt
from recsys_lightning.training.checkpoints import trained_model
from recsys_lightning.training.record import code_fingerprint
from recsys_lightning.training.tokenizer import FILE_NAME

HEALTHY = 0.7  # of a level's codes, as perplexity
YARDSTICK = 0.35  # CPU-seconds a step of ResidualVQ's RQ-VAE at the shape below, measured elsewhere


class Fit(NamedTuple):
    """A finished run of `recsys fit`, judged by the files it wrote."""

    experiment: str
    seed: int
    num_codes: int
    perplexity: tuple[float, ...]  # of each level, by the table of semantic IDs
    dead: tuple[int, ...]
    error: float  # relative reconstruction error of that table
    collisions: float
    epochs: int
    cpu_seconds: float
    history: pl.DataFrame  # epoch and perplexity@l of each validation
    record: dict[str, Any]  # results.json
    embeddings: Tensor  # (I, D)

    @property
    def healthy(self) -> bool:
        return min(self.perplexity) > HEALTHY * self.num_codes and not any(self.dead)


def fit(experiment: Path, seed: int, folder: Path, options: list[str]) -> Path:
    """The folder of a run, which is made first where there is none; `recsys fit` moves one that broke off aside."""
    made = folder / f"{experiment.stem}-seed{seed}"
    if not (made / "results.json").is_file():
        run(["fit", "-c", str(experiment), f"--run_dir={made}", f"--seed_everything={seed}", *options])
    return made


def judge(experiment: Path, seed: int, made: Path) -> Fit:
    """Read a run: its table of semantic IDs, its best weights and its log."""
    # An audit's settings: all is built, and nothing is run.
    cli = run(["audit", "-c", str(made / "config.yaml"), f"--run_dir={made}", "--ckpt_path=best"])
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    catalog = cli.datamodule.catalog
    tokenizer = trained_model(cli.model, catalog, Path(cli.config[cli.subcommand].ckpt_path))
    table = SemanticIds.load(made / FILE_NAME, catalog.text_fingerprint, catalog.num_items)
    embeddings, found = catalog.text_embeddings()[1:], table.collision_report()
    log = pl.read_csv(made / "metrics.csv")
    results = json.loads((made / "results.json").read_text())
    names = [f"{word}/perplexity@1" for word in ("val", "codebook") if f"{word}/perplexity@1" in log.columns]
    levels = [names[0].replace("@1", f"@{level}") for level in range(1, table.num_levels + 1)]
    return Fit(
        experiment=experiment.stem,
        seed=seed,
        num_codes=table.num_codes,
        perplexity=found.perplexity,
        dead=tuple(table.num_codes - used for used in found.used_codes),
        error=reconstruction_error(rebuilt(tokenizer, embeddings, table.codes[1:])),
        collisions=found.collision_rate,
        epochs=int(log["epoch"].max()) + 1,
        cpu_seconds=results["cpu_seconds_by_command"]["fit"],
        history=log.filter(pl.col(levels[0]).is_not_null()).select("epoch", *levels),
        record=results,
        embeddings=embeddings,
    )


def runs_table(fits: list[Fit]) -> str:
    """A row a run."""
    head = ["experiment", "seed", *(f"perplexity {level + 1} / codes" for level in range(len(fits[0].perplexity)))]
    head += ["dead codes", "reconstruction error", "collision rate", "epochs", "CPU-seconds", "healthy"]
    rows = [
        [
            each.experiment,
            str(each.seed),
            *(f"{value:.1f} / {each.num_codes} = {value / each.num_codes:.2f}" for value in each.perplexity),
            str(sum(each.dead)),
            f"{each.error:.3f}",
            f"{each.collisions:.3f}",
            str(each.epochs),
            f"{each.cpu_seconds:.0f}",
            "yes" if each.healthy else "no",
        ]
        for each in fits
    ]
    return markdown_table(head, rows)


def runs_csv(fits: list[Fit]) -> str:
    """The same at full precision, with the fingerprints of data and code."""
    rows = [
        {
            "experiment": each.experiment,
            "seed": each.seed,
            **{f"perplexity@{level + 1}": value for level, value in enumerate(each.perplexity)},
            **{f"dead_codes@{level + 1}": value for level, value in enumerate(each.dead)},
            "num_codes": each.num_codes,
            "reconstruction_error": each.error,
            "collision_rate": each.collisions,
            "epochs": each.epochs,
            "cpu_seconds": each.cpu_seconds,
            "text_fingerprint": each.record["data"]["text_fingerprint"],
            "code": each.record["code"]["sha256"],
        }
        for each in fits
    ]
    return pl.DataFrame(rows).write_csv()


def picture(fits: list[Fit]) -> bytes:
    """Perplexity of each level over the epochs, as a share of its codes: a panel an experiment, a line a run."""
    names = list(dict.fromkeys(each.experiment for each in fits))
    figure = new_figure(4.0)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for seed, each in enumerate(each for each in fits if each.experiment == name):
            for (color, _), level in zip(STYLES, each.history.columns[1:], strict=False):
                label = None if seed else f"level {level.partition('@')[2]}"  # each once
                axes.plot(each.history["epoch"], each.history[level] / each.num_codes, color=color, label=label)
        axes.axhline(HEALTHY, color="#000000", linestyle=(0, (3, 1.5)), linewidth=1)
        axes.legend()
        dress(axes, name, "epoch", "perplexity / codes")
    return png(figure)


def residual_vq(dim: int, num_codes: int, batch: int, own: bool) -> nn.Module:
    """ResidualVQ of 3 levels by moving averages; `own` with its k-means start and its reset of dead codes."""
    from vector_quantize_pytorch import ResidualVQ

    return ResidualVQ(
        dim=dim,
        num_quantizers=3,
        codebook_size=num_codes,
        decay=0.99,
        commitment_weight=0.25,
        kmeans_init=own,
        kmeans_iters=50,
        threshold_ema_dead_code=0.2 * batch / num_codes if own else 0,  # ours: 0.2 of the fair share
    )


def same_start(theirs: nn.Module, ours: ResidualQuantizer, batch: int) -> None:
    """Give ResidualVQ our codebooks and moving averages; theirs are of rows, ours of shares of rows."""
    for level, layer in enumerate(theirs.layers):  # type: ignore[arg-type]
        book = layer._codebook
        book.embed.copy_(ours.codebooks[level][None])
        book.cluster_size.copy_(batch * ours.usage[level][None])
        book.embed_avg.copy_(batch * ours.sums[level][None])
        book.initted.fill_(True)


def quantizers(rows: Tensor, num_codes: int, steps: int, batch: int, own: bool) -> tuple[float, float]:
    """Relative reconstruction error of our quantizer and of ResidualVQ after the same steps on rows (I, D)."""
    torch.manual_seed(0)
    ours = ResidualQuantizer(rows.shape[1], 3, num_codes, dead_code_threshold=0.2 if own else 0.0)
    ours.init_from_data(rows)
    theirs = residual_vq(rows.shape[1], num_codes, batch, own)
    if own:
        theirs.train()(rows)  # its k-means sees all rows too; that is one step more
    else:
        same_start(theirs, ours, batch)
    ours.train()
    theirs.train()
    with torch.no_grad():
        for _ in range(steps):
            x = rows[torch.randint(len(rows), (batch,))]
            ours(x)
            theirs(x)
        left = [rows - ours.eval()(rows).vectors, rows - theirs.eval()(rows)[0]]
    spread = (rows - rows.mean(0)).square().sum()
    return float(left[0].square().sum() / spread), float(left[1].square().sum() / spread)


def quantizer_table(rows: Tensor, sizes: list[int], steps: int, batch: int) -> str:
    """Both quantizers from the same codebooks, and each with its own start and its own care of dead codes."""
    lines = []
    for num_codes in sizes:
        for own, name in ((False, "same codebooks"), (True, "each its own k-means and reset of dead codes")):
            ours, theirs = quantizers(rows, num_codes, steps, batch, own)
            lines.append([f"3x{num_codes}", name, f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs - 1:+.2%}"])
    return markdown_table(["codes", "start", "ours", "ResidualVQ", "difference"], lines)


class Plain(nn.Module):
    """The same autoencoder around ResidualVQ."""

    def __init__(self, dim: int, hidden: list[int], latent: int, num_codes: int, batch: int) -> None:
        super().__init__()
        self.encoder, self.decoder = MLP([dim, *hidden, latent]), MLP([latent, *reversed(hidden), dim])
        self.quantizer = residual_vq(latent, num_codes, batch, own=True)

    def loss(self, x: Tensor) -> Tensor:
        """Reconstruction and commitment, as sums over the width."""
        z = self.encoder(x)
        quantized, _, commitment = self.quantizer(z)
        error = (self.decoder(quantized) - x).square().sum(-1).mean()
        total: Tensor = error + z.shape[-1] * commitment.sum()
        return total


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Forward, backward, clipping and the optimizer."""
    optimizer.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def speed_table(batch: int, dim: int, hidden: list[int], latent: int, num_codes: int, repeats: int) -> str:
    """Median CPU-seconds of a training step, in turns, so that what else runs on the machine meets all alike."""
    torch.manual_seed(0)
    rows = nn.functional.normalize(torch.randn(max(4 * batch, 2 * num_codes), dim), dim=-1)
    sizes = {"hidden": hidden, "latent_dim": latent, "num_codes": num_codes}
    ours = {
        "ours": RQVAE(dim, **sizes),
        "ours, rotation trick": RQVAE(dim, **sizes, estimator="rotation"),
        "ours, Gumbel": RQVAE(dim, **sizes, estimator="gumbel"),
        "ours, Sinkhorn last level": RQVAE(dim, **sizes, sinkhorn=0.003),
    }
    theirs = Plain(dim, hidden, latent, num_codes, batch)
    theirs.train().quantizer(theirs.encoder(rows))  # its k-means
    models: dict[str, nn.Module] = {name: model.fit(rows).train() for name, model in ours.items()}
    models["ResidualVQ"] = theirs
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model.loss(x) if isinstance(model, Plain) else torch.stack(list(model.losses(x).values())).sum()  # type: ignore[operator]

    spent: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 2):
        x = rows[torch.randint(len(rows), (batch,))]
        for name, model in models.items():
            before = time.process_time()
            step(model, optimizers[name], lambda model=model, x=x: loss(model, x))  # type: ignore[misc]
            if turn > 1:  # memory is allocated and kernels are chosen in the first
                spent[name].append(time.process_time() - before)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    lines = [
        [name, f"{median:.4f}", f"{min(spent[name]):.4f}", f"{median / medians['ResidualVQ']:.2f}"]
        for name, median in medians.items()
    ]
    return markdown_table(["RQ-VAE", "CPU-seconds a step", "least", "of ResidualVQ's"], lines)


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(fits: list[Fit], settings: argparse.Namespace, image: str) -> str:
    """Everything in words and tables; the comparisons are measured here."""
    sizes, first = sorted({each.num_codes for each in fits}), fits[0]
    code, healthy = code_fingerprint(), sum(each.healthy for each in fits)
    parts = [
        "# RQ-VAE: the health of its codes, its quantizer and its speed",
        "Written by `make bench-rqvae`.",
        f"## What `recsys fit` writes\n\n{healthy} of {len(fits)} runs end with every level's perplexity above "
        f"{HEALTHY:g} of its codes and without a dead code. Perplexity, dead codes, error and collisions are those of "
        "the table of semantic IDs of the whole catalogue. Reconstruction error is mean |x - x_hat|^2 over mean "
        "|x - mean|^2.",
        runs_table(fits),
        f"![perplexity over the epochs]({image})",
    ]
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        parts.append("Left out: vector-quantize-pytorch is not installed, with which quantizer and speed are compared.")
    else:
        library = f"vector-quantize-pytorch {version('vector-quantize-pytorch')}"
        parts += [
            f"## The quantizer alone, against `ResidualVQ` ({library})",
            f"No autoencoder: the {first.embeddings.shape[0]:,} embeddings of width {first.embeddings.shape[1]} "
            f"themselves, 3 levels, moving averages of decay 0.99, {settings.steps} steps of {settings.batch} rows, "
            "the same rows for both. Relative reconstruction error of all embeddings:",
            quantizer_table(first.embeddings, sizes, settings.steps, settings.batch),
            "## A training step",
            f"Forward, backward, clipping and AdamW of the whole RQ-VAE at batch {settings.speed_batch} x "
            f"{settings.dim}, hidden {settings.hidden}, latent {settings.latent}, 3 x {settings.speed_codes} codes; "
            f"median CPU-seconds of the process over {settings.repeats} steps in turns. `ResidualVQ` is the same "
            f"autoencoder around it. Measured elsewhere, it took about {YARDSTICK} at this shape's default.",
            speed_table(
                settings.speed_batch,
                settings.dim,
                settings.hidden,
                settings.latent,
                settings.speed_codes,
                settings.repeats,
            ),
        ]
    data = first.record["data"]
    fitted = sorted({str(each.record["code"]["sha256"])[:12] for each in fits})
    parts.append(
        f"Data: {data['source']}, {data['num_items']:,} items, texts by {data['text_encoder'].partition(':')[0]}, "
        f"embeddings {data['text_fingerprint'][:12]}. Machine: {cpu()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}. Code: {code['version']} {code['commit']} "
        f"{(code['sha256'] or '')[:12]}; the runs were made by {', '.join(fitted)}."
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = [Path(f"experiments/rqvae/{name}.yaml") for name in ("beauty_cpu", "beauty_3x256_cpu")]
    parser.add_argument("--experiments", type=Path, nargs="+", default=experiments)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_rqvae"), help="where runs are, or are put")
    parser.add_argument("--steps", type=int, default=240, help="of the quantizers alone")
    parser.add_argument("--batch", type=int, default=1024, help="of the quantizers alone")
    parser.add_argument("--speed_batch", type=int, default=640)
    parser.add_argument("--speed_codes", type=int, default=256)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("experiments/results/rqvae.md"))
    settings, options = parser.parse_known_args()  # what is left goes to `recsys fit`
    keep_freed_memory()  # as `recsys fit` does on a CPU
    fits = [
        judge(experiment, seed, fit(experiment, seed, settings.runs, options))
        for experiment in settings.experiments
        for seed in settings.seeds
    ]
    output = settings.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".png").write_bytes(picture(fits))
    output.with_suffix(".csv").write_text(runs_csv(fits))
    output.write_text(report(fits, settings, output.with_suffix(".png").name))
    sys.stdout.write(output.read_text())


if __name__ == "__main__":
    main()
