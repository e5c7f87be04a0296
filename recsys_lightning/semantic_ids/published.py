"""Semantic IDs that somebody has published, read from a table of codes by item."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl
import torch
from polars.exceptions import PolarsError
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook import least_squares_codebooks
from recsys_lightning.nn.quantize import residual_decode
from recsys_lightning.semantic_ids.random_codes import no_codes_of_embeddings, raw_ids
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings

# A published table is of these items if its first codes explain this many times what as many random groups would.
_MORE_THAN_CHANCE = 2.0


class PublishedCodes(ItemTokenizer):
    """Codes from a file, a row an item, CSV or Parquet.

    The items of the file are found in the catalogue in one of three ways:

    * ``item_ids="raw"``: it names them by their raw ids, as the raw data do;
    * with `mapping`, a table of two columns, the first as in the file, the second the raw id;
    * ``item_ids="catalogue"``: it numbers them from 1 in the order of their first appearance in the interactions, as
      this project does and, for files sorted by user, S3-Rec, P5 and many after them. Then file and catalogue must have
      equally many items, and the first codes must explain more of the embeddings than chance does: another order is
      refused.

    The file is read by `fit`. Embeddings are not read, so `encode` is refused, and so is an item that the file lacks.
    `decode` is a sum of codewords that `fit` chooses for these codes by least squares.

    Args:
        embedding_dim: Width D of the item embeddings.
        path: The file, ``.parquet`` or ``.csv``.
        num_levels: Levels L.
        num_codes: Codes K a level; the file's must lie in 0..K-1.
        code_columns: The L columns of the codes, the first level first; None takes ``c0``, ``c1``, ...
        item_column: The column of the items.
        tokenizer: Where the file holds several tables, the one to take: its value in `tokenizer_column`.
        tokenizer_column: See `tokenizer`.
        item_ids: How the file names items, see above; has no say where there is a `mapping`.
        mapping: A file of two columns, ``.parquet`` or ``.csv``.

    Raises:
        InputError: An argument is out of its range.
    """

    codebooks: Tensor  # (L, K, D)
    was_fitted: Tensor  # () bool

    def __init__(
        self,
        embedding_dim: int,
        path: str,
        num_levels: int = 3,
        num_codes: int = 256,
        code_columns: Sequence[str] | None = None,
        item_column: str = "item_id",
        tokenizer: str | None = None,
        tokenizer_column: str = "tokenizer",
        item_ids: Literal["raw", "catalogue"] = "raw",
        mapping: str | None = None,
    ) -> None:
        super().__init__()
        columns = [f"c{level}" for level in range(num_levels)] if code_columns is None else list(code_columns)
        if embedding_dim < 1 or num_levels < 1 or num_codes < 2 or len(set(columns)) != num_levels:
            raise InputError(
                "PublishedCodes needs embedding_dim and num_levels of 1 or more, num_codes of 2 or more and as many "
                f"different code_columns as levels, got {embedding_dim=} {num_levels=} {num_codes=} "
                f"code_columns={columns}"
            )
        if item_ids not in ("raw", "catalogue"):
            raise InputError(f"item_ids must be 'raw' or 'catalogue', got {item_ids!r}")
        self.embedding_dim = embedding_dim
        self.num_levels = num_levels
        self.num_codes = num_codes
        self.path, self.mapping = Path(path), None if mapping is None else Path(mapping)
        self.columns, self.item_column = columns, item_column
        self.table, self.tokenizer_column = tokenizer, tokenizer_column
        self.item_ids = item_ids
        self.register_buffer("codebooks", torch.zeros(num_levels, num_codes, embedding_dim))
        self.register_buffer("was_fitted", torch.tensor(False))
        self._codes_of: dict[str, list[int]] = {}  # by raw id or, as catalogue numbers, by number

    @property
    def fitted(self) -> bool:
        """Whether the file has been read."""
        return bool(self.was_fitted)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Self:
        """Read the file, and learn the codewords of `decode` from embeddings (I, D) and the items in `fields`.

        Raises:
            InputError: Embeddings of another width, or not finite; no fields; a file that is missing, unreadable, lacks
                a column or an item, holds an item twice or a code out of range, or is of other items.
        """
        check_embeddings(embeddings, self.embedding_dim)
        self._codes_of = self._read()
        codes = self.assign(embeddings, fields)  # (I, L)
        if self._by_number:
            self._refuse_other_order(embeddings, codes[:, 0])
        self.codebooks.copy_(least_squares_codebooks(embeddings, codes, self.num_codes))
        self.was_fitted.fill_(True)
        return self

    def assign(self, embeddings: Tensor, fields: pl.DataFrame | None = None) -> Tensor:
        """Codes (I, L) of the items whose raw ids stand in `fields`; embeddings (I, D) are not read.

        Raises:
            InputError: No fields, or items that the file lacks.
            RuntimeError: Called before `fit`.
        """
        if not self._codes_of:
            raise RuntimeError("PublishedCodes.assign was called before fit: the file has not been read")
        items = raw_ids(fields, len(embeddings), self)
        if self._by_number:
            if len(items) != len(self._codes_of):
                raise InputError(
                    f"{self.path} numbers {len(self._codes_of)} items and {len(items)} are asked for: numbers say "
                    "which item is which of the whole catalogue only; name a mapping from the file's items to raw ids"
                )
            items = [str(number) for number in range(1, len(items) + 1)]
        missing = [item for item in items if item not in self._codes_of]
        if missing:
            raise InputError(
                f"{self.path} has no codes for {len(missing)} of {len(items)} items, first {missing[0]!r}; if it names "
                "items otherwise, give a mapping of its items to raw ids, or item_ids: catalogue for numbers"
            )
        return torch.tensor([self._codes_of[item] for item in items])

    def encode(self, embeddings: Tensor) -> Tensor:
        """Refused: an embedding does not say which item it is of.

        Raises:
            InputError: Always.
        """
        raise no_codes_of_embeddings(self)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the codewords that codes (B, L) name, (B, D)."""
        return residual_decode(codes.to(self.device), self.codebooks)

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors of known shape; plain values and tensors only."""
        return {"items": list(self._codes_of), "codes": torch.tensor(list(self._codes_of.values()))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what `get_extra_state` gave."""
        self._codes_of = dict(zip(state["items"], state["codes"].tolist(), strict=True))

    @property
    def _by_number(self) -> bool:
        return self.item_ids == "catalogue" and self.mapping is None

    def _read(self) -> dict[str, list[int]]:
        """The codes of each item of the file."""
        table = _read_table(self.path)
        _check_columns(table, [self.item_column, *self.columns], self.path)
        if self.table is not None:
            _check_columns(table, [self.tokenizer_column], self.path)
            known = table.get_column(self.tokenizer_column).cast(pl.String).unique(maintain_order=True)
            table = table.filter(pl.col(self.tokenizer_column).cast(pl.String) == self.table)
            if table.is_empty():
                names = ", ".join(known.drop_nulls().to_list()[:20])
                raise InputError(
                    f"{self.path} has no tokenizer {self.table!r} in {self.tokenizer_column}; it has {names}"
                )
        table = table.select(pl.col(self.item_column).cast(pl.String).alias("item"), *self.columns)
        table = table if self.mapping is None else _renamed(table, self.mapping, self.path)
        self._refuse_rows(table)
        codes = table.select(pl.col(self.columns).cast(pl.Int64)).rows()
        return dict(zip(table.get_column("item").to_list(), map(list, codes), strict=True))

    def _refuse_rows(self, table: pl.DataFrame) -> None:
        if table.is_empty():
            raise InputError(f"{self.path} holds no items")
        words = [name for name in self.columns if not table.schema[name].is_integer()]
        if words:
            raise InputError(f"column {words[0]!r} of {self.path} holds no whole numbers; name others as code_columns")
        nameless = table.get_column("item").null_count()
        if nameless:
            raise InputError(f"{nameless} rows of {self.path} have no item in column {self.item_column!r}")
        twice = table.filter(pl.col("item").is_duplicated()).get_column("item")
        if len(twice):
            raise InputError(
                f"{self.path} has more than one row for {twice.n_unique()} items, first {twice[0]!r}; leave one, or "
                "name the tokenizer whose rows to take"
            )
        within = pl.all_horizontal(pl.col(self.columns).is_between(0, self.num_codes - 1).fill_null(False))
        outside = table.filter(~within)
        if len(outside):
            item, *codes = outside.row(0)
            raise InputError(
                f"{len(outside)} items of {self.path} have codes outside 0..{self.num_codes - 1}, first {item!r} with "
                f"{codes}; set num_codes"
            )

    def _refuse_other_order(self, embeddings: Tensor, first: Tensor) -> None:
        """Refuse a file whose level-1 codes (I,) have nothing to do with the embeddings (I, D)."""
        words = least_squares_codebooks(embeddings, first[:, None], self.num_codes)[0]  # (K, D) means
        spread = (embeddings - embeddings.mean(0)).square().sum()
        explained = 1 - float((embeddings - words[first.to(words.device)]).square().sum() / spread.clamp(min=1e-12))
        chance = (len(torch.unique(first)) - 1) / max(len(first) - 1, 1)
        if chance < 1 / _MORE_THAN_CHANCE and explained < _MORE_THAN_CHANCE * chance:
            raise InputError(
                f"the first codes of {self.path} explain {explained:.1%} of the embeddings, and random ones would "
                f"{chance:.1%}: its items are not numbered as the catalogue's; name a mapping from its items to raw ids"
            )


