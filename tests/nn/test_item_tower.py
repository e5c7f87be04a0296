"""The item tower is the sum of what it is told to look at, and of nothing else."""

import dataclasses

import polars as pl
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.nn.item_tower import FeatureItemEncoder

ALL = torch.arange(1, 38)


@pytest.fixture
def build(catalog):
    """The 37 items of `catalog`; item i has the tags "all", "third" where 3 divides i, and "rare" for items 1 and 2."""
    tags = ["; ".join(["all"] + ["third"] * (i % 3 == 0) + ["rare"] * (i < 3)) if i > 1 else None for i in range(1, 38)]
    made = dataclasses.replace(catalog, fields=catalog.fields.with_columns(pl.Series("tags", tags)))

    def make(**settings):
        torch.manual_seed(0)
        return FeatureItemEncoder(made, 8, **settings).eval()

    return make


def test_an_item_is_the_sum_of_its_own_vector_its_text_and_its_fields(build):
    tower = build(text=True, fields=("brand", "tags"))
    texts = tower.embeddings[ALL]
    own = tower.item.weight[ALL] + texts @ tower.project.weight.T + tower.project.bias
    acme, tags = tower.fields
    rows = []
    for item, vector in zip(ALL.tolist(), own, strict=True):
        # Brand: "acme" or none, in turns up to item 36. Tags by number of items: "all" is 1, "third" 2.
        vector = vector + (acme.weight[1] if item % 2 and item < 37 else 0)
        held = [1] * (item > 1) + [2] * (item > 1 and item % 3 == 0)
        rows.append(vector + (torch.stack([tags.weight[tag] for tag in held]).mean(0) if held else 0))
    torch.testing.assert_close(tower(ALL), torch.stack(rows))


@pytest.mark.parametrize(
    "part", [{"learned": True}, {"text": True}, {"fields": ("tags",)}], ids=lambda p: next(iter(p))
)
def test_each_part_may_stand_alone_and_gets_a_gradient(build, part):
    tower = build(**({"learned": False} | part))
    vectors = tower(ALL)
    assert vectors.shape == (37, 8)
    vectors.square().sum().backward()
    assert all((parameter.grad != 0).any() for parameter in tower.parameters())


def test_the_mlp_corrects_the_sum(build):
    plain, corrected = build(), build(hidden=(5,))
    corrected.item.load_state_dict(plain.item.state_dict())
    total = plain(ALL)
    torch.testing.assert_close(corrected(ALL), total + corrected.mlp(corrected.norm(total)))


@pytest.mark.parametrize(("min_count", "num_values"), [(5, 2), (1, 3)])
def test_a_value_of_fewer_than_min_count_items_counts_as_none(build, min_count, num_values):
    """Only item 2 is known to be rare, and only item 1 has no tags."""
    tower = build(learned=False, fields=("tags",), min_count=min_count)
    table = tower.fields[0]
    assert len(table.weight) == num_values + 1
    of_two = table.weight[1] if min_count > 1 else (table.weight[1] + table.weight[3]) / 2
    torch.testing.assert_close(tower(torch.tensor([1, 2])), torch.stack([torch.zeros(8), of_two]))


def test_padding_of_a_field_is_zero_and_learns_nothing(build):
    tower = build(learned=False, fields=("brand",))
    tower(ALL).sum().backward()
    table = tower.fields[0]
    assert not table.weight[0].any()
    assert not table.weight.grad[0].any()
    assert table.weight.grad[1].any()


def test_dropout_touches_text_and_mlp_in_training_only(build):
    calm, noisy = build(text=True, dropout=0.0).train(), build(text=True, dropout=0.5).train()
    torch.testing.assert_close(calm(ALL), calm.eval()(ALL))
    assert not torch.equal(noisy(ALL), noisy(ALL))
    assert torch.equal(noisy.eval()(ALL), noisy(ALL))
    own = build(dropout=0.5).train()
    assert torch.equal(own(ALL), own(ALL))
    hidden = build(dropout=0.5, hidden=(5,)).train()
    assert not torch.equal(hidden(ALL), hidden(ALL))


def test_what_the_catalogue_knows_stays_out_of_checkpoints(build):
    state = build(text=True, fields=("tags",), hidden=(5,)).state_dict()
    assert not [name for name in state if name.startswith(("embeddings", "values"))]


def test_no_items_give_no_vectors(build):
    assert build(text=True, fields=("tags",), hidden=(5,))(ALL[:0]).shape == (0, 8)


def test_what_cannot_be_built_is_named(build, catalog):
    with pytest.raises(InputError, match="one of learned, text and fields"):
        build(learned=False)
    with pytest.raises(InputError, match=r"no field 'tag'; did you mean 'tags'"):
        build(fields=("tag",))
    with pytest.raises(InputError, match=r"shared by 40 items; lower min_count"):
        build(fields=("tags",), min_count=40)
    with pytest.raises(InputError, match=r"needs item text embeddings.*encoder"):
        FeatureItemEncoder(dataclasses.replace(catalog, text=None), 8, text=True)
