"""The table of semantic IDs: which tuple of codes each item has, and from which embeddings it came."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing
from recsys_lightning.semantic_ids.usage import code_usage


@dataclass(frozen=True, kw_only=True)
class CollisionReport:
    """How items share semantic IDs; a cell is the set of items that hold one tuple of codes. Plain values only."""

    num_items: int
    num_cells: int  # different tuples in use
    collision_rate: float  # share of items whose tuple some other item holds too
    largest_cell: int  # items
    mean_cell: float  # items
    used_codes: tuple[int, ...]  # (L,) codes of the level that some item holds
    perplexity: tuple[float, ...]  # (L,)
    entropy: tuple[float, ...]  # (L,) nats
    entropy_share: tuple[float, ...]  # (L,) entropy / log K


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The semantic IDs of a catalogue.

    Attributes:
        codes: (I+1, L) int64 in 0..K-1. Row 0 is padding and all zeros, so (0, ..., 0) is also a tuple a real item may
            hold: mask padding by item id, never by codes.
        num_codes: Codes K a level.
        embeddings_fingerprint: Fingerprint of the item embeddings the codes were made from.
        tokenizer: Free description of what made them.
        item_ids: Raw ids of items 1..I, in their order; None where they are not known. By these the items of a table
            are found again in a catalogue that has grown.

    Raises:
        InputError: Codes of another shape or type, out of range, a padding row that is not zero, or another number of
            raw ids.
    """

    codes: Tensor  # (I+1, L)
    num_codes: int
    embeddings_fingerprint: str
    tokenizer: str
    item_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse a table that breaks its promises."""
        codes = self.codes
        if codes.dtype != torch.int64 or codes.ndim != 2 or codes.shape[0] < 2 or codes.shape[1] < 1:
            raise InputError(
                "semantic IDs must be int64 of shape (I+1, L) with at least one item and one level, "
                f"got {codes.dtype} of shape {tuple(codes.shape)}"
            )
        if bool(codes[0].any()):
            raise InputError(f"row 0 of the semantic IDs is padding and must be zero, got {codes[0].tolist()}")
        if self.item_ids is not None and len(self.item_ids) != self.num_items:
            raise InputError(f"{self.num_items} items have semantic IDs, but {len(self.item_ids)} raw ids are given")
        outside = ((codes < 0) | (codes >= self.num_codes)).nonzero()  # (N, 2)
        if len(outside):
            item, level = outside[0].tolist()
            raise InputError(
                f"semantic IDs must lie in 0..{self.num_codes - 1}, but item {item} has code {int(codes[item, level])} "
                f"at level {level + 1}; was num_codes={self.num_codes} meant?"
            )

    @property
    def num_items(self) -> int:
        """Items I, padding not counted."""
        return len(self.codes) - 1

    @property
    def num_levels(self) -> int:
        """Levels L."""
        return self.codes.shape[1]

    def of_items(self, items: Tensor) -> Self:
        """The table of some items (N,) alone, by their ids 1..I, in the order given."""
        rows = torch.cat([items.new_zeros(1), items])  # (N+1,) the padding row first
        ids = None if self.item_ids is None else tuple(self.item_ids[item - 1] for item in items.tolist())
        return replace(self, codes=self.codes[rows], item_ids=ids)

    def disambiguated(self) -> Self:
        """The same table with one level more, which counts the items of a cell by id: each item has its own tuple.

        TIGER (arXiv:2305.05065, section 3.1) does so. All levels have as many codes as the largest needs.
        """
        _, cell, sizes = torch.unique(self.codes[1:], dim=0, return_inverse=True, return_counts=True)  # (I,), (C,)
        order = cell.argsort(stable=True)  # (I,) by cell, and by id within one
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (I,)
        nth = torch.zeros(len(self.codes), dtype=torch.int64, device=self.codes.device)
        nth[order + 1] = torch.arange(len(order), device=order.device) - starts
        return replace(
            self,
            codes=torch.cat([self.codes, nth[:, None]], 1),
            num_codes=max(self.num_codes, int(sizes.max())),
            tokenizer=f"{self.tokenizer}, disambiguated",
        )

    def collision_report(self) -> CollisionReport:
        """Count cells, collisions and the use of each level's codes."""
        _, cells = torch.unique(self.codes[1:], dim=0, return_counts=True)  # (C,)
        usage = code_usage(self.codes[1:], self.num_codes)
        return CollisionReport(
            num_items=self.num_items,
            num_cells=len(cells),
            collision_rate=int(cells[cells > 1].sum()) / self.num_items,
            largest_cell=int(cells.max()),
            mean_cell=self.num_items / len(cells),
            used_codes=tuple(usage.num_used.tolist()),
            perplexity=tuple(usage.perplexity.tolist()),
            entropy=tuple(usage.entropy.tolist()),
            entropy_share=tuple(usage.entropy_share.tolist()),
        )

    def save(self, path: str | Path) -> None:
        """Write the table to one safetensors file: whole or not at all, whenever the process dies."""
        path = Path(path)
        codes = self.codes.cpu().contiguous()
        metadata = {
            "num_codes": str(self.num_codes),
            "embeddings_fingerprint": self.embeddings_fingerprint,
            "tokenizer": self.tokenizer,
            "codes_sha256": _sha256(codes),
        }
        tensors = {"codes": codes}
        if self.item_ids is not None:  # a tensor: the header, where metadata stand, has a limit of 100 MB
            tensors["item_ids"] = torch.frombuffer(bytearray(json.dumps(self.item_ids).encode()), dtype=torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(to_safetensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path, embeddings_fingerprint: str | None = None, num_items: int | None = None) -> Self:
        """Read a table, and refuse one that was made from other embeddings or for another catalogue.

        Args:
            path: File that `save` wrote.
            embeddings_fingerprint: Fingerprint of the embeddings in use; None leaves it unchecked.
            num_items: Items in the catalogue in use; None leaves it unchecked.

        Raises:
            InputError: No such file, a damaged file, other embeddings, or another number of items.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no semantic IDs at {path}; make them with {_command_that_makes(path)}")
        table = cls._read(path)
        if embeddings_fingerprint is not None and table.embeddings_fingerprint != embeddings_fingerprint:
            raise InputError(
                f"semantic IDs at {path} were made from other item embeddings ({table.embeddings_fingerprint[:12]}) "
                f"than those in use ({embeddings_fingerprint[:12]}); make them anew with {_command_that_makes(path)}, "
                "or use the embeddings they came from"
            )
        if num_items is not None and table.num_items != num_items:
            raise InputError(
                f"semantic IDs at {path} hold {table.num_items} items but the catalogue has {num_items}; "
                f"make them anew with {_command_that_makes(path)}"
            )
        return table

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                codes = file.get_tensor("codes")
                written = file.get_tensor("item_ids") if "item_ids" in file.keys() else None  # noqa: SIM118
            digest, num_codes = metadata["codes_sha256"], int(metadata["num_codes"])
            fingerprint, tokenizer = metadata["embeddings_fingerprint"], metadata["tokenizer"]
            item_ids: Sequence[str] | None = None if written is None else json.loads(written.numpy().tobytes())
        # OSError: safetensors maps the file into memory, which fails on an empty one.
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if _sha256(codes) != digest:
            raise _damaged(path, "its codes do not match their SHA-256")
        return cls(
            codes=codes,
            num_codes=num_codes,
            embeddings_fingerprint=fingerprint,
            tokenizer=tokenizer,
            item_ids=None if item_ids is None else tuple(item_ids),
        )


def _sha256(codes: Tensor) -> str:
    return hashlib.sha256(codes.numpy().tobytes()).hexdigest()


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is no table of semantic IDs, or a damaged one ({reason}); "
        f"remove it and make it anew with {_command_that_makes(path)}"
    )


def _command_that_makes(path: Path) -> str:
    """The command line behind a file that lies, by convention, at `runs/<group>/<name>/semantic_ids.safetensors`."""
    folders = path.absolute().parent.parts[-3:]
    if len(folders) == 3 and folders[0] == "runs":
        return f"`recsys fit -c experiments/{folders[1]}/{folders[2]}.yaml`"
    return "`recsys fit -c <the tokenizer's experiment>.yaml`"
