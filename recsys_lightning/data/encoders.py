"""Text to vectors: a sentence-transformers model, or TF-IDF with an SVD, which needs no download.

Shapes: N texts, D width.
"""

import hashlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recsys_lightning.errors import InputError

_log = logging.getLogger(__name__)

HUB_TIMEOUT_SECONDS = 10.0
_CURE_WITHOUT_HUB = (
    "give a local folder with --data.encoder.init_args.model DIR (or set RECSYS_TEXT_MODEL where the experiment file "
    "reads it), or use the encoder that needs no download with --data.encoder TfidfSVD"
)

Vectors = NDArray[np.float32]


class TextEncoder(ABC):
    """Turns texts into vectors, under a name for everything that changes those vectors."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """One line that differs whenever the vectors of the same texts would differ; part of the fingerprint."""

    @abstractmethod
    def encode(self, texts: list[str]) -> Vectors:
        """Vectors of ``texts``, (N, D) float32, in their order, with a progress bar on a terminal."""

    @property
    def alternatives(self) -> list["TextEncoder"]:
        """This encoder and what may stand in for it, most wanted first."""
        return [self]

    def resolve(self) -> "TextEncoder":
        """The encoder to use here and now: this one, or the one that stands in for it."""
        return self

    def release(self) -> None:  # noqa: B027 - most encoders hold nothing
        """Give back what ``encode`` keeps in memory."""


class BatchedEncoder(TextEncoder):
    """An encoder that takes texts batch by batch, each of them by itself: several processes can share them out."""

    @abstractmethod
    def batches(self, texts: list[str]) -> list[list[int]]:
        """The places in ``texts`` of what is encoded at once: every place in one batch, largest batch first."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> Vectors:
        """Vectors of one batch of texts, (B, D) float32, in their order."""


