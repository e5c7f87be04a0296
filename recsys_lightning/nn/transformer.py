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


def drop_out(x: Tensor, share: float) -> Tensor:
    """x (...) with a random share of its elements set to zero and the others scaled so that the expectation stays.

    On a CPU the noise costs little: one random 64-bit number serves four elements, whose share is so rounded to a
    multiple of 2^-16. Torch draws a Bernoulli number an element there, and for a small model that costs as much as its
    matrix products. On other devices it is torch's own.
    """
    dropped = round(share * 65536)
    if x.device.type != "cpu" or not 0 < dropped < 65536:
        return F.dropout(x, share)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.long).random_(-(2**63), None)  # all 64 bits
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -32768..32767
    keep = torch.ge(draws, dropped - 32768, out=torch.empty_like(x, requires_grad=False))
    return x * keep.mul_(65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    """`drop_out` as a module, at work in training only."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return drop_out(x, self.p) if self.training else x


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
        share = self.dropout if self.training else 0.0
        if share and x.device.type == "cpu":
            attended = _attend(queries, cache, mask, causal, share)  # (B, H, T, d)
        else:
            attended = F.scaled_dot_product_attention(queries, cache.keys, cache.values, mask, share, is_causal=causal)
        return self._join(attended), cache

    def state_at(self, x: Tensor, at: Tensor) -> tuple[Tensor, KeyValues]:
        """Attend causally from the place `at` (B,) of each row of x (B, T, D) alone; (B, D) and the cache of all."""
        width = x.shape[-1]
        weight, bias = self.project.weight, self.project.bias
        here = x[torch.arange(len(x), device=x.device), at]  # (B, D)
        query = F.linear(here, weight[:width], bias[:width]).view(len(x), self.num_heads, 1, -1)  # (B, H, 1, d)
        keys_values = F.linear(x, weight[width:], bias[width:]).view(*x.shape[:2], 2, self.num_heads, -1)
        keys, values = keys_values.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        cache = KeyValues(keys, values)
        seen = torch.arange(x.shape[1], device=x.device) <= at[:, None]  # (B, T)
        attended = F.scaled_dot_product_attention(
            query, cache.keys, cache.values, seen[:, None, None], self.dropout if self.training else 0.0
        )  # (B, H, 1, d)
        return self._join(attended)[:, 0], cache

    def first(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from the first token of x (B, T, D) alone, (B, D); `mask` (B, T) as in `Transformer.forward`.

        No keys and values are written out. With ``k_t = W_k x_t + b_k``, ``q . k_t`` is ``(W_k' q) . x_t`` and a
        number that is the same for all t, which a softmax does not see. And ``sum_t a_t (W_v x_t + b_v)`` is
        ``W_v (sum_t a_t x_t) + b_v sum_t a_t``.
        """
        width = x.shape[-1]
        query, key, value = self.project.weight.view(3, self.num_heads, -1, width)  # (H, d, D) each
        bias_query, _, bias_value = self.project.bias.view(3, self.num_heads, 1, -1)  # (H, 1, d) each
        asked = x[:, 0] @ query.transpose(-1, -2) + bias_query  # (H, B, d)
        asked = (asked * asked.shape[-1] ** -0.5 @ key).transpose(0, 1)  # (B, H, D)
        scores = asked @ x.transpose(-1, -2)  # (B, H, T)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        weights = scores.softmax(-1)  # (B, H, T)
        if self.training:
            weights = drop_out(weights, self.dropout)
        read = (weights @ x).transpose(0, 1) @ value.transpose(-1, -2)  # (H, B, d)
        read = read + bias_value * weights.sum(-1).T[..., None]
        attended: Tensor = self.output(read.transpose(0, 1).flatten(1))
        return attended

    def _join(self, attended: Tensor) -> Tensor:
        """Heads side by side, (B, H, T, d) to (B, T, D), through the output layer."""
        joined: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return joined

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
        queries = queries * queries.shape[-1] ** -0.5
        shared = queries @ prefix.keys.transpose(-1, -2)  # (B, H, M, T)
        shared = shared.masked_fill(~prefix_mask[:, None, None], -torch.inf)
        # The beams' own tokens are few: products and sums are cheaper than a thousand tiny matrix products.
        private = (keys * queries[..., None, :]).sum(-1)  # (B, H, M, s)
        weights = torch.cat([shared, private], -1).softmax(-1)  # (B, H, M, T + s)
        of_prefix, of_own = torch.split(weights, [shared.shape[-1], private.shape[-1]], -1)
        attended = of_prefix @ prefix.values + (of_own[..., None] * values).sum(-2)  # (B, H, M, d)
        return self._join(attended), KeyValues(keys, values)


def _attend(queries: Tensor, cache: KeyValues, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """Attention written out, (B, H, T, d): torch's own cannot take its dropout from `drop_out`."""
    scores = queries * queries.shape[-1] ** -0.5 @ cache.keys.transpose(-1, -2)  # (B, H, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return drop_out(scores.softmax(-1), dropout) @ cache.values


class Block(nn.Module):
    """Attention, then a feed-forward layer, each with a residual path and layer norm before it."""

    def __init__(self, dim: int, num_heads: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.GELU(), Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.feedforward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

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

    def state_at(self, x: Tensor, at: Tensor) -> tuple[Tensor, KeyValues]:
        """The state at one place of each row, (B, T, D) to (B, D); see `Attention.state_at`."""
        attended, cache = self.attention.state_at(self.attention_norm(x), at)
        return self._finish(x[torch.arange(len(x), device=x.device), at], attended), cache

    def first(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The state of the first token, (B, T, D) to (B, D); see `Attention.first`."""
        return self._finish(x[:, 0], self.attention.first(self.attention_norm(x), mask))

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
        x, cache = self._run(list(self._blocks), x, mask)
        return self.norm(x), cache

    def state_at(self, x: Tensor, at: Tensor) -> tuple[Tensor, list[KeyValues]]:
        """What `forward` gives at one place of each row of a causal stack; the last layer is spared all the others.

        Args:
            x: (B, T, D).
            at: (B,) places, 0..T-1.

        Returns:
            (B, D), and the keys and values of each layer at all places, for `extend`.
        """
        if not self.causal:
            raise ValueError("state_at is for causal stacks; a bidirectional one has `first`")
        *earlier, last = self._blocks
        x, cache = self._run(earlier, x, None)
        state, keys_values = last.state_at(x, at)
        # Every level of a search reads them, and products of matrices want them in one piece.
        pieces = [KeyValues(*(part.contiguous() for part in layer)) for layer in (*cache, keys_values)]
        return self.norm(state), pieces

    def first(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `forward` gives for the first token of a bidirectional stack, (B, T, D) to (B, D).

        In the last layer the other tokens are looked at and nothing more, which makes one layer about as cheap as none.
        """
        if self.causal:
            raise ValueError("first is for bidirectional stacks: in a causal one the first token sees only itself")
        *earlier, last = self._blocks
        x, _ = self._run(earlier, x, mask)
        state: Tensor = self.norm(last.first(x, mask))
        return state

    def _run(self, blocks: list[Block], x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[KeyValues]]:
        cache = []
        attention_mask = None if self.causal or mask is None else mask[:, None, None]  # (B, 1, 1, T)
        for block in blocks:
            x, keys_values = block(x, attention_mask, self.causal)
            cache.append(keys_values)
        return x, cache

    @property
    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.layers)  # a ModuleList does not say what it holds

    def extend(
        self, x: Tensor, prefix: list[KeyValues], prefix_mask: Tensor, own: list[KeyValues] | None
    ) -> tuple[Tensor, list[KeyValues]]:
        """Add one token to each of M beams over a shared prefix; see `Attention.extend`. (B, M, D) to (B, M, D)."""
        grown = []
        for i, block in enumerate(self._blocks):
            x, keys_values = block.extend(x, prefix[i], prefix_mask, own[i] if own else None)
            grown.append(keys_values)
        return self.norm(x), grown
