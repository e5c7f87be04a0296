"""The prefix trie against sets of tuples."""

import pytest
import torch
from torch import nn

from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.trie import PrefixTrie


def random_ids(num_items, num_levels, num_codes, seed=0):
    codes = torch.randint(num_codes, (num_items + 1, num_levels), generator=torch.Generator().manual_seed(seed))
    codes[0] = 0
    return SemanticIds(codes, num_codes, "", "")


SIZES = [(1, 1, 2), (7, 1, 4), (40, 2, 5), (60, 3, 4), (300, 3, 32), (50, 20, 256)]


@pytest.mark.parametrize(("num_items", "num_levels", "num_codes"), SIZES)
def test_children_are_the_prefixes_in_use_in_lexicographic_order(num_items, num_levels, num_codes):
    ids = random_ids(num_items, num_levels, num_codes)
    trie = PrefixTrie(ids)
    tuples = [tuple(row) for row in ids.codes[1:].tolist()]
    assert (trie.num_levels, trie.num_codes, trie.num_nodes(0)) == (num_levels, num_codes, 1)
    for level in range(num_levels):
        prefixes = sorted({row[:level] for row in tuples})
        longer = {prefix: node for node, prefix in enumerate(sorted({row[: level + 1] for row in tuples}))}
        assert trie.num_nodes(level) == len(prefixes)
        expected = [[longer.get((*prefix, code), -1) for code in range(num_codes)] for prefix in prefixes]
        assert trie.child_nodes(level, torch.arange(len(prefixes))).tolist() == expected
    assert trie.num_nodes(num_levels) == trie.num_cells == len(set(tuples))


@pytest.mark.parametrize(("num_items", "num_levels", "num_codes"), SIZES)
def test_cells_hold_every_item_once_with_its_own_codes(num_items, num_levels, num_codes):
    ids = random_ids(num_items, num_levels, num_codes)
    trie = PrefixTrie(ids)
    seen = []
    for leaf in range(trie.num_cells):
        items = trie.cell_items[trie.cell_offsets[leaf] : trie.cell_offsets[leaf + 1]].tolist()
        assert items
        assert items == sorted(items)
        for item in items:
            assert torch.equal(ids.codes[item], trie.codes_of_leaf[leaf])
            assert int(trie.leaf_of_item[item]) == leaf
        seen += items
    assert sorted(seen) == list(range(1, num_items + 1))
    assert int(trie.leaf_of_item[0]) == -1
    assert trie.codes_of_leaf.tolist() == sorted(trie.codes_of_leaf.tolist())


def test_walking_the_codes_of_an_item_ends_at_its_leaf():
    ids = random_ids(60, 3, 4)
    trie = PrefixTrie(ids)
    nodes = torch.zeros(60, dtype=torch.int64)
    for level in range(3):
        nodes = trie.child_nodes(level, nodes).gather(1, ids.codes[1:, level, None])[:, 0]
    assert torch.equal(nodes, trie.leaf_of_item[1:])


def test_children_keep_the_shape_of_the_nodes_and_no_node_has_no_children():
    trie = PrefixTrie(random_ids(60, 3, 4))
    nodes = torch.tensor([[0, -1, 2], [3, 1, -1]])
    children = trie.child_nodes(1, nodes)
    assert children.shape == (2, 3, 4)
    assert children.dtype == torch.int64
    assert (children[nodes < 0] == -1).all()
    assert torch.equal(children[1, 0], trie.child_nodes(1, torch.tensor(3)))


def test_the_trie_moves_with_its_model_and_is_not_saved():
    model = nn.ModuleDict({"trie": PrefixTrie(random_ids(60, 3, 4))})
    assert model.state_dict() == {}
    moved = model.to("meta")["trie"]
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert len(list(moved.buffers())) == 3 + 4
