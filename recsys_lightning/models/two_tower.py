"""A two-tower model: one vector a user, one vector an item, and retrieval by inner product.

The baseline that SPARC (arXiv:2508.09090) is measured against, of the same size and on the same towers; SPARC is this
model with interests. Axis letters: B rows, T items of a history, S states of it, D width, I items, P positions learned
from, N wrong items of a position, U unique items.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import gather_rows, row_weight
from recsys_lightning.errors import InputError
from recsys_lightning.losses import binary_cross_entropy, info_nce, log_sampling_chance
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.nn.item_encoders import ItemEncoder
from recsys_lightning.nn.item_tower import FeatureItemEncoder
from recsys_lightning.nn.user_tower import HistoryEncoder
from recsys_lightning.retrieval.index import ItemIndex, Similarity
from recsys_lightning.retrieval.recommendations import Recommendations


@dataclass(frozen=True, kw_only=True)
class UserSettings:
    """The tower that reads a history.

    Attributes:
        num_layers: causal transformer blocks; 0 reads the item vectors as they are.
        num_heads: attention heads.
        dropout: on inputs, inside the blocks and in the layers behind them.
        start: put a learned token first, so that the first item is predicted too and an empty history has an answer.
            Without it an empty history is an error.
    """

    num_layers: int = 1
    num_heads: int = 2
    dropout: float = 0.2
    start: bool = False


@dataclass(frozen=True, kw_only=True)
class PairObjective:
    """What any two-tower model minimises: ``bce_weight * L_BCE + contrast_weight * L_CL``.

    Attributes:
        negatives: N, wrong items of each position in L_BCE (S6).
        drawn_from: wrong items are drawn uniformly from the items of the training split, or in proportion to their
            popularity from the answers of the batch (S6).
        pool: items drawn for a batch when they are drawn uniformly; every position takes its N from them.
        log_q: correct both losses for popular items being drawn more often (S6).
        bce_weight: of L_BCE, the mean over positions and their 1 + N items. A learned number is added to all scores
            within it, so that they need not all be low where most items are wrong.
        contrast_weight: of L_CL, the user's vector against the items of the batch, each once.
        contrast_pool: the items of the pool are candidates of L_CL too.
        temperature: of L_CL (S5).
        contrast_by: ``inner_product`` as printed, or ``cosine`` (S5).
    """

    negatives: int = 10
    drawn_from: Literal["uniform", "batch"] = "uniform"
    pool: int = 2048
    log_q: bool = False
    bce_weight: float = 1.0
    contrast_weight: float = 1.0
    contrast_pool: bool = False
    temperature: float = 1.0
    contrast_by: Similarity = "inner_product"

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.pool < 1:
            raise InputError(f"objective.negatives={self.negatives} and objective.pool={self.pool} must be 1 or more")
        if self.temperature <= 0:
            raise InputError(f"objective.temperature={self.temperature} must be above 0")


class Pairs(NamedTuple):
    """The positions of a batch that are learned from, each with its right item and its wrong ones.

    Every item stands once in `items`, so that it is encoded once.
    """

    history: Tensor  # (B, T, D) item vectors of the histories
    states: Tensor  # (B, S, D) of the histories
    row: Tensor  # (P,) whose history
    at: Tensor  # (P,) the state of it that is read
    items: Tensor  # (U,) ids
    vectors: Tensor  # (U, D) theirs
    answers: int  # the first so many of them are answers of the batch, those of all processes
    right: Tensor  # (P,) place of the right item in `items`
    wrong: Tensor  # (P, N) places of the wrong ones


class TwoTower(Recommender):
    """Learns vectors of users and items whose inner product is high where the item came next.

    Every position of a sequence is learned from: the state of the history before it is the user.

    Args:
        catalog: the items.
        dim: D.
        max_history: longest history in items, that of the data.
        normalize: bring user and item vectors to length 1, so that scores are cosines.
        item_encoder: the item tower, built from ``(catalog, dim)``.
        user: see `UserSettings`.
        objective: see `PairObjective`.
    """

    def __init__(
        self,
        catalog: Catalog,
        dim: int = 64,
        max_history: int = 20,
        normalize: bool = False,
        item_encoder: Callable[[Catalog, int], ItemEncoder] = FeatureItemEncoder,
        user: UserSettings = UserSettings(),
        objective: PairObjective = PairObjective(),
    ):
        super().__init__()
        self.num_items, self.dim, self.max_history, self.normalize = catalog.num_items, dim, max_history, normalize
        self.user, self.objective = user, objective
        self.feature_sizes = tuple(catalog.user_features.sizes) if catalog.user_features is not None else ()
        self.item_encoder = item_encoder(catalog, dim)
        self.history = self.history_encoder()
        # Of all scores in L_BCE: cosines must grow, and most items are wrong.
        self.scale = nn.Parameter(torch.tensor(1 / objective.temperature)) if normalize else None
        self.bias = nn.Parameter(torch.tensor(-math.log(objective.negatives)))
        counts = torch.as_tensor(catalog.train_counts)  # (I+1,)
        # Items that training never meets are no wrong answers: it would only learn that nobody wants them.
        self.register_buffer("trained", counts.nonzero().flatten(), persistent=False)  # ids, ascending
        log_popularity = (counts.clamp_min(1).double() / counts.sum().clamp_min(1)).log().float()
        self.register_buffer("log_popularity", log_popularity, persistent=False)  # (I+1,)

    trained: Tensor
    log_popularity: Tensor

    def history_encoder(self) -> HistoryEncoder:
        """A new encoder of histories, by the settings of the user."""
        user = self.user
        return HistoryEncoder(
            self.dim, user.num_layers, user.num_heads, user.dropout, self.max_history, self.feature_sizes, user.start
        )

    # ---------------------------------------------------------------------------------------------- training

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """``bce`` and ``contrast``, weighted; one that weighs nothing is left out."""
        pairs = self.pairs(batch)
        users = self._scaled(pairs.states[pairs.row, pairs.at])  # (P, D)
        return self._with_idle(self.pair_losses(pairs, users[:, None], users, pairs.vectors))

    def pairs(self, batch: SequenceBatch) -> Pairs:
        """The positions of a batch and their items."""
        sequence = self._known(batch.sequence)  # (B, T+1)
        first = 0 if self.user.start else 1  # without a start token nothing stands before the first item
        row, at = (sequence[:, first:] != 0).nonzero(as_tuple=True)  # (P,) each
        target = sequence[row, at + first]  # (P,)
        answers = torch.unique(gather_rows(torch.unique(target)))  # ascending, the same on every process
        if self.objective.drawn_from == "uniform":
            drawn = self.trained[torch.randint(len(self.trained), (self.objective.pool,), device=target.device)]
        else:
            drawn = gather_rows(target)
        items, place = torch.unique(torch.cat([answers, drawn]), return_inverse=True)
        # Answers first: they are what L_CL contrasts with.
        is_answer = torch.zeros(len(items), dtype=torch.bool, device=items.device)
        is_answer[place[: len(answers)]] = True
        order = (~is_answer).to(torch.int8).argsort(stable=True)  # (U,)
        where = order.argsort()  # (U,) new place of each
        items, place = items[order], where[place]
        vectors = self.encode_items(items)  # (U, D)
        history = self._vectors_of(sequence[:, :-1], items, vectors)  # (B, T, D)
        states = self.history(history, batch.user_features)  # (B, S, D)
        pool = place[len(answers) :]
        wrong = pool[torch.randint(max(len(pool), 1), (len(target), self.objective.negatives), device=target.device)]
        return Pairs(history, states, row, at, items, vectors, len(answers), torch.searchsorted(answers, target), wrong)

    def _vectors_of(self, item_ids: Tensor, items: Tensor, vectors: Tensor) -> Tensor:
        """Vectors (B, T, D) of items (B, T), zeros at padding: those of `items` are at hand, others are encoded."""
        at = torch.full((self.num_items + 1,), -1, device=items.device)
        at[items] = torch.arange(len(items), device=items.device)
        rest = torch.unique(item_ids[(at[item_ids] < 0) & (item_ids != 0)])
        at[rest] = len(items) + torch.arange(len(rest), device=items.device)
        at[0] = len(items) + len(rest)
        known = torch.cat([vectors, self.encode_items(rest), vectors.new_zeros(1, vectors.shape[1])])
        return known[at[item_ids]]

    def pair_losses(self, pairs: Pairs, users: Tensor, contrasted: Tensor, candidates: Tensor) -> dict[str, Tensor]:
        """The two losses of any two-tower model, weighted.

        Args:
            pairs: what is learned from.
            users: (P, 1 or 1 + N, D) the user's vector for the right item and, if there are more, for each wrong one.
            contrasted: (P, D) the user's vector in L_CL.
            candidates: (U, D) vectors of the items in L_CL.
        """
        settings, terms = self.objective, dict[str, Tensor]()
        share = row_weight(len(pairs.row), pairs.row.device)
        if settings.bce_weight:
            places = torch.cat([pairs.right[:, None], pairs.wrong], 1)  # (P, 1 + N)
            scores = (users * pairs.vectors[places]).sum(-1)  # (P, 1 + N)
            scores = (scores if self.scale is None else self.scale * scores) + self.bias
            if settings.log_q and settings.drawn_from == "batch":
                scores = scores - self.log_popularity[pairs.items[places]]
            terms["bce"] = share * settings.bce_weight * binary_cross_entropy(scores[:, :1], scores[:, 1:])
        if settings.contrast_weight:
            count = len(pairs.items) if settings.contrast_pool else pairs.answers
            log_q = self._log_chance(pairs, pairs.items[:count]) if settings.log_q else None  # (U,)
            contrast = info_nce(
                contrasted, candidates[:count], pairs.right, settings.temperature, None, log_q, settings.contrast_by
            )
            terms["contrast"] = share * settings.contrast_weight * contrast
        return terms

    def _log_chance(self, pairs: Pairs, items: Tensor) -> Tensor:
        """Log of the chance that items (U,) are candidates of L_CL: answers of all processes, and this one's pool."""
        num_met = gather_rows(torch.tensor([len(pairs.row)], device=items.device)).sum()
        drawn = self.objective.pool if self.objective.contrast_pool and self.objective.drawn_from == "uniform" else 0
        return log_sampling_chance(self.log_popularity[items], num_met, drawn, len(self.trained))

    def _with_idle(self, terms: dict[str, Tensor], *idle: Tensor) -> dict[str, Tensor]:
        """The same losses, connected to what none of them may need: every process passes on every gradient."""
        if terms:
            name, numbers = next(iter(terms)), [self.bias] if self.scale is None else [self.bias, self.scale]
            terms[name] = terms[name] + sum(0.0 * output.sum() for output in (*numbers, *idle))
        return terms

    # --------------------------------------------------------------------------------------------- inference

    def encode_items(self, item_ids: Tensor) -> Tensor:
        """(n, D) what the item tower says of them."""
        return self._scaled(self.item_encoder(item_ids))

    def _scaled(self, vectors: Tensor) -> Tensor:
        """(..., D) of length 1 where that is asked for."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def encode_users(self, batch: SequenceBatch) -> Tensor:
        """(B, D) the state after the last item of each history."""
        states, at = self.read_histories(batch)
        return self._scaled(states[torch.arange(len(at), device=at.device), at])

    def read_histories(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """States (B, S, D) of histories, and which of them is the last, (B,).

        Raises:
            InputError: a history is empty, or holds an item that is not in the catalogue.
        """
        at = self.last_states(batch)
        return self.history(self.history_vectors(batch.history), batch.user_features), at

    def last_states(self, batch: SequenceBatch) -> Tensor:
        """Which state of each history is the last, (B,); see `read_histories`."""
        lengths = batch.history_mask.sum(1)  # (B,)
        if not self.user.start and bool((lengths == 0).any()):
            user = int(batch.user[(lengths == 0).nonzero()[0, 0]])
            raise InputError(
                f"user {user} has an empty history, and {type(self).__name__} knows users by theirs; set user.start to "
                "learn an answer for such users"
            )
        return lengths - int(not self.user.start)

    def history_vectors(self, history: Tensor) -> Tensor:
        """Item vectors (B, T, D) of histories (B, T), zeros at padding."""
        none = history.new_zeros(0)
        return self._vectors_of(self._known(history), none, self.encode_items(none))

    def _known(self, item_ids: Tensor) -> Tensor:
        """The same items (B, T), once it is sure that the catalogue has them all."""
        if item_ids.numel() and int(item_ids.max()) > self.num_items:
            raise InputError(
                f"a sequence holds item {int(item_ids.max())}, but the catalogue has {self.num_items} items: the "
                "interactions and the items are of different data"
            )
        return item_ids

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k items whose vectors have the largest products with the user's."""
        found = index.search_with_ties(self.encode_users(batch), k)
        return Recommendations(found.item_ids, found.scores)
