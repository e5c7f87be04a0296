"""Clusterings by FAISS (facebookresearch/faiss): k-means, and the product quantizers PQ and OPQ.

FAISS itself is made for many points: by default it draws a sample of them, 256 a cluster. Here every row counts.
"""

from typing import NamedTuple

# Before faiss, always: see `recsys_lightning.retrieval.faiss_index`.
import numpy as np
import torch
from torch import Tensor

from recsys_lightning.errors import InputError

try:
    import faiss
except (ImportError, RuntimeError) as error:  # faiss-gpu raises RuntimeError where the CUDA libraries are missing
    raise InputError(
        f"this clustering is one of FAISS, which cannot be imported ({str(error).splitlines()[0]}); install it with "
        "pip install 'recsys_lightning[cpu]' or, for NVIDIA GPUs on Linux, 'recsys_lightning[gpu]', "
        "or take ResidualKMeans with engine: sklearn"
    ) from error


class ProductCodebooks(NamedTuple):
    """What a product quantizer has learned."""

    rotation: Tensor  # (D, D) orthonormal; row x is quantized as x @ rotation.T; the identity without OPQ
    codebooks: Tensor  # (L, K, D / L), one of each part of a rotated row


def faiss_kmeans(rows: Tensor, num_codes: int, num_iterations: int, num_starts: int, seed: int) -> Tensor:
    """Centres of a k-means clustering of all rows, k-means++ started: rows (N, D) -> (K, D), on the rows' device.

    The best of `num_starts` clusterings is kept. It runs on all GPUs where FAISS sees any. The same seed on the same
    machine gives the same centres; another number of threads may round otherwise.

    Args:
        rows: (N, D) with N >= K.
        num_codes: Centres K.
        num_iterations: Of each start; FAISS does not stop before.
        num_starts: How often to begin anew.
        seed: Of the starts.
    """
    kmeans = faiss.Kmeans(
        rows.shape[1],
        num_codes,
        niter=num_iterations,
        nredo=num_starts,
        seed=seed,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # no word on clusters that are small
        max_points_per_centroid=_all_points(len(rows), num_codes),
        gpu=_sees_gpus(),
    )
    kmeans.train(_array(rows))
    return torch.as_tensor(kmeans.centroids, dtype=rows.dtype, device=rows.device)  # (K, D)


def product_codebooks(
    rows: Tensor, num_levels: int, num_codes: int, num_iterations: int, seed: int, rotate: bool
) -> ProductCodebooks:
    """Learn a product quantizer of rows (N, D): PQ or, with `rotate`, OPQ, which also learns a rotation first.

    PQ (Jegou et al., TPAMI 2011) cuts a row into L equal parts and clusters each by k-means. OPQ (Ge et al., TPAMI
    2014) seeks the rotation of the rows with which that loses least, by turns with the codebooks.

    Args:
        rows: (N, D); D a multiple of `num_levels`, N >= K.
        num_levels: Parts L.
        num_codes: Centres K of each part, a power of two.
        num_iterations: Of the k-means, and of OPQ's turns.
        seed: Of the k-means of PQ and of those within OPQ; OPQ's first rotation is FAISS's own, always the same.
        rotate: Learn a rotation.

    Returns:
        Rotation and codebooks, on the rows' device.
    """
    num_rows, dim = rows.shape
    points = _array(rows)
    rotation = np.eye(dim, dtype=np.float32)
    if rotate:
        opq = faiss.OPQMatrix(dim, num_levels)
        inner = _product_quantizer(dim, num_levels, num_codes, num_rows, num_iterations, seed)
        opq.pq = inner  # FAISS would take 256 codes, whatever is asked of the quantizer after it
        opq.niter = num_iterations
        opq.max_train_points = num_rows
        opq.train(points)
        rotation = faiss.vector_to_array(opq.A).reshape(dim, dim)
        points = opq.apply(points)
    quantizer = _product_quantizer(dim, num_levels, num_codes, num_rows, num_iterations, seed)
    quantizer.train(points)
    codebooks = faiss.vector_to_array(quantizer.centroids).reshape(num_levels, num_codes, dim // num_levels)
    return ProductCodebooks(torch.from_numpy(rotation.copy()).to(rows), torch.from_numpy(codebooks.copy()).to(rows))


def _product_quantizer(
    dim: int, num_levels: int, num_codes: int, num_rows: int, num_iterations: int, seed: int
) -> "faiss.ProductQuantizer":
    quantizer = faiss.ProductQuantizer(dim, num_levels, num_codes.bit_length() - 1)
    quantizer.cp.niter = num_iterations
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    quantizer.cp.max_points_per_centroid = _all_points(num_rows, num_codes)
    return quantizer


def _all_points(num_rows: int, num_codes: int) -> int:
    """The points a centroid with which FAISS leaves out none."""
    return -(-num_rows // num_codes)


def _array(rows: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ascontiguousarray(rows.detach().cpu().numpy(), dtype=np.float32)


def _sees_gpus() -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
