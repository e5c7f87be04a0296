"""Collision policies against brute force, by hand, and on a tokenizer a person can picture."""

import itertools
from dataclasses import replace

import polars as pl
import pytest
import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.balanced_kmeans import BalancedResidualKMeans
from recsys_lightning.semantic_ids.category_tree import CategoryTree
from recsys_lightning.semantic_ids.collisions import Policy, append, resolve
from recsys_lightning.semantic_ids.last_codes import separate
from recsys_lightning.semantic_ids.product_quantizer import ProductQuantizer
from recsys_lightning.semantic_ids.random_codes import RandomCodes
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.residual_vq import ResidualVQ
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import tokenize

NUM_CODES = 4


def tokenizer(num_levels: int = 2) -> ResidualKMeans:
    """Codewords on a line: level 1 at 0, 100, 200, 300, and each level after it at 0, 1, 2, 3."""
    made = ResidualKMeans(1, num_levels, NUM_CODES, normalize=False)
    made.codebooks[0] = 100 * torch.arange(NUM_CODES)[:, None]
    made.codebooks[1:] = torch.arange(NUM_CODES)[:, None].float()
    made.was_fitted.fill_(True)
    return made


def items(*values: float) -> Tensor:
    """Embeddings (I+1, 1), the padding row first."""
    return torch.tensor([0.0, *values])[:, None]


def table_of(made: ResidualKMeans, embeddings: Tensor) -> SemanticIds:
    return tokenize(made, embeddings, "old", "by hand")


def many(num_items: int, seed: int = 0) -> Tensor:
    """Items crowded about the first two codes of the first two prefixes."""
    draw = torch.Generator().manual_seed(seed)
    prefix = 100 * torch.randint(0, 2, (num_items,), generator=draw)
    return items(*(prefix + torch.rand(num_items, generator=draw) * 1.6 - 0.3).tolist())


def cells(table: SemanticIds) -> list[tuple[int, ...]]:
    return [tuple(row) for row in table.codes[1:].tolist()]


def evenly(num_items: int) -> list[tuple[int, ...]]:
    """All ways to give items codes that use all as evenly as can be."""
    most, least = -(-num_items // NUM_CODES), num_items // NUM_CODES
    return [
        way
        for way in itertools.product(range(NUM_CODES), repeat=num_items)
        if all(least <= way.count(code) <= most for code in range(NUM_CODES))
    ]


@pytest.mark.parametrize("num_items", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_reassign_finds_the_least_total_distance_of_all_even_ways(num_items, seed):
    embeddings = items(*(torch.rand(num_items, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1).tolist())
    found = resolve("reassign", tokenizer(), embeddings, table_of(tokenizer(), embeddings)).table.codes[1:]
    values = embeddings[1:, 0].tolist()
    costs = [sum((v - code) ** 2 for v, code in zip(values, way, strict=True)) for way in evenly(num_items)]
    ours = sum((v - code) ** 2 for v, code in zip(values, found[:, 1].tolist(), strict=True))
    assert tuple(found[:, 1].tolist()) in evenly(num_items)
    assert ours == pytest.approx(min(costs), rel=1e-5)
    assert not found[:, 0].any()


def test_reassign_moves_an_item_that_is_alone_only_where_that_makes_the_total_less():
    def codes(*values):
        embeddings = items(*values)
        return (
            resolve("reassign", tokenizer(), embeddings, table_of(tokenizer(), embeddings)).table.codes[1:, 1].tolist()
        )

    assert codes(0.9, 1.0, 1.6) == [0, 1, 2]  # nearest are 1, 1 and 2
    assert codes(1.3, 1.45, 1.6) == [0, 1, 2]  # at 2.05; with the third at 3 it would be 2.35
    assert codes(1.4, 1.45, 1.9) == [1, 2, 3]  # at 1.67; with the third at 2 it would be 2.17


def test_reassign_leaves_prefixes_without_a_collision_and_all_codes_before_the_last():
    embeddings = items(0.1, 0.2, 101.4, 102.6, 203.0)
    before = table_of(tokenizer(), embeddings)
    after = resolve("reassign", tokenizer(), embeddings, before).table
    assert torch.equal(after.codes[:, 0], before.codes[:, 0])
    assert torch.equal(after.codes[3:], before.codes[3:])
    assert sorted(after.codes[1:3, 1].tolist()) == [0, 1]


@pytest.mark.parametrize("policy", ["reassign", "sinkhorn"])
def test_a_prefix_is_all_codes_before_the_last(policy):
    """Two levels before it: items of one first code and different second ones are no concern of each other."""
    made = tokenizer(3)
    embeddings = items(1.0, 1.0 + 1e-3, 2.0, 2.0 + 1e-3, 102.0)
    after = resolve(policy, made, embeddings, table_of(made, embeddings)).table
    assert len(set(cells(after))) == 5
    assert after.codes[1:, :2].tolist() == [[0, 1], [0, 1], [0, 2], [0, 2], [1, 2]]


def test_with_one_level_the_whole_catalogue_is_one_prefix():
    made = tokenizer(1)
    embeddings = items(10.0, 20.0, 30.0, 210.0)
    assert resolve("reassign", made, embeddings, table_of(made, embeddings)).table.codes[1:, 0].tolist() == [0, 1, 2, 3]
    embeddings = items(10.0, 20.0, 210.0)
    assert resolve("reassign", made, embeddings, table_of(made, embeddings)).table.codes[1:, 0].tolist() == [0, 1, 2]


def test_sinkhorn_moves_colliding_items_alone_and_only_to_codes_that_nobody_else_holds():
    embeddings = items(0.05, 0.1, 0.2, 0.9, 101.0, 103.0)
    before = table_of(tokenizer(), embeddings)
    after = resolve("sinkhorn", tokenizer(), embeddings, before).table
    assert torch.equal(after.codes[4:], before.codes[4:])
    assert sorted(after.codes[1:4, 1].tolist()) == [0, 2, 3]
    assert after.codes[1:4, 1].tolist() == sorted(after.codes[1:4, 1].tolist())  # the nearest to 0 stays the nearest


def test_sinkhorn_cannot_part_equal_items_and_reassign_does():
    embeddings = items(0.1, 0.1, 0.8)
    before = table_of(tokenizer(), embeddings)
    assert len(set(cells(resolve("sinkhorn", tokenizer(), embeddings, before).table))) == 2
    assert len(set(cells(resolve("reassign", tokenizer(), embeddings, before).table))) == 3


def test_sinkhorn_leaves_a_prefix_without_a_free_code_as_it_is():
    embeddings = items(0.0, 0.01, 0.02, 1.0, 2.0, 3.0)
    codes = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 2], [0, 3]])
    before, movable = codes.clone(), torch.arange(7) > 1  # item 1 stays, so that code 0 is taken too
    separate("sinkhorn", tokenizer(), embeddings, codes, movable)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("policy", ["none", "extra_token", "reassign", "sinkhorn"])
