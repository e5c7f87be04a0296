"""Published results to stand beside ours: unfiltered ranking of the whole catalogue, leave-one-out, test split.

Source: COBRA (arXiv:2503.02453) Table 2. All rows but COBRA's are the ones TIGER (arXiv:2305.05065) printed before.
"""

from collections.abc import Sequence

from recsys_lightning.analysis.compare import Row
from recsys_lightning.analysis.groups import Group, Score

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")

TABLE_2: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "beauty": {
        "SASRec": (0.0387, 0.0249, 0.0605, 0.0318),
        "S3-Rec": (0.0387, 0.0244, 0.0647, 0.0327),
        "TIGER": (0.0454, 0.0321, 0.0648, 0.0384),
        "COBRA": (0.0537, 0.0395, 0.0725, 0.0456),
    },
    "sports": {
        "SASRec": (0.0233, 0.0154, 0.0350, 0.0192),
        "S3-Rec": (0.0251, 0.0161, 0.0385, 0.0204),
        "TIGER": (0.0264, 0.0181, 0.0400, 0.0225),
        "COBRA": (0.0305, 0.0215, 0.0434, 0.0257),
    },
    "toys": {
        "SASRec": (0.0463, 0.0306, 0.0675, 0.0374),
        "S3-Rec": (0.0443, 0.0294, 0.0700, 0.0376),
        "TIGER": (0.0521, 0.0371, 0.0712, 0.0432),
        "COBRA": (0.0619, 0.0462, 0.0781, 0.0515),
    },
}


def standing(group: Group, dataset: str) -> str:
    """One line: how much of the paper's COBRA a row's unfiltered test metrics reach; empty if it has none of them."""
    shares = [
        f"{metric} {score.mean / value:.0%}"
        for metric, value in zip(METRICS, TABLE_2[dataset]["COBRA"], strict=True)
        if (score := group.score(f"test/{metric}"))
    ]
    return f"`{group.name}` reaches this share of COBRA's row in the paper: {', '.join(shares)}." if shares else ""


def published_rows(dataset: str, metrics: Sequence[str]) -> list[Row]:
    """Rows for a comparison of test metrics; a metric that was not printed has no score."""
    rows = []
    for method, values in TABLE_2[dataset].items():
        printed = dict(zip(METRICS, values, strict=True))
        scores = tuple(Score((printed[metric],)) if metric in printed else None for metric in metrics)
        rows.append(Row("arXiv:2503.02453 Table 2", method, "test", None, scores))
    return rows
