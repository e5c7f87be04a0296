"""Search by FAISS (facebookresearch/faiss), exact or approximate, by factory string. The one module that imports it."""

import importlib.metadata
import logging
import re
from pathlib import Path
from typing import Any, Literal

# Before faiss, always: the two bring an OpenMP runtime each, and only in this order does torch's thread count, which
# data loaders set to one in their workers, hold for both. The other way round a forked worker hangs
# (facebookresearch/faiss#5206).
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_lightning.distributed import world_size
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.index import Found, LocalIndex, Similarity

try:
    import faiss
except (ImportError, RuntimeError) as error:  # faiss-gpu raises RuntimeError where the CUDA libraries are missing
    raise InputError(
        f"index.backend is faiss, but faiss cannot be imported ({str(error).splitlines()[0]}); install it with "
        "pip install 'recsys_lightning[cpu]' or, for NVIDIA GPUs on Linux, 'recsys_lightning[gpu]', "
        "or set index.backend: torch"
    ) from error

_log = logging.getLogger(__name__)

Gpus = Literal["replicate", "shard"]

GPU_LIMIT = 2048  # places of a list that FAISS gives on a GPU
DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12")


class FaissIndex(LocalIndex):
    """An index made by ``faiss.index_factory``, on GPUs where FAISS sees one, else on the CPU.

    Where it runs on a GPU, each process takes its own GPU if there are several processes, and all GPUs if it is alone.
    What FAISS cannot hold on a GPU, such as HNSW, stays on the CPU. Training starts from a fixed seed.

    Args:
        vectors: (n, D).
        similarity: what a score is.
        factory: what to build, as FAISS writes it, e.g. ``Flat``, ``IVF1024,Flat``, ``HNSW32``, ``IVF4096,PQ64``.
        parameters: of the search, e.g. ``nprobe=16`` or ``efSearch=64``, separated by commas.
        gpus: with several GPUs, the whole index on each or a share on each.
        first_item: see `LocalIndex`.
        file: an index of these very vectors that `write` has written: it is read, and nothing is built.

    Raises:
        InputError: a factory or parameters that FAISS does not know or that do not fit the vectors, too few items to
            train it, two FAISS distributions at once, or a file that FAISS cannot read.
    """

    def __init__(
        self,
        vectors: Tensor,
        similarity: Similarity = "inner_product",
        factory: str = "Flat",
        parameters: str = "",
        gpus: Gpus = "replicate",
        first_item: int = 1,
        file: Path | None = None,
    ):
        super().__init__(vectors, similarity, first_item)
        refuse_two_distributions()
        self.factory, self.parameters = factory, parameters
        self._built = self._build() if file is None else self._read(file)
        _set_parameters(self._built, factory, parameters)
        self.exact = isinstance(faiss.downcast_index(self._built), faiss.IndexFlat)
        self._index, on_gpu = _to_gpus(self._built, factory, gpus)
        if on_gpu:
            self._limit = min(self._limit, GPU_LIMIT)

    def write(self, file: Path) -> None:
        """Write the built index to a file, by ``faiss.write_index``.

        Raises:
            OSError: the file cannot be written.
        """
        try:
            faiss.write_index(self._built, str(file))
        except RuntimeError as error:
            raise OSError(_reason(error)) from error

    def _top(self, queries: Tensor, k: int) -> Found:
        if not len(queries):
            return Found(queries.new_empty(0, k), self.item_ids.new_empty(0, k))
        scores, places = self._index.search(queries.cpu().numpy(), k)
        found, ids = torch.from_numpy(scores), torch.from_numpy(places) + self._first_item
        missing = ids < self._first_item  # FAISS marks them by -1
        found, ids = found.masked_fill(missing, -torch.inf), ids.masked_fill(missing, 0)
        return Found(found.to(queries.device), ids.to(queries.device))

    def _build(self) -> Any:
        rows = F.normalize(self.vectors, dim=-1) if self.similarity == "cosine" else self.vectors
        array = rows.cpu().numpy()  # (n, D)
        try:
            index = faiss.index_factory(self.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(
                f"index.factory={self.factory!r} is nothing that FAISS can build for vectors of width {self.dim} "
                f"({_reason(error)}); examples: Flat, IVF1024,Flat, HNSW32, IVF1024,PQ16"
            ) from error
        coarse = faiss.try_extract_index_ivf(index)
        if coarse is not None and coarse.nlist > self.num_items:
            smaller = max(1, min(self.num_items // 39, int(4 * self.num_items**0.5)))  # 39: what FAISS's k-means asks
            raise InputError(
                f"index.factory={self.factory!r} needs at least {coarse.nlist} items to train its lists, and there are "
                f"{self.num_items}; name a smaller number, such as IVF{smaller}"
            )
        try:
            if not index.is_trained:
                index.train(array)
            index.add(array)
        except RuntimeError as error:
            raise InputError(
                f"FAISS cannot build index.factory={self.factory!r} from {self.num_items} items ({_reason(error)}); "
                "name another one, such as Flat"
            ) from error
        return index

    def _read(self, file: Path) -> Any:
        try:
            index = faiss.read_index(str(file))
        except RuntimeError as error:
            raise InputError(f"FAISS cannot read {file} ({_reason(error)})") from error
        if (index.d, index.ntotal, index.metric_type) != (self.dim, self.num_items, faiss.METRIC_INNER_PRODUCT):
            raise InputError(f"{file} is an index of {index.ntotal} vectors of width {index.d}, not of those given")
        return index


def refuse_two_distributions() -> None:
    """Refuse to go on where two FAISS distributions are installed: they write to one folder and break each other.

    Raises:
        InputError: with the commands that mend it.
    """
    names = []
    for name in DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        names.append(name)
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names)} are installed at once and overwrite each other's files; run "
            f"pip uninstall -y {' '.join(names)} and then pip install 'recsys_lightning[cpu]' or '...[gpu]'"
        )


