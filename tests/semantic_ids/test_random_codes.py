"""Random codes: of the item alone, whatever else there is."""

import hashlib

import polars as pl
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.health import reconstruction_error
from recsys_lightning.semantic_ids.random_codes import RandomCodes
from recsys_lightning.semantic_ids.tokenizer import rebuilt, tokenize


def items(*ids):
    return pl.DataFrame({"item_id": list(ids)}, schema={"item_id": pl.String})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MANY = items(*(f"B{number:04d}" for number in range(1000)))


def test_an_item_keeps_its_codes_when_the_catalogue_grows_and_whatever_its_embedding():
    few = RandomCodes(4).assign(random(3, 4), items("shoe", "hat", "tie"))
    more = RandomCodes(4).fit(random(5, 4, seed=1), items("tie", "bag", "hat", "cap", "shoe"))
    codes = more.assign(random(5, 4, seed=2), items("tie", "bag", "hat", "cap", "shoe"))
    assert torch.equal(codes[[4, 2, 0]], few)


def test_a_code_is_a_hash_of_seed_level_and_raw_id():
    codes = RandomCodes(4, num_levels=2, num_codes=7, seed=5).assign(random(1, 4), items("hat"))[0].tolist()
    digests = [hashlib.blake2b(f"5 {level} hat".encode(), digest_size=8).hexdigest() for level in range(2)]
    assert codes == [int(digest, 16) % 7 for digest in digests]


def test_codes_are_spread_evenly_and_levels_and_seeds_have_nothing_in_common():
    codes = RandomCodes(4, num_codes=4).assign(random(1000, 4), MANY)
    counts = torch.stack([torch.bincount(level, minlength=4) for level in codes.unbind(-1)])
    assert (counts - 250).abs().max() < 60  # four standard deviations are 55
    other = RandomCodes(4, num_codes=4, seed=1).assign(random(1000, 4), MANY)
    for one, two in ((codes[:, 0], codes[:, 1]), (codes[:, 1], codes[:, 2]), (codes[:, 0], other[:, 0])):
        assert 190 < int((one == two).sum()) < 310


def test_what_codes_tell_of_embeddings_is_chance():
    rows = random(1000, 6)
    tokenizer = RandomCodes(6, num_codes=4).fit(rows, MANY)
    error = reconstruction_error(rebuilt(tokenizer, rows, tokenizer.assign(rows, MANY)))
    assert 0.97 < error < 1  # 3 x 4 codewords for 1000 items


def test_it_makes_a_table_of_a_catalogue():
    rows = random(1000, 6)
    tokenizer = RandomCodes(6).fit(rows, MANY)
    table = tokenize(tokenizer, torch.cat([torch.zeros(1, 6), rows]), "print", "random", MANY)
    assert torch.equal(table.codes[1:], tokenizer.assign(rows, MANY))


def test_a_state_dict_restores_what_codes_stand_for():
    rows = random(1000, 6)
    first, second = RandomCodes(6, num_codes=4).fit(rows, MANY), RandomCodes(6, num_codes=4)
    assert not second.fitted
    second.load_state_dict(first.state_dict())
    assert second.fitted
    codes = first.assign(rows, MANY)
    assert torch.equal(first.decode(codes), second.decode(codes))


def test_what_random_codes_cannot_do_is_refused():
    tokenizer = RandomCodes(4)
    with pytest.raises(InputError, match="not by its embedding: use assign, with fields"):
        tokenizer.encode(random(2, 4))
    with pytest.raises(InputError, match="RandomCodes reads the fields of the items, and none are given"):
        tokenizer.fit(random(2, 4))
    with pytest.raises(InputError, match="given 2 embeddings but the fields of 3 items"):
        tokenizer.assign(random(2, 4), items("a", "b", "c"))
    with pytest.raises(InputError, match="num_codes=1"):
        RandomCodes(4, num_codes=1)