def test_the_cost_is_what_a_count_by_hand_finds(policy):
    embeddings = many(14)
    before = table_of(tokenizer(), embeddings)
    after, cost = resolve(policy, tokenizer(), embeddings, before)

    def rate(table):
        return sum(cells(table).count(cell) > 1 for cell in cells(table)) / 14

    def distance(table):
        return sum(float((x - 100 * a - b) ** 2) for x, (a, b, *_) in zip(embeddings[1:, 0], cells(table), strict=True))

    moved = [old != new[:2] for old, new in zip(cells(before), cells(after), strict=True)]
    assert cost.policy == policy
    assert cost.items_moved == sum(moved)
    assert cost.extra_levels == (policy == "extra_token") == after.num_levels - 2
    assert cost.num_codes == (4, after.num_codes)
    assert cost.collision_rate == pytest.approx((rate(before), rate(after)))
    assert cost.cells == (len(set(cells(before))), len(set(cells(after))))
    assert cost.largest_cell == tuple(max(map(cells(t).count, cells(t))) for t in (before, after))
    assert cost.squared_distance == pytest.approx((distance(before) / 14, distance(after) / 14), rel=1e-4)
    assert cost.seconds >= 0
    line = cost.describe()
    assert "\n" not in line
    assert f"collisions by {policy}" in line
    assert f"{cost.items_moved} items moved" in line


def test_every_policy_changes_the_table_in_a_way_of_its_own():
    embeddings = items(0.0, 0.1, 100.2)
    before = table_of(tokenizer(), embeddings)
    policies: tuple[Policy, ...] = ("none", "extra_token", "reassign", "sinkhorn")
    tables = [resolve(policy, tokenizer(), embeddings, before).table.codes for policy in policies]
    assert torch.equal(tables[0], before.codes)
    assert torch.equal(tables[1], before.disambiguated().codes)
    assert not torch.equal(tables[2], tables[0])
    assert not torch.equal(tables[3], tables[0])
    assert not torch.equal(tables[2], tables[3])


