"""What `recsys study interests` reports."""

from collections.abc import Sequence
from dataclasses import asdict

import polars as pl

from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun, draw_users
from recsys_lightning.analysis.study_sparc import shown_score
from recsys_lightning.analysis.study_sparc_interests import InterestGrid, InterestRow, measure_interests
from recsys_lightning.models.sparc import SPARC


def interest_study(runs: Sequence[StudiedRun[SPARC]], grid: InterestGrid, progress: Progress) -> Findings:
    """Measure numbers of interests and say what was found.

    Raises:
        InputError: see `measure_interests`, or matplotlib is missing.
    """
    from recsys_lightning.analysis.study_sparc_interests_figure import interests_png

    found = measure_interests(runs, grid, progress)
    k, on_gpu = grid.k, runs[0].device.type == "cuda"
    ms = "ms" if on_gpu else "CPU ms"
    lists = {
        f"/recall@{k}": f"recall@{k}",
        f"-unseen/recall@{k}": f"unseen recall@{k}",
        f"/tail/recall@{k}": f"tail recall@{k}",
        f"-unseen/tail/recall@{k}": f"unseen tail recall@{k}",
        f"/coverage@{k}": "coverage",
        f"/distinct-codes@{k}": "level-1 codes",
        "ms": f"{ms} a user",
        "batch_ms": f"{ms} a user in batches",
    }
    tower = {"accuracy": "answer among K", "popular": "the K most met codes", "ece": "ECE"}
    users, total = draw_users(runs[0], grid.stage, grid.users, grid.seed)[1:]
    size = runs[0].data.eval_batch_size
    return Findings(
        title="Soft search over the number of interests",
        introduction=_introduction(runs, grid, f"{users:,} of {total:,} users of the {grid.stage} split", on_gpu),
        tables=[
            StudyTable("What they find and cost", *_table(found.rows, lists)),
            StudyTable("Whether they are the right ones", *_table(found.rows, tower)),
        ],
        remarks=[],
        pictures={".png": interests_png(found, grid, ms)},
        files={".csv": _csv(found.rows)},
        settings={
            "soft search": _searches(runs),
            "users": f"{users:,} of {total:,}, {grid.stage} split, seed {grid.seed}",
            "cost": f"median of {grid.calls} calls of one user, and of {grid.batch_calls} calls of up to {size} users; "
            + ("GPU" if on_gpu else "one thread"),
        },
    )


def _searches(runs: Sequence[StudiedRun[SPARC]]) -> str:
    """How runs search, and which do so where they differ."""
    by_search: dict[str, list[str]] = {}
    for run in runs:
        fields = ", ".join(f"{name}={value}" for name, value in asdict(run.model.search).items())
        by_search.setdefault(fields, []).append(run.name)
    if len(by_search) == 1:
        return next(iter(by_search))
    return "; ".join(f"{fields} ({', '.join(names)})" for fields, names in by_search.items())


def _introduction(runs: Sequence[StudiedRun[SPARC]], grid: InterestGrid, users: str, on_gpu: bool) -> list[str]:
    named = ", ".join(f"`{run.name}`" for run in runs)
    seeds = " ± is one standard deviation over runs that differ in their seed alone." if len(runs) > 1 else ""
    clock = "the time until the answer is there" if on_gpu else "CPU time, of one thread"
    return [
        f"Lists of {named} for {users}, found by the exact index with K interests a user; all else is as the run has "
        f"it, and nothing was trained again. All measures are over the first {grid.k} places; those named *unseen* are "
        "of the lists without the items a user has met. *Tail* is of the answers outside the 20 % of the items most "
        "met in training, *coverage* the share of the catalogue that is in at least one list, *level-1 codes* the mean "
        f"number of different ones in a list. A user costs {clock}, for user tower, search and merge.{seeds}",
        "*Answer among K* is the share of the answers whose level-1 code is among the K most probable ones of the "
        "interest tower, beside that of the K codes most met in training. *ECE* is the expected calibration error, "
        "over 15 bins of equal mass, of the probability that the tower gives to these K codes together, at "
        "temperature 1.",
    ]


def _table(rows: Sequence[InterestRow], names: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    digits = {"ms": 2, "batch_ms": 2}
    body = [
        [
            row.group,
            f"{row.number} of {row.num_codes}" + (" (own)" if row.own else ""),
            *(shown_score(row.scores.get(name), 1 if "codes" in name else digits.get(name, 4)) for name in names),
        ]
        for row in rows
    ]
    return ["run", "K", *names.values()], body


def _csv(rows: Sequence[InterestRow]) -> bytes:
    made = [
        {"run": row.group, "interests": row.number, "codes": row.num_codes, "own": row.own}
        | {"seeds": len(next(iter(row.scores.values())).values)}
        | {name: score.mean for name, score in row.scores.items()}
        | {f"{name} sd": score.sd for name, score in row.scores.items()}
        for row in rows
    ]
    return pl.DataFrame(made, infer_schema_length=None).write_csv().encode()
