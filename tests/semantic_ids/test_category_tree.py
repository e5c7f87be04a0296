"""Category-tree codes, counted by hand on a small shop."""

import io
import logging

import polars as pl
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.category_tree import CategoryTree

# item: path, codes of two levels
SHOP = {
    "s1": ("Shop > Shoes > Boots", [1, 1]),
    "s2": ("Shop > Shoes > Boots > Red", [1, 1]),  # the fourth depth is cut
    "s3": ("Shop > Shoes > Clogs", [1, 2]),
    "s4": ("Shop > Shoes", [1, 0]),
    "h1": ("Shop > Hats > Caps", [2, 1]),
    "h2": ("Shop > Hats >  Caps; Shop > Shoes > Clogs", [2, 1]),  # the first path counts
    "b1": ("Shop > Bags", [3, 0]),
    "x1": (None, [0, 0]),
}


def shop(**more):
    paths = {item: path for item, (path, _) in SHOP.items()} | more
    return pl.DataFrame(
        {"item_id": list(paths), "categories": list(paths.values())}, schema_overrides={"categories": str}
    )


def embeddings(num_items=8):
    return torch.randn(num_items, 3, generator=torch.Generator().manual_seed(0))


def fitted(fields=None, **settings):
    fields = shop() if fields is None else fields
    return CategoryTree(3, **({"num_levels": 2, "num_codes": 4, "skip": 1} | settings)).fit(
        embeddings(len(fields)), fields
    )


def test_codes_number_the_categories_among_their_siblings_by_items():
    codes = fitted().assign(embeddings(), shop())
    assert codes.tolist() == [codes for _, codes in SHOP.values()]


def test_depths_at_the_top_are_skipped_only_if_asked():
    codes = fitted(skip=0).assign(embeddings(), shop())
    assert codes[:, 0].tolist() == [1] * 7 + [0]
    assert codes[:, 1].tolist() == [codes[0] for _, codes in SHOP.values()]


def test_siblings_beyond_the_last_code_share_it_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        codes = fitted(num_codes=3).assign(embeddings(), shop())
    assert "1 categories share a code with a larger sibling, for want of more than 3 codes" in caplog.text
    # Hats and Bags are both 2 now; below them Caps is the only child.
    assert codes.tolist() == [[1, 1], [1, 1], [1, 2], [1, 0], [2, 1], [2, 1], [2, 0], [0, 0]]


def test_children_of_categories_that_share_a_code_are_siblings():
    fields = shop(b2="Shop > Bags > Sacks", b3="Shop > Bags > Sacks", b4="Shop > Bags > Sacks")
    codes = fitted(fields, num_codes=3).assign(embeddings(len(fields)), fields)
    # By items: Shoes 4, Bags 4, Hats 2. Equal ones by alphabet: Bags is 1, and Shoes and Hats share 2.
    assert codes[[8, 6]].tolist() == [[1, 1], [1, 0]]
    # Below both: Hats > Caps 2 and Shoes > Boots 2, by alphabet; Shoes > Clogs 1 must share with the latter.
    assert codes[[4, 0, 2]].tolist() == [[2, 1], [2, 2], [2, 2]]


def test_a_new_category_has_code_zero_and_so_has_all_below_it_and_that_is_said(caplog):
    tokenizer = fitted()
    fields = pl.DataFrame(
        {"item_id": ["n1", "n2", "n3"], "categories": ["Shop > Toys > Cars", "Shop > Hats > Fez", None]}
    )
    with caplog.at_level(logging.WARNING):
        codes = tokenizer.assign(embeddings(3), fields)
    assert codes.tolist() == [[0, 0], [2, 0], [0, 0]]
    assert "of 3 items 1 have no category and 2 a new one" in caplog.text


def test_cut_paths_are_counted(caplog):
    with caplog.at_level(logging.INFO):
        fitted()
    assert "1 of 8 paths are cut at level 2" in caplog.text


def test_codes_stand_for_the_mean_of_their_items_or_of_those_with_their_longest_known_part():
    rows = embeddings()
    found = fitted().decode(torch.tensor([[1, 1], [1, 3], [2, 1], [3, 3]]))
    expected = [rows[[0, 1]].mean(0), rows[:4].mean(0), rows[[4, 5]].mean(0), rows[6]]
    torch.testing.assert_close(found, torch.stack(expected))
    only = CategoryTree(3, 2, 4, skip=1).fit(rows[:6], shop()[:6])  # without Bags
    torch.testing.assert_close(only.decode(torch.tensor([[3, 1]]))[0], rows[:6].mean(0))


def test_another_field_is_read_if_named():
    fields = shop().rename({"categories": "shelf"})
    assert torch.equal(
        fitted(fields, field="shelf").assign(embeddings(), fields), fitted().assign(embeddings(), shop())
    )


def test_a_file_of_the_state_dict_restores_codes_and_what_they_stand_for():
    first, second, file = fitted(), CategoryTree(3, 2, 4, skip=1), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.fitted
    codes = first.assign(embeddings(), shop())
    assert torch.equal(second.assign(embeddings(), shop()), codes)
    assert torch.equal(second.decode(codes), first.decode(codes))


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(InputError, match="no field 'category' of categories; set field to one of: categories"):
        fitted(field="category")
    with pytest.raises(InputError, match="no item has a category in its field 'categories' below the 9 depths skipped"):
        fitted(skip=9)
    with pytest.raises(InputError, match="reads the fields of the items"):
        CategoryTree(3).fit(embeddings())
    with pytest.raises(InputError, match="not by its embedding: use assign"):
        fitted().encode(embeddings())
    with pytest.raises(RuntimeError, match="before fit"):
        CategoryTree(3).assign(embeddings(), shop())
    with pytest.raises(InputError, match="skip=-1"):
        CategoryTree(3, skip=-1)