@pytest.mark.parametrize("policy", ["none", "extra_token", "reassign", "sinkhorn"])
def test_resolving_is_repeatable_and_leaves_its_inputs_and_the_tokenizers_mode(policy):
    made, embeddings = tokenizer().train(), many(14)
    before = table_of(made, embeddings)
    codes, rows = before.codes.clone(), embeddings.clone()
    first, second = (resolve(policy, made, embeddings, before).table for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(before.codes, codes)
    assert torch.equal(embeddings, rows)
    assert made.training
    assert first.embeddings_fingerprint == before.embeddings_fingerprint


def grown(policy: Policy, num_old: int = 10, num_all: int = 16):
    """A resolved table of the first items, and one to which the others have been appended."""
    embeddings, made = many(num_all), tokenizer()
    old = resolve(policy, made, embeddings[: num_old + 1], table_of(made, embeddings[: num_old + 1])).table
    ids = torch.arange(num_all + 1)
    return old, append(policy, made, embeddings, old, torch.where(ids <= num_old, ids, 0), "new")


@pytest.mark.parametrize("policy", ["none", "extra_token", "reassign", "sinkhorn"])
@pytest.mark.parametrize("num_old", [1, 6, 10])
def test_known_items_keep_their_codes_to_the_digit_when_others_are_appended(policy, num_old):
    old, new = grown(policy, num_old)
    assert torch.equal(new.codes[: num_old + 1], old.codes)
    assert new.num_items == 16
    assert new.embeddings_fingerprint == "new"
    assert new.codes[1:, 0].tolist() == tokenizer().encode(many(16))[1:, 0].tolist()


def test_known_items_keep_their_codes_wherever_they_stand_in_the_new_catalogue():
    embeddings, made = many(12), tokenizer()
    old = resolve("reassign", made, embeddings[:7], table_of(made, embeddings[:7])).table
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(12) + 1])
    new = append("reassign", made, embeddings[order], old, torch.where(order <= 6, order, 0), "new")
    for place, item in enumerate(order.tolist()):
        if 0 < item <= 6:
            assert torch.equal(new.codes[place], old.codes[item])


def test_appended_items_of_policy_none_get_the_tokenizers_codes():
    _, new = grown("none")
    assert torch.equal(new.codes[11:], tokenizer().encode(many(16))[11:])


def test_an_extra_token_counts_on_from_the_last_known_item_of_the_cell():
    made = tokenizer()
    old = table_of(made, items(0.1, 0.2, 100.1)).disambiguated()
    new = append("extra_token", made, items(0.1, 0.2, 100.1, 0.0, 100.0, 0.05, 3.0), old, ids(3, 7), "new")
    assert new.codes[4:].tolist() == [[0, 0, 2], [1, 0, 1], [0, 0, 3], [0, 3, 0]]
    assert new.num_codes == 4
    new = append("extra_token", made, items(0.1, 0.2, 100.1, 0.0, 0.0, 0.0, 0.0), old, ids(3, 7), "new")
    assert new.codes[4:, 2].tolist() == [2, 3, 4, 5]
    assert new.num_codes == 6


def test_an_extra_token_that_already_needed_more_codes_can_be_appended_to():
    made, rows = tokenizer(), items(*[0.1] * 6)
    old = table_of(made, rows).disambiguated()
    new = append("extra_token", made, items(*[0.1] * 8), old, ids(6, 8), "new")
    assert new.codes[1:, 2].tolist() == list(range(8))
    assert new.num_codes == 8


def ids(num_old: int, num_all: int) -> Tensor:
    """`known` of a catalogue whose new items stand behind the known ones."""
    every = torch.arange(num_all + 1)
    return torch.where(every <= num_old, every, 0)


@pytest.mark.parametrize("policy", ["reassign", "sinkhorn"])
def test_appended_items_take_the_last_codes_that_are_free(policy):
    made = tokenizer()
    old = table_of(made, items(0.0, 2.0))
    new = append(policy, made, items(0.0, 2.0, 0.2, 0.3), old, ids(2, 4), "new")
    assert new.codes[3:, 1].tolist() == [1, 3]  # by the least total distance


def test_appended_items_that_collide_with_nobody_keep_the_nearest_code():
    made = tokenizer()
    new = append("reassign", made, items(0.0, 2.4), table_of(made, items(0.0)), ids(1, 2), "new")
    assert new.codes[2].tolist() == [0, 2]


def test_where_no_code_is_free_reassign_appends_to_the_smallest_cells():
    made = tokenizer()
    old = table_of(made, items(0.0, 0.01, 1.0, 2.0, 3.0))  # code 0 twice
    new = append("reassign", made, items(0.0, 0.01, 1.0, 2.0, 3.0, 0.1, 0.2, 0.3), old, ids(5, 8), "new")
    assert sorted(new.codes[6:, 1].tolist()) == [1, 2, 3]


def test_a_crowd_of_known_items_does_not_let_new_ones_share_a_code():
    made = tokenizer()
    old = table_of(made, items(*[0.0] * 8))
    new = append("reassign", made, items(*[0.0] * 8, 0.4, 0.45), old, ids(8, 10), "new")
    assert new.codes[9:, 1].tolist() == [1, 2]


def test_codes_of_an_item_that_is_gone_may_be_given_away():
    made = tokenizer()
    old = table_of(made, items(0.0, 1.0))
    new = append("reassign", made, items(1.0, 0.1), old, torch.tensor([0, 2, 0]), "new")
    assert cells(new) == [(0, 1), (0, 0)]


