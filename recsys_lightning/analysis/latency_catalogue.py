"""Synthetic items and users for the latency lab: vectors with the clusters that approximate indexes live on.

Axis letters: I items, U users, K interest queries a user, D width, C clusters.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 1.75  # length of what sets an item apart from its cluster, the cluster's centre being of length 1
CHUNK = 1 << 17  # items drawn at once


class Catalogue(NamedTuple):
    """Items, and users who ask for several things at once."""

    vectors: Tensor  # (I, D) of unit length
    queries: Tensor  # (U, K, D) of unit length


def synthetic_catalogue(num_items: int, num_users: int, num_queries: int, dim: int, seed: int) -> Catalogue:
    """Draw a catalogue from a mixture of Gaussians; the same arguments give the same one.

    There are about sqrt(I) clusters of equal chance, whose centres are uniform on the sphere. A vector is
    ``(centre + NOISE g / sqrt(D)) / length`` with standard normal g, so two items of a cluster have a cosine near
    1 / (1 + NOISE^2) = 0.25 and the neighbours of a query reach beyond its cluster. The queries of a user are such
    vectors too, each near another cluster, as the interests of a soft search are.

    Args:
        num_items: I.
        num_users: U.
        num_queries: K.
        dim: D.
        seed: of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    num_clusters = max(math.isqrt(num_items), num_queries)
    centres = F.normalize(torch.randn(num_clusters, dim, generator=generator), dim=1)  # (C, D)
    chosen = torch.rand(num_users, num_clusters, generator=generator).argsort(1)[:, :num_queries]  # (U, K) distinct
    queries = _near(centres, chosen.flatten(), generator).view(num_users, num_queries, dim)
    vectors = torch.empty(num_items, dim)
    for chunk in torch.split(vectors, CHUNK):  # bounded memory beside the vectors themselves
        cluster = torch.randint(num_clusters, (len(chunk),), generator=generator)
        chunk.copy_(_near(centres, cluster, generator))
    return Catalogue(vectors, queries)


def _near(centres: Tensor, cluster: Tensor, generator: torch.Generator) -> Tensor:
    """(N, D) a unit vector near the centre of each cluster (N,)."""
    dim = centres.shape[1]
    noise = torch.randn(len(cluster), dim, generator=generator).mul_(NOISE / math.sqrt(dim))
    return F.normalize(noise.add_(centres[cluster]), dim=1)
