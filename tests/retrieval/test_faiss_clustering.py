"""FAISS's clusterings against FAISS's own indexes, and what is asked of them."""

import pytest
import torch

from recsys_lightning.nn.codebook import nearest_code

faiss = pytest.importorskip("faiss")

from recsys_lightning.retrieval import faiss_clustering  # noqa: E402
from recsys_lightning.retrieval.faiss_clustering import faiss_kmeans, product_codebooks  # noqa: E402


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_row_is_left_out_of_a_clustering():
    """With FAISS's default of 256 rows a centre, 2 x 256 of these 3000 would be seen."""
    rows = random(3000, 2)
    centres = faiss_kmeans(rows, 2, 100, 1, seed=0)
    codes = nearest_code(rows, centres)
    means = torch.stack([rows[codes == code].mean(0) for code in range(2)])
    torch.testing.assert_close(centres, means, atol=1e-3, rtol=0)


def test_a_seed_settles_a_clustering():
    rows = random(300, 4)
    first = faiss_kmeans(rows, 8, 3, 1, seed=0)
    assert torch.equal(first, faiss_kmeans(rows, 8, 3, 1, seed=0))
    assert not torch.equal(first, faiss_kmeans(rows, 8, 3, 1, seed=1))


def test_more_iterations_and_starts_leave_less():
    rows = random(500, 6)
    left = []
    for iterations, starts in ((1, 1), (20, 1), (20, 20)):
        centres = faiss_kmeans(rows, 12, iterations, starts, seed=3)
        left.append(float((rows - centres[nearest_code(rows, centres)]).square().sum()))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("rotate", [False, True])
def test_product_codebooks_are_those_of_faiss_own_index(rotate):
    rows = random(400, 8)
    rotation, codebooks = product_codebooks(rows, 2, 16, 25, seed=1234, rotate=rotate)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), atol=1e-4, rtol=0)
    index = faiss.IndexPQ(8, 2, 4)
    index.pq.cp.niter = 25
    turned = (rows @ rotation.T).contiguous()
    index.train(turned.numpy())
    expected = torch.from_numpy(faiss.vector_to_array(index.pq.centroids).reshape(2, 16, 4))
    torch.testing.assert_close(codebooks, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(rotation, torch.eye(8)) is not rotate


def test_a_seed_settles_a_product_quantizer():
    rows = random(300, 8)
    first = product_codebooks(rows, 2, 8, 2, seed=0, rotate=True)
    again, other = (product_codebooks(rows, 2, 8, 2, seed=seed, rotate=True) for seed in (0, 1))
    assert torch.equal(first.codebooks, again.codebooks)
    assert not torch.equal(first.codebooks, other.codebooks)


def test_gpus_are_asked_for_where_faiss_sees_any(monkeypatch):
    asked = []

    class Kmeans(faiss.Kmeans):
        def __init__(self, *args, gpu=False, **kwargs):
            asked.append(gpu)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(faiss_clustering.faiss, "Kmeans", Kmeans)
    monkeypatch.setattr(faiss_clustering, "_sees_gpus", lambda: True)
    faiss_kmeans(random(20, 2), 2, 1, 1, seed=0)
    assert asked == [True]
