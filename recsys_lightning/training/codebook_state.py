"""The codebooks of a model measured on its whole catalogue, and the gradients that reach them in a step."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.nn.quantize import ResidualQuantizer, residual_decode
from recsys_lightning.semantic_ids.health import CodebookState, codebook_state, reconstruction_error, residual_norms
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, evaluating, rebuilt, tokenize
from recsys_lightning.training.checkpoints import Learner

# Items whose embeddings are rebuilt at once: bounds memory on catalogues of millions.
_ROWS = 8192


def has_codebooks(model: Learner) -> bool:
    """Whether a model makes its codes itself: a tokenizer, or a recommender with a quantizer of its own."""
    return isinstance(model, ItemTokenizer) or quantizer_of(model) is not None


def quantizer_of(model: Learner) -> ResidualQuantizer | None:
    """The residual quantizer in a model; a tokenizer that is learned in closed form has none."""
    quantizer = getattr(model, "quantizer", None)
    return quantizer if isinstance(quantizer, ResidualQuantizer) else None


def item_codes_now(model: Learner, catalog: Catalog) -> SemanticIds | None:
    """The codes of the whole catalogue as a model stands; None while its codebooks are not initialised.

    The modes of the model's parts are as before afterwards. The table of a recommender names no embeddings.
    """
    name = type(model).__name__
    if isinstance(model, ItemTokenizer):
        if not model.fitted:
            return None
        return tokenize(model, catalog.text_embeddings(), catalog.text_fingerprint, name, catalog.fields)
    quantizer = quantizer_of(model)
    if quantizer is None or not quantizer.initialised:
        return None
    with evaluating(model), torch.no_grad():
        codes = F.pad(model.item_codes(), (0, 0, 1, 0)).cpu()  # (I+1, L) the padding row first
    return SemanticIds(codes=codes, num_codes=quantizer.num_codes, embeddings_fingerprint="", tokenizer=name)


def quantized_vectors(model: Learner, catalog: Catalog) -> Tensor:
    """What the quantizer of a model is given of the items 1..I: (I, D), on the model's device.

    For a recommender these are its item vectors, for a tokenizer its latents. The modes of the model's parts are as
    before afterwards.
    """
    with evaluating(model), torch.no_grad():
        if not isinstance(model, ItemTokenizer):
            return model.item_table()[1:]
        rows = torch.split(catalog.text_embeddings()[1:], _ROWS)
        return torch.cat([model.latents(part.to(model.device)) for part in rows])


def codebook_state_now(model: Learner, catalog: Catalog, before: Tensor | None = None) -> CodebookState | None:
    """All that is measured of a model's codes; None while its codebooks are not initialised.

    The random numbers of the training are not touched.

    Args:
        model: a tokenizer, or a recommender with a quantizer.
        catalog: the items; all of them count, whether training meets them or not.
        before: codes (I, L) of the check before.
    """
    with isolate_rng():
        table = item_codes_now(model, catalog)
        if table is None:
            return None
        norms, vectors, quantizer = None, None, quantizer_of(model)
        if quantizer is not None:
            vectors = quantized_vectors(model, catalog)  # (I, D)
            books = quantizer.codebooks.detach()
            norms = residual_norms(vectors, table.codes[1:].to(vectors.device), books)
        error = reconstruction_error(_rebuilt(model, catalog, table, vectors))
    return codebook_state(table, norms, error, before)


def gradient_norms(losses: Mapping[str, Tensor], codebooks: Tensor) -> dict[str, Tensor]:
    """Euclidean norm of each loss term's gradient on each level's codebook, (L,) float32 a term.

    No ``.grad`` is touched and the graph is kept for the backward pass to come.

    Args:
        losses: terms (), by name.
        codebooks: (L, K, D) that require a gradient. A term that they have no part in has norms of 0.
    """
    norms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        gradient: Tensor | None = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, codebooks, retain_graph=True, allow_unused=True)  # (L, K, D)
        found = torch.zeros_like(codebooks) if gradient is None else gradient
        norms[name] = found.float().flatten(1).norm(dim=1)  # (L,)
    return norms


def _rebuilt(
    model: Learner, catalog: Catalog, table: SemanticIds, vectors: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the codes stand for and what is made of them, bit by bit.

    Of a tokenizer the embeddings; of a recommender the vectors (I, D) that its quantizer is given.
    """
    if isinstance(model, ItemTokenizer):
        with evaluating(model):
            yield from rebuilt(model, catalog.text_embeddings()[1:], table.codes[1:])
        return
    quantizer = quantizer_of(model)
    if quantizer is None or vectors is None:
        return
    for codes, rows in zip(torch.split(table.codes[1:], _ROWS), torch.split(vectors, _ROWS), strict=True):
        yield rows, residual_decode(codes.to(rows.device), quantizer.codebooks.detach())
