import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.sources.source import RawData
from recsys_lightning.data.sources.synthetic import Synthetic, item_distribution, transition_matrix
from recsys_lightning.errors import InputError

HERE = Path()


@pytest.fixture(scope="module")
def raw() -> RawData:
    return Synthetic().read(HERE)


def last_two(raw: RawData) -> tuple[list[str], list[str]]:
    """The last item but one and the last item of each user."""
    users = raw.interactions.group_by("user_id", maintain_order=True).agg(
        before=pl.col("item_id").slice(-2, 1).first(), last=pl.col("item_id").last()
    )
    return users["before"].to_list(), users["last"].to_list()


def test_the_transition_matrix_of_four_topics_is_the_one_worked_out_by_hand() -> None:
    # Two themes {0, 1} and {2, 3}; 0.1 of jumps over four equal topics is 0.025 each.
    expected = [
        [0.125, 0.625, 0.225, 0.025],
        [0.625, 0.125, 0.025, 0.225],
        [0.225, 0.025, 0.125, 0.625],
        [0.025, 0.225, 0.625, 0.125],
    ]
    np.testing.assert_allclose(transition_matrix(2, 2, 0.6, 0.2, 0.1, 0.0), expected, atol=1e-12)


def test_zipf_halves_and_thirds() -> None:
    np.testing.assert_allclose(item_distribution(3, 1.0), [6 / 11, 3 / 11, 2 / 11])
    np.testing.assert_allclose(item_distribution(4, 0.0), [0.25] * 4)


def test_next_item_probabilities_are_topic_odds_times_item_odds() -> None:
    source = Synthetic(
        num_themes=2, topics_per_theme=2, items_per_topic=2, main=0.6, second=0.2, stay=0.1, topic_zipf=0
    )
    rows = source.next_item_probabilities([source.item_ids[0], source.item_ids[1], source.item_ids[6]])
    by_hand = np.outer([0.125, 0.625, 0.225, 0.025], [2 / 3, 1 / 3]).ravel()
    np.testing.assert_allclose(rows[0], by_hand)
    np.testing.assert_allclose(rows[1], by_hand)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    assert source.best_recall(source.item_ids[:1], 2) == pytest.approx(0.625 * 2 / 3 + 0.625 / 3)
    second_gain = 0.625 / 3 / np.log2(3)
    assert source.best_ndcg(source.item_ids[:1], 2) == pytest.approx(0.625 * 2 / 3 + second_gain)
    assert source.best_recall(source.item_ids, 100) == pytest.approx(1)


def test_the_best_ranking_hits_as_often_as_promised(raw: RawData) -> None:
    source = Synthetic()
    before, last = last_two(raw)
    order = np.argsort(-source.next_item_probabilities(before), axis=1, kind="stable")
    target = np.array([source.item_ids.index(item) for item in last])
    rank = np.nonzero(order == target[:, None])[1]
    for k in (1, 5, 10, 50):
        hits = rank < k
        gains = hits / np.log2(rank + 2)
        for values, promise in ((hits, source.best_recall(before, k)), (gains, source.best_ndcg(before, k))):
            assert abs(values.mean() - promise) < 3 * values.std() / np.sqrt(len(values))


def test_users_move_between_topics_as_the_matrix_says(raw: RawData) -> None:
    source = Synthetic()
    steps = raw.interactions.with_columns(topic=pl.col("item_id").replace_strict(source.topic_of_item)).with_columns(
        next=pl.col("topic").shift(-1).over("user_id")
    )
    counts = np.zeros((16, 16))
    moves = steps.drop_nulls("next")
    np.add.at(counts, (moves["topic"].to_numpy(), moves["next"].to_numpy()), 1)
    totals = counts.sum(axis=1, keepdims=True)
    error = np.sqrt(source.transitions * (1 - source.transitions) / totals)
    # Of 256 cells, 4.5 standard errors are exceeded by chance once in 500 seeds.
    assert (np.abs(counts / totals - source.transitions) < 4.5 * error).all()


def test_popularity_is_far_from_the_bound(raw: RawData) -> None:
    before, last = last_two(raw)
    bound = Synthetic().best_recall(before, 10)
    popular = set(raw.interactions["item_id"].value_counts(sort=True)["item_id"].head(10))
    assert 0.35 < bound < 0.55
    assert np.mean([item in popular for item in last]) < bound / 2


def test_a_five_core_would_keep_nearly_everything(raw: RawData) -> None:
    assert raw.interactions["item_id"].n_unique() == raw.items.height == 400
    assert raw.interactions["item_id"].value_counts()["count"].min() >= 5  # type: ignore[operator]
    lengths = raw.interactions["user_id"].value_counts()["count"]
    assert (lengths.min(), lengths.max(), len(lengths)) == (6, 20, 3000)


def test_times_tell_the_order_and_no_two_rows_are_equal(raw: RawData) -> None:
    assert raw.interactions["timestamp"].is_sorted()
    assert not raw.interactions.select("user_id", "timestamp").is_duplicated().any()
    assert raw.interactions.schema == {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}


def test_the_same_seed_gives_the_same_data_and_another_does_not(raw: RawData) -> None:
    again, other = Synthetic().read(HERE), Synthetic(seed=1).read(HERE)
    assert raw.interactions.equals(again.interactions)
    assert raw.items.equals(again.items)
    assert not raw.interactions.equals(other.interactions)
    assert not raw.items.equals(other.items)


def test_more_users_share_the_catalogue(raw: RawData) -> None:
    assert Synthetic(num_users=10).read(HERE).items.equals(raw.items)


def test_text_tells_topic_and_theme_apart(raw: RawData) -> None:
    source = Synthetic()
    texts = {row["item_id"]: row for row in raw.items.iter_rows(named=True)}
    words = [set(texts[item]["description"].lower().strip(".").split()) for item in source.item_ids]
    shared = np.array([[len(a & b) for b in words] for a in words], dtype=float)
    topic = np.arange(400) // 25
    same_topic = topic[:, None] == topic
    same_theme = (topic[:, None] // 4 == topic // 4) & ~same_topic
    elsewhere = ~same_topic & ~same_theme
    np.fill_diagonal(same_topic, False)
    assert shared[same_topic].mean() > shared[same_theme].mean() + 2 > shared[elsewhere].mean() + 3
    assert len({texts[item]["categories"] for item in source.item_ids[:25]}) == 1
    assert raw.items["categories"].n_unique() == 16
    assert raw.items["title"].is_unique().all()
    assert raw.items.null_count().sum_horizontal().item() == 0


def test_every_row_is_accounted_for(raw: RawData) -> None:
    assert raw.rejects.rows_read("interactions") == raw.interactions.height
    assert raw.rejects.rows_rejected() == 0


def test_one_topic_and_one_item_are_legal() -> None:
    source = Synthetic(num_users=2, num_themes=1, topics_per_theme=1, items_per_topic=1, min_length=1, max_length=1)
    assert source.read(HERE).interactions.height == 2
    assert source.best_recall(source.item_ids, 1) == pytest.approx(1)


def test_settings_are_the_constructor_arguments() -> None:
    source = Synthetic(num_users=5, seed=3)
    assert Synthetic(**source.settings).settings == source.settings
    json.dumps(source.settings)
    assert source.files(HERE) == []


def test_settings_that_make_no_sense_are_refused() -> None:
    for options in ({"num_users": 0}, {"min_length": 9, "max_length": 8}, {"main": 0.9}, {"zipf": -1.0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            Synthetic(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'nothing' is not of this catalogue"):
        Synthetic().best_recall(["nothing"], 5)