def _read_table(path: Path) -> pl.DataFrame:
    if not path.is_file():
        raise InputError(f"{path} does not exist; name the file of published codes or of their mapping")
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{path}: unknown kind of file; give one of .parquet, .csv")
    try:
        return pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
    except (PolarsError, OSError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _check_columns(table: pl.DataFrame, wanted: Sequence[str], path: Path) -> None:
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.columns)}")


def _renamed(table: pl.DataFrame, path: Path, codes: Path) -> pl.DataFrame:
    """The table with raw ids in its column ``item``, by the mapping in a file."""
    pairs = _read_table(path)
    if pairs.width != 2:
        raise InputError(f"{path} must have two columns, the items of {codes} and raw ids, and has {pairs.width}")
    pairs = pairs.cast(pl.String).rename(dict(zip(pairs.columns, ("item", "raw"), strict=True)))
    twice = pairs.filter(pl.col("item").is_duplicated()).get_column("item")
    if len(twice):
        raise InputError(f"{path} maps {twice.n_unique()} items more than once, first {twice[0]!r}")
    joined = table.join(pairs, on="item", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("raw").is_null()).get_column("item")
    if len(unknown):
        raise InputError(f"{path} has no raw id for {len(unknown)} items of {codes}, first {unknown[0]!r}")
    return joined.with_columns(item="raw").drop("raw")