class SentenceTransformerEncoder(BatchedEncoder):
    """A sentence-transformers model, from a local folder or from the Hugging Face hub.

    An item without text is encoded as the empty string, like any other. ``batch_size`` and ``device`` are no part of
    the identity: they change vectors by rounding only. So is the version of the libraries.

    Args:
        model: Local folder or hub name. Sentence-T5 base, 768 wide, is the usual choice in the semantic ID literature.
        revision: Commit, tag or branch of a hub model; ``None`` is its main branch, which may move. A folder has none.
        batch_size: Texts a forward pass.
        device: Where to run, such as ``cuda``; ``None`` takes the GPU if there is one, each process of a run its own.
        max_tokens: Texts are cut after so many tokens; ``None`` keeps the model's own limit.
        normalize: Scale every vector to unit length.
        offline_fallback: What to use instead when the hub cannot be reached; ``None`` makes that an error.
    """

    def __init__(
        self,
        model: str = "sentence-transformers/sentence-t5-base",
        revision: str | None = None,
        batch_size: int = 128,
        device: str | None = None,
        max_tokens: int | None = None,
        normalize: bool = True,
        offline_fallback: TextEncoder | None = None,
    ) -> None:
        if not model.strip():
            raise InputError("text model is empty; give a hub name or a local folder as model")
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise InputError(f"batch_size and max_tokens must be at least 1, got {batch_size=} {max_tokens=}")
        self.model = model
        self.revision = revision
        self.batch_size = batch_size
        self.device = device
        self.max_tokens = max_tokens
        self.normalize = normalize
        self.offline_fallback = offline_fallback
        self._loaded: Any = None
        self._digest: tuple[object, str] | None = None  # what the folder looked like, and its digest

    @property
    def identity(self) -> str:
        """Contents of the folder, or name@revision, and the settings that change vectors."""
        folder = self._folder()
        source = f"folder:{self._folder_digest(folder)}" if folder else f"{self._hub_name()}@{self.revision or 'main'}"
        return f"SentenceTransformer {source} max_tokens={self.max_tokens} normalize={self.normalize}"

    @property
    def alternatives(self) -> list[TextEncoder]:
        """This encoder, then its offline fallback."""
        return [self, *(self.offline_fallback.alternatives if self.offline_fallback else [])]

    def resolve(self) -> TextEncoder:
        """This encoder with its model loaded, or the offline fallback when the hub cannot be reached.

        Raises:
            InputError: As ``load``; an unreachable hub only when there is no fallback.
        """
        try:
            self.load()
        except _HubUnreachable as error:
            if self.offline_fallback is None:
                raise
            _log.warning(
                "text model %s could not be had (%s); its offline fallback %s is used instead: results are not "
                "comparable with those of the named model",
                self.model,
                error.reason,
                type(self.offline_fallback).__name__,
            )
            return self.offline_fallback.resolve()
        return self

    def load(self) -> None:
        """Bring the model into memory; a hub model comes from the local cache if it is there.

        Raises:
            InputError: sentence-transformers is not installed, the folder or the hub model does not exist or cannot be
                read, or the hub cannot be reached (found out within about ``HUB_TIMEOUT_SECONDS``).
        """
        if self._loaded is not None:
            return
        folder = self._folder()
        if importlib.util.find_spec("sentence_transformers") is None:
            raise InputError(
                f"text model {self.model!r} needs sentence-transformers, which is not installed; "
                'pip install "recsys_lightning[text]", or use --data.encoder TfidfSVD'
            )
        import torch

        if self.device is not None and self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(
                f"text model device is {self.device!r} but there is no CUDA GPU; set device to null or cpu"
            )
        model = self._load_folder(folder) if folder else self._load_from_hub()
        if self.max_tokens is not None:
            model.max_seq_length = self.max_tokens
        self._loaded = model

    def release(self) -> None:
        """Drop the model: it would otherwise sit beside the recommender on the GPU."""
        self._loaded = None

    def encode(self, texts: list[str]) -> Vectors:
        """Vectors of ``texts``, (N, D) float32.

        Raises:
            InputError: As ``load``, or the model gives NaN or infinite values.
        """
        batches = self.batches(texts)
        if not batches:
            raise InputError(f"text model {self.model!r} was given no texts")
        parts: list[Vectors] = []
        with progress("Encoding item texts", len(texts)) as advance:
            for batch in batches:
                parts.append(self.encode_batch([texts[place] for place in batch]))
                advance(len(batch))
        vectors = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)  # (N, D)
        vectors[[place for batch in batches for place in batch]] = np.concatenate(parts)
        check_finite(vectors, texts, self.model)
        return vectors

    def batches(self, texts: list[str]) -> list[list[int]]:
        """Longest first, so that a batch holds texts of one length and memory runs out at once or never."""
        empty = sum(not text for text in texts)
        if empty:
            _log.info("text model %s: %d of %d texts are empty", self.model, empty, len(texts))
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def encode_batch(self, texts: list[str]) -> Vectors:
        """Vectors of up to ``batch_size`` texts, (B, D) float32.

        Raises:
            InputError: As ``load``.
        """
        self.load()
        vectors = self._loaded.encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, dtype=np.float32)

    def _folder(self) -> Path | None:
        """The local folder that ``model`` names, None for a hub name.

        Raises:
            InputError: It reads as a path and there is no such folder.
        """
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            return folder
        if self.model[0] in "/.~" or folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir()):
            raise InputError(f"text model folder {folder} does not exist; give an existing folder or a hub name")
        return None

    def _folder_digest(self, folder: Path) -> str:
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        # A model is hundreds of megabytes: read it again only when a file has changed.
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if self._digest is None or self._digest[0] != state:
            digest = hashlib.sha256()
            for path in files:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0{content}\n".encode())
            self._digest = (state, digest.hexdigest())
        return self._digest[1]

    def _hub_name(self) -> str:
        # sentence-transformers reads a bare name as one of its own models; say so once for all uses of the name.
        return self.model if "/" in self.model else f"sentence-transformers/{self.model}"

    def _load_folder(self, folder: Path) -> Any:
        if self.revision is not None:
            _log.info("text model %s is a local folder: revision %s is not used", folder, self.revision)
        try:
            return _sentence_transformer(str(folder), None, self._device(), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"text model folder {folder} cannot be loaded ({first_line(error)}); "
                "give a folder written by SentenceTransformer.save or transformers' save_pretrained"
            ) from error

    def _device(self) -> str | None:
        """Where to run; sentence-transformers would take GPU 0 for processes that srun has started on a second node."""
        import torch

        if self.device is None and torch.cuda.is_available():
            return f"cuda:{torch.cuda.current_device()}"
        return self.device

    def _load_from_hub(self) -> Any:
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        name = self._hub_name()
        try:
            # Without modules.json a cached model would load as its bare transformer and give other vectors in silence.
            if try_to_load_from_cache(name, "modules.json", revision=self.revision) is not None:
                try:
                    return _sentence_transformer(name, self.revision, self._device(), local_files_only=True)
                except (OSError, ValueError) as error:
                    _log.info("cached text model %s is not complete (%s); asking the hub", name, first_line(error))
            # One short question first: left alone, a download retries each file for over a minute without a network.
            HfApi().model_info(name, revision=self.revision, timeout=HUB_TIMEOUT_SECONDS)
            return _sentence_transformer(name, self.revision, self._device(), local_files_only=False)
        except HFValidationError:
            raise InputError(
                f"text model {self.model!r} is neither a local folder nor a hub name (owner/name)"
            ) from None
        except RepositoryNotFoundError as error:
            raise InputError(
                f"text model {name!r} is not on the Hugging Face hub, or not open to you; "
                "check the spelling, log in with `hf auth login`, or give a local folder as model"
            ) from error
        except RevisionNotFoundError as error:
            raise InputError(
                f"text model {name!r} has no revision {self.revision!r} on the Hugging Face hub"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            reason = _why_unreachable(error)
            if reason is None:
                raise InputError(f"text model {name!r} cannot be loaded ({first_line(error)})") from error
            raise _HubUnreachable(name, reason) from error
        except Exception as error:  # HTTP clients' own errors: huggingface_hub has changed its client twice
            reason = _why_unreachable(error)
            if reason is None:
                raise
            raise _HubUnreachable(name, reason) from error


class TfidfSVD(TextEncoder):
    """Latent semantic analysis: TF-IDF of words and word pairs, reduced by a truncated SVD, unit length.

    Needs no download. The vectors depend on all the texts together. An item without text, or without a word that
    is in the vocabulary, has the zero vector.

    Args:
        dim: Width of the vectors; columns beyond the rank that the texts allow are zero.
        min_df: A word or pair must stand in at least so many texts.
        max_features: Keep the most frequent words and pairs, to bound memory; ``None`` keeps all.
        seed: Seed of the randomized SVD.
    """

    def __init__(self, dim: int = 256, min_df: int = 2, max_features: int | None = 200_000, seed: int = 0) -> None:
        if dim < 1 or min_df < 1 or (max_features is not None and max_features < 1):
            raise InputError(f"dim, min_df and max_features must be at least 1, got {dim=} {min_df=} {max_features=}")
        self.dim = dim
        self.min_df = min_df
        self.max_features = max_features
        self.seed = seed

    @property
    def identity(self) -> str:
        """All settings."""
        return f"TfidfSVD dim={self.dim} min_df={self.min_df} max_features={self.max_features} seed={self.seed}"

    def encode(self, texts: list[str]) -> Vectors:
        """Vectors of ``texts``, (N, dim) float32.

        Raises:
            InputError: All texts are empty, or no word stands in ``min_df`` of them.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not any(text.strip() for text in texts):
            raise InputError(f"TfidfSVD: all {len(texts)} item texts are empty; name other fields in the text template")
        vectorizer = TfidfVectorizer(
            sublinear_tf=True,
            ngram_range=(1, 2),
            min_df=self.min_df,
            max_features=self.max_features,
            dtype=np.float32,
        )
        with progress("Encoding item texts (TF-IDF, SVD)", 2) as advance:
            try:
                counts = vectorizer.fit_transform(texts)  # (N, words)
            except ValueError as error:
                raise InputError(
                    f"TfidfSVD: no word stands in min_df={self.min_df} or more of the {len(texts)} item texts; "
                    "set min_df to 1 or add fields to the text template"
                ) from error
            advance(1)
            rank = min(self.dim, *counts.shape)
            if counts.shape[1] < 2:  # scikit-learn refuses one column, which needs no reduction
                reduced = counts.toarray()
            else:
                reduced = TruncatedSVD(rank, random_state=self.seed).fit_transform(counts)  # (N, rank)
            advance(1)
        if rank < self.dim:
            _log.info(
                "TfidfSVD: %d texts with %d words allow %d of %d columns; the rest is zero",
                *counts.shape,
                rank,
                self.dim,
            )
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)  # (N, dim)
        # A text without a known word leaves only rounding noise, which must not be blown up to unit length.
        known = np.diff(counts.indptr) > 0  # (N,)
        norms = np.linalg.norm(reduced, axis=1, keepdims=True)  # (N, 1)
        known &= norms[:, 0] > 1e-6
        vectors[known, : reduced.shape[1]] = reduced[known] / norms[known]
        if not known.all():
            _log.info(
                "TfidfSVD: %d of %d texts are empty or hold no known word: zero vectors", (~known).sum(), len(known)
            )
        check_finite(vectors, texts, "TfidfSVD")
        return vectors


class _HubUnreachable(InputError):
    """The hub did not answer: the one failure that an offline fallback may cover."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"text model {name!r} is not in the local cache and the Hugging Face hub cannot be reached ({reason}); "
            + _CURE_WITHOUT_HUB
        )
        self.reason = reason


