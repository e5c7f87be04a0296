"""Which index to search, as settings, and the index that they describe."""

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.index import ItemIndex, LocalIndex, Similarity
from recsys_lightning.retrieval.sharded import ShardedIndex
from recsys_lightning.retrieval.torch_index import TorchIndex

_PARAMETER = r"\w+=0*[1-9]\d*(\.\d+)?"  # FAISS takes 0, negative and half numbers without a word


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How item vectors are searched.

    Attributes:
        backend: `torch` searches exactly, on any device; `faiss` builds what `factory` says and needs the extra `cpu`
            or `gpu`.
        factory: what FAISS builds: Flat is exact; IVF1024,Flat, HNSW32 or IVF4096,PQ64 are approximate.
        parameters: of FAISS's search, e.g. nprobe=16 or efSearch=64, separated by commas; empty takes FAISS's defaults.
        gpus: where FAISS sees several GPUs, the whole index on each (replicate) or a share on each (shard).
        sharded: with several processes, each holds a share of the items; else each holds all of them.
        path: folder in which the built index is kept and from which it is taken again; null keeps none.

    Raises:
        InputError: settings that contradict each other.
    """

    backend: Literal["torch", "faiss"] = "torch"
    factory: str = "Flat"
    parameters: str = ""
    gpus: Literal["replicate", "shard"] = "replicate"
    sharded: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that would have no effect or cannot be met."""
        for name, values in (("backend", ("torch", "faiss")), ("gpus", ("replicate", "shard"))):
            if getattr(self, name) not in values:
                raise InputError(f"index.{name}={getattr(self, name)!r} must be {' or '.join(values)}")
        if self.backend == "torch":
            given = {"factory": self.factory != "Flat", "parameters": self.parameters, "gpus": self.gpus != "replicate"}
            for name in (name for name, is_given in given.items() if is_given):
                raise InputError(f"index.{name}={getattr(self, name)} needs index.backend: faiss")
        if self.parameters and not re.fullmatch(f"{_PARAMETER}(,{_PARAMETER})*", self.parameters):
            raise InputError(
                f"index.parameters={self.parameters!r} must be names with positive numbers, "
                "such as nprobe=16 or nprobe=16,efSearch=64"
            )
        if self.sharded and self.path is not None:
            raise InputError(
                "an index over several processes is not kept: set index.path: null or index.sharded: false"
            )


def build_index(vectors: Tensor, settings: IndexSettings, similarity: Similarity, first_item: int = 1) -> ItemIndex:
    """Build the index that the settings describe; `IndexSettings.path` is left to the caller.

    Args:
        vectors: (n, D) of this process.
        settings: what to build.
        similarity: what a score is.
        first_item: item of the first row. With 0, `vectors` is a table (I+1, D) whose row 0 is padding.

    Returns:
        The index; with ``settings.sharded`` one that all processes must make and search together.

    Raises:
        InputError: vectors that cannot be ranked, or settings that do not fit them.
    """
    local: LocalIndex
    if settings.backend == "torch":
        local = TorchIndex(vectors, similarity, first_item)
    else:
        from recsys_lightning.retrieval.faiss_index import FaissIndex  # where it is asked for only: it may be missing

        local = FaissIndex(vectors, similarity, settings.factory, settings.parameters, settings.gpus, first_item)
    return ShardedIndex(local) if settings.sharded else local
