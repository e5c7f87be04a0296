"""Recall and diversity of BeamFusion over M, tau, psi and mode (COBRA, section 4.3.2 and Figure 6; C16, C17).

Generating beams is what costs; all settings of one M are fused from the same beams.
Axis letters: B rows, R places of a list, M beams.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import polars as pl
import torch
from torch import Tensor

from recsys_lightning.analysis.study_report import Findings, StudyTable
from recsys_lightning.analysis.study_run import Pool, Progress, StudiedRun, draw_users, pools, require_fusion
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import NDCGAtK, RankingMetrics, RecallAtK
from recsys_lightning.metrics.ranks import TargetRanks
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.retrieval.beam_fusion import log_scores
from recsys_lightning.retrieval.fusion_weights import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
TAUS = tuple(round(0.5 + 0.1 * step, 1) for step in range(11))
PSIS = (4.0, 8.0, 16.0, 32.0)
BEAMS = (10, 20, 30, 40, 50)
BEST_BY = "ndcg@10"


@dataclass(frozen=True, kw_only=True)
class FusionGrid:
    """What is tried.

    Attributes:
        beams: numbers of beams M.
        taus: weights of the beam score.
        psis: weights of the cosine.
        k: places over which diversity and the recall of the picture are taken.
        stage: ``val`` or ``test``.
        users: to draw; None takes all.
        seed: of the draw.

    Raises:
        InputError: a list that is empty, repeats a value or holds one that cannot be.
    """

    beams: tuple[int, ...] = BEAMS
    taus: tuple[float, ...] = TAUS
    psis: tuple[float, ...] = PSIS
    k: int = 50
    stage: Literal["val", "test"] = "val"
    users: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        lists: dict[str, tuple[Sequence[float], float]] = {
            "beams": (self.beams, 1),
            "taus": (self.taus, 0),
            "psis": (self.psis, 0),
        }
        for name, (values, least) in lists.items():
            if not values or len(set(values)) < len(values) or min(values) < least:
                raise InputError(f"--{name} {' '.join(map(str, values))}: need different values of {least} or more")
        if self.k < 1:
            raise InputError(f"--k {self.k} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of BeamFusion."""

    mode: Mode
    beams: int
    tau: float
    psi: float


@dataclass
class Measured:
    """What a setting reached.

    Attributes:
        setting: of BeamFusion.
        own: whether it is the run's own.
        in_grid: False of a setting that is there only because it is the run's own.
        values: by the names of `shown_names`, once all users are measured.
    """

    setting: Setting
    own: bool
    in_grid: bool
    values: dict[str, float] = field(default_factory=dict)
    _ranks: list[TargetRanks] = field(default_factory=list)
    _num_ids: int = 0

    def update(self, pool: Pool, lists: "_Lists", k: int) -> None:
        """Fuse and count a batch."""
        chosen = self.setting
        scores = log_scores(pool.found, pool.log_probs, chosen.tau, chosen.psi, chosen.mode)
        self._ranks.append(pool.ranks(scores))
        self._num_ids += lists.num_distinct_ids(scores, k)

    def finish(self, k: int) -> None:
        """Turn what was counted into `values`."""
        every = TargetRanks(*(torch.cat(parts) for parts in zip(*self._ranks, strict=True)))
        metrics = RankingMetrics({f"recall@{cut}": RecallAtK(cut) for cut in _cuts(k)} | {BEST_BY: NDCGAtK(10)})
        metrics.to(every.first.device).update(every)
        self.values = {name: float(value) for name, value in metrics.compute().items()}
        users = len(every.first)
        self.values[f"diversity@{k}"] = self._num_ids / users
        self.values["answer in a beam"] = float((every.first > 0).sum()) / users
        self._ranks.clear()


class _Lists:
    """The candidates of a batch side by side, a row a user, to take the best of each again and again."""

    def __init__(self, pool: Pool):
        row, (num_rows, self.num_beams) = pool.found.row, pool.log_probs.shape
        sizes = row.bincount(minlength=num_rows)
        self.row, self.column = row, torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
        self.shape = (num_rows, int(sizes.max()))
        # The beam of each candidate; one more stands for the places behind a row's last.
        self.beam = row.new_full(self.shape, self.num_beams)
        self.beam[row, self.column] = pool.found.beam % self.num_beams

    def num_distinct_ids(self, scores: Tensor, k: int) -> int:
        """How many semantic IDs the k best candidates of a user have, summed over users; a beam is one ID."""
        grid = scores.new_full(self.shape, -torch.inf)
        grid[self.row, self.column] = scores
        beams = self.beam.gather(1, grid.topk(min(k, self.shape[1]), dim=1).indices)
        met = torch.zeros(len(grid), self.num_beams + 1, dtype=torch.bool, device=scores.device)
        return int(met.scatter_(1, beams, True)[:, :-1].sum())


