"""One codebook: k-means by either library, and codewords by least squares."""

import numpy as np
import pytest
import torch

from recsys_lightning.nn.codebook import kmeans_codebook, least_squares_codebooks, nearest_code


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inertia(rows, codebook):
    return float((rows - codebook[nearest_code(rows, codebook)]).square().sum())


def test_both_engines_find_clusters_that_lie_apart():
    pytest.importorskip("faiss")
    centres = 20 * torch.eye(6)
    rows = (centres[:, None] + 0.1 * random(6, 30, 6)).flatten(0, 1)
    means = rows.view(6, 30, 6).mean(1)
    for engine in ("sklearn", "faiss"):
        found = kmeans_codebook(rows, 6, num_starts=3, engine=engine)
        torch.testing.assert_close(found[nearest_code(means, found)], means, atol=1e-4, rtol=0)


def test_both_engines_leave_about_as_much():
    pytest.importorskip("faiss")
    rows = random(400, 8)
    left = {
        engine: inertia(rows, kmeans_codebook(rows, 16, num_starts=3, engine=engine)) for engine in ("sklearn", "faiss")
    }
    assert left["faiss"] == pytest.approx(left["sklearn"], rel=0.05)
    assert left["faiss"] != left["sklearn"], "one engine ran for both"


@pytest.mark.parametrize("engine", ["sklearn", "faiss"])
def test_no_more_distinct_rows_than_codes_are_all_centres(engine):
    rows = random(3, 4).repeat(5, 1)
    found = kmeans_codebook(rows, 8, engine=engine)
    assert inertia(rows, found) == 0
    assert nearest_code(rows, found).max() < 3


def test_least_squares_codewords_are_those_of_numpy():
    rows, codes = random(60, 5), torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(1))
    design = np.zeros((60, 12))
    for row, own in enumerate(codes.tolist()):
        for level, code in enumerate(own):
            design[row, 4 * level + code] = 1
    solution = np.linalg.lstsq(design, rows.double().numpy(), rcond=None)[0]
    words = least_squares_codebooks(rows, codes, 4)
    sums = sum(words[level, codes[:, level]] for level in range(3))
    torch.testing.assert_close(sums.double(), torch.from_numpy(design @ solution), atol=1e-4, rtol=1e-4)


def test_of_one_level_least_squares_codewords_are_means_and_unused_ones_the_mean_of_all():
    rows, codes = random(30, 5), torch.arange(30).remainder(3)
    words = least_squares_codebooks(rows, codes[:, None], 4)[0]
    for code in range(3):
        torch.testing.assert_close(words[code], rows[codes == code].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(words[3], rows.mean(0), atol=1e-5, rtol=1e-5)
