"""Item categories: fields split into values, numbered by frequency, as padded ids."""

import numpy as np
import polars as pl
import pytest
import torch

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError


def catalog(**fields: list[str | None]) -> Catalog:
    count = len(next(iter(fields.values())))
    table = pl.DataFrame({"item_id": [str(n) for n in range(count)], **fields})
    return Catalog(table, np.zeros(count + 1, dtype=np.int64))


def test_values_are_numbered_the_most_frequent_first_and_equal_ones_by_alphabet():
    found = catalog(brand=["Z", "B", None, "A", "Z", "B", "A", "Z"]).categorical("brand")
    assert found.values == ("Z", "A", "B")
    assert found.item.dtype == torch.int64
    assert found.item.tolist() == [[0], [1], [3], [0], [2], [1], [3], [2], [1]], "row 0 is padding"


def test_a_list_has_several_values_and_a_path_stands_for_every_category_on_it():
    paths = ["Hair > Combs; Gifts", "Hair > Combs > Wood", "Gifts; Gifts", None, "Hair"]
    found = catalog(categories=paths).categorical("categories", min_count=1)
    assert found.values == ("Hair", "Gifts", "Hair > Combs", "Hair > Combs > Wood")
    rows = [[found.values[n - 1] for n in row if n] for row in found.item.tolist()]
    assert rows == [
        [],
        ["Hair", "Gifts", "Hair > Combs"],
        ["Hair", "Hair > Combs", "Hair > Combs > Wood"],
        ["Gifts"],
        [],
        ["Hair"],
    ]
    assert found.item.shape == (6, 3), "no column of padding alone"


def test_a_name_with_a_semicolon_within_is_one_value():
    assert catalog(brand=["A;B", "A;B"]).categorical("brand").values == ("A;B",)


@pytest.mark.parametrize(("min_count", "values"), [(1, ("A", "B", "C")), (2, ("A", "B")), (3, ("A",))])
def test_values_of_fewer_items_are_no_values(min_count, values):
    found = catalog(brand=["A", "A", "A", "B", "B", "C"]).categorical("brand", min_count)
    assert found.values == values
    assert (found.item[1:] > 0).sum() == sum({"A": 3, "B": 2, "C": 1}[value] for value in values)


def test_a_field_that_is_not_there_is_answered_with_the_nearest_one():
    fields = {"title": ["t"], "brand": ["b"]}
    with pytest.raises(
        InputError, match=r"items have no field 'brnd'; did you mean 'brand'\? there are 'title', 'brand'"
    ):
        catalog(**fields).categorical("brnd")
    with pytest.raises(InputError, match="items have no field 'item_id'; there are 'title', 'brand'"):
        catalog(**fields).categorical("item_id")


def test_a_field_without_frequent_values_is_one_clear_line():
    with pytest.raises(InputError, match="no value of the items' field 'brand' is shared by 2 items; lower min_count"):
        catalog(brand=["A", None, "B"]).categorical("brand")