def _why_unreachable(error: BaseException) -> str | None:
    """First sign of a missing network in the chain of an exception, None if there is none.

    By class name, because huggingface_hub has used requests, httpx and httpx2, each with classes of its own.
    """
    from huggingface_hub.errors import HfHubHTTPError

    signs = {"ConnectionError", "TransportError", "Timeout", "TimeoutError", "gaierror"}
    signs |= {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}
    seen: BaseException | None = error
    while seen is not None:
        down = isinstance(seen, HfHubHTTPError) and seen.response.status_code in (408, 429, 500, 502, 503, 504)
        if down or any(kind.__name__ in signs for kind in type(seen).__mro__) or "couldn't connect" in str(seen):
            return f"{type(seen).__name__}: {first_line(seen)}"
        seen = seen.__cause__ or seen.__context__
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, its class where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _sentence_transformer(name: str, revision: str | None, device: str | None, local_files_only: bool) -> Any:
    """The loaded model, without transformers' bars and reports of its own."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        return SentenceTransformer(name, revision=revision, device=device, local_files_only=local_files_only)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def check_finite(vectors: Vectors, texts: list[str], model: str, places: Sequence[int] | None = None) -> None:
    """Refuse (N, D) vectors that are not all finite.

    Args:
        vectors: of the texts.
        texts: in the order of the vectors.
        model: who has made them.
        places: of these texts among those of all items; None where they are all.

    Raises:
        InputError: it names the first item; the text at place ``i - 1`` is of item ``i``.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise InputError(
            f"text encoder {model} gives NaN or infinite vectors for {len(bad)} of {len(texts)} texts, first for item "
            f"{(bad[0] if places is None else places[bad[0]]) + 1} ({texts[bad[0]][:60]!r}); use another model"
        )


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; nothing stays of it, and nothing shows where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