def _set_parameters(index: Any, factory: str, parameters: str) -> None:
    if not parameters:
        return
    space: Any = faiss.ParameterSpace()
    try:
        space.set_index_parameters(index, parameters)
    except RuntimeError as error:
        raise InputError(
            f"index.parameters={parameters!r} do not fit index.factory={factory!r} ({_reason(error)}); "
            "IVF knows nprobe, HNSW knows efSearch"
        ) from error


def _to_gpus(index: Any, factory: str, gpus: Gpus) -> tuple[Any, bool]:
    """The index on GPUs and True, or as it is and False where there is no GPU or it has no form for one."""
    # A GPU build without a GPU has all the functions, and `index_cpu_to_all_gpus` gives an empty index: ask first.
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() < 1:
        return index, False
    if isinstance(faiss.downcast_index(index), faiss.IndexHNSW):
        _log.info("FAISS has no %s for GPUs: it stays on the CPU", factory)
        return index, False
    options = faiss.GpuMultipleClonerOptions()
    options.shard = gpus == "shard"
    # One of several processes must not spread over the GPUs of the others.
    devices = [torch.cuda.current_device()] if world_size() > 1 else list(range(faiss.get_num_gpus()))
    try:
        moved = faiss.index_cpu_to_gpus_list(index, co=options, gpus=devices)
    except RuntimeError as error:
        _log.warning("FAISS keeps %s on the CPU: it cannot move it to GPUs (%s)", factory, _reason(error))
        return index, False
    if moved.ntotal != index.ntotal:
        raise RuntimeError(f"FAISS moved {moved.ntotal} of {index.ntotal} vectors to GPUs {devices}")
    return moved, True


def _reason(error: RuntimeError) -> str:
    """What FAISS has to say, without the C++ signature in front."""
    text = " ".join(str(error).split())
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: '.*?' failed: ?)?", "", text) or text
