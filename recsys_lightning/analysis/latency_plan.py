"""What the latency lab measures: its settings, and the cells of its table.

Axis letters: I items.
"""

import math
from dataclasses import dataclass, fields

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings

KINDS = ("exact", "ivf", "hnsw")
MAX_LISTS = 4096  # of an IVF index; more take hours to train
HNSW_LINKS = 32


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """What is measured.

    Args:
        items: sizes of the catalogues.
        interests: queries a user.
        indexes: of `KINDS`.
        devices: ``cpu``, ``cuda``.
        dim: width of the vectors.
        k: items of a list.
        users: users that are drawn.
        batch: users of a batch.
        repeats: calls of a cell and form that are timed.
        seconds: limit of the timed calls of a cell and form.
        threads: of a search and of building an index.
        hnsw_limit: largest catalogue that HNSW is built on.
        seed: of all that is drawn.
    """

    items: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    interests: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    indexes: tuple[str, ...] = KINDS
    devices: tuple[str, ...] = ("cpu",)
    dim: int = 128
    k: int = 50
    users: int = 256
    batch: int = 64
    repeats: int = 500
    seconds: float = 5.0
    threads: int = 1
    hnsw_limit: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("seed", "hnsw_limit") else 1e-9 if field.name == "seconds" else 1
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and not least <= number < math.inf:
                    raise InputError(f"--{field.name} {number} must be at least {least:g}")
        if not self.items or not self.interests or not self.indexes or not self.devices:
            raise InputError("items, interests, indexes and devices need at least one value each")
        if self.k > min(self.items):
            raise InputError(f"--k {self.k} is more than the {min(self.items)} items of --items; lower --k")
        if self.batch > self.users:
            raise InputError(f"--batch {self.batch} is more than --users {self.users}; lower --batch")
        unknown = [name for name in self.indexes if name not in KINDS]
        if unknown:
            raise InputError(f"no index {unknown[0]!r}; --indexes takes {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One index, one parameter, one number of interests: what was measured, or why not. None where there is no value.

    A call is one search of all queries of a user and the merge of their lists, of a batch of users in ``batch_...``.
    """

    items: int
    device: str
    index: str
    parameters: str
    interests: int
    build_seconds: float | None = None
    index_bytes: int | None = None
    recall: float | None = None  # of the merged lists, against the exact merged lists
    recall_users: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None  # None also below 100 calls
    calls: int = 0
    batch_p50_ms: float | None = None
    batch_p99_ms: float | None = None
    batch_calls: int = 0
    users_per_second: float | None = None  # in batches
    queries_per_second: float | None = None  # in batches
    left_out: str = ""  # why a value is missing, apart from a p99 for want of calls


def planned_cells(settings: LabSettings) -> list[Cell]:
    """Every cell of a lab, in the order of measuring, nothing measured yet."""
    return [
        Cell(items=items, device=device, index=kind, parameters=parameters, interests=interests)
        for items in sorted(set(settings.items))
        for device in settings.devices
        for kind in dict.fromkeys(settings.indexes)
        for parameters in sweep(kind, items, settings.k)
        for interests in sorted(set(settings.interests))
    ]


def num_lists(items: int) -> int:
    """Lists of an IVF index: the power of two nearest 2 sqrt(I), but at least the 39 items a list that FAISS asks."""
    nearest, trainable = round(math.log2(2 * math.sqrt(items))), math.floor(math.log2(max(items / 39, 1)))
    return min(MAX_LISTS, 1 << nearest, 1 << trainable)


def sweep(kind: str, items: int, k: int) -> list[str]:
    """The parameters an index is searched with, from fast to exact."""
    if kind == "ivf":
        return [f"nprobe={2**power}" for power in range(8) if 2**power <= num_lists(items)]
    if kind == "hnsw":
        first = 2 ** math.ceil(math.log2(max(k, 16)))  # FAISS never keeps fewer candidates than it returns
        return [f"efSearch={first * 2**step}" for step in range(4)]
    return [""]


def index_settings(kind: str, items: int) -> IndexSettings:
    """How an index of the lab is built."""
    if kind == "exact":
        return IndexSettings(backend="torch")
    factory = f"IVF{num_lists(items)},Flat" if kind == "ivf" else f"HNSW{HNSW_LINKS}"
    return IndexSettings(backend="faiss", factory=factory)
