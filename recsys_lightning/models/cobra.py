"""COBRA: a decoder that first generates an item's sparse ID, then its dense vector (arXiv:2503.02453).

Every choice that the paper leaves open is a setting whose docstring names its code, C1 to C23.
Axis letters: B rows, T items of a sequence, L code levels, K codes a level, D width, I items, P positions learned from,
U candidates, M beams, S tokens of an item. As the paper has it, an item is S = L + 1 tokens: its L codes, coarse to
fine, then its dense vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import gather_rows, rank, row_weight, world_size
from recsys_lightning.errors import InputError
from recsys_lightning.losses import cross_entropy, info_nce, log_sampling_chance
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, ItemEncoder
from recsys_lightning.nn.item_queue import ItemQueue
from recsys_lightning.nn.transformer import KeyValues, Transformer
from recsys_lightning.retrieval.beam_fusion import beam_candidates, items_of_beams, rank_fused
from recsys_lightning.retrieval.beam_search import Beams, beam_search
from recsys_lightning.retrieval.fusion_weights import FusionWeights, user_features
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.rank_fusion import reciprocal_rank_fusion
from recsys_lightning.retrieval.recommendations import Generated, Recommendations
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.trie import PrefixTrie


@dataclass(frozen=True, kw_only=True)
class CobraTokens:
    """What an item is to the decoder, and in what order its parts are generated.

    Attributes:
        paths: ``both``; ``dense`` leaves out the IDs (the paper's "w/o ID"), ``sparse`` the dense vectors (its "w/o
            Dense") (C23).
        order: ``cascade`` is the paper's: the ID first, the dense vector after it. ``dense_first`` is the other way
            round: the vector is predicted from the history alone, and fed back before the ID is generated.
            ``parallel`` predicts both from the history alone.
        id_merge: ``sequence`` gives each code a token of its own. ``sum`` adds the code embeddings up to one token;
            the codes are then predicted independently of one another (C1).
        disambiguate: without dense vectors, give each item of a cell a last code of its own (C19).
    """

    paths: Literal["both", "sparse", "dense"] = "both"
    order: Literal["cascade", "dense_first", "parallel"] = "cascade"
    id_merge: Literal["sequence", "sum"] = "sequence"
    disambiguate: bool = False

    def __post_init__(self) -> None:
        if self.paths != "both" and self.order != "cascade":
            raise InputError(f"tokens.order={self.order} needs two parts to order: tokens.paths=both")
        if self.paths == "dense" and self.id_merge != "sequence":
            raise InputError("tokens.id_merge=sum needs IDs: tokens.paths=dense has none")
        if self.paths != "sparse" and self.disambiguate:
            raise InputError(
                "tokens.disambiguate is for tokens.paths=sparse: dense vectors tell the items of a cell apart"
            )


class _Layout:
    """Which tokens an item is made of, and which state of its window predicts what.

    The window of an item are the S states before each of its tokens: state 0 is that of the token before the item.

    Attributes:
        code_slots: places of the code tokens among the S of an item: L, or 1 for their sum, or none.
        dense_slot: place of the dense token; None without one.
        code_reads: state of the window that predicts the code of each level.
        dense_read: state of the window that predicts the dense vector; None without one.
        size: S.
    """

    def __init__(self, tokens: CobraTokens, num_levels: int):
        codes = 0 if tokens.paths == "dense" else num_levels if tokens.id_merge == "sequence" else 1
        has_dense = tokens.paths != "sparse"
        first = int(tokens.order == "dense_first")
        self.code_slots = range(first, first + codes)
        self.dense_slot = (0 if first else codes) if has_dense else None
        self.size = codes + int(has_dense)
        self.code_reads = [self.code_slots[min(level, codes - 1)] for level in range(num_levels)] if codes else []
        self.dense_read = (0 if tokens.order != "cascade" else self.dense_slot) if has_dense else None


@dataclass(frozen=True, kw_only=True)
class CobraDecoder:
    """The causal decoder (section 3.2; widths are C10).

    Attributes:
        num_layers: the paper's public setting is 2.
        num_heads: attention heads.
        feedforward: width of the feed-forward layers; None is 4 D.
        dropout: on the input and inside the blocks.
        bos: put a learned token first, so that the first item is predicted too and an empty history has an answer
            (C2). The paper has none.
        dense_head: ``none`` reads the dense vector straight off the decoder, as eq. 6 does; ``linear`` adds a layer;
            ``residual`` adds the state before the ID, so that what the ID brings is a correction: in a cascade that
            state is L tokens back, and a shallow decoder is slow to learn to look there (C3).
        max_items: longest sequence in items, the answer included: one more than the data's ``max_history`` (C12).
    """

    num_layers: int = 2
    num_heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.3
    bos: bool = False
    dense_head: Literal["none", "linear", "residual"] = "none"
    max_items: int = 21


@dataclass(frozen=True, kw_only=True)
class CobraObjective:
    """What is minimised: ``sparse_weight * L_sparse + dense_weight * L_dense`` (section 3.3).

    Attributes:
        temperature: of the cosines in L_dense; the paper prints none, and 1.0 is its literal reading (C4).
        negatives: ``batch`` contrasts with the unique items of the batch, histories and answers alike; ``catalogue``
            with all items of the training split (C6).
        extra_negatives: items of the training split drawn uniformly for every batch and added to its own, so that
            rarely met items are contrasted with too (C6). Literal: 0.
        queue: items of earlier batches, with their vectors as they were, kept as further negatives (C6). Literal: 0.
        mask_same_sequence: other items of a user's own sequence are no negatives for it (C6). Literal: off.
        log_q: correct for popular items being negatives more often, with ``negatives: batch`` (C7). Literal: off.
        detach_targets: no gradient into the item encoder through the answers' vectors (C5). Literal: off.
        sparse_weight: of L_sparse, the mean over levels and positions (C8).
        dense_weight: of L_dense, the mean over positions (C8).
        early_weight: of the same loss on a dense vector that is also read before the ID, from the history alone. In a
            cascade alone, item vectors learn only what tells the items of a cell apart, since the ID gives the rest
            away; this teaches them who follows whom. For ``tokens.order=cascade`` with both paths. Literal: 0, none.
    """

    temperature: float = 0.0625
    negatives: Literal["batch", "catalogue"] = "batch"
    extra_negatives: int = 0
    queue: int = 0
    mask_same_sequence: bool = False
    log_q: bool = False
    detach_targets: bool = False
    sparse_weight: float = 1.0
    dense_weight: float = 1.0
    early_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(
                f"objective.temperature={self.temperature} must be above 0; the paper's literal reading is 1.0"
            )
        for name, value in (("extra_negatives", self.extra_negatives), ("queue", self.queue)):
            if value < 0:
                raise InputError(f"objective.{name}={value} must be 0 or more")
        if self.negatives == "catalogue" and (self.log_q or self.extra_negatives or self.queue):
            raise InputError(
                "objective.log_q, objective.extra_negatives and objective.queue are for negatives: batch; "
                "the catalogue is already complete"
            )
        if self.log_q and self.queue:
            raise InputError(
                "objective.log_q knows the chance of an item being in a batch, not in objective.queue; choose one"
            )


@dataclass(frozen=True, kw_only=True)
class CobraSearch:
    """Coarse-to-fine inference with BeamFusion (section 3.4).

    Attributes:
        num_beams: M, semantic IDs kept by the beam search (C17).
        per_cell: N, nearest items kept of each cell; 0 keeps all (C17).
        tau: weight of the beam score (C17; the paper's industrial optimum is 0.9).
        psi: weight of the cosine (C17; the paper's is 16).
        omega: weight of the cosine with the dense vector that is read before the ID, in BeamFusion; needs
            ``objective.early_weight``. Literal: 0.
        fusion: ``global`` and ``per_id`` are BeamFusion with either domain of the softmax over cosines (C16). Two do
            without it: ``nearest`` takes the items nearest to the dense vector of the best ID, and ``ranks`` merges
            those with the items of the beams by their reciprocal ranks.
        learned: file of `recsys study learned-fusion` with tau and psi as functions of the user, in place of these.
    """

    num_beams: int = 50
    per_cell: int = 100
    tau: float = 1.0
    psi: float = 16.0
    omega: float = 0.0
    learned: str | None = None
    fusion: Literal["global", "per_id", "nearest", "ranks"] = "global"

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise InputError(f"search.num_beams={self.num_beams} must be at least 1")
        if self.per_cell < 0:
            raise InputError(f"search.per_cell={self.per_cell} must be 0 (keep all) or more")


class COBRA(Recommender):
    """Cascaded organised bi-represented generative retrieval.

    Items carry their natural cells: there is no extra token to tell apart items that share a semantic ID (C19), the
    dense vector does that; and an item, having one ID, is in one beam only (C20).

    On several processes the negatives are those of all of them, and the losses are such that their mean over the
    processes is the loss of one process with the whole batch.

    Args:
        catalog: with text fields or embeddings, as the item encoder needs.
        semantic_ids: the table itself, or its file. It must come from this catalogue's text embeddings. Not looked at
            without IDs.
        dim: D, width of the decoder and of the dense vectors (C3, C10).
        item_encoder: makes the trainable encoder of the dense vectors (section 3.1.2, C9).
        tokens: see `CobraTokens`.
        decoder: see `CobraDecoder`.
        objective: see `CobraObjective`.
        search: see `CobraSearch`.
    """

    similarity = "cosine"
    codes: Tensor
    trained: Tensor
    log_popularity: Tensor

    def __init__(
        self,
        catalog: Catalog,
        semantic_ids: str | Path | SemanticIds | None = None,
        dim: int = 256,
        item_encoder: Callable[[Catalog, int], ItemEncoder] = EmbeddingItemEncoder,
        tokens: CobraTokens = CobraTokens(),
        decoder: CobraDecoder = CobraDecoder(),
        objective: CobraObjective = CobraObjective(),
        search: CobraSearch = CobraSearch(),
    ):
        super().__init__()
        if dim % decoder.num_heads:
            raise InputError(f"dim={dim} must be a multiple of decoder.num_heads={decoder.num_heads}")
        if tokens.paths == "sparse" and search.fusion in ("nearest", "ranks"):
            raise InputError(f"search.fusion={search.fusion} needs dense vectors: tokens.paths=sparse has none")
        if decoder.dense_head == "residual" and (tokens.paths != "both" or tokens.order != "cascade"):
            raise InputError("decoder.dense_head=residual is for tokens.paths=both and tokens.order=cascade")
        if objective.early_weight and (tokens.paths != "both" or tokens.order != "cascade"):
            raise InputError("objective.early_weight is for tokens.paths=both and tokens.order=cascade")
        if search.omega and not objective.early_weight:
            raise InputError(f"search.omega={search.omega} needs objective.early_weight: nothing is read before the ID")
        # In a tuple, so that it is no part of the state: a checkpoint does not depend on how it is searched.
        self.learned = (_learned_weights(search),) if search.learned is not None else ()
        self.tokens, self.decoder_config, self.objective, self.search = tokens, decoder, objective, search
        self.num_items = catalog.num_items
        self.trie: PrefixTrie | None = None
        self.num_levels = self.num_codes = 0
        if tokens.paths != "dense":
            if semantic_ids is None:
                raise InputError(
                    "semantic_ids is missing: name the file of a tokenizer's run, or set tokens.paths=dense"
                )
            if not isinstance(semantic_ids, SemanticIds):
                semantic_ids = SemanticIds.load(Path(semantic_ids), catalog.text_fingerprint, catalog.num_items)
            if tokens.disambiguate:
                semantic_ids = semantic_ids.disambiguated()
            self.num_levels, self.num_codes = semantic_ids.codes.shape[1], semantic_ids.num_codes
            self.register_buffer("codes", semantic_ids.codes)  # (I+1, L); in the checkpoint, to be checked at load
            self.trie = PrefixTrie(semantic_ids)
            self.code = nn.Embedding(self.num_levels * self.num_codes, dim)
            # Item vectors leave their encoder's layer norm with unit variance. Codes start at the same scale, so that
            # neither half of an item drowns the other; types and positions are hints beside them.
            nn.init.normal_(self.code.weight, std=1.0)
            self.heads = nn.ModuleList(nn.Linear(dim, self.num_codes) for _ in range(self.num_levels))
            self.register_load_state_dict_pre_hook(_refuse_other_codes)  # type: ignore[no-untyped-call] # torch left it so
        self.layout = _Layout(tokens, self.num_levels)
        if tokens.paths != "sparse":
            self.item_encoder = item_encoder(catalog, dim)
            self.dense_head = nn.Linear(dim, dim) if decoder.dense_head == "linear" else nn.Identity()
            counts = torch.as_tensor(catalog.train_counts)  # (I+1,)
            # Items that training never meets are no negatives: it would only learn that nobody wants them.
            self.register_buffer("trained", counts.nonzero().flatten(), persistent=False)  # ids, ascending
            log_popularity = (counts.clamp_min(1).double() / counts.sum()).log()
            self.register_buffer("log_popularity", log_popularity, persistent=False)  # (I+1,)
        self.queue = ItemQueue(objective.queue, dim) if objective.queue and tokens.paths != "sparse" else None

        self.token_type = nn.Embedding(self.layout.size, dim)  # one type a level, then the dense type (C1)
        self.position = nn.Embedding(int(decoder.bos) + decoder.max_items * self.layout.size, dim)
        self.bos = nn.Parameter(torch.empty(1, dim).normal_(std=0.02)) if decoder.bos else None
        for table in (self.token_type, self.position):
            nn.init.normal_(table.weight, std=0.1)
        self.dropout = nn.Dropout(decoder.dropout)
        self.decoder = Transformer(
            dim, decoder.num_layers, decoder.num_heads, decoder.feedforward or 4 * dim, decoder.dropout, "causal"
        )

    @property
    def catalogue_facts(self) -> tuple[str, ...]:  # type: ignore[override] # depends on the settings
        """The semantic IDs, if there are any."""
        return ("codes",) if self.trie is not None else ()

    # ---------------------------------------------------------------------------------------------- training

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Teacher forcing: one causal pass predicts every item of every sequence from those before it (eqs. 4-9, C14).

        Returns:
            ``sparse`` and ``dense``, weighted; with `CobraObjective.early_weight` also ``early``.
        """
        sequence = batch.sequence  # (B, T)
        present = sequence != 0
        vectors = dense = None
        candidates = own = sequence.new_empty(0)
        if self.layout.dense_slot is not None:
            candidates, own = self._candidates(sequence[present])
            vectors = self._encode(candidates)  # (U, D) each item once
            dense = vectors.new_zeros(*sequence.shape, vectors.shape[-1])  # (B, T, D)
            dense[present] = vectors[own]

        # The last token predicts nothing that is known, so it is not fed.
        hidden, _ = self.decoder(self._embed(sequence, dense)[:, :-1])
        # Without BOS nothing stands before the first item, so it is not predicted (C2).
        first = 0 if self.bos is not None else 1
        windows = hidden[:, first * (self.layout.size - 1) :].unflatten(
            1, (-1, self.layout.size)
        )  # (B, T - first, S, D)
        learned = present[:, first:]
        windows, target = windows[learned], sequence[:, first:][learned]  # (P, S, D), (P,)

        share = row_weight(len(target), target.device)
        terms: dict[str, Tensor] = {}
        if self.layout.code_reads:
            sparse = [
                cross_entropy(head(windows[:, state]), self.codes[target, level])
                for level, (head, state) in enumerate(zip(self.heads, self.layout.code_reads, strict=True))
            ]
            terms["sparse"] = share * self.objective.sparse_weight * torch.stack(sparse).mean()
        if vectors is not None:
            index = torch.zeros_like(sequence).masked_scatter(present, own)[:, first:][learned]  # (P,)
            row_has = None
            if self.objective.mask_same_sequence:
                row_has = torch.zeros(len(sequence), len(candidates), dtype=torch.bool, device=sequence.device)
                row_has[present.nonzero()[:, 0], own] = True  # (B, U)
                row_has = row_has[learned.nonzero()[:, 0]]  # (P, U)
            candidate_vectors, log_q, row_has = self._negatives(vectors, candidates, row_has, len(own))
            weights = {"dense": (self.layout.dense_read, self.objective.dense_weight)}
            if self.objective.early_weight:
                weights["early"] = (0, self.objective.early_weight)
            for name, (state, weight) in weights.items():
                predicted = self._dense(windows[:, 0], windows[:, state] if state else None)  # (P, D)
                contrast = info_nce(
                    predicted, candidate_vectors, index, self.objective.temperature, row_has, log_q
                )  # eq. 8
                terms[name] = share * weight * contrast
        return terms

    def _dense(self, before: Tensor, after: Tensor | None) -> Tensor:
        """The dense vectors (..., D) predicted from the state before the ID alone, or from that after it."""
        if after is not None and self.decoder_config.dense_head == "residual":
            after = before + after
        predicted: Tensor = self.dense_head(before if after is None else after)
        return predicted

    def _negatives(
        self, vectors: Tensor, candidates: Tensor, excluded: Tensor | None, met: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `info_nce` contrasts with: the vectors (U, D) of the candidates (U,) and of the queue, the logQ
        correction, and which are no negatives of which position (P, U). `met` items stand in this process's sequences.
        """
        log_q = None
        if self.objective.log_q:
            counts = torch.tensor([[met, self.objective.extra_negatives]], device=candidates.device)
            num_met, num_drawn = gather_rows(counts).sum(0)  # of all processes
            popularity = self.log_popularity[candidates]
            log_q = log_sampling_chance(popularity, num_met, num_drawn, len(self.trained)).to(vectors.dtype)  # (U,)
        if self.objective.detach_targets:
            vectors = vectors.detach()
        if self.queue is not None:
            older = self.queue.without(candidates)  # (Q, D)
            if self.training:
                self.queue.push(candidates, vectors)
            vectors = torch.cat([vectors, older.to(vectors.dtype)])
            if excluded is not None:  # what is not in the batch is in no sequence of it
                excluded = torch.cat([excluded, excluded.new_zeros(len(excluded), len(older))], 1)
        return vectors, log_q, excluded

    def _candidates(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the items that are encoded and contrasted (U,), and where each of `items` is among them.

        They are those of all processes, in ascending order and so the same on each.
        """
        if self.objective.negatives == "catalogue":
            drawn = self.trained
        else:
            chosen = torch.randint(len(self.trained), (self.objective.extra_negatives,), device=items.device)
            drawn = self.trained[chosen]
        candidates = torch.unique(gather_rows(torch.unique(torch.cat([items, drawn]))))
        return candidates, torch.searchsorted(candidates, items)

    def _encode(self, candidates: Tensor) -> Tensor:
        """The vectors (U, D) of candidates (U,) that are the same on all processes: each encodes its share of them."""
        if world_size() == 1 or len(candidates) < world_size():
            vectors: Tensor = self.item_encoder(candidates)
            return vectors
        return gather_rows(self.item_encoder(candidates.tensor_split(world_size())[rank()]), gradient=True)

    def _embed(self, sequence: Tensor, dense: Tensor | None) -> Tensor:
        """Tokens of items (B, T) with dense vectors (B, T, D), (B, bos + T S, D); ``[e^1 .. e^L, v]`` an item."""
        if sequence.shape[1] > self.decoder_config.max_items:
            raise InputError(
                f"a sequence of {sequence.shape[1]} items, but the decoder has positions for "
                f"{self.decoder_config.max_items}: set decoder.max_items of the model to max_history of the data plus 1"
            )
        parts: list[Tensor] = []
        if self.layout.code_slots:
            offset = torch.arange(self.num_levels, device=sequence.device) * self.num_codes
            codes = self.code(self.codes[sequence] + offset)  # (B, T, L, D)
            parts.append(codes if self.tokens.id_merge == "sequence" else codes.sum(2, keepdim=True))
        if dense is not None:
            parts.insert(0 if self.layout.dense_slot == 0 else 1, dense[:, :, None])
        tokens = (torch.cat(parts, 2) + self.token_type.weight).flatten(1, 2)  # (B, T S, D)
        if self.bos is not None:
            tokens = torch.cat([self.bos.expand(len(tokens), 1, -1), tokens], 1)
        embedded: Tensor = self.dropout(tokens + self.position.weight[: tokens.shape[1]])
        return embedded

    # --------------------------------------------------------------------------------------------- inference

    @property
    def prefix_trie(self) -> PrefixTrie | None:
        """The occupied prefixes that the beam search walks along; None without IDs."""
        return self.trie

    def encode_items(self, item_ids: Tensor) -> Tensor:
        """(n, D) dense vectors of items (n,); without dense vectors, the sums of their code embeddings."""
        if self.layout.dense_slot is None:
            offset = torch.arange(self.num_levels, device=item_ids.device) * self.num_codes
            summed: Tensor = self.code(self.codes[item_ids] + offset).sum(1)
            return summed
        vectors: Tensor = self.item_encoder(item_ids)
        return vectors

    @torch.no_grad()
    def generate(self, batch: SequenceBatch, item_vectors: Tensor, num_beams: int) -> Beams:
        """The most likely semantic IDs of the next item, with the dense vector predicted for each (eqs. 10, 11).

        Args:
            batch: histories.
            item_vectors: (I+1, D) of the items, row 0 padding.
            num_beams: M, semantic IDs kept.

        Returns:
            `hidden` holds the dense vectors (B, M, D), all of a row the same unless the order is ``cascade``; without
            dense vectors it has no meaning.

        Raises:
            InputError: a history is empty and the decoder has no BOS token.
        """
        return _Generation(self, batch, item_vectors).beams(num_beams)

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k best items by BeamFusion over the items of the best semantic IDs (eqs. 12-14), or as `search` says."""
        search, trie = self.search, self.trie
        generation = _Generation(self, batch, index.table)
        if trie is None:
            nearest = index.search_with_ties(generation.dense(), k)
            return Recommendations(nearest.item_ids, nearest.scores)
        beams = generation.beams(search.num_beams)
        if self.layout.dense_slot is None:
            return items_of_beams(beams, trie, k)
        if search.fusion == "global" or search.fusion == "per_id":
            found = beam_candidates(beams, trie, index.table, search.per_cell, search.omega)
            tau: float | Tensor = search.tau
            psi: float | Tensor = search.psi
            for weights in self.learned:
                features = user_features(beams.log_probs, batch.history_mask.sum(1), found)
                tau, psi = weights.to(features.device)(features)
            return rank_fused(found, beams, k, tau, psi, search.fusion)
        nearest = index.search_with_ties(beams.hidden[:, 0], k)
        lists = Recommendations(nearest.item_ids, nearest.scores, Generated(beams.leaves, beams.log_probs))
        if search.fusion == "nearest":
            return lists
        return reciprocal_rank_fusion([items_of_beams(beams, trie, k), lists], k)


class _Generation:
    """The next item of each row of a batch: the prefix is read once, and beams add their tokens to it."""

    def __init__(self, model: COBRA, batch: SequenceBatch, item_vectors: Tensor):
        history = batch.history
        lengths = batch.history_mask.sum(1)  # (B,)
        bos = int(model.bos is not None)
        if not bos and bool((lengths == 0).any()):
            user = int(batch.user[(lengths == 0).nonzero()[0, 0]])
            raise InputError(f"user {user} has an empty history; COBRA answers those only with decoder.bos: true")
        self.model, self.layout = model, model.layout
        dense = item_vectors[history] if self.layout.dense_slot is not None else None
        embedded = model._embed(history, dense)
        self.stop = bos + lengths * self.layout.size  # (B,) tokens of each row
        self.rows = torch.arange(len(history), device=history.device)
        self.prefix_mask = torch.arange(embedded.shape[1], device=history.device) < self.stop[:, None]
        self.state, self.prefix = model.decoder.state_at(embedded, self.stop - 1)  # (B, D)
        self.own: list[KeyValues] | None = None  # of the tokens that the beams have added

    def dense(self) -> Tensor:
        """(B, D) the dense vector predicted from the history alone."""
        return self.model._dense(self.state, None)

    def beams(self, num_beams: int) -> Beams:
        """The most likely semantic IDs; see `COBRA.generate`."""
        model, layout, tokens = self.model, self.layout, self.model.tokens
        assert model.trie is not None  # noqa: S101 - no beams are asked for without IDs
        last, summed = model.num_levels - 1, tokens.id_merge == "sum"
        ahead = self.dense()[:, None] if layout.dense_read == 0 else None  # (B, 1, D)
        state = self.state
        if tokens.order == "dense_first":
            assert ahead is not None  # noqa: S101 - it is read at state 0
            state = self._extend(ahead, 0, None)[:, 0]
        merged: Tensor | None = None  # (B, M, D) sum of the code embeddings of each beam so far

        def advance(level: int, parents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal merged
            token = model.code(codes + level * model.num_codes)  # (B, M, D)
            if summed:
                token = merged = token if merged is None else token + merged[self.rows[:, None], parents]
            if level == last:
                if ahead is not None:
                    return token, ahead.expand_as(token)
                if layout.dense_read is None:
                    return token, token
            elif summed:
                return model.heads[level + 1](state)[:, None].expand(-1, codes.shape[1], -1), token
            new = self._extend(token, layout.code_slots[0 if summed else level], parents)
            if level == last:
                return new, model._dense(self.state[:, None], new)
            return model.heads[level + 1](new), new

        beams = beam_search(model.trie, model.heads[0](state), advance, num_beams)
        return beams._replace(early=self.dense()) if model.objective.early_weight else beams

    def _extend(self, token: Tensor, slot: int, parents: Tensor | None) -> Tensor:
        """States (B, M, D) after one more token (B, M, D) each, which stands at `slot` of its item."""
        model, own = self.model, self.own
        token = token + model.token_type.weight[slot] + model.position(self.stop + slot)[:, None]
        if own is not None and parents is not None:
            own = [KeyValues(*(part[self.rows[:, None], :, parents].transpose(1, 2) for part in kv)) for kv in own]
        state, self.own = model.decoder.extend(token, self.prefix, self.prefix_mask, own)
        return state


def _learned_weights(search: CobraSearch) -> FusionWeights:
    weights = FusionWeights.load(str(search.learned))
    if (weights.mode, weights.num_beams) != (search.fusion, search.num_beams):
        raise InputError(
            f"search.learned={search.learned} was learned for search.fusion={weights.mode} and "
            f"search.num_beams={weights.num_beams}, not for {search.fusion} and {search.num_beams}"
        )
    return weights.eval().requires_grad_(False)


def _refuse_other_codes(model: COBRA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A decoder trained on some semantic IDs is worthless on others, even of the same shape."""
    codes = state.get(f"{prefix}codes")
    if codes is not None and not torch.equal(codes.cpu(), model.codes.cpu()):
        raise InputError(
            "this checkpoint was trained with other semantic IDs than the model was given; "
            "name the file it was trained with in semantic_ids, or train again"
        )
