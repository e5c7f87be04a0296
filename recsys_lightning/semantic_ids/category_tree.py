"""Category-tree codes: the path of an item through the shop's own categories as its semantic ID, a control."""

import logging
from collections import Counter
from typing import Any, Self

import polars as pl
import torch
from torch import Tensor

from recsys_lightning.data.catalog import LIST_SEPARATOR, PATH_SEPARATOR
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.random_codes import no_codes_of_embeddings, raw_ids
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings

_log = logging.getLogger(__name__)

Path = tuple[str, ...]  # of categories, the widest first


class CategoryTree(ItemTokenizer):
    """Codes that people have made: level l names the category at depth l, among its siblings.

    A path stands in a text field as ``Beauty > Hair Care > Combs``; of several, ``A > B; C > D``, the first counts.
    Codes are learned by `fit`:

    * code 0 means that there is no category: the path is shorter, or the item has none;
    * siblings have the codes 1..K-1, the one of most items first, equal ones by alphabet;
    * where there are more siblings than that, all from the (K-1)-th on share K-1, and their children count as siblings;
    * what lies deeper than level L is cut.

    A category that `fit` has not met gets 0, and so does all below it. How many items each of these rules touches is
    logged, as a warning where something is lost by it.

    Embeddings are not read, so `encode` is refused. `decode` is the mean embedding of the items of `fit` with these
    codes; where there are none, of those with the longest part of the codes, from the first on, that some item has.

    Args:
        embedding_dim: Width D of the item embeddings.
        num_levels: Levels L.
        num_codes: Codes K a level.
        field: The text field that holds the paths.
        skip: Depths to leave out at the top, for a catalogue that lies in one department as a whole.

    Raises:
        InputError: An argument is out of its range.
    """

    was_fitted: Tensor  # () bool

    def __init__(
        self, embedding_dim: int, num_levels: int = 3, num_codes: int = 32, field: str = "categories", skip: int = 0
    ) -> None:
        super().__init__()
        if min(embedding_dim, num_levels) < 1 or num_codes < 2 or skip < 0:
            raise InputError(
                "CategoryTree needs embedding_dim and num_levels of 1 or more, num_codes of 2 or more and skip of 0 or "
                f"more, got {embedding_dim=} {num_levels=} {num_codes=} {skip=}"
            )
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.field = field
        self.skip = skip
        self.register_buffer("was_fitted", torch.tensor(False))
        self._code_of: dict[Path, int] = {}  # of each path from the top, its last category's
        # The tree of codes; node 0 is the root, a child that does not exist is -1.
        self._children = torch.full((1, num_codes), -1)  # (N, K)
        self._means = torch.zeros(1, embedding_dim)  # (N, D)

    @property
    def fitted(self) -> bool:
        """Whether the categories have been numbered."""
        return bool(self.was_fitted)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Number the categories in `fields` and average the embeddings (I, D) of their items.

        Raises:
            InputError: Embeddings of another width, or not finite; no fields, no such field, or no item has a category.
        """
        check_embeddings(embeddings, self.embedding_dim)
        paths = self._paths(fields, len(embeddings))
        if not any(paths):
            raise InputError(f"no item has a category in its field {self.field!r} below the {self.skip} depths skipped")
        self._code_of = self._number(paths)
        codes = self.assign(embeddings, fields)  # (I, L)
        self._children, self._means = _prefix_means(embeddings, codes, self.num_codes)
        self.was_fitted.fill_(True)
        return self

    def assign(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Tensor:
        """Codes (I, L) of the items whose categories stand in `fields`; embeddings (I, D) are not read.

        Raises:
            InputError: No fields, or no such field.
            RuntimeError: Called before `fit`.
        """
        if not self._code_of:
            raise RuntimeError("CategoryTree.assign was called before fit: there are no categories yet")
        paths = self._paths(fields, len(embeddings))
        codes = torch.zeros(len(paths), self.num_levels, dtype=torch.int64)
        unknown = 0
        for row, path in enumerate(paths):
            for level in range(min(len(path), self.num_levels)):
                code = self._code_of.get(path[: level + 1])
                if code is None:
                    unknown += 1
                    break
                codes[row, level] = code
        bare = sum(not path for path in paths)
        deep = sum(len(path) > self.num_levels for path in paths)
        if bare or unknown:
            _log.warning("category tree: of %d items %d have no category and %d a new one", len(paths), bare, unknown)
        if deep:
            _log.info("category tree: %d of %d paths are cut at level %d", deep, len(paths), self.num_levels)
        return codes

    def encode(self, embeddings: Tensor) -> Tensor:
        """Refused: an embedding does not say what category it is of.

        Raises:
            InputError: Always.
        """
        raise no_codes_of_embeddings(self)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Mean embedding (B, D) of the items with codes (B, L), or with the longest part of them that some item has."""
        codes = codes.to(self.device)
        children = self._children.to(self.device)
        node = torch.zeros(len(codes), dtype=torch.int64, device=self.device)  # (B,)
        alive = torch.ones_like(node, dtype=torch.bool)
        for code in codes.unbind(-1):  # (B,)
            child = children[node, code]
            alive &= child >= 0
            node = torch.where(alive, child, node)
        return self._means.to(self.device)[node]

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors of known shape; plain values and tensors only."""
        paths = [list(path) for path in self._code_of]
        return {
            "paths": paths,
            "codes": list(self._code_of.values()),
            "children": self._children,
            "means": self._means,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        self._code_of = {tuple(path): code for path, code in zip(state["paths"], state["codes"], strict=True)}
        self._children, self._means = state["children"], state["means"]

    def _paths(self, fields: pl.DataFrame | None, num_items: int) -> list[Path]:
        """The path of each item, without the depths that are skipped."""
        raw_ids(fields, num_items, self)
        if fields is None or self.field not in fields.columns:
            known = ", ".join(name for name in (fields.columns if fields is not None else []) if name != "item_id")
            raise InputError(
                f"items have no field {self.field!r} of categories; set field to one of: {known or 'none'}"
            )
        return [_first_path(text)[self.skip :] for text in fields.get_column(self.field).to_list()]

    def _number(self, paths: list[Path]) -> dict[Path, int]:
        """The code of each path from the top; logs how many siblings share one."""
        code_of: dict[Path, int] = {}
        prefix: dict[Path, tuple[int, ...]] = {(): ()}  # codes from the top, by path
        merged = 0
        for level in range(self.num_levels):
            families: dict[tuple[int, ...], Counter[Path]] = {}  # siblings and their items, by the codes above them
            for path in paths:
                if len(path) > level:
                    families.setdefault(prefix[path[:level]], Counter())[path[: level + 1]] += 1
            for parent, counts in families.items():
                ranked = sorted(counts, key=lambda path: (-counts[path], path))
                merged += max(len(ranked) - (self.num_codes - 1), 0)
                for rank, path in enumerate(ranked, 1):
                    code_of[path] = min(rank, self.num_codes - 1)
                    prefix[path] = (*parent, code_of[path])
        if merged:
            _log.warning(
                "category tree: %d categories share a code with a larger sibling, for want of more than %d codes",
                merged,
                self.num_codes,
            )
        return code_of


def _first_path(text: str | None) -> Path:
    first = (text or "").split(LIST_SEPARATOR)[0]
    parts = (" ".join(part.split()) for part in first.split(PATH_SEPARATOR))
    return tuple(part for part in parts if part)


def _prefix_means(rows: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The tree of codes (I, L) in use, children (N, K), and the mean (N, D) of the rows (I, D) below each node."""
    children = [torch.full((1, num_codes), -1)]  # a level of nodes each
    node = torch.zeros(len(codes), dtype=torch.int64)  # (I,) in its level
    means, first = [rows.mean(0, keepdim=True)], 1
    for code in codes.unbind(-1):  # (I,)
        found, below = torch.unique(node * num_codes + code, return_inverse=True)  # (n,), (I,)
        children[-1][found // num_codes, found % num_codes] = first + torch.arange(len(found))
        first += len(found)
        children.append(torch.full((len(found), num_codes), -1))
        counts = torch.bincount(below)[:, None].to(rows)  # (n, 1)
        means.append(rows.new_zeros(len(found), rows.shape[1]).index_add_(0, below.to(rows.device), rows) / counts)
        node = below
    return torch.cat(children), torch.cat(means).cpu()
