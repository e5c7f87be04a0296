"""Product quantization: codes side by side, as FAISS's own index has them."""

import io

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.product_quantizer import ProductQuantizer

faiss = pytest.importorskip("faiss")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(tokenizer, rows):
    return float((tokenizer.target(rows) - tokenizer.reconstruct(rows)).square().sum())


def test_codes_are_those_of_faiss_own_index():
    rows = random(400, 8)
    tokenizer = ProductQuantizer(8, 2, 16, seed=1234).fit(rows)
    index = faiss.IndexPQ(8, 2, 4)
    points = F.normalize(rows, dim=-1).numpy()
    index.train(points)
    packed = torch.from_numpy(index.sa_encode(points)).long()[:, 0]  # two codes of four bits in a byte
    expected = torch.stack([packed & 15, packed >> 4], -1)
    assert (tokenizer.encode(rows) == expected).float().mean() > 0.999
    torch.testing.assert_close(
        tokenizer.reconstruct(rows), torch.from_numpy(index.sa_decode(index.sa_encode(points))), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("opq", [False, True])
def test_a_code_is_the_nearest_centre_of_its_part(opq):
    rows = random(60, 6)
    tokenizer = ProductQuantizer(6, 3, 4, opq=opq, normalize=False).fit(rows)
    turned = rows @ tokenizer.rotation.T
    for row, codes in zip(turned, tokenizer.encode(rows).tolist(), strict=True):
        for level, code in enumerate(codes):
            distances = (tokenizer.codebooks[level] - row[2 * level : 2 * level + 2]).square().sum(-1)
            assert code == int(distances.argmin())


def test_a_rotation_pays_where_the_parts_hang_together():
    """Two directions hold nearly all: PQ, which cuts across them, needs more codes than OPQ."""
    mix = torch.linalg.qr(random(8, 8, seed=1)).Q
    rows = (random(500, 8) * torch.tensor([5.0, 5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])) @ mix
    plain, rotated = (ProductQuantizer(8, 2, 8, opq=opq, normalize=False).fit(rows) for opq in (False, True))
    assert error(rotated, rows) < 0.8 * error(plain, rows)
    torch.testing.assert_close(rotated.rotation @ rotated.rotation.T, torch.eye(8), atol=1e-4, rtol=0)
    assert torch.equal(plain.rotation, torch.eye(8))


@pytest.mark.parametrize("opq", [False, True])
@pytest.mark.parametrize("num_rows", [100, 5])
def test_a_width_that_levels_do_not_divide_and_few_items_are_filled_up(opq, num_rows):
    rows = random(num_rows, 7)
    tokenizer = ProductQuantizer(7, 3, 8, opq=opq).fit(rows)
    codes = tokenizer.encode(rows)
    assert codes.shape == (num_rows, 3)
    assert tokenizer.decode(codes).shape == (num_rows, 7)
    assert error(tokenizer, rows) < (0.7 * num_rows if num_rows > 8 else 1e-3)


def test_last_distances_are_what_each_last_code_would_leave():
    rows = random(40, 8)
    tokenizer = ProductQuantizer(8, 2, 4, opq=True).fit(rows)
    codes = tokenizer.encode(rows)
    found = tokenizer.last_distances(rows, codes)
    for last in range(4):
        tried = torch.stack([codes[:, 0], torch.full((40,), last)], -1)
        expected = (tokenizer.target(rows) - tokenizer.decode(tried)).square().sum(-1)
        torch.testing.assert_close(found[:, last], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmin(-1), codes[:, 1])


def test_iterations_normalisation_and_seed_count():
    rows = random(300, 8) * torch.linspace(0.2, 4, 300)[:, None]
    few, many = (ProductQuantizer(8, 2, 8, num_iterations=number).fit(rows) for number in (1, 25))
    assert error(many, rows) < error(few, rows)
    assert not torch.equal(many.codebooks, ProductQuantizer(8, 2, 8, seed=1).fit(rows).codebooks)
    assert torch.equal(many.encode(rows), many.encode(2 * rows))
    plain = ProductQuantizer(8, 2, 8, normalize=False).fit(rows)
    assert not torch.equal(plain.encode(rows), plain.encode(2 * rows))


@pytest.mark.parametrize("opq", [False, True])
def test_a_file_of_the_state_dict_restores_the_codes(opq):
    rows = random(100, 7)
    first, second, file = ProductQuantizer(7, 3, 8, opq=opq).fit(rows), ProductQuantizer(7, 3, 8, opq=opq), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.fitted
    assert torch.equal(first.encode(rows), second.encode(rows))
    assert torch.equal(first.decode(first.encode(rows)), second.decode(second.encode(rows)))


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(InputError, match="power of two as num_codes, got 48; take 32"):
        ProductQuantizer(8, 2, 48)
    with pytest.raises(InputError, match="embedding_dim=2 num_levels=3"):
        ProductQuantizer(2, 3, 4)
    with pytest.raises(RuntimeError, match="before fit"):
        ProductQuantizer(8, 2, 4).encode(random(3, 8))
    with pytest.raises(InputError, match="set embedding_dim to 6"):
        ProductQuantizer(8, 2, 4).fit(random(30, 6))
