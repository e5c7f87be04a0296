"""Towers of the user: one reads a history, one asks it about an interest, one guesses which interests there are.

SPARC (arXiv:2508.09090) sections 3.1 and 3.3. Axis letters: B rows, T items of a history, S states of a history (T, one
more with a start token), P states read, Q queries, D width, H heads, C codes of level 1, F user features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_lightning.errors import InputError
from recsys_lightning.nn.mlp import MLP
from recsys_lightning.nn.transformer import Dropout, Transformer


class HistoryEncoder(nn.Module):
    """Reads a history so that every state knows what came before it, and nothing of what came after.

    Args:
        dim: D.
        num_layers: causal transformer blocks; 0 reads item vectors and their positions as they are.
        num_heads: attention heads.
        dropout: on the input and inside the blocks.
        max_history: longest history in items.
        feature_sizes: (F,) how many codes each user feature has, 0 (unknown) counted; the vectors of a user's codes are
            added to every state, that of 0 is zero.
        start: put a learned token first: state t is then that of t items, and an empty history has one.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_history: int,
        feature_sizes: Sequence[int] = (),
        start: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"dim={dim} must be a multiple of user.num_heads={num_heads}")
        self.max_history = max_history
        self.norm = nn.LayerNorm(dim)  # inner products want small vectors, transformers unit variance
        self.position = nn.Embedding(max_history + int(start), dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.start = nn.Parameter(torch.empty(1, dim).normal_(std=0.02)) if start else None
        self.features = nn.ModuleList(nn.Embedding(size, dim, padding_idx=0) for size in feature_sizes)
        for table in self.features:
            nn.init.normal_(table.weight[1:], std=0.1)  # type: ignore[index] # an Embedding, which a ModuleList forgets
        self.dropout = Dropout(dropout)
        self.transformer = Transformer(dim, num_layers, num_heads, 4 * dim, dropout, "causal")

    def forward(self, vectors: Tensor, features: Tensor) -> Tensor:
        """States (B, S, D) of item vectors (B, T, D), padded on the right, of users with features (B, F).

        Raises:
            InputError: a history is longer than the positions, or users have another number of features.
        """
        if features.shape[1] != len(self.features):
            raise InputError(
                f"the batch has {features.shape[1]} user features and the model was built for {len(self.features)}: "
                "the catalogue and the batch are of different data"
            )
        length = vectors.shape[1]
        if length > self.max_history:
            raise InputError(
                f"a history of {length} items, but the model has positions for {self.max_history}: set max_history of "
                "the model to that of the data"
            )
        x = self.norm(vectors)
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), 1, -1), x], 1)
        x = self.dropout(x + self.position.weight[: x.shape[1]])
        states: Tensor = self.transformer(x)[0]
        for number, table in enumerate(self.features):
            states = states + table(features[:, number])[:, None]
        return states


class InterestReader(nn.Module):
    """Target attention: what a user is, seen with an interest in mind (section 3.1, the user tower).

    With s the state of the history, q the vector of an interest and h_t the states up to that one::

        a = attention(query = W_q q + W_s s, keys and values = h_1 .. h_s)
        u = s + W_o gelu(W_1 q + W_2 a + W_3 s + b)

    so that the interest corrects what a plain two-tower model says of the user. Queries are brought to unit variance,
    for codewords grow while they are trained.

    Args:
        dim: D.
        num_heads: heads of the attention.
        dropout: on the hidden layer.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.keys_values = nn.Linear(dim, 2 * dim)
        self.ask, self.ask_state = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.hidden_query, self.hidden_state = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.hidden_attended = nn.Linear(dim, dim, bias=False)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, dim)

    def forward(self, states: Tensor, row: Tensor, at: Tensor, queries: Tensor) -> Tensor:
        """User vectors (P, Q, D), one for each query of each state that is read.

        Args:
            states: (B, S, D) of histories.
            row: (P,) whose history is read.
            at: (P,) up to which state of it.
            queries: (P, Q, D) vectors of interests.
        """
        state = states[row, at][:, None]  # (P, 1, D)
        queries = self.norm(queries)
        split = (self.num_heads, -1)
        keys, values = self.keys_values(states).unflatten(-1, (2, *split)).permute(2, 0, 3, 1, 4)  # (B, H, S, d) each
        asked = (self.ask(queries) + self.ask_state(state)).unflatten(-1, split).transpose(1, 2)  # (P, H, Q, d)
        visible = torch.arange(states.shape[1], device=at.device) <= at[:, None]  # (P, S)
        attended = F.scaled_dot_product_attention(asked, keys[row], values[row], visible[:, None, None])
        attended = attended.transpose(1, 2).flatten(2)  # (P, Q, D)
        hidden = self.hidden_query(queries) + self.hidden_attended(attended) + self.hidden_state(state)
        vectors: Tensor = state + self.output(self.dropout(F.gelu(hidden)))
        return vectors


class InterestTower(nn.Module):
    """Which level-1 codes the next item may have, from the user alone (section 3.3, S10).

    A separate network: its own encoder of the history and an MLP on its states.

    Args:
        encoder: of histories, its own.
        dim: D.
        num_codes: C.
        dropout: inside the MLP.
    """

    def __init__(self, encoder: HistoryEncoder, dim: int, num_codes: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.head = MLP([dim, dim, num_codes], dropout)

    def forward(self, vectors: Tensor, features: Tensor) -> Tensor:
        """Logits (B, S, C) after each item of histories (B, T, D) of users with features (B, F)."""
        logits: Tensor = self.head(self.encoder(vectors, features))
        return logits
