"""COBRA: a decoder that first generates an item's sparse ID, then its dense vector (arXiv:2503.02453).

Every choice that the paper leaves open is a setting whose docstring names its code, C1 to C22.
Axis letters: B rows, T items of a sequence, L code levels, K codes a level, D width, I items, P positions learned from,
U candidates, M beams. An item is S = L + 1 tokens: its L codes, coarse to fine, then its dense vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.errors import InputError
from recsys_lightning.losses import cross_entropy, info_nce
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, ItemEncoder
from recsys_lightning.nn.transformer import KeyValues, Transformer
from recsys_lightning.retrieval.beam_fusion import beam_fusion
from recsys_lightning.retrieval.beam_search import Beams, beam_search
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.trie import PrefixTrie


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
        dense_head: ``none`` reads the dense vector straight off the decoder, as eq. 6 does; ``linear`` adds a layer
            (C3).
        max_items: longest sequence in items, the answer included: one more than the data's ``max_history`` (C12).
    """

    num_layers: int = 2
    num_heads: int = 4
    feedforward: int | None = None
    dropout: float = 0.3
    bos: bool = False
    dense_head: Literal["none", "linear"] = "none"
    max_items: int = 21


@dataclass(frozen=True, kw_only=True)
class CobraObjective:
    """What is minimised: ``sparse_weight * L_sparse + dense_weight * L_dense`` (section 3.3).

    Attributes:
        temperature: of the cosines in L_dense; the paper prints none, and 1.0 is its literal reading (C4).
        negatives: ``batch`` contrasts with the unique items of the batch, histories and answers alike; ``catalogue``
            with all items (C6).
        extra_negatives: items drawn uniformly from the catalogue for every batch and added to its own, so that rarely
            met items are contrasted with too (C6). Literal: 0.
        mask_same_sequence: other items of a user's own sequence are no negatives for it (C6). Literal: off.
        log_q: correct for popular items being negatives more often, with ``negatives: batch`` (C7). Literal: off.
        detach_targets: no gradient into the item encoder through the answers' vectors (C5). Literal: off.
        sparse_weight: of L_sparse, the mean over levels and positions (C8).
        dense_weight: of L_dense, the mean over positions (C8).
    """

    temperature: float = 0.0625
    negatives: Literal["batch", "catalogue"] = "batch"
    extra_negatives: int = 0
    mask_same_sequence: bool = False
    log_q: bool = False
    detach_targets: bool = False
    sparse_weight: float = 1.0
    dense_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(
                f"objective.temperature={self.temperature} must be above 0; the paper's literal reading is 1.0"
            )
        if self.extra_negatives < 0:
            raise InputError(f"objective.extra_negatives={self.extra_negatives} must be 0 or more")
        if self.negatives == "catalogue" and (self.log_q or self.extra_negatives):
            raise InputError(
                "objective.log_q and objective.extra_negatives are for negatives: batch; "
                "the catalogue is already complete"
            )


@dataclass(frozen=True, kw_only=True)
class CobraSearch:
    """Coarse-to-fine inference with BeamFusion (section 3.4).

    Attributes:
        num_beams: M, semantic IDs kept by the beam search (C17).
        per_cell: N, nearest items kept of each cell; 0 keeps all (C17).
        tau: weight of the beam score (C17; the paper's industrial optimum is 0.9).
        psi: weight of the cosine (C17; the paper's is 16).
        fusion: domain of the softmax over cosines (C16).
    """

    num_beams: int = 50
    per_cell: int = 100
    tau: float = 1.0
    psi: float = 16.0
    fusion: Literal["global", "per_id"] = "global"

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise InputError(f"search.num_beams={self.num_beams} must be at least 1")
        if self.per_cell < 0:
            raise InputError(f"search.per_cell={self.per_cell} must be 0 (keep all) or more")


