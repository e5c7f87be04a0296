"""The table that `recsys prepare` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table


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
        "train / validation / test": " / ".join(f"{split[name]:,}" for name in ("train", "val", "test")),
    }
    rows |= {f"items with {name}": f"{share:.1%}" for name, share in statistics["text_coverage"].items()}
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
