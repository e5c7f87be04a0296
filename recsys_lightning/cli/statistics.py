"""The tables that `recsys prepare`, `fit`, `validate` and `test` print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys_lightning.analysis.compare import DEFAULT_METRICS
from recsys_lightning.training.codebook_files import EVENTS_FILE
from recsys_lightning.training.codebook_report import CodebookReport

STAGES = ("train", "val", "test")


def print_statistics(statistics: dict[str, Any]) -> None:
    """Print a data set's figures, one a line."""
    table = Table(show_header=False, title="data")
    length, split = statistics["length"], statistics["split"]
    rows = {
        "users": f"{statistics['users']:,}",
        "items": f"{statistics['items']:,}",
        "interactions": f"{statistics['interactions']:,}",
        "density": f"{statistics['density']:.6f}",
        "interactions a user": "mean {mean:.2f}, median {median:g}, from {min} to {max}".format(**length),
        "split": statistics["split_rule"],
        "train / validation / test": " / ".join(f"{split[name]:,}" for name in STAGES),
        "their users": " / ".join(f"{statistics['split_users'][name]:,}" for name in STAGES),
    }
    if statistics["only_history"]:
        rows["only history of held-out users"] = f"{statistics['only_history']:,}"
    cold = statistics["cold_items"]
    if cold["items"]:
        struck = f"{cold['items']:,}, with {cold['struck_interactions']:,} interactions"
        rows["items held out of training"] = struck
    rows |= {f"items with {name}": f"{share:.1%}" for name, share in statistics["text_coverage"].items()}
    rows |= {f"users with {name}": f"{share:.1%}" for name, share in statistics["user_coverage"].items()}
    rows["items without any text"] = f"{statistics['items_without_text']:,}"
    rows |= {f"dropped: {reason}": f"{count:,}" for reason, count in statistics["dropped"].items()}
    for file, counts in statistics["rejects"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts["rejected"].items())
        rows[f"raw: {file}"] = "\n".join(
            [f"{counts['read']:,} lines read, rejected: {reasons or 'none'}", *counts["examples"]]
        )
    encoder, width = statistics["text_encoder"], statistics["text_width"]
    rows["text encoder"] = f"{encoder}, width {width}" if encoder else "none"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def print_metrics(metrics: Mapping[str, float], where: Path) -> None:
    """Print the headline of an evaluation, one line a split or slice; `where` holds all of it.

    Args:
        metrics: by name, e.g. ``test/recall@10``, ``test-unseen/tail/ndcg@5``, ``test/gini@10``.
        where: the file that holds them all.
    """
    lines: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        group, _, metric = name.rpartition("/")
        lines.setdefault(group, {})[metric] = value
    shown = [name for name in DEFAULT_METRICS if any(name in values for values in lines.values())]
    shown = shown or sorted({name for values in lines.values() for name in values if name.startswith("recall@")})
    # A tokenizer has no ranking metrics: then everything is the headline.
    shown = shown or sorted({name for values in lines.values() for name in values})
    table = Table(title=f"all {len(metrics)} metrics are in {where}")
    for title in ("", "users", *shown):
        table.add_column(title, justify="left" if not title else "right")
    for group, values in lines.items():
        if any(name in values for name in shown):
            users = f"{values['users']:.0f}" if "users" in values else ""
            table.add_row(group, users, *(f"{values[name]:.4f}" if name in values else "" for name in shown))
    Console().print(table)


def print_codebooks(report: CodebookReport) -> None:
    """Print how the whole catalogue uses the codebooks, one line a level, and below it what is wrong with them."""
    if report.levels:
        table = Table(title=f"codebooks of {report.judged}")
        titles = ("level", "codes", "dead", "perplexity", "of the codes", "entropy share", "Gini", "left over")
        for title in titles:
            table.add_column(title, justify="right")
        for row in report.levels:
            left = "" if row.residual_norm is None else f"{row.residual_norm:.1%}"
            shares = f"{row.perplexity / row.size:.0%}", f"{row.entropy:.3f}", f"{row.gini:.3f}", left
            table.add_row(f"{row.level}", f"{row.size}", f"{row.dead_codes}", f"{row.perplexity:.1f}", *shares)
        table.caption = _whole(report)
        Console().print(table)
    print_codebook_warning(report)


def _whole(report: CodebookReport) -> str:
    """What is no matter of one level, in one line."""
    values, parts = report.whole, []
    if "cells" in values:
        parts.append(f"{values['cells']:.0f} cells, largest {values['largest_cell']:.0f}")
        parts.append(f"collision rate {values['collision_rate']:.3f}")
    if "reconstruction_error" in values:
        parts.append(f"reconstruction error {values['reconstruction_error']:.3f}")
    if report.num_events:
        parts.append(f"{report.num_events} events in {EVENTS_FILE}")
    return ", ".join(parts)


def print_codebook_warning(report: CodebookReport) -> None:
    """Print what is wrong with the codebooks on a line each, red on a terminal; nothing if they are well."""
    if report.warning is not None:
        Console().print(report.warning, style="bold red", soft_wrap=True, highlight=False, markup=False)
