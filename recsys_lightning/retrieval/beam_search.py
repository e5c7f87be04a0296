"""Beam search over semantic IDs that only ever walks along prefixes which items have.

Axis letters: B rows, M beams, K codes a level, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_lightning.semantic_ids.trie import PrefixTrie

Advance = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Beams(NamedTuple):
    """The best whole semantic IDs of each row, best first."""

    leaves: Tensor  # (B, M) leaf (occupied cell) of the trie
    log_probs: Tensor  # (B, M) sum over levels of log P(code | codes before it, history)
    hidden: Tensor  # (B, M, D) what `advance` returned for the last code
    early: Tensor | None = None  # (B, D) the dense vector predicted before the ID, of models that learn one


def beam_search(trie: PrefixTrie, logits: Tensor, advance: Advance, num_beams: int) -> Beams:
    """Search for the `num_beams` most likely semantic IDs among those that at least one item carries.

    COBRA (arXiv:2503.02453) eq. 10, constrained to occupied prefixes (C18). A beam's score is its cumulative log
    probability without length normalisation (C15); probabilities are the model's own, over all K codes, so a prefix
    that no item has keeps its share and is merely not followed. With ``num_beams`` of at least the number of prefixes
    at every level the result is exact.

    Args:
        trie: which prefixes exist.
        logits: (B, K) of the first code.
        advance: called as ``advance(level, parents, codes)`` with the beams (B, M) chosen at `level`: for each, the
            beam of the level before that it continues and its code. Returns logits of the next level (B, M, K), ignored
            after the last, and hidden states (B, M, D).
        num_beams: beams kept at each level; fewer where there are fewer prefixes.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} must be at least 1")
    log_probs = logits.new_zeros(len(logits), 1, dtype=torch.float32)  # (B, 1)
    nodes = torch.zeros_like(log_probs, dtype=torch.long)  # the root
    logits = logits[:, None]  # (B, 1, K)
    hidden = logits
    for level in range(trie.num_levels):
        children = trie.child_nodes(level, nodes)  # (B, M, K)
        scores = log_probs[..., None] + logits.float().log_softmax(-1)  # (B, M, K)
        scores = scores.masked_fill(children < 0, -torch.inf).flatten(1)  # (B, M K)
        log_probs, best = scores.topk(min(num_beams, trie.num_nodes(level + 1)), dim=1)  # (B, M')
        nodes = children.flatten(1).gather(1, best)
        logits, hidden = advance(level, best // trie.num_codes, best % trie.num_codes)
    return Beams(nodes, log_probs, hidden)
