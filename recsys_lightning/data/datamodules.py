"""Lightning data modules: a source and its settings in, batches out."""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.encoders import TextEncoder
from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.data.prepared import PreparedData, prepare
from recsys_lightning.data.sequences import BucketSampler, SequenceBatch, SequenceDataset, Stage
from recsys_lightning.data.shared_text import embed_together, embed_unless_shared
from recsys_lightning.data.sources import Source
from recsys_lightning.data.splits import LEAVE_ONE_OUT, Split, Splitter, draw_cold, training_part
from recsys_lightning.data.text import compose_texts, embed_texts, find_embeddings
from recsys_lightning.data.users import encode_users
from recsys_lightning.distributed import rank, world_size
from recsys_lightning.errors import InputError

T = TypeVar("T")

TEMPLATE = ("{title}", "Brand: {brand}", "Categories: {categories}", "Price: {price}", "{description}")


class CatalogDataModule(L.LightningDataModule):
    """The part every data module shares: build the data set and its item embeddings once, then read them.

    `prepare_data` runs on one process of a machine and does all the work, but for item texts that several processes can
    share out: `setup`, which runs on all, has them encoded, and otherwise only opens what is there.

    Args:
        source: where the interactions come from: `Amazon2014`, `Tabular` or `Synthetic`.
        encoder: turns item texts into embeddings: `SentenceTransformerEncoder` or `TfidfSVD`. Without one, models that
            need text embeddings refuse the data.
        template: segments of an item's text, with field names in braces; one whose field an item lacks is left out.
        raw_dir: folder of the raw files. What is missing there is downloaded, if the source has a public address.
        cache_dir: folder for everything that is built.
        k_core: drop users and items with fewer interactions, again and again until none is left; 0 keeps all.
        num_workers: processes that make batches; 0 makes them in the training process, which is enough for most data.
        seed: of the order of training batches, 0 or more; None takes the run's own, ``seed_everything``.
        cold_items: share of the items that are held out of training, to see how new items fare: no training sequence
            holds them and no tokenizer learns from them. They stay in the catalogue, in the histories and answers of
            evaluation, and are given semantic IDs. A text encoder that learns from the texts, `TfidfSVD`, reads theirs.
        cold_seed: of the draw of these items, 0 or more. With the same share and seed, data modules of either kind
            over the same data hold out the same items.
        split: what is training, validation and test: `LeaveOneOut`, or `UserSplit`, which holds out whole users.
    """

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder | None = None,
        template: tuple[str, ...] = TEMPLATE,
        raw_dir: str = "raw",
        cache_dir: str = "cache",
        k_core: int = 5,
        num_workers: int = 0,
        seed: int | None = None,
        cold_items: float = 0.0,
        cold_seed: int = 0,
        split: Splitter = LEAVE_ONE_OUT,
    ):
        super().__init__()
        counts = {"k_core": k_core, "num_workers": num_workers, "seed": seed or 0, "cold_seed": cold_seed}
        for name, value in counts.items():
            if value < 0:
                raise InputError(f"data.{name}={value} must be 0 or more")
        self.source, self.encoder, self.template = source, encoder, template
        self.raw_dir, self.cache_dir = Path(raw_dir).expanduser(), Path(cache_dir).expanduser()
        self.k_core, self.num_workers = k_core, num_workers
        self.seed = seed
        self.cold_items, self.cold_seed = cold_items, cold_seed
        self.splitter = split
        self._data: PreparedData | None = None
        self._composed: list[str] | None = None
        self._catalog: Catalog | None = None
        self._resumed = (0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The place in the order of the training batches."""
        epoch, done = _place(self.trainer) if self.trainer is not None else (0, 0)
        return {"epoch": epoch, "done_batches": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._resumed = state_dict["epoch"], state_dict["done_batches"]

    def prepare_data(self) -> None:
        """Download, read, clean and number whatever is not cached yet; embed it too, where this is the only process."""
        self._prepared()
        if self.encoder is not None:
            embed = embed_texts if world_size() == 1 else embed_unless_shared
            embed(self._texts(), self.encoder, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared data."""
        if self._catalog is not None:
            return
        data = self._prepared()
        text = None
        if self.encoder is not None:
            find = find_embeddings if world_size() == 1 else embed_together
            text = find(self._texts(), self.encoder, self.cache_dir)
            if text is None:
                raise InputError(f"no item embeddings in {self.cache_dir}: run `recsys prepare` on this machine first")
        num_items = data.interactions.num_items
        cold = draw_cold(num_items, self.cold_items, self.cold_seed)
        self._split = dataclasses.replace(self.splitter(data.interactions), cold=cold)
        part = training_part(data.interactions, self._split)
        features = encode_users(data.users, part.stop > part.first)
        self._catalog = Catalog(data.fields, part.counts(num_items), text, features)

    @property
    def data(self) -> PreparedData:
        """The prepared data; available after `setup`."""
        self.catalog  # noqa: B018 - says what to do if setup has not run
        return self._prepared()

    @property
    def catalog(self) -> Catalog:
        """The items; available after `setup`."""
        if self._catalog is None:
            raise RuntimeError("call prepare_data() and setup() first")
        return self._catalog

    @property
    def split(self) -> Split:
        """What is training, validation and test; available after `setup`."""
        self.catalog  # noqa: B018 - says what to do if setup has not run
        return self._split

    @property
    def warm_items(self) -> IntArray:
        """Ids, ascending, of the items that `cold_items` does not hold out of training; available after `setup`."""
        return np.setdiff1d(np.arange(1, self.catalog.num_items + 1), self.split.cold)

    def with_interactions(self, interactions: Interactions) -> Self:
        """The same data module, set up over other interactions of the same users and items.

        Nothing is written, and nothing that was derived from the old interactions is kept; the statistics of the
        prepared data alone stay as they were.

        Raises:
            ValueError: they are interactions of another number of users or items.
        """
        known = self.data.interactions
        if (interactions.num_users, interactions.num_items) != (known.num_users, known.num_items):
            raise ValueError(
                f"interactions of {interactions.num_users} users with {interactions.num_items} items cannot take the "
                f"place of those of {known.num_users} users with {known.num_items} items"
            )
        other = copy.copy(self)
        # Not the fingerprint of the raw files: these data are not what is in them.
        other._data = dataclasses.replace(
            self.data, interactions=interactions, fingerprint=f"not {self.data.fingerprint}"
        )
        other._catalog = other._composed = None
        other.setup()
        return other

    def statistics(self) -> dict[str, Any]:
        """What `recsys prepare` prints: the data set's figures, its split, its user features and its text encoder."""
        split, users, first = self.split, self.data.users, self.data.interactions.offsets[:-1]
        features = [name for name in users.columns if name != "user_id"]
        validation, test = split.sizes
        train, text = int(self.catalog.train_counts.sum()), self.catalog.text
        struck = int((split.train_stop - first).sum()) - train
        held_out = {"val": split.val_stop > split.val_start, "test": split.test_stop > split.test_start}
        return {
            **self.data.statistics,
            "split": {"train": train, "val": validation, "test": test},
            "split_rule": str(self.splitter),
            "split_users": {
                "train": int((split.train_stop > first).sum()),
                **{stage: int(is_held_out.sum()) for stage, is_held_out in held_out.items()},
            },
            "only_history": len(self.data.interactions) - train - struck - validation - test,
            "cold_items": {"items": len(self.split.cold), "struck_interactions": struck},
            "user_coverage": {name: 1 - users.get_column(name).null_count() / len(users) for name in features},
            "text_encoder": text.encoder if text else None,
            "text_width": text.vectors.shape[1] if text else None,
        }

    def _batches(self, dataset: Dataset[T], lengths: IntArray, batch_size: int, shuffle: bool) -> DataLoader[T]:
        """This process's batches of a data set whose rows have such lengths."""
        # PL_GLOBAL_SEED is what seed_everything has set, the same in all processes of a run.
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        sampler = BucketSampler(lengths, batch_size, shuffle, seed, rank=rank(), world_size=world_size())
        if shuffle:
            # Now: worker processes fetch their first batches before Lightning says which epoch it is.
            sampler.resume_at(*self._resumed)
        # The sampler yields whole batches and the dataset answers with one: nothing is collated.
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _prepared(self) -> PreparedData:
        # Kept, since to find it the raw files are hashed.
        if self._data is None:
            self._data = prepare(self.source, self.raw_dir, self.cache_dir, self.k_core)
        return self._data

    def _texts(self) -> list[str]:
        if self._composed is None:
            self._composed = compose_texts(self._prepared().fields.drop("item_id"), self.template)
        return self._composed


class SequenceDataModule(CatalogDataModule):
    """Users' sequences as `SequenceBatch`es.

    Args:
        source: see `CatalogDataModule`.
        encoder: see `CatalogDataModule`.
        template: see `CatalogDataModule`.
        raw_dir: see `CatalogDataModule`.
        cache_dir: see `CatalogDataModule`.
        k_core: see `CatalogDataModule`.
        max_history: longest history in items (C12); the newest ones are kept.
        windows: what becomes of longer training sequences: ``last`` trains on the newest items, ``all`` splits them.
        batch_size: sequences of a training batch on one device.
        eval_batch_size: sequences of an evaluation batch on one device.
        num_workers: see `CatalogDataModule`.
        seed: see `CatalogDataModule`.
        cold_items: see `CatalogDataModule`.
        cold_seed: see `CatalogDataModule`.
        split: see `CatalogDataModule`.
    """

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder | None = None,
        template: tuple[str, ...] = TEMPLATE,
        raw_dir: str = "raw",
        cache_dir: str = "cache",
        k_core: int = 5,
        max_history: int = 20,
        windows: Literal["last", "all"] = "last",
        batch_size: int = 256,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
        cold_items: float = 0.0,
        cold_seed: int = 0,
        split: Splitter = LEAVE_ONE_OUT,
    ):
        super().__init__(
            source, encoder, template, raw_dir, cache_dir, k_core, num_workers, seed, cold_items, cold_seed, split
        )
        sizes = {"max_history": max_history, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"data.{name}={value} must be at least 1")
        self.max_history, self.windows = max_history, windows
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    def dataset(self, stage: Stage) -> SequenceDataset:
        """The rows of one stage."""
        return SequenceDataset(
            self.data.interactions, self.split, stage, self.max_history, self.windows, self.catalog.user_features
        )

    def train_dataloader(self) -> DataLoader[SequenceBatch]:
        """Shuffled training batches."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every user with a validation answer, once."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every user with a test answer, once; the validation answer is part of the history."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[SequenceBatch]:
        """Every user, with all interactions as history."""
        return self._loader("predict")

    def _loader(self, stage: Stage) -> DataLoader[SequenceBatch]:
        dataset = self.dataset(stage)
        if not len(dataset):
            cure = "lower --data.k_core or give more data"
            if stage == "train" and len(self.split.cold):
                cure = f"lower --data.cold_items, which holds out {len(self.split.cold):,} items"
            raise InputError(f"no user has enough interactions for the {stage} split; {cure}")
        size = self.batch_size if stage == "train" else self.eval_batch_size
        return self._batches(dataset, dataset.lengths, size, shuffle=stage == "train")


class ItemDataModule(CatalogDataModule):
    """Item text embeddings in batches (B, D), for models that learn semantic IDs.

    Args:
        source: see `CatalogDataModule`.
        encoder: see `CatalogDataModule`.
        template: see `CatalogDataModule`.
        raw_dir: see `CatalogDataModule`.
        cache_dir: see `CatalogDataModule`.
        k_core: see `CatalogDataModule`.
        batch_size: items of a batch on one device.
        num_workers: see `CatalogDataModule`.
        seed: see `CatalogDataModule`.
        cold_items: see `CatalogDataModule`.
        cold_seed: see `CatalogDataModule`.
        split: see `CatalogDataModule`.
    """

    def __init__(
        self,
        source: Source,
        encoder: TextEncoder | None = None,
        template: tuple[str, ...] = TEMPLATE,
        raw_dir: str = "raw",
        cache_dir: str = "cache",
        k_core: int = 5,
        batch_size: int = 1024,
        num_workers: int = 0,
        seed: int | None = None,
        cold_items: float = 0.0,
        cold_seed: int = 0,
        split: Splitter = LEAVE_ONE_OUT,
    ):
        super().__init__(
            source, encoder, template, raw_dir, cache_dir, k_core, num_workers, seed, cold_items, cold_seed, split
        )
        if batch_size < 1:
            raise InputError(f"data.batch_size={batch_size} must be at least 1")
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled batches of the embeddings of all items that are not held out of training."""
        return self._loader(self.warm_items, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same items, each once: the best checkpoint is chosen without those held out."""
        return self._loader(self.warm_items, shuffle=False)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Every item once: a tokenizer is judged on the whole catalogue."""
        return self._loader(np.arange(1, self.catalog.num_items + 1), shuffle=False)

    def _loader(self, items: IntArray, shuffle: bool) -> DataLoader[Tensor]:
        dataset = _Rows(self.catalog.text_embeddings()[torch.from_numpy(items)])
        return self._batches(dataset, np.ones(len(dataset), dtype=np.int64), self.batch_size, shuffle)


class _Rows(Dataset[Tensor]):
    """Rows of a matrix, many at a time."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> Tensor:
        return self.rows[torch.as_tensor(index)]


def _place(trainer: L.Trainer) -> tuple[int, int]:
    """The epoch that a training would go on in, and how many of its batches are done."""
    loop: Any = trainer.fit_loop  # whose types leave out these counters
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    if epochs.started == epochs.processed:  # between two epochs
        return epochs.processed, 0
    # Within the last step of an epoch, when its batch is not completed, Lightning would begin the next one.
    if batches.processed >= trainer.num_training_batches and batches.completed < batches.processed:
        return epochs.processed + 1, 0
    return epochs.processed, batches.processed
