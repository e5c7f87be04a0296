"""Residual k-means: semantic IDs in closed form."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans


def clusters(num_groups=4, num_kinds=4, num_each=5, dim=8, seed=0):
    """Groups far apart, in each the same few kinds near it, each with a few items nearer still."""
    g = torch.Generator().manual_seed(seed)
    groups = 10 * torch.eye(dim)[:num_groups]
    kinds = torch.eye(dim)[num_groups : num_groups + num_kinds]
    rows = (
        groups[:, None, None] + kinds[:, None] + 0.01 * torch.randn(num_groups, num_kinds, num_each, dim, generator=g)
    )
    return rows.flatten(0, 2)  # (groups * kinds * each, D)


def test_the_first_code_is_the_group_and_the_second_the_kind():
    rows = clusters()
    codes = ResidualKMeans(8, 2, 4, normalize=False).fit(rows).encode(rows).view(4, 4, 5, 2)
    assert len({int(codes[group, 0, 0, 0]) for group in range(4)}) == 4
    assert (codes[..., 0] == codes[:, :1, :1, 0]).all()
    for group in range(4):
        assert len({int(codes[group, kind, 0, 1]) for kind in range(4)}) == 4
        assert (codes[group, ..., 1] == codes[group, :, :1, 1]).all()


def test_codes_are_the_nearest_centre_of_what_is_left():
    rows = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    tokenizer = ResidualKMeans(8, 3, 4).fit(rows)
    for row, codes in zip(F.normalize(rows, dim=-1), tokenizer.encode(rows).tolist(), strict=True):
        residual = row
        for codebook, code in zip(tokenizer.codebooks, codes, strict=True):
            distances = [float((residual - centre).square().sum()) for centre in codebook]
            assert code == distances.index(min(distances))
            residual = residual - codebook[code]


def test_normalised_embeddings_of_one_direction_have_one_semantic_id():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(0.5, 4, 50)[:, None]
    tokenizer = ResidualKMeans(8, 3, 4).fit(rows)
    assert torch.equal(tokenizer.encode(rows), tokenizer.encode(rows * lengths))
    plain = ResidualKMeans(8, 3, 4, normalize=False).fit(rows)
    assert not torch.equal(plain.encode(rows), plain.encode(rows * lengths))


def test_equal_embeddings_have_equal_codes_wherever_they_stand():
    rows = torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
    twins = torch.cat([rows, rows.flip(0), rows])
    codes = ResidualKMeans(8, 3, 16).fit(twins).encode(twins)
    assert torch.equal(codes[:37], codes[37:74].flip(0))
    assert torch.equal(codes[:37], codes[74:])


def test_more_codes_than_items_is_no_error():
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    codes = ResidualKMeans(8, 3, 32).fit(rows).encode(rows)
    assert len(torch.unique(codes, dim=0)) == 5


def test_a_state_dict_restores_the_codes():
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    first, second = ResidualKMeans(8, 3, 4).fit(rows), ResidualKMeans(8, 3, 4)
    assert first.fitted
    assert not second.fitted
    second.load_state_dict(first.state_dict())
    assert second.fitted
    assert torch.equal(first.encode(rows), second.encode(rows))


def test_there_is_nothing_to_minimise_by_gradient():
    tokenizer = ResidualKMeans(8)
    assert tokenizer.losses(torch.zeros(2, 8)) == {}
    assert list(tokenizer.parameters()) == []


def test_what_cannot_be_fitted_is_refused():
    tokenizer = ResidualKMeans(8)
    with pytest.raises(RuntimeError, match="before fit"):
        tokenizer.encode(torch.zeros(2, 8))
    with pytest.raises(InputError, match="width 6 but the tokenizer has embedding_dim=8; set embedding_dim to 6"):
        tokenizer.fit(torch.zeros(2, 6))
    with pytest.raises(InputError, match=r"1 of 3 .* row 2"):
        tokenizer.fit(torch.zeros(3, 8).index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(InputError, match="at least one item"):
        tokenizer.fit(torch.zeros(0, 8))
    with pytest.raises(InputError, match="num_codes=1"):
        ResidualKMeans(8, num_codes=1)


def test_by_faiss_too_the_first_code_is_the_group_and_the_second_the_kind():
    pytest.importorskip("faiss")
    rows = clusters()
    codes = ResidualKMeans(8, 2, 4, normalize=False, engine="faiss").fit(rows).encode(rows).view(4, 4, 5, 2)
    assert len({int(codes[group, 0, 0, 0]) for group in range(4)}) == 4
    assert (codes == codes[:, :, :1]).all()
    for group in range(4):
        assert len({int(codes[group, kind, 0, 1]) for kind in range(4)}) == 4


def test_the_engine_decides_whose_k_means_runs():
    pytest.importorskip("faiss")
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    ours, faiss = (ResidualKMeans(8, 2, 8, engine=engine).fit(rows) for engine in ("sklearn", "faiss"))
    assert not torch.allclose(ours.codebooks, faiss.codebooks)
    left = [float((one.target(rows) - one.reconstruct(rows)).square().sum()) for one in (ours, faiss)]
    assert left[0] == pytest.approx(left[1], rel=0.05)
    with pytest.raises(InputError, match="engine must be one of sklearn, faiss, got 'scipy'"):
        ResidualKMeans(8, engine="scipy")
