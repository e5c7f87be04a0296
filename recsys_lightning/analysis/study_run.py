"""What the studies share: a trained model opened again, its users in batches, and the items that COBRA's beams reach.

Axis letters: B rows, M beams, C candidates over all rows, I items, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recsys_lightning.analysis.audit import TrainedRun
from recsys_lightning.analysis.groups import load_run
from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.sequences import SequenceBatch, SequenceDataset, Stage
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranks import TargetRanks
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.beam_fusion import Candidates, beam_candidates
from recsys_lightning.training.checkpoints import trained_model

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many steps of it are."""


M = TypeVar("M", bound=Recommender)
M_co = TypeVar("M_co", bound=Recommender, covariant=True)


@dataclass(frozen=True)
class StudiedRun(Generic[M_co]):
    """A trained model with its data.

    Attributes:
        name: the folder, as a report may show it.
        model: in evaluation mode.
        data: set up.
        results: the run's ``results.json``.
        checkpoint: name of the file that the weights are from.
        device: where the model is.
    """

    name: str
    model: M_co
    data: SequenceDataModule
    results: dict[str, Any]
    checkpoint: str
    device: torch.device


def open_studied(run: TrainedRun, kinds: tuple[type[M], ...], device: str = "cpu") -> StudiedRun[M]:
    """Build the data and the model of a run and load its weights.

    Args:
        run: that was trained.
        kinds: models that can be studied.
        device: where the model shall be.

    Raises:
        InputError: the run is of another model, has left no results, or its data or checkpoint cannot be read.
    """
    record = load_run(run.folder)
    names = [kind.__name__ for kind in kinds]
    if not isinstance(run.data, SequenceDataModule) or record.results["model"] not in names:
        wanted = " or ".join(names)
        raise InputError(f"{record.name} is a run of {record.results['model']}; this study is of trained {wanted} runs")
    run.data.prepare_data()
    run.data.setup()
    model = trained_model(run.module, run.data.catalog, run.checkpoint)
    assert isinstance(model, kinds)  # noqa: S101 - its results say so
    place = torch.device(device)
    return StudiedRun(record.name, model.to(place), run.data, record.results, run.checkpoint.name, place)


def require_fusion(run: StudiedRun[COBRA]) -> None:
    """Nothing, if there is something to fuse.

    Raises:
        InputError: the run lacks semantic IDs or dense vectors.
    """
    paths = run.model.tokens.paths
    if paths != "both":
        lacks = "semantic IDs" if paths == "dense" else "dense vectors"
        raise InputError(f"{run.name} has no {lacks} (tokens.paths={paths}): BeamFusion needs both")


class Users(NamedTuple):
    """Users of one stage."""

    batches: DataLoader[SequenceBatch]
    drawn: int  # users in the batches
    total: int  # users of the stage


def draw_users(
    run: StudiedRun[Recommender],
    stage: Stage,
    number: int | None = None,
    seed: int = 0,
    shuffled: bool = False,
    batch_size: int | None = None,
) -> Users:
    """Batches of the users of a stage, or of a part of them.

    In training a user's answer is his last training item and his history what stands before it: no validation and no
    test item is touched.

    Args:
        run: whose data.
        stage: ``train``, ``val`` or ``test``.
        number: users to draw, each with equal chance; None takes all.
        seed: of the draw and of the order.
        shuffled: users in random order, rather than batches of like length.
        batch_size: users of a batch; None takes that of the run's evaluation.

    Raises:
        InputError: the stage has no users.
    """
    data = run.data
    features = data.catalog.user_features
    dataset = SequenceDataset(data.data.interactions, data.split, stage, data.max_history, "last", features)
    if not len(dataset):
        raise InputError(f"{run.name}: no user has enough interactions for the {stage} split")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(dataset))[:number]
    if not shuffled:
        rows = rows[np.argsort(-dataset.lengths[rows], kind="stable")]
    size = batch_size or data.eval_batch_size
    batches = [rows[start : start + size].tolist() for start in range(0, len(rows), size)]
    # The sampler holds whole batches and the dataset answers with one: nothing is collated.
    return Users(DataLoader(dataset, sampler=batches, batch_size=None), len(rows), len(dataset))


class Pool(NamedTuple):
    """What BeamFusion has to rank for a batch of users, whatever tau, psi and mode are."""

    user: Tensor  # (B,)
    length: Tensor  # (B,) items of the history
    answer: Tensor  # (B,)
    log_probs: Tensor  # (B, M)
    found: Candidates
    reached: Tensor  # (B,) bool: the answer is a candidate
    answer_at: Tensor  # (reached users,) where in `found`, by row

    def ranks(self, scores: Tensor) -> TargetRanks:
        """Ranks of the answers by scores (C,): those of the whole ranked list, which need not be made."""
        num_users = len(self.user)
        answer = scores.new_full((num_users,), torch.inf)  # (B,) score; nothing is above one that is not there
        answer[self.reached] = scores[self.answer_at]
        own = answer[self.found.row]  # (C,)
        better, equal = (
            torch.zeros(num_users, dtype=torch.long, device=scores.device).index_add_(0, self.found.row, part.long())
            for part in (scores > own, scores == own)
        )
        first = torch.where(self.reached, better + 1, 0)
        return TargetRanks(first[:, None], equal[:, None], torch.ones_like(self.reached)[:, None])


def pools(run: StudiedRun[COBRA], users: Users, num_beams: int, progress: Progress, what: str) -> Iterator[Pool]:
    """The candidates of all users, batch by batch; beams are generated freely, as in a test."""
    model = run.model
    trie = model.trie
    assert trie is not None  # noqa: S101 - see require_fusion
    vectors = model.item_table()
    total = len(users.batches)
    for number, batch in enumerate(users.batches):
        progress(what, number, total)
        batch = batch.to(run.device)
        beams = model.generate(batch, vectors, num_beams)
        found = beam_candidates(beams, trie, vectors, model.search.per_cell, model.search.omega)
        answer = batch.target[:, 0]
        hit = found.items == answer[found.row]  # (C,)
        reached = torch.zeros(len(batch), dtype=torch.bool, device=run.device)
        reached[found.row[hit]] = True
        lengths = batch.history_mask.sum(1)
        yield Pool(batch.user, lengths, answer, beams.log_probs, found, reached, hit.nonzero()[:, 0])
    progress(what, total, total)
