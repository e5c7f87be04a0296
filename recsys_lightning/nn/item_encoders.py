"""Item encoders: item ids in, one trainable vector an item out. COBRA (arXiv:2503.02453) section 3.1.2, C9.

Axis letters: U items asked for, I items of the catalogue, D width, W tokens of a text.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.nn.transformer import Dropout, Transformer

CHUNK = 256  # texts read at once


class ItemEncoder(nn.Module, ABC):
    """Turns item ids into vectors of width D. Built from ``(catalog, dim)``; the settings follow."""

    @abstractmethod
    def forward(self, item_ids: Tensor) -> Tensor:
        """(U,) ids in 1..I to (U, D)."""


class EmbeddingItemEncoder(ItemEncoder):
    """An MLP on the frozen text embedding of an item; cheap, for machines without a GPU.

    Args:
        catalog: with text embeddings.
        dim: D.
        hidden: widths between the text embedding and D.
        dropout: on the text embedding and after each hidden layer.
        learned: add a vector of its own to every item. It starts at zero, so an item that was never trained on is
            what its text says, and the others are that and what their users say.
    """

    embeddings: Tensor

    def __init__(
        self,
        catalog: Catalog,
        dim: int,
        hidden: tuple[int, ...] = (512,),
        dropout: float = 0.1,
        learned: bool = False,
    ):
        super().__init__()
        embeddings = catalog.text_embeddings()  # (I+1, text width)
        # Rebuilt from the catalogue, so it stays out of checkpoints. Text encoders differ in scale: bring all to unit
        # variance around the catalogue's mean, which also removes the direction that all sentence vectors share.
        centred = embeddings[1:] - embeddings[1:].mean(0)
        embeddings[1:] = centred / centred.std().clamp_min(1e-8)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.project = MLP([embeddings.shape[1], *hidden, dim], dropout=dropout)
        self.item: nn.Embedding | None = None
        if learned:
            self.item = nn.Embedding(catalog.num_items + 1, dim, padding_idx=0)
            nn.init.zeros_(self.item.weight)
        self.norm = nn.LayerNorm(dim)

    def forward(self, item_ids: Tensor) -> Tensor:
        """(U,) to (U, D)."""
        vectors: Tensor = self.project(self.dropout(self.embeddings[item_ids]))
        if self.item is not None:
            vectors = vectors + self.item(item_ids)
        normed: Tensor = self.norm(vectors)
        return normed


class IdItemEncoder(ItemEncoder):
    """A learned vector an item and nothing else: what COBRA is worth without reading the items' texts.

    Args:
        catalog: the items.
        dim: D.
    """

    def __init__(self, catalog: Catalog, dim: int):
        super().__init__()
        self.item = nn.Embedding(catalog.num_items + 1, dim, padding_idx=0)
        self.norm = nn.LayerNorm(dim)

    def forward(self, item_ids: Tensor) -> Tensor:
        """(U,) to (U, D)."""
        vectors: Tensor = self.norm(self.item(item_ids))
        return vectors


class TextItemEncoder(ItemEncoder):
    """A bidirectional transformer over an item's own words, trained with the recommender: the paper's dense encoder.

    The input is ``[CLS]`` and then the tokens of each field; token, position and field-type embeddings are summed, and
    the output at ``[CLS]`` is the item's vector (COBRA section 3.1.2 and figure 2).

    Args:
        catalog: with text fields.
        dim: D.
        fields: columns of the catalogue in the order they are read; ones it lacks are left out (C9).
        max_tokens: longest text, ``[CLS]`` included; the end is cut.
        num_layers: the paper's public setting is 1.
        num_heads: attention heads.
        feedforward: width of the feed-forward layer; None is 4 D.
        dropout: inside the transformer and on its input.
        vocabulary: ``catalogue`` trains a byte-pair vocabulary on the catalogue's texts; any other value is the name or
            folder of a pretrained model, whose tokenizer is used.
        vocabulary_size: of the vocabulary trained on the catalogue.
        pretrained_tokens: start from the input embeddings of that pretrained model, through a linear layer if its width
            is not D.
    """

    tokens: Tensor
    types: Tensor
    lengths: Tensor

    def __init__(
        self,
        catalog: Catalog,
        dim: int,
        fields: tuple[str, ...] = ("title", "brand", "categories", "price", "description"),
        max_tokens: int = 128,
        num_layers: int = 1,
        num_heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.1,
        vocabulary: str = "catalogue",
        vocabulary_size: int = 8192,
        pretrained_tokens: bool = False,
    ):
        super().__init__()
        present = [name for name in fields if name in catalog.fields.columns]
        if not present:
            raise InputError(
                f"no text field of {list(fields)} in the catalogue, which has {catalog.fields.columns[1:]}"
            )
        if max_tokens < 2:
            raise InputError(f"max_tokens={max_tokens} leaves no room for words; use 2 or more")
        if pretrained_tokens and vocabulary == "catalogue":
            raise InputError("pretrained_tokens needs a pretrained vocabulary: name a model in vocabulary")
        self.columns = [catalog.fields.get_column(name).fill_null("").to_list() for name in present]
        self.max_tokens = max_tokens
        self.tokenizer: Any = (  # a tokenizers.Tokenizer; that library has no types
            _train_vocabulary(self.columns, vocabulary_size)
            if vocabulary == "catalogue"
            else _pretrained(vocabulary, "AutoTokenizer").backend_tokenizer
        )
        self._tokenize()
        size = self.tokenizer.get_vocab_size()
        self.token = nn.Embedding(size + 2, dim, padding_idx=0)  # 0 is padding, 1 is [CLS], the vocabulary follows
        self.widen: nn.Module = nn.Identity()
        if pretrained_tokens:
            weight = _pretrained(vocabulary, "AutoModel").get_input_embeddings().weight.detach()[:size]  # (size, width)
            self.token = nn.Embedding(size + 2, weight.shape[1], padding_idx=0)
            self.token.weight.data[2 : len(weight) + 2] = weight
            if weight.shape[1] != dim:
                self.widen = nn.Linear(weight.shape[1], dim)
        else:
            nn.init.normal_(self.token.weight[1:], std=0.02)
        self.position = nn.Embedding(max_tokens, dim)
        self.token_type = nn.Embedding(len(present) + 1, dim)  # 0 is the type of [CLS]
        for table in (self.position, self.token_type):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = Dropout(dropout)
        self.transformer = Transformer(dim, num_layers, num_heads, feedforward or 4 * dim, dropout, "bidirectional")

    def forward(self, item_ids: Tensor) -> Tensor:
        """(U,) to (U, D)."""
        if not len(item_ids):
            return self.position.weight[:0]
        # Texts of like length are read together: a few long ones would otherwise widen all the others.
        order = self.lengths[item_ids].argsort()  # (U,)
        parts = [self._read(part) for part in torch.split(item_ids[order], CHUNK)]
        return torch.cat(parts)[order.argsort()]

    def _read(self, item_ids: Tensor) -> Tensor:
        width = int(self.lengths[item_ids].max())
        tokens, types = self.tokens[item_ids, :width], self.types[item_ids, :width]  # (U, W)
        x = self.widen(self.token(tokens)) + self.position.weight[:width] + self.token_type(types)  # (U, W, D)
        return self.transformer.first(self.dropout(x), tokens != 0)  # (U, D) at [CLS]

    def get_extra_state(self) -> str:
        """The vocabulary travels in the checkpoint, so that the same words keep their embeddings."""
        return str(self.tokenizer.to_str())

    def set_extra_state(self, state: str) -> None:
        """Take the vocabulary of a checkpoint."""
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(state)
        self._tokenize()

    def _tokenize(self) -> None:
        """Write tokens and field types of every item, (I+1, W); recomputed rather than stored in checkpoints."""
        encoded = [
            [line.ids for line in self.tokenizer.encode_batch(column, add_special_tokens=False)]
            for column in self.columns
        ]
        device = self.tokens.device if hasattr(self, "tokens") else None
        rows, row_types = [[1]], [[0]]  # item 0: [CLS] alone, never asked for
        for texts in zip(*encoded, strict=True):
            ids = [1, *(i + 2 for text in texts for i in text)]
            kinds = [0, *(f for f, text in enumerate(texts, start=1) for _ in text)]
            rows.append(ids[: self.max_tokens])
            row_types.append(kinds[: self.max_tokens])
        for name, lists in (("tokens", rows), ("types", row_types)):
            padded = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True)
            self.register_buffer(name, padded.to(device), persistent=False)
        self.register_buffer("lengths", (self.tokens != 0).sum(1), persistent=False)  # (I+1,)


def _train_vocabulary(columns: list[list[str]], size: int) -> Any:
    """A byte-pair vocabulary of the catalogue's words (tokenizers library), the same in every process."""
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ImportError as error:
        raise InputError('TextItemEncoder needs the text extra: pip install "recsys_lightning[text]"') from error
    # Not WordPiece: its trainer numbers word-internal pieces in the order of a hash map, so that ties between merges
    # fall differently in each process, and with them the vocabulary. Plain byte pairs start from a sorted alphabet.
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))  # noqa: S106 - a token of text, not a secret
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((text for column in columns for text in column), trainer)
    return tokenizer


def _pretrained(name: str, loader: str) -> Any:
    """``transformers.<loader>.from_pretrained(name)``, with an error a user can act on."""
    try:
        import transformers

        return getattr(transformers, loader).from_pretrained(name)
    except ImportError as error:
        raise InputError(
            'a pretrained vocabulary needs the text extra: pip install "recsys_lightning[text]"'
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load vocabulary {name!r}: give a local folder, or vocabulary: catalogue "
            f"({str(error).splitlines()[0]})"
        ) from error
