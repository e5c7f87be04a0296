"""A transformer stack that can go on from where it stopped: causal or not, with a cache of keys and values.

Axis letters: B rows, T time, D width, H heads, M beams, d head width (D = H d).
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValues(NamedTuple):
    """The keys and values of one layer."""

    keys: Tensor  # (B, H, T, d)
    values: Tensor  # (B, H, T, d)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.project = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, KeyValues]:
        """Queries (B, H, T, d) and keys and values of x (B, T, D)."""
        q, k, v = self.project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, d)
        return q, KeyValues(k, v)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, KeyValues]:
        """Attend within x (B, T, D).

        Args:
            x: (B, T, D).
            mask: (B, 1, 1 or T, T) bool, True where a query may look; None lets it look everywhere.
            causal: look only at oneself and backwards; then `mask` must be None.
        """
        queries, cache = self.split(x)
        attended = F.scaled_dot_product_attention(
            queries, cache.keys, cache.values, mask, self.dropout if self.training else 0.0, is_causal=causal
        )  # (B, H, T, d)
        return self.output(attended.transpose(1, 2).flatten(2)), cache

    def extend(
        self, x: Tensor, prefix: KeyValues, prefix_mask: Tensor, own: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """Attend from one new token of each of M beams to the prefix they share and to the beam's own tokens.

        The prefix is kept once a row, not once a beam: its scores are one product with the M queries of that row.

        Args:
            x: (B, M, D) the new token of each beam.
            prefix: keys and values (B, H, T, d) shared by the beams of a row.
            prefix_mask: (B, T) True where the prefix holds a token.
            own: keys and values (B, H, M, s, d) of the s tokens the beams have added so far.

        Returns:
            (B, M, D), and `own` with the new token appended.
        """
        queries, new = self.split(x)  # (B, H, M, d)
        keys, values = new.keys[:, :, :, None], new.values[:, :, :, None]  # (B, H, M, 1, d)
        if own is not None:
            keys, values = torch.cat([own.keys, keys], 3), torch.cat([own.values, values], 3)
        scale = queries.shape[-1] ** -0.5
        shared = queries @ prefix.keys.transpose(-1, -2) * scale  # (B, H, M, T)
        shared = shared.masked_fill(~prefix_mask[:, None, None], -torch.inf)
        private = (keys @ queries[..., None]).squeeze(-1) * scale  # (B, H, M, s)
        weights = torch.cat([shared, private], -1).softmax(-1)  # (B, H, M, T + s)
        of_prefix, of_own = torch.split(weights, [shared.shape[-1], private.shape[-1]], -1)
        attended = of_prefix @ prefix.values + (of_own[..., None, :] @ values).squeeze(-2)  # (B, H, M, d)
        return self.output(attended.transpose(1, 2).flatten(2)), KeyValues(keys, values)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each with a residual path and layer norm before it."""

    def __init__(self, dim: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, KeyValues]:
        """(B, T, D) to (B, T, D), with the keys and values it used."""
        attended, cache = self.attention(self.attention_norm(x), mask, causal)
        return self._finish(x, attended), cache

    def extend(
        self, x: Tensor, prefix: KeyValues, prefix_mask: Tensor, own: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """One new token of each beam, (B, M, D) to (B, M, D); see `Attention.extend`."""
        attended, own = self.attention.extend(self.attention_norm(x), prefix, prefix_mask, own)
        return self._finish(x, attended), own

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        finished: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return finished


class Transformer(nn.Module):
    """A stack of blocks with a final layer norm.

    Padding stands on the right. In a causal stack no token sees what comes after it, so padding changes nothing before
    it and no mask is needed; in a bidirectional one the caller's mask hides it.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        feedforward: int,
        dropout: float,
        direction: Literal["causal", "bidirectional"],
    ):
        super().__init__()
        self.causal = direction == "causal"
        self.layers = nn.ModuleList(Block(dim, num_heads, feedforward, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[KeyValues]]:
        """Encode x (B, T, D).

        Args:
            x: (B, T, D).
            mask: (B, T) True where there is a token; a bidirectional stack needs it where rows differ in length.

        Returns:
            (B, T, D), and the keys and values of each layer for `extend`.
        """
        cache = []
        attention_mask = None if self.causal or mask is None else mask[:, None, None]  # (B, 1, 1, T)
        for layer in self.layers:
            x, keys_values = layer(x, attention_mask, self.causal)
            cache.append(keys_values)
        return self.norm(x), cache

    def extend(
        self, x: Tensor, prefix: list[KeyValues], prefix_mask: Tensor, own: list[KeyValues] | None
    ) -> tuple[Tensor, list[KeyValues]]:
        """Add one token to each of M beams over a shared prefix; see `Attention.extend`. (B, M, D) to (B, M, D)."""
        grown = []
        layers = cast(Iterable[Block], self.layers)  # a ModuleList does not say what it holds
        for i, layer in enumerate(layers):
            x, keys_values = layer.extend(x, prefix[i], prefix_mask, own[i] if own else None)
            grown.append(keys_values)
        return self.norm(x), grown
