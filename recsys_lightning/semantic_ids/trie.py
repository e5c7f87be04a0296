"""The prefix trie of a catalogue's semantic IDs: which codes may follow a prefix, and which items end there.

Shapes: I items, L levels, K codes a level, C occupied cells (leaves).
"""

import torch
from torch import Tensor, nn

from recsys_lightning.semantic_ids.table import SemanticIds


class PrefixTrie(nn.Module):
    """All prefixes of the semantic IDs in use, as integer tables that move with `.to(device)`.

    The nodes of level l are the different prefixes of length l, numbered 0.. in lexicographic order: level 0 has the
    root alone, and the nodes of level L, the leaves, are the occupied cells. The tables are rebuilt from codes and
    never saved. Memory is dominated by 4 * K bytes a node of level L-1.

    Args:
        semantic_ids: The catalogue's semantic IDs. The tables lie on the device of their codes.
    """

    leaf_of_item: Tensor  # (I+1,) int64, -1 for padding
    cell_offsets: Tensor  # (C+1,) int64: the items of leaf c are cell_items[cell_offsets[c] : cell_offsets[c + 1]]
    cell_items: Tensor  # (I,) int64 item ids by leaf, ascending within one
    codes_of_leaf: Tensor  # (C, L) int64

    def __init__(self, semantic_ids: SemanticIds) -> None:
        super().__init__()
        self.num_codes = semantic_ids.num_codes
        self.num_levels = semantic_ids.num_levels
        items = semantic_ids.codes[1:]  # (I, L)
        num_nodes = [1]
        node = torch.zeros_like(items[:, 0])  # (I,) node of each item's prefix
        for level in range(self.num_levels):
            # Parent and code, not the whole prefix, make the key: it stays below I * K, whatever L is.
            keys, node = torch.unique(node * self.num_codes + items[:, level], return_inverse=True)  # (nodes,), (I,)
            children = torch.full((num_nodes[-1] * self.num_codes,), -1, dtype=torch.int32, device=items.device)
            children[keys] = torch.arange(len(keys), dtype=torch.int32, device=items.device)
            self._add_table(f"children_{level}", children.view(-1, self.num_codes))  # (nodes, K)
            num_nodes.append(len(keys))
        self._num_nodes = tuple(num_nodes)

        by_leaf = torch.argsort(node, stable=True)  # (I,)
        sizes = torch.bincount(node, minlength=num_nodes[-1])  # (C,)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # (C+1,)
        self._add_table("leaf_of_item", torch.cat([node.new_full((1,), -1), node]))  # (I+1,)
        self._add_table("cell_offsets", offsets)
        self._add_table("cell_items", by_leaf + 1)  # (I,)
        self._add_table("codes_of_leaf", items[by_leaf[offsets[:-1]]])  # (C, L)

    @property
    def num_cells(self) -> int:
        """Occupied cells C."""
        return self._num_nodes[-1]

    def num_nodes(self, level: int) -> int:
        """Different prefixes of length `level`, from 0 (the root) to L (the leaves)."""
        return self._num_nodes[level]

    def child_nodes(self, level: int, nodes: Tensor) -> Tensor:
        """Node of level + 1 behind each code, or -1 where no item has that prefix.

        (`nn.Module` has a `children` of its own, which `.to` walks: hence the longer name.)

        Args:
            level: Level of the nodes, 0..L-1.
            nodes: (...) integer node ids; -1, no node, has no children.

        Returns:
            (..., K) int64.
        """
        children = self.get_buffer(f"children_{level}")[nodes.clamp(min=0)].long()  # (..., K)
        return children.masked_fill(nodes[..., None] < 0, -1)

    def _add_table(self, name: str, table: Tensor) -> None:
        self.register_buffer(name, table, persistent=False)
