"""SPARC: multi-interest retrieval with codebooks that are trained with the recommender (arXiv:2508.09090).

Every choice that the paper leaves open is a setting whose docstring names its code, S1 to S18.
Axis letters: B rows, T items of a history, D width, I items, L code levels, C codes a level, K interests searched,
P positions learned from, N wrong items and J shuffled codes of a position, U unique items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import gather_rows, row_weight
from recsys_lightning.errors import InputError
from recsys_lightning.losses import bayesian_personalized_ranking, cross_entropy, info_nce, mixture_cross_entropy
from recsys_lightning.models.two_tower import PairObjective, Pairs, TwoTower, UserSettings
from recsys_lightning.nn.codebook import nearest_code
from recsys_lightning.nn.estimators import Estimator, estimate
from recsys_lightning.nn.item_encoders import ItemEncoder
from recsys_lightning.nn.item_tower import FeatureItemEncoder
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_encode
from recsys_lightning.nn.user_tower import InterestReader, InterestTower
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.retrieval.soft_search import Cells, Merge, soft_search
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.trie import PrefixTrie


@dataclass(frozen=True, kw_only=True)
class SparcCodebooks:
    """The residual quantizer of the item tower's output (section 3.2).

    Attributes:
        num_levels: L (S1).
        num_codes: C a level (S1).
        joint: train the codebooks with everything else. Without, as in SPARC-Static, they and the codes of all items
            stay as k-means has left them (S13).
        estimator: who gets the gradients of what is computed with codewords (S2): ``gather`` the codebooks alone, as
            the text reads; ``gather_straight_through`` and ``rotation`` the codebooks and the item tower. The
            textbook's ``straight_through`` gives the codebooks none and is refused.
        gradient_share: part of the recommendation losses' gradient that reaches the codebooks; the rest of their
            movement is that of L_rqvae. Literal: 1.
        loss_form: ``vq`` or ``paper``, see `ResidualQuantizer` (S3).
        commitment: beta of L_rqvae (S3).
        warmup_steps: training steps before there are codes. Until then the model is a plain two-tower model; then the
            codebooks start from k-means on the item vectors (S17).
        dead_code_threshold: a code used less than this part of the fair share is set to a random residual (S17).
        seed: of the k-means.
    """

    num_levels: int = 3
    num_codes: int = 64
    joint: bool = True
    estimator: Estimator = "gather"
    gradient_share: float = 1.0
    loss_form: Literal["vq", "paper"] = "vq"
    commitment: float = 0.25
    warmup_steps: int = 1000
    dead_code_threshold: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.estimator == "straight_through":
            raise InputError(
                "codebooks.estimator=straight_through gives the codebooks no gradient; use gather, "
                "gather_straight_through or rotation"
            )
        if not 0 <= self.gradient_share <= 1:
            raise InputError(f"codebooks.gradient_share={self.gradient_share} must be in 0..1")
        if self.warmup_steps < 0:
            raise InputError(f"codebooks.warmup_steps={self.warmup_steps} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SparcObjective(PairObjective):
    """What is minimised: the weighted sum of the six losses (section 3.4; only the 10 of L_BPR is printed, S4).

    Of `PairObjective`, ``bce_weight`` is that of L_BCE and ``contrast_weight`` that of L_CL_ui, whose candidates are
    the quantized vectors of the batch's items.

    Attributes:
        rq_weight: of L_rqvae, the mean over the unique items of the batch.
        bpr_weight: of L_BPR_shuffle: the user asked with the item's own code likes it more than asked with others.
        num_shuffled: J, other codes of each position (S9); they come from the answers of the batch.
        item_contrast_weight: of L_CL_ii: item vectors against quantized vectors.
        interest_weight: of L_interest: which level-1 code comes next.
        label_smoothing: of L_interest (S10).
        interest_reaches_items: what moves the interest tower moves the item tower too, through the histories (S10).
        own_share: chance that a position is asked with e_0 of its item and not with z_recon (S8). The paper mixes half
            and half; 1 is e_0 only, 0 z_recon only.
        shared_query: score the wrong items of a position with the right item's query too; literal is off, each item
            with its own (S7).
        contrast_own: ask L_CL_ui with e_0 always. The mixed query names the right item, and L_CL_ui is then learned by
            repeating it. Literal: off.
        contrast_items: candidates of L_CL_ui are item vectors, which is what is searched, and not their quantization.
            Literal: off.
        search_weight: of a loss that the paper has not, on what soft search computes, without a look at the answer:
            with p the probabilities of the ``search.num_interests`` likeliest codes,
            ``-log sum_k p_k softmax_i(<u_k, z_i> / temperature)`` at the right item. In the warm-up there is one user
            vector and no p. Literal: 0.
    """

    rq_weight: float = 1.0
    bpr_weight: float = 10.0
    num_shuffled: int = 3
    item_contrast_weight: float = 1.0
    interest_weight: float = 1.0
    label_smoothing: float = 0.0
    interest_reaches_items: bool = True
    own_share: float = 0.5
    shared_query: bool = False
    contrast_own: bool = False
    contrast_items: bool = False
    search_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_shuffled < 1:
            raise InputError(f"objective.num_shuffled={self.num_shuffled} must be 1 or more")
        for name in ("own_share", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"objective.{name}={getattr(self, name)} must be in 0..1")


@dataclass(frozen=True, kw_only=True)
class SparcSearch:
    """Soft search (section 3.5): a search for each of the user's likeliest interests, and one list of them all.

    Attributes:
        num_interests: K, level-1 codes that are searched; 1 is SPARC-Hard (S12).
        merge: how the K lists become one, see `recsys_lightning.retrieval.soft_search` (S11).
        temperature: of the softmax over the interest logits; it changes what ``max`` does not look at (S11).
        score_temperature: of the scores, where a merge weighs them against probabilities (S11).
        per_interest: items found for each code. None is as many as are wanted of the list; an evaluation wants more for
            users who have seen much, and ``sum``, ``mixture`` and ``quota`` then depend on who is in a batch.
        restrict_to_code: each search looks at the items of its code alone (S11). Literal: off.
        interests: ``predicted`` takes the K likeliest codes; ``uniform`` gives them equal weight (S12).
    """

    num_interests: int = 4
    merge: Merge = "max"
    temperature: float = 1.0
    score_temperature: float = 1.0
    per_interest: int | None = 200
    restrict_to_code: bool = False
    interests: Literal["predicted", "uniform"] = "predicted"

    def __post_init__(self) -> None:
        if self.num_interests < 1:
            raise InputError(f"search.num_interests={self.num_interests} must be 1 or more")
        if self.per_interest is not None and self.per_interest < 1:
            raise InputError(f"search.per_interest={self.per_interest} must be 1 or more, or null")
        for name in ("temperature", "score_temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"search.{name}={getattr(self, name)} must be above 0")


class _Coded(NamedTuple):
    """Codes and codewords of the unique items of a batch."""

    codes: Tensor  # (U, L)
    first: Tensor  # (U, D) e_0
    total: Tensor  # (U, D) z_recon
    loss: Tensor  # () L_rqvae


class SPARC(TwoTower):
    """A two-tower model whose users are asked with interests: codewords of a codebook that is trained with the towers.

    Args:
        catalog: the items.
        dim: D (S1).
        max_history: longest history in items, that of the data.
        normalize: bring user and item vectors to length 1, so that scores are cosines; literal is inner products (S5).
        item_encoder: the item tower, built from ``(catalog, dim)``.
        user: of the towers that read histories: the user tower and, a separate one, the interest tower.
        codebooks: see `SparcCodebooks`.
        objective: see `SparcObjective`.
        search: see `SparcSearch`.

    Raises:
        InputError: more interests than codes.
    """

    codes: Tensor  # (I+1, L) of SPARC-Static
    steps: Tensor  # () training steps so far

    def __init__(
        self,
        catalog: Catalog,
        dim: int = 128,
        max_history: int = 20,
        normalize: bool = False,
        item_encoder: Callable[[Catalog, int], ItemEncoder] = FeatureItemEncoder,
        user: UserSettings = UserSettings(),  # noqa: B008 - frozen
        codebooks: SparcCodebooks = SparcCodebooks(),
        objective: SparcObjective = SparcObjective(),
        search: SparcSearch = SparcSearch(),
    ):
        super().__init__(catalog, dim, max_history, normalize, item_encoder, user, objective)
        self.settings, self.aims, self.search = codebooks, objective, search
        self.books = ResidualQuantizer(
            dim,
            codebooks.num_levels,
            codebooks.num_codes,
            codebooks.commitment,
            "gradient",
            dead_code_threshold=codebooks.dead_code_threshold,
            estimator=codebooks.estimator,
            loss_form=codebooks.loss_form,
        )
        self.books.codebooks.requires_grad_(codebooks.joint)
        self.reader = InterestReader(dim, user.num_heads, user.dropout)
        self.interest = InterestTower(self.history_encoder(), dim, codebooks.num_codes, user.dropout)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("codes", torch.zeros(catalog.num_items + 1, codebooks.num_levels, dtype=torch.long))

    @property
    def search(self) -> SparcSearch:
        """How lists are made; it may be set anew at any time."""
        return self._search

    @search.setter
    def search(self, search: SparcSearch) -> None:
        if search.num_interests > self.settings.num_codes:
            raise InputError(
                f"search.num_interests={search.num_interests} is more than the {self.settings.num_codes} codes of "
                "level 1: lower it or raise codebooks.num_codes"
            )
        self._search = search

    @property
    def quantizer(self) -> ResidualQuantizer:
        """The codebooks that are trained with the model."""
        return self.books

    @property
    def has_codes(self) -> bool:
        """Whether the warm-up is over."""
        return bool(self.books.initialised)

    # ---------------------------------------------------------------------------------------------- training

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """``bce``, ``rq``, ``bpr``, ``contrast`` (L_CL_ui), ``item_contrast`` (L_CL_ii), ``interest`` and ``search``.

        They are weighted, and one that weighs nothing is left out. In training mode this counts a step; the one after
        the warm-up starts the codebooks.
        """
        if self.training:
            if not self.has_codes and int(self.steps) >= self.settings.warmup_steps:
                self.start_codes()
            self.steps += 1
        pairs = self.pairs(batch)
        if not self.has_codes or not len(pairs.items):  # without any item there is nothing to quantize
            return self._warm_up(pairs, batch)
        aims = self.aims
        share = row_weight(len(pairs.row), pairs.row.device)
        coded = self._coded(pairs.items, pairs.vectors)
        own = coded.codes[pairs.right, 0]  # (P,)
        shuffled, valid = self._shuffled(own)  # (P, J), (P,)

        # All that the user tower is asked at a position, in one pass.
        by_code = torch.rand(len(own), 1, device=own.device) < aims.own_share  # (P, 1)
        asked = {"right": torch.where(by_code, coded.first[pairs.right], coded.total[pairs.right])[:, None]}
        if aims.bce_weight and not aims.shared_query:
            asked["wrong"] = torch.where(by_code[..., None], coded.first[pairs.wrong], coded.total[pairs.wrong])
        if aims.bpr_weight or aims.contrast_own:
            asked["own"] = coded.first[pairs.right][:, None]
        if aims.bpr_weight:
            asked["shuffled"] = self._words(shuffled)
        likeliest = None
        logits = self._interest_logits(pairs, batch)  # (P, C)
        if aims.search_weight:
            likeliest = logits.log_softmax(-1).topk(self.search.num_interests)
            asked["likely"] = self._words(likeliest.indices)
        vectors = self._scaled(self.reader(pairs.states, pairs.row, pairs.at, torch.cat(list(asked.values()), 1)))
        parts = torch.split(vectors, [query.shape[1] for query in asked.values()], dim=1)
        users = dict(zip(asked, parts, strict=True))  # (P, ., D) each

        right = pairs.vectors[pairs.right]  # (P, D)
        scored = torch.cat([users["right"], users["wrong"]], 1) if "wrong" in users else users["right"]
        contrasted = users["own" if aims.contrast_own else "right"][:, 0]
        terms = self.pair_losses(pairs, scored, contrasted, pairs.vectors if aims.contrast_items else coded.total)
        if aims.rq_weight:
            terms["rq"] = aims.rq_weight * coded.loss
        if aims.bpr_weight:
            better, worse = ((users[name] * right[:, None]).sum(-1) for name in ("own", "shuffled"))  # (P, 1), (P, J)
            ranking = bayesian_personalized_ranking(better[:, 0], worse, valid)
            terms["bpr"] = row_weight(int(valid.sum()), own.device) * aims.bpr_weight * ranking
        if aims.item_contrast_weight:
            answers = slice(pairs.answers)
            place = torch.arange(pairs.answers, device=own.device)
            terms["item_contrast"] = aims.item_contrast_weight * info_nce(
                pairs.vectors[answers], coded.total[answers], place, aims.temperature, similarity=aims.contrast_by
            )
        if aims.interest_weight:
            guess = cross_entropy(logits, own, aims.label_smoothing)
            terms["interest"] = share * aims.interest_weight * guess
        if likeliest is not None:
            terms["search"] = share * self._search_loss(pairs, users["likely"], likeliest.values)
        return self._with_idle(terms, logits, vectors)

    def _search_loss(self, pairs: Pairs, users: Tensor, log_weights: Tensor) -> Tensor:
        """The weighted loss on soft search with user vectors (P, K, D) of interests with log-weights (P, K)."""
        items = pairs.vectors if self.aims.contrast_pool else pairs.vectors[: pairs.answers]  # (U, D)
        scores = users / self.aims.temperature @ items.T  # (P, K, U)
        return self.aims.search_weight * mixture_cross_entropy(scores, log_weights, pairs.right)

    def _warm_up(self, pairs: Pairs, batch: SequenceBatch) -> dict[str, Tensor]:
        """A plain two-tower model's losses; its search is one with the user's only vector."""
        users = self._scaled(pairs.states[pairs.row, pairs.at])  # (P, D)
        terms = self.pair_losses(pairs, users[:, None], users, pairs.vectors)
        if self.aims.search_weight:
            share = row_weight(len(pairs.row), pairs.row.device)
            terms["search"] = share * self._search_loss(pairs, users[:, None], users.new_zeros(len(users), 1))
        asked = self.reader(pairs.states, pairs.row[:1], pairs.at[:1], self.books.codebooks[:1, :1])
        return self._with_idle(terms, self._interest_logits(pairs, batch), asked, self.books.codebooks)

    @torch.no_grad()
    def start_codes(self) -> None:
        """Start the codebooks from k-means on the item vectors as they are, and end the warm-up (S17).

        Items that training never meets do not count: nothing has been learned of them.
        """
        was_training = self.training
        table = self.eval().item_table()  # (I+1, D)
        self.train(was_training)
        self.books.init_from_data(table[self.trained], seed=self.settings.seed)
        self.codes[1:] = residual_encode(table[1:], self.books.codebooks)

    def _coded(self, items: Tensor, vectors: Tensor) -> _Coded:
        """Codes and codewords of items (U,) with vectors (U, D), with the gradients of the estimator."""
        if self.settings.joint:
            found = self.books(vectors)
            codes, words, loss = found.codes, found.words, found.loss
        else:
            codes = self.codes[items]  # (U, L)
            words = self.books.codebooks[torch.arange(codes.shape[1], device=codes.device), codes]  # (U, L, D)
            left = vectors[:, None] - F.pad(words.cumsum(1)[:, :-1], (0, 0, 1, 0))  # (U, L, D) residuals
            loss = self.settings.commitment * (left - words).square().sum((1, 2)).mean()
            if self.settings.loss_form == "paper":  # whose codebook term moves nothing here
                loss = loss.detach() + (vectors - words.sum(1)).square().sum(-1).mean()
        words = self._held(words)
        first = estimate(vectors, words[:, 0], self.settings.estimator)
        return _Coded(codes, first, estimate(vectors, words.sum(1), self.settings.estimator), loss)

    def _held(self, words: Tensor) -> Tensor:
        """Codewords (..., D) that pass on `gradient_share` of a gradient."""
        passed = self.settings.gradient_share
        return passed * words + (1 - passed) * words.detach() if passed < 1 else words

    def _words(self, codes: Tensor) -> Tensor:
        """Level-1 codewords (..., D) of codes (...)."""
        return self._held(self.books.codebooks[0])[codes]

    def _shuffled(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Other level-1 codes (P, J) for positions with codes `own` (P,), and which positions have any, (P,) bool.

        They are drawn as answers of the batch are, of all processes, among those with another code.
        """
        counts = torch.bincount(gather_rows(own), minlength=self.settings.num_codes)  # (C,)
        weights = counts.float().repeat(len(own), 1).scatter(1, own[:, None], 0.0)  # (P, C)
        valid = weights.sum(1) > 0
        weights = weights.masked_fill(~valid[:, None], 1.0)  # multinomial wants something to draw
        return torch.multinomial(weights, self.aims.num_shuffled, replacement=True), valid

    def _interest_logits(self, pairs: Pairs, batch: SequenceBatch) -> Tensor:
        """(P, C) what the interest tower says at every position."""
        history = pairs.history if self.aims.interest_reaches_items else pairs.history.detach()
        logits: Tensor = self.interest(history, batch.user_features)[pairs.row, pairs.at]
        return logits

    # --------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def interest_logits(self, batch: SequenceBatch) -> Tensor:
        """(B, C) how likely each level-1 code is next, of the users alone; `target` is never looked at."""
        return self._logits_of(batch, self.history_vectors(batch.history))

    def _logits_of(self, batch: SequenceBatch, vectors: Tensor) -> Tensor:
        """`interest_logits` of users whose histories have item vectors (B, T, D)."""
        at = self.last_states(batch)
        logits: Tensor = self.interest(vectors, batch.user_features)  # (B, S, C)
        return logits[torch.arange(len(at), device=at.device), at]

    @torch.no_grad()
    def interest_queries(self, batch: SequenceBatch, codes: Tensor) -> Tensor:
        """(B, K, D) the user's vector for each of the level-1 codes (B, K), in one pass."""
        return self._queries_of(batch, self.history_vectors(batch.history), codes)

    def _queries_of(self, batch: SequenceBatch, vectors: Tensor, codes: Tensor) -> Tensor:
        """`interest_queries` of users whose histories have item vectors (B, T, D)."""
        at = self.last_states(batch)
        states = self.history(vectors, batch.user_features)  # (B, S, D)
        rows = torch.arange(len(at), device=at.device)
        return self._scaled(self.reader(states, rows, at, self.books.codebooks[0][codes]))

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """Soft search (section 3.5); before there are codes, the search of a plain two-tower model."""
        if not self.has_codes:
            return super().recommend(batch, k, index)
        search = self.search
        vectors = self.history_vectors(batch.history)  # (B, T, D) for both towers
        log_probs = (self._logits_of(batch, vectors) / search.temperature).log_softmax(-1)
        best = log_probs.topk(search.num_interests)
        chosen = torch.zeros_like(best.values) if search.interests == "uniform" else best.values
        queries = self._queries_of(batch, vectors, best.indices)
        cells = Cells(self._first_codes(index), best.indices) if search.restrict_to_code else None
        return soft_search(
            index,
            queries,
            chosen.log_softmax(-1),
            k,
            merge=search.merge,
            per_query=search.per_interest,
            score_temperature=search.score_temperature,
            restrict_to=cells,
        )

    def _first_codes(self, index: ItemIndex) -> Tensor:
        """(I+1,) level-1 codes of the items of an index; -1 for padding."""
        book = self.books.codebooks[0]
        codes = nearest_code(index.table[1:].to(book), book) if self.settings.joint else self.codes[1:, 0]
        return F.pad(codes, (1, 0), value=-1)

    @torch.no_grad()
    def item_codes(self) -> Tensor:
        """(I, L) codes of all items as the model stands.

        Raises:
            RuntimeError: the warm-up is not over.
        """
        if not self.has_codes:
            raise RuntimeError("there are no codes before the warm-up is over")
        if not self.settings.joint:
            return self.codes[1:]
        return residual_encode(self.item_table()[1:], self.books.codebooks)

    @property
    def prefix_trie(self) -> PrefixTrie | None:
        """The trie of the codes; None before there are any."""
        if not self.has_codes:
            return None
        codes = F.pad(self.item_codes(), (0, 0, 1, 0))  # (I+1, L)
        return PrefixTrie(SemanticIds(codes, self.settings.num_codes, "trained with the recommender", "SPARC"))
