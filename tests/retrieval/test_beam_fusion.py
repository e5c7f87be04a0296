"""BeamFusion against its formula, one candidate at a time."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.retrieval.beam_fusion import beam_fusion
from recsys_lightning.retrieval.beam_search import Beams, beam_search
from recsys_lightning.semantic_ids.trie import PrefixTrie


@pytest.fixture
def setting(semantic_ids):
    """Two users with 5 beams each over 37 items in several cells, one of them crowded."""
    g = torch.Generator().manual_seed(3)
    trie = PrefixTrie(semantic_ids)
    crowded = int(trie.leaf_of_item[19])
    leaves = torch.stack([torch.randperm(trie.num_cells, generator=g)[:5] for _ in range(2)])
    leaves[:, 0] = crowded
    leaves[:, 1:][leaves[:, 1:] == crowded] = (crowded + 1) % trie.num_cells
    log_probs = torch.randn(2, 5, generator=g).sort(descending=True).values
    vectors = torch.randn(38, 8, generator=g)
    return trie, Beams(leaves, log_probs, torch.randn(2, 5, 8, generator=g)), vectors


def by_hand(trie, beams, vectors, tau, psi, per_cell, mode):
    """Equations 12 to 14 as printed: softmaxes multiplied, then a sort."""
    lists = []
    for row in range(len(beams.leaves)):
        found = []
        for beam, leaf in enumerate(beams.leaves[row]):
            items = trie.cell_items[trie.cell_offsets[leaf] : trie.cell_offsets[leaf + 1]]
            cosine = F.cosine_similarity(beams.hidden[row, beam][None], vectors[items])
            keep = cosine.argsort(descending=True)[: per_cell or None]
            found.append((items[keep], cosine[keep]))
        beam_part = (tau * beams.log_probs[row]).softmax(0)
        if mode == "global":
            near = (psi * torch.cat([cosine for _, cosine in found])).softmax(0).split([len(c) for _, c in found])
        else:
            near = [(psi * cosine).softmax(0) for _, cosine in found]
        scores = {
            int(item): float(beam_part[beam] * weight)
            for beam, (items, _) in enumerate(found)
            for item, weight in zip(items, near[beam], strict=True)
        }
        lists.append(sorted(scores.items(), key=lambda pair: -pair[1]))
    return lists


@pytest.mark.parametrize("mode", ["global", "per_id"])
@pytest.mark.parametrize("per_cell", [0, 1, 3, 100])
def test_scores_are_equation_13(setting, mode, per_cell):
    trie, beams, vectors = setting
    found = beam_fusion(beams, trie, vectors, 12, 0.9, 6.0, per_cell, mode)
    for row, expected in enumerate(by_hand(trie, beams, vectors, 0.9, 6.0, per_cell, mode)):
        width = min(12, len(expected))
        assert found.item_ids[row, :width].tolist() == [item for item, _ in expected[:width]]
        torch.testing.assert_close(found.scores[row, :width].exp(), torch.tensor([s for _, s in expected[:width]]))
        assert (found.item_ids[row, width:] == 0).all()


def test_global_mode_ranks_by_tau_phi_plus_psi_cos(setting):
    trie, beams, vectors = setting
    found = beam_fusion(beams, trie, vectors, 5, tau=1.3, psi=4.0)
    for row in range(2):
        keys = []
        for item in found.item_ids[row]:
            beam = int((beams.leaves[row] == trie.leaf_of_item[item]).nonzero()[0])
            cosine = F.cosine_similarity(beams.hidden[row, beam], vectors[item], dim=0)
            keys.append(float(1.3 * beams.log_probs[row, beam] + 4.0 * cosine))
        assert keys == sorted(keys, reverse=True)


def test_chunking_changes_nothing(setting, monkeypatch):
    trie, beams, vectors = setting
    whole = beam_fusion(beams, trie, vectors, 12)
    monkeypatch.setattr("recsys_lightning.retrieval.beam_fusion.CHUNK", 3)
    pieces = beam_fusion(beams, trie, vectors, 12)
    assert torch.equal(whole.item_ids, pieces.item_ids)


def markov_logits(trie, seed):
    """A toy model: logits of a level depend on the code before."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(trie.num_levels, trie.num_codes + 1, trie.num_codes, generator=g)


@pytest.mark.parametrize("num_beams", [1, 3, 64])
def test_beam_search_equals_a_python_search(semantic_ids, num_beams):
    trie = PrefixTrie(semantic_ids)
    table = markov_logits(trie, 5)

    def advance(level, parents, codes):
        nxt = table[min(level + 1, trie.num_levels - 1)][codes]
        return nxt, nxt

    found = beam_search(trie, table[0][-1][None], advance, num_beams)
    prefixes = {tuple(code[:n]) for code in semantic_ids.codes[1:].tolist() for n in range(4)}
    beams = [((), 0.0)]
    for level in range(trie.num_levels):
        grown = [
            ((*prefix, code), score + float(table[level][prefix[-1] if prefix else -1].log_softmax(0)[code]))
            for prefix, score in beams
            for code in range(trie.num_codes)
            if (*prefix, code) in prefixes
        ]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    assert [tuple(trie.codes_of_leaf[leaf].tolist()) for leaf in found.leaves[0]] == [prefix for prefix, _ in beams]
    torch.testing.assert_close(found.log_probs[0], torch.tensor([score for _, score in beams]))


def test_beams_must_be_at_least_one(semantic_ids):
    with pytest.raises(ValueError, match="num_beams=0"):
        beam_search(PrefixTrie(semantic_ids), torch.zeros(1, 4), lambda *_: (_, _), 0)