def test_appending_nothing_changes_no_code_and_appending_keeps_raw_ids():
    made, rows = tokenizer(), items(0.0, 1.0)
    old = replace(table_of(made, rows), item_ids=("a", "b"))
    same = append("reassign", made, rows, old, ids(2, 2), "old")
    assert torch.equal(same.codes, old.codes)
    fields = pl.DataFrame({"item_id": ["a", "b", "c"], "title": ["", "", ""]})
    new = append("reassign", made, items(0.0, 1.0, 2.0), old, ids(2, 3), "new", fields)
    assert new.item_ids == ("a", "b", "c")
    assert new.tokenizer == "by hand, 1 items appended"


def test_bad_input_is_refused_with_its_reason():
    made, rows = tokenizer(), items(0.0, 1.0)
    table = table_of(made, rows)
    with pytest.raises(InputError, match="must be one of none, extra_token, sinkhorn, reassign, got 'zcr'"):
        resolve("zcr", made, rows, table)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 items have semantic IDs but 1 have embeddings"):
        resolve("none", made, rows[:2], table)
    with pytest.raises(InputError, match=r"tokenizer has 3 levels of 4 codes, but the table, .* has 2 of 4"):
        resolve("none", tokenizer(3), rows, table)
    with pytest.raises(InputError, match="another policy"):
        append("reassign", made, rows, table.disambiguated(), ids(2, 2), "new")
    with pytest.raises(InputError, match="another policy"):
        append("extra_token", made, rows, table, ids(2, 2), "new")
    with pytest.raises(InputError, match=r"got shape \(2,\)"):
        append("none", made, rows, table, torch.tensor([0, 1]), "new")
    with pytest.raises(InputError, match=r"1..2 of the old table, or 0 for a new one, got 0..3"):
        append("none", made, rows, table, torch.tensor([0, 1, 3]), "new")
    with pytest.raises(InputError, match="item 2 of the old table is named twice"):
        append("none", made, rows, table, torch.tensor([0, 2, 2]), "new")


def test_a_prefix_too_large_to_weigh_is_refused_by_its_size(monkeypatch):
    monkeypatch.setattr("recsys_lightning.semantic_ids.last_codes._LARGEST", 3)
    embeddings = items(0.0, 0.1, 0.2, 0.3)
    with pytest.raises(InputError, match=r"a prefix holds 4 items, .* weigh 3"):
        resolve("reassign", tokenizer(), embeddings, table_of(tokenizer(), embeddings))


def test_many_prefixes_are_resolved_as_each_by_itself(monkeypatch):
    """Distances are taken of many prefixes at once: the size of such a block changes nothing."""
    draw = torch.Generator().manual_seed(3)
    values = 100 * (torch.arange(15) % 4) + torch.rand(15, generator=draw) * 1.6
    embeddings = items(*values.tolist())
    table = table_of(tokenizer(), embeddings)
    whole = resolve("reassign", tokenizer(), embeddings, table).table
    monkeypatch.setattr("recsys_lightning.semantic_ids.last_codes._ROWS", 1)
    assert torch.equal(resolve("reassign", tokenizer(), embeddings, table).table.codes, whole.codes)
    assert whole.collision_report().collision_rate == 0


TOKENIZERS = {
    "balanced": lambda: BalancedResidualKMeans(6, 2, 4),
    "pq": lambda: ProductQuantizer(6, 2, 4),
    "opq": lambda: ProductQuantizer(6, 2, 4, opq=True),
    "residual_vq": lambda: ResidualVQ(6, 2, 4),
    "random": lambda: RandomCodes(6, 2, 4),
    "category_tree": lambda: CategoryTree(6, 2, 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_items_are_appended_whatever_the_tokenizer(name):
    embeddings = torch.cat([torch.zeros(1, 6), torch.randn(30, 6, generator=torch.Generator().manual_seed(0))])
    paths = [f"Toys > {('Dolls', 'Cars', 'Bricks')[number % 3]} > {number % 2}" for number in range(30)]
    fields = pl.DataFrame({"item_id": [f"i{n}" for n in range(30)], "categories": paths})
    tokenizer = TOKENIZERS[name]().fit(embeddings[1:21], fields[:20])
    table = tokenize(tokenizer, embeddings[:21], "old", name, fields[:20])
    known = torch.tensor([0, *range(1, 21), *[0] * 10])
    grown = append("none", tokenizer, embeddings, table, known, "new", fields)
    assert torch.equal(grown.codes[:21], table.codes)
    assert grown.num_items == 30
    assert grown.item_ids == tuple(fields["item_id"])
    assert len(grown.codes[21:].unique(dim=0)) > 1, "new items have codes of their own"
