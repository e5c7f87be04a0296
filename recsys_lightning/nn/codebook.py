"""One codebook: which codeword is nearest to a row, and codewords by k-means.

Shapes: B and N rows, D width, K codes.
"""

import warnings
from typing import Literal

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from recsys_lightning.retrieval.torch_index import full_precision

Engine = Literal["sklearn", "faiss"]


def nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codeword of each row: rows (B, D), codebook (K, D) -> (B,) int64; a tie goes to the lowest.

    Distances are taken by differences and not by ``|a|^2 - 2ab + |b|^2``: the expansion cancels when rows lie far from
    the origin, and its rounding depends on where a row stands in the batch, so that equal rows could get unequal codes.
    On a CPU the expansion is several times faster and comes first, but its answer is taken only where the nearest
    codeword leads by more than rounding can account for, so that differences would give the same.
    """
    rows, codebook = rows.detach(), codebook.detach()
    if rows.device.type != "cpu":  # a GPU would have to tell the host how many rows are left over
        return _nearest_by_differences(rows, codebook)
    # The whole rounding of a sum of D products, and of the differences, is within this part of (|a| + |b|)^2.
    rounding = 2 * (rows.shape[-1] + 8) * torch.finfo(rows.dtype).eps
    with full_precision(rows.device):
        lengths, words = rows.square().sum(-1), codebook.square().sum(-1)  # (B,), (K,)
        distances = torch.addmm(words, rows, codebook.T, alpha=-2)  # (B, K) short of |a|^2, which all K share
    best, codes = distances.min(-1)  # (B,)
    reach = best + rounding * (lengths.sqrt() + words.max().sqrt()).square()  # (B,)
    unsure = ((distances <= reach[:, None]).sum(-1) != 1).nonzero()[:, 0]  # (U,) also where a distance is NaN
    codes[unsure] = _nearest_by_differences(rows[unsure], codebook)
    return codes


def _nearest_by_differences(rows: Tensor, codebook: Tensor) -> Tensor:
    distances = torch.cdist(rows, codebook, compute_mode="donot_use_mm_for_euclid_dist")  # (B, K)
    return distances.argmin(-1)  # (B,)


def kmeans_codebook(
    rows: Tensor,
    num_codes: int,
    num_iterations: int = 50,
    num_starts: int = 1,
    seed: int = 0,
    engine: Engine = "sklearn",
) -> Tensor:
    """Centres of a k-means clustering, k-means++ started: rows (N, D) -> (K, D), on the rows' device.

    With no more distinct rows than codes each distinct row is a centre and the spare codes repeat them; a tie goes to
    the lowest index, so the spare codes stay unused.

    Args:
        rows: (N, D).
        num_codes: Centres K.
        num_iterations: Most iterations of a start; scikit-learn stops where nothing changes any more, FAISS does not.
        num_starts: How often to begin anew; the best is kept.
        seed: Of the starts.
        engine: scikit-learn, on the CPU; or FAISS, on GPUs where it sees any.
    """
    distinct: Tensor = torch.unique(rows.detach(), dim=0)  # (U, D)
    if len(distinct) <= num_codes:
        return distinct[torch.arange(num_codes, device=rows.device).remainder(len(distinct))]  # (K, D)
    if engine == "faiss":
        # Where it is asked for only: it may be missing.
        from recsys_lightning.retrieval.faiss_clustering import faiss_kmeans

        return faiss_kmeans(rows.detach(), num_codes, num_iterations, num_starts, seed)
    kmeans = KMeans(num_codes, init="k-means++", n_init=num_starts, max_iter=num_iterations, random_state=seed)
    with warnings.catch_warnings():
        # Rows that differ by rounding alone can leave fewer clusters than codes. That is data, not a mistake.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres = kmeans.fit(rows.detach().cpu().numpy()).cluster_centers_
    return torch.as_tensor(centres, dtype=rows.dtype, device=rows.device)  # (K, D)


def least_squares_codebooks(rows: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """The codewords whose sums come nearest to given rows with given codes, (L, K, D).

    They minimise ``sum_i |row_i - sum_l e_l[code_il]|^2``, with the least norm about the mean of the rows: a code that
    no row has stands for its share of that mean alone.

    Args:
        rows: (N, D).
        codes: (N, L) in 0..K-1.
        num_codes: Codes K a level.
    """
    num_levels = codes.shape[1]
    bins = codes.to(rows.device) + num_codes * torch.arange(num_levels, device=rows.device)  # (N, L)
    mean = rows.double().mean(0)  # (D,)
    sums = rows.new_zeros(num_levels * num_codes, rows.shape[1], dtype=torch.float64)  # (L * K, D)
    pairs = rows.new_zeros(num_levels * num_codes, num_levels * num_codes, dtype=torch.float64)  # rows with both codes
    ones = rows.new_ones(len(rows), dtype=torch.float64)
    for own in bins.unbind(-1):  # (N,)
        sums.index_add_(0, own, rows.double() - mean)
        for other in bins.unbind(-1):
            pairs.index_put_((own, other), ones, accumulate=True)
    # A shift from one level to another changes no sum, so the equations alone do not settle the words.
    pairs.diagonal().add_(1e-6)
    words: Tensor = torch.linalg.solve(pairs, sums).view(num_levels, num_codes, -1) + mean / num_levels  # (L, K, D)
    return words.to(rows)