def own_setting(run: StudiedRun[COBRA]) -> Setting | None:
    """The setting a run ranks with; None if it ranks without BeamFusion."""
    search = run.model.search
    if search.fusion == "global" or search.fusion == "per_id":
        return Setting(mode=search.fusion, beams=search.num_beams, tau=search.tau, psi=search.psi)
    return None


def measure_grid(run: StudiedRun[COBRA], grid: FusionGrid, progress: Progress) -> list[Measured]:
    """Every setting of the grid, and the run's own.

    Raises:
        InputError: the run lacks semantic IDs or dense vectors.
    """
    require_fusion(run)
    own = own_setting(run)
    users = draw_users(run, grid.stage, grid.users, grid.seed)
    found = []
    for number in dict.fromkeys((*grid.beams, *([own.beams] if own else []))):
        wanted = [
            Setting(mode=mode, beams=number, tau=tau, psi=psi)
            for mode in MODES
            for psi in grid.psis
            for tau in grid.taus
            if number in grid.beams
        ]
        others = [own] if own and own.beams == number and own not in wanted else []
        here = [Measured(setting, setting == own, setting in wanted) for setting in (*wanted, *others)]
        with torch.inference_mode():
            for pool in pools(run, users, number, progress, f"M={number}"):
                lists = _Lists(pool)
                for measured in here:
                    measured.update(pool, lists, grid.k)
        for measured in here:
            measured.finish(grid.k)
        found += here
    return found


def _cuts(k: int) -> list[int]:
    return sorted({5, 10, 50, k})


def shown_names(k: int) -> list[str]:
    """The metrics of the table, the picture and the CSV."""
    recalls = [f"recall@{cut}" for cut in _cuts(k)]
    return [*recalls, BEST_BY, f"diversity@{k}", "answer in a beam"]


def best_settings(found: Sequence[Measured]) -> list[Measured]:
    """Of each mode and M the setting of the grid with the best `BEST_BY`; the first of equals."""
    best: dict[tuple[str, int], Measured] = {}
    for measured in found:
        key = (measured.setting.mode, measured.setting.beams)
        if measured.in_grid and (key not in best or measured.values[BEST_BY] > best[key].values[BEST_BY]):
            best[key] = measured
    return list(best.values())


def fusion_study(run: StudiedRun[COBRA], grid: FusionGrid, progress: Progress) -> Findings:
    """Measure the grid and say what was found.

    Raises:
        InputError: the run lacks semantic IDs or dense vectors, or matplotlib is missing.
    """
    from recsys_lightning.analysis.study_fusion_figure import fusion_png

    found = measure_grid(run, grid, progress)
    names = shown_names(grid.k)
    own = next((measured for measured in found if measured.own), None)
    shown = [(measured, "best") for measured in best_settings(found)] + ([(own, "the run's own")] if own else [])
    body = [
        [what, s.mode, str(s.beams), f"{s.tau:g}", f"{s.psi:g}", *(_cell(name, measured) for name in names)]
        for measured, what in shown
        for s in [measured.setting]
    ]
    rows = [{**asdict(m.setting), "own": m.own, **{name: m.values[name] for name in names}} for m in found]
    users = draw_users(run, grid.stage, grid.users, grid.seed)
    introduction = (
        f"Beams of `{run.name}` for {users.drawn:,} of {users.total:,} users of the {grid.stage} split, fused with "
        f"every setting. All items are ranked, seen ones too. *Diversity@{grid.k}* is the mean number of different "
        f"semantic IDs among the first {grid.k} places; *answer in a beam* is the share of users whose answer can be "
        f"ranked at all. *Best* is by {BEST_BY} on these same users, so it flatters by what a choice among "
        f"{len(grid.taus) * len(grid.psis)} settings does.",
    )
    settings = {
        "M": ", ".join(map(str, grid.beams)),
        "tau": ", ".join(f"{tau:g}" for tau in grid.taus),
        "psi": ", ".join(f"{psi:g}" for psi in grid.psis),
        "items kept of each cell": str(run.model.search.per_cell or "all"),
        "users": f"{users.drawn:,} of {users.total:,}, {grid.stage} split, seed {grid.seed}",
    }
    return Findings(
        title=f"BeamFusion of {run.name}: M, tau, psi and the mode",
        introduction=introduction,
        tables=[StudyTable("Best settings", ["", "mode", "M", "tau", "psi", *names], body)],
        remarks=[],
        pictures={".png": fusion_png(found, grid, own.setting if own else None)},
        files={".csv": pl.DataFrame(rows).write_csv().encode()},
        settings=settings,
    )


def _cell(name: str, measured: Measured) -> str:
    value = measured.values[name]
    return f"{value:.1f}" if name.startswith("diversity") else f"{value:.4f}"
