"""What `recsys study learned-fusion` reports."""

import polars as pl

from recsys_lightning.analysis.study_fusion import PSIS, TAUS, own_setting
from recsys_lightning.analysis.study_learned import Teaching
from recsys_lightning.analysis.study_learned_compare import (
    LEARNED,
    METRICS,
    OWN,
    STAGES,
    TAUGHT_PAIR,
    TUNED_BY,
    TUNED_PAIR,
    Comparison,
    calibration_errors,
    compare_learned,
)
from recsys_lightning.analysis.study_learned_figure import learned_png
from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Progress, StudiedRun, draw_users, require_fusion
from recsys_lightning.data.sequences import Stage
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.retrieval.fusion_weights import FEATURES, Mode


def learned_study(
    run: StudiedRun[COBRA],
    teaching: Teaching,
    mode: Mode | None,
    users: int | None,
    progress: Progress,
    resamples: int = 10_000,
) -> Findings:
    """Compare, and say what was found; the learned weights are one of the files.

    Args:
        run: whose beams.
        teaching: how tau and psi are learned.
        mode: domain of the second softmax; None takes the run's own.
        users: to draw from each split; None takes all.
        progress: told of each step.
        resamples: of the bootstrap.

    Raises:
        InputError: the run lacks semantic IDs or dense vectors, ranks without BeamFusion and no mode is named, or too
            few answers are in a beam.
    """
    require_fusion(run)
    own = own_setting(run)
    chosen = mode or (own.mode if own else None)
    if chosen is None:
        raise InputError(
            f"{run.name} ranks without BeamFusion (search.fusion={run.model.search.fusion}): say --mode global|per_id"
        )
    stages: tuple[Stage, ...] = ("train", *STAGES)
    drawn = {stage: draw_users(run, stage, users, teaching.seed, shuffled=stage == "train") for stage in stages}
    found = compare_learned(run, chosen, teaching, drawn, progress, resamples)
    head, body, rows = _table(found)
    tests = [
        [stage, name, metric, f"{t.difference:+.4f}", f"{t.low:+.4f} to {t.high:+.4f}", f"{t.p:.4f}", f"{t.p_holm:.4f}"]
        for (stage, name, metric), t in found.tests.items()
    ]
    taught, missed = found.taught, found.taught.users - found.taught.reached
    search = run.model.search
    introduction = [
        f"tau and psi as functions of {', '.join(FEATURES)}, learned for `{run.name}` (M={search.num_beams}, mode "
        f"{chosen}) from {taught.users:,} users of the training split: the answer is the last training item, beams are "
        "generated freely from what stands before it, and no validation or test item is touched. The model itself has "
        f"learned from these answers. {missed:,} of these users ({missed / taught.users:.1%}) have their answer in no "
        "beam and cannot teach.",
        f"*{OWN}* is the run's own fixed pair. *{TAUGHT_PAIR}* is the fixed pair of the grid with the least loss on "
        f"the users that taught, *{TUNED_PAIR}* the one with the best {TUNED_BY} on validation; it has "
        "seen the answers of the validation rows, the others have not. *Loss on training* is the mean "
        "cross-entropy of the answer among the candidates, over the users of the training split whose answer is in a "
        "beam.",
        "*ECE* is the expected calibration error, over 15 bins of equal mass, of the chance that the first item is the "
        "answer: its Phi over the sum of Phi of all candidates. A candidate list leaves out answers that are in no "
        "beam, so chances are of the users whose answer it holds; both are given.",
    ]
    if found.mode == "global":
        introduction.append(
            "*ECE of Phi* takes Phi as eq. 13 has it: over all candidates it sums to less than 1, so it is no chance."
        )
    kept = f"epoch {taught.best_epoch} of {len(taught.losses) - 1}"
    settings = {
        "users": "; ".join(f"{stage} {u.drawn:,} of {u.total:,}" for stage, u in drawn.items()),
        "learning": f"Adam, lr {teaching.lr:g}, hidden {teaching.hidden}, seed {teaching.seed}; weights of {kept}, by "
        f"the loss on the {teaching.held_out:.0%} of the users held out "
        f"({taught.losses[0]:.4f} before, {taught.losses[taught.best_epoch]:.4f} there)",
        "grid of fixed pairs": f"tau {', '.join(f'{t:g}' for t in TAUS)}; psi {', '.join(f'{p:g}' for p in PSIS)}",
        "bootstrap": f"{resamples:,} resamples of the users",
    }
    paired_head = ["split", "learned against", "metric", "difference", "95 % interval", "p", "p (Holm)"]
    return Findings(
        title=f"Learned BeamFusion of {run.name}",
        introduction=introduction,
        tables=[
            StudyTable("Learned against fixed", head, body),
            StudyTable("Difference of the learned weights, over the same users", paired_head, tests),
        ],
        remarks=[],
        pictures={".png": learned_png(found)},
        files={
            ".csv": pl.DataFrame(rows).write_csv().encode(),
            ".safetensors": taught.weights.to_bytes(),
        },
        settings=settings,
    )


def _table(found: Comparison) -> tuple[list[str], list[list[str]], list[dict[str, str | float]]]:
    """Head and cells of the main table, and its rows at full precision."""
    rows: list[dict[str, str | float]] = []
    body = []
    for stage, ways in found.ranked.items():
        for name, ranked in ways.items():
            errors = calibration_errors(ranked, found.mode)
            means = {metric: float(ranked.values[metric].mean()) for metric in METRICS}
            spread = {part: (getattr(ranked, part).mean(), getattr(ranked, part).std()) for part in ("tau", "psi")}
            given: dict[str, str | float] = {"split": stage, "weights": name}
            for part, (mean, deviation) in spread.items():
                given |= {part: float(mean), f"{part}_sd": float(deviation)}
            rows.append({**given, **means, **errors, "loss_on_training": found.train_losses[name]})
            pair = [f"{mean:.2f}" + (f" ± {sd:.2f}" if name == LEARNED else "") for mean, sd in spread.values()]
            numbers = [f"{value:.4f}" for value in (*means.values(), *errors.values(), found.train_losses[name])]
            body.append([stage, name, *pair, *numbers])
    return ["split", "weights", "tau", "psi", *METRICS, *errors, "loss on training"], body, rows