class COBRA(Recommender):
    """Cascaded organised bi-represented generative retrieval.

    Items carry their natural cells: there is no extra token to tell apart items that share a semantic ID (C19), the
    dense vector does that; and an item, having one ID, is in one beam only (C20).

    Args:
        catalog: with text fields or embeddings, as the item encoder needs.
        semantic_ids: the table itself, or its file. It must come from this catalogue's text embeddings.
        dim: D, width of the decoder and of the dense vectors (C3, C10).
        item_encoder: makes the trainable encoder of the dense vectors (section 3.1.2, C9).
        decoder: see `CobraDecoder`.
        objective: see `CobraObjective`.
        search: see `CobraSearch`.
    """

    similarity = "cosine"
    catalogue_facts = ("codes",)
    codes: Tensor
    log_popularity: Tensor

    def __init__(
        self,
        catalog: Catalog,
        semantic_ids: str | Path | SemanticIds,
        dim: int = 256,
        item_encoder: Callable[[Catalog, int], ItemEncoder] = EmbeddingItemEncoder,
        decoder: CobraDecoder = CobraDecoder(),
        objective: CobraObjective = CobraObjective(),
        search: CobraSearch = CobraSearch(),
    ):
        super().__init__()
        if dim % decoder.num_heads:
            raise InputError(f"dim={dim} must be a multiple of decoder.num_heads={decoder.num_heads}")
        if not isinstance(semantic_ids, SemanticIds):
            semantic_ids = SemanticIds.load(Path(semantic_ids), catalog.text_fingerprint, catalog.num_items)
        self.decoder_config, self.objective, self.search = decoder, objective, search
        self.num_levels, self.num_codes = semantic_ids.codes.shape[1], semantic_ids.num_codes
        self.num_items, self.stride = catalog.num_items, self.num_levels + 1
        self.register_buffer("codes", semantic_ids.codes)  # (I+1, L); in the checkpoint, to be checked at load
        counts = torch.as_tensor(catalog.train_counts).clamp_min(1).double()
        self.register_buffer("log_popularity", (counts / counts[1:].sum()).log(), persistent=False)  # (I+1,)
        self.trie = PrefixTrie(semantic_ids)

        self.item_encoder = item_encoder(catalog, dim)
        self.code = nn.Embedding(self.num_levels * self.num_codes, dim)
        self.token_type = nn.Embedding(self.stride, dim)  # one type a level, then the dense type (C1)
        self.position = nn.Embedding(int(decoder.bos) + decoder.max_items * self.stride, dim)
        self.bos = nn.Parameter(torch.empty(1, dim).normal_(std=0.02)) if decoder.bos else None
        # Item vectors leave their encoder's layer norm with unit variance. Codes start at the same scale, so that
        # neither half of an item drowns the other; types and positions are hints beside them.
        nn.init.normal_(self.code.weight, std=1.0)
        for table in (self.token_type, self.position):
            nn.init.normal_(table.weight, std=0.1)
        self.dropout = nn.Dropout(decoder.dropout)
        self.decoder = Transformer(
            dim, decoder.num_layers, decoder.num_heads, decoder.feedforward or 4 * dim, decoder.dropout, "causal"
        )
        self.heads = nn.ModuleList(nn.Linear(dim, self.num_codes) for _ in range(self.num_levels))
        self.dense_head = nn.Linear(dim, dim) if decoder.dense_head == "linear" else nn.Identity()
        self.register_load_state_dict_pre_hook(_refuse_other_codes)  # type: ignore[no-untyped-call] # torch left it so

    # ---------------------------------------------------------------------------------------------- training

    def losses(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Teacher forcing: one causal pass predicts every item of every sequence from those before it (eqs. 4-9, C14).

        Returns:
            ``sparse`` and ``dense``, weighted.
        """
        sequence = batch.sequence  # (B, T)
        present = sequence != 0
        candidates, own = self._candidates(sequence[present])
        vectors = self.item_encoder(candidates)  # (U, D) each item once
        dense = vectors.new_zeros(*sequence.shape, vectors.shape[-1])  # (B, T, D)
        dense[present] = vectors[own]

        # The last dense token predicts nothing that is known, so it is not fed.
        hidden, _ = self.decoder(self._embed(sequence, dense)[:, :-1])
        # From the token before an item's first code on, each window of S states reads that item's L codes and its dense
        # vector. Without BOS nothing stands before the first item, so it is not predicted (C2).
        first = 0 if self.bos is not None else 1
        windows = hidden[:, first * self.num_levels :].unflatten(1, (-1, self.stride))  # (B, T - first, S, D)
        learned = present[:, first:]
        windows, target = windows[learned], sequence[:, first:][learned]  # (P, S, D), (P,)

        sparse = [
            cross_entropy(head(windows[:, level]), self.codes[target, level]) for level, head in enumerate(self.heads)
        ]
        if self.objective.detach_targets:
            vectors = vectors.detach()
        index = torch.zeros_like(sequence).masked_scatter(present, own)[:, first:][learned]  # (P,)
        log_q = excluded = None
        if self.objective.log_q:
            # The chance that an item with popularity p is among n items of sequences and m drawn from the catalogue's
            # I: 1 - (1 - p)^n (1 - 1/I)^m.
            stays_out = torch.log1p(-self.log_popularity[candidates].exp()) * len(own)
            stays_out = stays_out + math.log1p(-1 / self.num_items) * self.objective.extra_negatives
            log_q = (-torch.expm1(stays_out)).log().to(vectors.dtype)  # (U,)
        if self.objective.mask_same_sequence:
            row_has = torch.zeros(len(sequence), len(candidates), dtype=torch.bool, device=sequence.device)
            row_has[present.nonzero()[:, 0], own] = True  # (B, U)
            excluded = row_has[learned.nonzero()[:, 0]]  # (P, U)
        predicted = self.dense_head(windows[:, -1])  # (P, D)
        return {
            "sparse": self.objective.sparse_weight * torch.stack(sparse).mean(),
            "dense": self.objective.dense_weight
            * info_nce(predicted, vectors, index, self.objective.temperature, excluded, log_q),
        }

    def _candidates(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of the items that are encoded and contrasted (U,), and where each of `items` is among them."""
        if self.objective.negatives == "catalogue":
            return torch.arange(1, self.num_items + 1, device=items.device), items - 1
        drawn = torch.randint(1, self.num_items + 1, (self.objective.extra_negatives,), device=items.device)
        unique, inverse = torch.unique(torch.cat([items, drawn]), return_inverse=True)
        return unique, inverse[: len(items)]

    def _embed(self, sequence: Tensor, dense: Tensor) -> Tensor:
        """Tokens of items (B, T) with dense vectors (B, T, D): ``[e^1 .. e^L, v]`` an item, (B, bos + T S, D)."""
        if sequence.shape[1] > self.decoder_config.max_items:
            raise InputError(
                f"a sequence of {sequence.shape[1]} items, but the decoder has positions for "
                f"{self.decoder_config.max_items}: set decoder.max_items of the model to max_history of the data plus 1"
            )
        offset = torch.arange(self.num_levels, device=sequence.device) * self.num_codes
        codes = self.code(self.codes[sequence] + offset)  # (B, T, L, D)
        tokens = torch.cat([codes, dense[:, :, None]], 2) + self.token_type.weight  # (B, T, S, D)
        tokens = tokens.flatten(1, 2)
        if self.bos is not None:
            tokens = torch.cat([self.bos.expand(len(tokens), 1, -1), tokens], 1)
        embedded: Tensor = self.dropout(tokens + self.position.weight[: tokens.shape[1]])
        return embedded

    # --------------------------------------------------------------------------------------------- inference

    @property
    def prefix_trie(self) -> PrefixTrie:
        """The occupied prefixes that the beam search walks along."""
        return self.trie

    def encode_items(self, item_ids: Tensor) -> Tensor:
        """(n, D) dense vectors of items (n,)."""
        vectors: Tensor = self.item_encoder(item_ids)
        return vectors

    @torch.no_grad()
    def generate(self, batch: SequenceBatch, item_vectors: Tensor, num_beams: int) -> Beams:
        """The most likely semantic IDs of the next item, with the dense vector predicted after each (eqs. 10, 11).

        Raises:
            InputError: a history is empty and the decoder has no BOS token.
        """
        history = batch.history
        lengths = batch.history_mask.sum(1)  # (B,)
        bos = int(self.bos is not None)
        if not bos and bool((lengths == 0).any()):
            user = int(batch.user[(lengths == 0).nonzero()[0, 0]])
            raise InputError(f"user {user} has an empty history; COBRA answers those only with decoder.bos: true")
        hidden, prefix = self.decoder(self._embed(history, item_vectors[history]))
        stop = bos + lengths * self.stride  # (B,) tokens of each row
        rows = torch.arange(len(history), device=history.device)
        prefix_mask = torch.arange(hidden.shape[1], device=history.device) < stop[:, None]
        own: list[KeyValues] | None = None

        def advance(level: int, parents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal own
            token = self.code(codes + level * self.num_codes) + self.token_type.weight[level]
            token = token + self.position(stop + level)[:, None]  # (B, M, D)
            if own is not None:
                own = [KeyValues(*(part[rows[:, None], :, parents].transpose(1, 2) for part in kv)) for kv in own]
            state, own = self.decoder.extend(token, prefix, prefix_mask, own)
            last = level == self.num_levels - 1
            return (state, self.dense_head(state)) if last else (self.heads[level + 1](state), state)

        return beam_search(self.trie, self.heads[0](hidden[rows, stop - 1]), advance, num_beams)

    @torch.no_grad()
    def recommend(self, batch: SequenceBatch, k: int, index: ItemIndex) -> Recommendations:
        """The k best items by BeamFusion over the items of the best semantic IDs (eqs. 12-14)."""
        search, vectors = self.search, index.table
        beams = self.generate(batch, vectors, search.num_beams)
        return beam_fusion(beams, self.trie, vectors, k, search.tau, search.psi, search.per_cell, search.fusion)


def _refuse_other_codes(model: COBRA, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A decoder trained on some semantic IDs is worthless on others, even of the same shape."""
    codes = state.get(f"{prefix}codes")
    if codes is not None and not torch.equal(codes.cpu(), model.codes.cpu()):
        raise InputError(
            "this checkpoint was trained with other semantic IDs than the model was given; "
            "name the file it was trained with in semantic_ids, or train again"
        )
