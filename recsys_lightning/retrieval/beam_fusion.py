"""BeamFusion: one score for items found under different semantic IDs.

Axis letters: B rows, M beams, C candidates over all rows, D width, I items.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.retrieval.beam_search import Beams
from recsys_lightning.retrieval.recommendations import Generated, Recommendations, rank_candidates
from recsys_lightning.semantic_ids.trie import PrefixTrie

CHUNK = 1 << 16  # candidates whose vectors are held at once


def beam_fusion(
    beams: Beams,
    trie: PrefixTrie,
    item_vectors: Tensor,
    k: int,
    tau: float | Tensor = 1.0,
    psi: float | Tensor = 16.0,
    per_cell: int = 100,
    mode: Literal["global", "per_id"] = "global",
    omega: float = 0.0,
) -> Recommendations:
    """Rank the items of the beams' cells by beam score and cosine together.

    COBRA (arXiv:2503.02453) eqs. 12-14, in log space: with beam score phi_k, dense vector v_k and A_k the `per_cell`
    nearest items to v_k in the cell of beam k,
    ``log Phi(k, a) = log softmax_k(tau phi)[k] + log softmax(psi cos(v_k, .))[a]``.
    The paper does not say over what the second softmax runs (C16): ``global`` takes the union of all A_k, so the
    ranking is that of ``tau phi_k + psi cos(v_k, a)``; ``per_id`` takes A_k, so a one-item cell always scores 1 there.

    Args:
        beams: leaves (B, M), log probabilities (B, M) and dense vectors (B, M, D) as `hidden`.
        trie: which items lie in a cell.
        item_vectors: (I+1, D).
        k: places wanted; lists are closed under ties, and shorter ones end in item 0.
        tau: weight of the beam score; one number, or one a row (B,).
        psi: weight of the cosine; one number, or one a row (B,).
        per_cell: N of the paper: items kept of each cell; 0 keeps all.
        mode: domain of the second softmax.
        omega: ``omega cos(v, a)`` is added to the score, v being the dense vector predicted before the ID. The paper
            has none.

    Raises:
        ValueError: omega without such a vector.
    """
    return rank_fused(beam_candidates(beams, trie, item_vectors, per_cell, omega), beams, k, tau, psi, mode)


class Candidates(NamedTuple):
    """The items that the beams of B rows reach (the union of eq. 12), row by row and beam by beam."""

    row: Tensor  # (C,) row of the batch
    beam: Tensor  # (C,) 0 .. B M - 1: row * M + beam of the row
    items: Tensor  # (C,)
    cosine: Tensor  # (C,) of the item and its beam's dense vector
    added: Tensor | None = None  # (C,) to the score: omega times the cosine with the vector predicted before the ID


def beam_candidates(
    beams: Beams, trie: PrefixTrie, item_vectors: Tensor, per_cell: int = 100, omega: float = 0.0
) -> Candidates:
    """The items that BeamFusion ranks; none of `tau`, `psi` and `mode` changes them. Arguments as in `beam_fusion`."""
    if omega and beams.early is None:
        raise ValueError(f"omega={omega} needs beams with a dense vector predicted before the ID")
    beam, nth, items = _members(beams.leaves, trie)
    vectors = F.normalize(item_vectors, dim=-1)
    cosine = _cosines(F.normalize(beams.hidden.flatten(0, 1), dim=-1), vectors, beam, items)
    if 0 < per_cell <= int(nth.max()):
        nearest = cosine.argsort(descending=True, stable=True)
        nearest = nearest[beam[nearest].argsort(stable=True)]  # by beam, nearest first
        nearest = nearest[nth < per_cell]  # cells are contiguous, so nth is also the rank
        beam, items, cosine = beam[nearest], items[nearest], cosine[nearest]
    row, added = beam // beams.leaves.shape[1], None
    if omega and beams.early is not None:
        added = omega * _cosines(F.normalize(beams.early, dim=-1), vectors, row, items)
    return Candidates(row, beam, items, cosine, added)


def log_scores(
    found: Candidates,
    log_probs: Tensor,
    tau: float | Tensor = 1.0,
    psi: float | Tensor = 16.0,
    mode: Literal["global", "per_id"] = "global",
) -> Tensor:
    """(C,) log Phi of each candidate (eq. 13), with gradients for `tau` and `psi`. Arguments as in `beam_fusion`.

    Args:
        found: the candidates.
        log_probs: (B, M) of the beams.
        tau: weight of the beam score.
        psi: weight of the cosine.
        mode: domain of the second softmax.
    """
    num_rows, num_beams = log_probs.shape
    tau, psi = (torch.as_tensor(weight, device=found.cosine.device).expand(num_rows) for weight in (tau, psi))
    near = psi[found.row] * found.cosine
    domain, num_domains = (found.row, num_rows) if mode == "global" else (found.beam, num_rows * num_beams)
    log_near = near - segment_logsumexp(near, domain, num_domains)[domain]
    log_beam = (tau[:, None] * log_probs.float()).log_softmax(1).flatten()  # (B M,)
    scores = log_beam[found.beam] + log_near
    return scores if found.added is None else scores + found.added


def rank_fused(
    found: Candidates,
    beams: Beams,
    k: int,
    tau: float | Tensor = 1.0,
    psi: float | Tensor = 16.0,
    mode: Literal["global", "per_id"] = "global",
) -> Recommendations:
    """What `beam_fusion` returns, of candidates that are known already. Arguments as there."""
    scores = log_scores(found, beams.log_probs, tau, psi, mode)
    ids, padded = _by_row(found.items, scores, found.row, len(beams.leaves))
    return rank_candidates(ids, padded, k)._replace(generated=Generated(beams.leaves, beams.log_probs))


def items_of_beams(beams: Beams, trie: PrefixTrie, k: int) -> Recommendations:
    """Rank the items of the beams' cells by beam score alone: items of one cell are equals.

    Args:
        beams: leaves (B, M) and log probabilities (B, M).
        trie: which items lie in a cell.
        k: places wanted; lists are closed under ties, and shorter ones end in item 0.
    """
    beam, _, items = _members(beams.leaves, trie)
    num_rows, num_beams = beams.leaves.shape
    ids, scores = _by_row(items, beams.log_probs.float().flatten()[beam], beam // num_beams, num_rows)
    return rank_candidates(ids, scores, k)._replace(generated=Generated(beams.leaves, beams.log_probs))


def _members(leaves: Tensor, trie: PrefixTrie) -> tuple[Tensor, Tensor, Tensor]:
    """The items of cells (B, M), one after another: beam 0 .. B M - 1, place within the cell, and item, (C,) each."""
    sizes = (trie.cell_offsets[1:] - trie.cell_offsets[:-1])[leaves].flatten()  # (B M,)
    beam = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)  # (C,)
    nth = torch.arange(len(beam), device=beam.device) - (sizes.cumsum(0) - sizes)[beam]
    return beam, nth, trie.cell_items[trie.cell_offsets[leaves.flatten()][beam] + nth]


def _cosines(queries: Tensor, vectors: Tensor, beam: Tensor, items: Tensor) -> Tensor:
    """(C,) the inner product of each candidate with its beam's query."""
    chunks = zip(torch.split(beam, CHUNK), torch.split(items, CHUNK), strict=True)
    return torch.cat([(queries[b] * vectors[i]).sum(-1) for b, i in chunks]).float()


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(num_segments,) log of the sum of exponentials of the values (C,) of each segment."""
    largest = values.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment, values.detach(), "amax")
    total = torch.zeros_like(largest).index_add(0, segment, (values - largest[segment]).exp())
    return largest + total.log()


def _by_row(items: Tensor, scores: Tensor, row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Candidates (C,) that stand row by row as padded ids and scores, (B, most candidates of a row) each."""
    counts = row.bincount(minlength=num_rows)
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    padded = scores.new_full((num_rows, int(counts.max())), -torch.inf)
    padded[row, column] = scores
    ids = items.new_zeros(padded.shape)
    ids[row, column] = items
    return ids, padded
