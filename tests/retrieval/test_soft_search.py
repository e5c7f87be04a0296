"""Soft search: the lists of a user's interest queries become one list."""

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index import Found
from recsys_lightning.retrieval.soft_search import Cells, apportion, merge_interests, search_cells, soft_search
from recsys_lightning.retrieval.torch_index import TorchIndex

MERGES = ("max", "p_weighted", "sum", "mixture", "quota")


def numbers(*shape: int, seed: int = 0, whole: bool = False) -> Tensor:
    """Random numbers; whole ones from -2 to 2 give many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-2, 3, shape, generator=generator).float() if whole else torch.randn(shape, generator=generator)
    )


def probabilities(*shape: int, seed: int = 5) -> Tensor:
    """Log-probabilities (B, K) of which some users have equal ones."""
    log_probs = torch.log_softmax(2 * numbers(*shape, seed=seed), -1)
    log_probs[::3] = -math.log(shape[-1])
    return log_probs


def ranking(score_of: dict[int, float], k: int) -> list[tuple[int, float]]:
    """(item, score) by falling score, equals by rising id: the first k and whatever equals the k-th."""
    ordered = sorted(score_of.items(), key=lambda pair: (-pair[1], pair[0]))
    return [pair for pair in ordered if len(ordered) <= k or pair[1] >= ordered[k - 1][1]]


def lists_of(found: Found, user: int) -> list[list[tuple[int, float]]]:
    rows = zip(found.item_ids[user].tolist(), found.scores[user].tolist(), strict=True)
    return [[(i, s) for i, s in zip(ids, scores, strict=True) if i] for ids, scores in rows]


def quota_by_hand(lists: list[list[tuple[int, float]]], p: list[float], k: int) -> dict[int, float]:
    """The rule of `quota_merge`, a turn at a time, for one user."""
    likelier = sorted(range(len(p)), key=lambda j: (-p[j], j))
    exact = [k * p[j] / sum(p) for j in range(len(p))]
    places = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(likelier, key=lambda j: -round(exact[j] - places[j], 6))
    for j in by_remainder[: k - sum(places)]:
        places[j] += 1
    taken: dict[int, float] = {}
    filled = [0] * len(p)
    while any(filled[j] < places[j] for j in likelier):
        turn = min((j for j in likelier if filled[j] < places[j]), key=lambda j: (filled[j] + 0.5) / places[j])
        left = [(item, score) for item, score in lists[turn] if item not in taken]
        if not left:
            filled[turn] = places[turn]
            continue
        equal = [item for item, score in left if score == max(score for _, score in left)]
        taken |= dict.fromkeys(equal, -float(len(taken)))
        filled[turn] += len(equal)
    best: dict[int, float] = defaultdict(lambda: -math.inf)
    for item, score in (pair for found in lists for pair in found if pair[0] not in taken):
        best[item] = max(best[item], score)
    return taken | {item: -float(len(taken) + sum(other > s for other in best.values())) for item, s in best.items()}


def merged_by_hand(lists: list[list[tuple[int, float]]], p: list[float], shared: int, merge: str) -> dict[int, float]:
    """Item -> score for one user, a list and an item at a time; `shared` places are shared out by quota."""
    if merge == "quota":
        return quota_by_hand(lists, p, shared)
    scores = {}
    for item in {item for found in lists for item, _ in found}:
        held = [(j, dict(found)[item]) for j, found in enumerate(lists) if item in dict(found)]
        if merge == "max":
            scores[item] = max(s for _, s in held)
        elif merge == "p_weighted":
            scores[item] = round(max(math.log(p[j]) + s / 0.5 for j, s in held), 5)
        elif merge == "mixture":
            drawn = [p[j] * math.exp(s / 0.5) / sum(math.exp(t / 0.5) for _, t in lists[j]) for j, s in held]
            scores[item] = round(math.log(sum(drawn)), 5)
        else:
            scores[item] = sum(p[j] * dict(found).get(item, found[-1][1]) for j, found in enumerate(lists) if found)
    return scores


def agrees(recommended: object, user: int, expected: list[tuple[int, float]]) -> None:
    ids, scores = recommended.item_ids[user].tolist(), recommended.scores[user].tolist()
    assert ids == [item for item, _ in expected] + [0] * (len(ids) - len(expected))
    assert scores == pytest.approx(
        [score for _, score in expected] + [-math.inf] * (len(ids) - len(expected)), abs=1e-5
    )


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("whole", [False, True], ids=["random", "many ties"])
@pytest.mark.parametrize(("num_queries", "per_query", "k"), [(1, 5, 5), (3, 7, 7), (4, 3, 9), (6, 20, 4)])
def test_a_merge_is_its_rule_applied_one_item_at_a_time(merge, whole, num_queries, per_query, k):
    index, queries = TorchIndex(numbers(20, 3, whole=whole)), numbers(7, num_queries, 3, seed=1, whole=whole)
    # Whole numbers and sums of them are exact, so that equal scores are equal whatever the order of their terms.
    log_probs = torch.zeros(7, num_queries) if whole and merge == "sum" else probabilities(7, num_queries)
    found = index.search_with_ties(queries.flatten(0, 1), per_query)
    found = Found(*(part.view(7, num_queries, -1) for part in found))
    recommended = soft_search(index, queries, log_probs, k, merge, per_query, score_temperature=0.5)
    for user in range(7):
        by_hand = merged_by_hand(lists_of(found, user), log_probs[user].exp().tolist(), per_query, merge)
        agrees(recommended, user, ranking(by_hand, k))


@pytest.mark.parametrize("merge", ["max", "p_weighted"])
@pytest.mark.parametrize(
    "settings", [IndexSettings(), IndexSettings(backend="faiss", factory="Flat")], ids=["torch", "faiss"]
)
@pytest.mark.parametrize("k", [1, 7, 30])
def test_lists_as_long_as_the_result_give_the_exact_top_of_the_whole_catalogue(merge, settings, k):
    if settings.backend == "faiss":
        pytest.importorskip("faiss")
    table, queries, log_probs = numbers(30, 3), numbers(6, 5, 3, seed=1), probabilities(6, 5)
    recommended = soft_search(build_index(table, settings, "inner_product"), queries, log_probs, k, merge)
    every = torch.einsum("bkd,id->bki", queries, table)
    every = every if merge == "max" else every + log_probs[..., None]
    for user, scores in enumerate(every.amax(1).tolist()):
        agrees(recommended, user, ranking(dict(enumerate(scores, 1)), k))


@pytest.mark.parametrize(
    "settings", [IndexSettings(), IndexSettings(backend="faiss", factory="Flat")], ids=["torch", "faiss"]
)
def test_with_lists_of_all_items_sum_is_the_probability_weighted_sum_over_the_whole_catalogue(settings):
    if settings.backend == "faiss":
        pytest.importorskip("faiss")
    table, queries, log_probs = numbers(30, 3), numbers(6, 5, 3, seed=1), probabilities(6, 5)
    index = build_index(table, settings, "inner_product")
    recommended = soft_search(index, queries, log_probs, 8, "sum", per_query=10**12)
    every = torch.einsum("bk,bkd,id->bi", log_probs.exp(), queries, table)
    for user, scores in enumerate(every.tolist()):
        agrees(recommended, user, ranking(dict(enumerate(scores, 1)), 8))


def test_sum_does_not_reward_items_that_a_list_is_too_short_to_hold():
    """Item 1 is second to two likely interests, items 2 and 3 first to one of them; all scores are negative."""
    lists = Found(torch.tensor([[[-1.0, -2.0], [-1.0, -2.0]]]), torch.tensor([[[2, 1], [3, 1]]]))
    merged = merge_interests(lists, torch.tensor([[0.5, 0.5]]).log(), 3, "sum")
    assert merged.item_ids.tolist() == [[2, 3, 1]]
    assert merged.scores.tolist() == [[-1.5, -1.5, -2.0]]


def test_all_codes_as_queries_find_the_set_of_an_exhaustive_search_with_all_of_them():
    queries = numbers(4, 16, 3, seed=1)  # K = C
    index = TorchIndex(numbers(40, 3))
    recommended = soft_search(index, queries, torch.full((4, 16), -math.log(16)), 10)
    for user in range(4):
        best = (queries[user] @ index.vectors.T).amax(0).topk(10).indices + 1
        assert set(recommended.item_ids[user].tolist()) == set(best.tolist())


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("whole", [False, True], ids=["random", "many ties"])
def test_one_query_is_a_plain_search(merge, whole):
    index, queries = TorchIndex(numbers(50, 4, whole=whole)), numbers(8, 4, seed=1, whole=whole)
    soft = soft_search(index, queries[:, None], torch.zeros(8, 1), 10, merge)
    plain = index.search_with_ties(queries, 10)
    assert torch.equal(soft.item_ids, plain.item_ids)
    number_ahead = (plain.scores[:, :, None] < plain.scores[:, None]).sum(-1).float()
    scores = {
        "quota": -number_ahead.masked_fill(plain.item_ids == 0, torch.inf),
        "mixture": plain.scores.log_softmax(1),
    }
    torch.testing.assert_close(soft.scores, scores.get(merge, plain.scores))


@pytest.mark.parametrize("merge", ["quota", "p_weighted", "sum", "mixture"])
def test_at_a_very_small_temperature_of_the_interests_the_likeliest_alone_fills_the_list(merge):
    index, queries = TorchIndex(numbers(50, 4)), numbers(8, 3, 4, seed=1)
    logits = numbers(8, 3, seed=2)
    log_probs = torch.log_softmax(logits / 1e-4, -1)
    hard = index.search(queries[torch.arange(8), logits.argmax(1)], 10)
    assert torch.equal(soft_search(index, queries, log_probs, 10, merge).item_ids, hard.item_ids)


def test_quota_gives_each_interest_its_share_also_of_the_first_places():
    """Shares of 10 places by 0.6, 0.3, 0.1 are 6, 3 and 1, and the first places go around by them."""
    scores = torch.arange(10.0, 0.0, -1).expand(1, 3, 10)
    ids = torch.stack([torch.arange(1, 11), torch.arange(11, 21), torch.arange(21, 31)])[None]
    merged = merge_interests(Found(scores, ids), torch.tensor([[0.6, 0.3, 0.1]]).log(), 10, "quota")
    assert merged.item_ids.tolist() == [[1, 11, 2, 3, 12, 21, 4, 5, 13, 6]]
    assert merged.scores.tolist() == [[0.0, -1, -2, -3, -4, -5, -6, -7, -8, -9]]


def test_quota_passes_over_items_that_are_taken_and_fills_what_a_short_list_leaves():
    lists = Found(
        torch.tensor([[[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, -torch.inf, -torch.inf]]]),
        torch.tensor([[[1, 2, 3, 4], [1, 7, 0, 0]]]),
    )
    merged = merge_interests(lists, torch.tensor([[0.5, 0.5]]).log(), 6, "quota")
    assert merged.item_ids.tolist() == [[1, 7, 2, 3, 4, 0]]  # 4 is beyond the first list's three places


def test_quota_takes_equals_together_so_that_the_list_is_closed_under_ties():
    lists = Found(
        torch.tensor([[[9.0, 8.0, 8.0, 8.0], [5.0, 4.0, 3.0, 2.0]]]), torch.tensor([[[1, 2, 3, 4], [5, 6, 7, 8]]])
    )
    merged = merge_interests(lists, torch.tensor([[0.5, 0.5]]).log(), 4, "quota")
    assert merged.item_ids.tolist() == [[1, 5, 2, 3, 4]]
    assert merged.scores.tolist() == [[0.0, -1.0, -2.0, -2.0, -2.0]]


@pytest.mark.parametrize(
    ("shares", "places", "expected"),
    [
        ([0.6, 0.3, 0.1], 10, [6, 3, 1]),
        ([0.5, 0.25, 0.25], 2, [1, 1, 0]),  # equal remainders: the first
        ([0.41, 0.33, 0.26], 5, [2, 2, 1]),  # 2.05, 1.65, 1.30
        ([1.0, 0.0], 3, [3, 0]),
        ([1 / 3, 1 / 3, 1 / 3], 3, [1, 1, 1]),
        ([0.7, 0.2, 0.1], 1, [1, 0, 0]),
    ],
)
def test_places_are_apportioned_by_largest_remainder(shares, places, expected):
    assert apportion(torch.tensor([shares], dtype=torch.float64), places).tolist() == [expected]


def test_remainders_that_rounding_alone_tells_apart_go_to_the_likelier_interest():
    shares = torch.tensor([[0.65, 0.35]]).log().double().softmax(1)  # remainders 0.49999986 and 0.50000014 of 10
    assert apportion(shares, 10).tolist() == [[7, 3]]


def test_equal_items_have_equal_scores_and_are_all_there_whatever_the_merge():
    """Items 1-4 are the same vector; with k = 2 none of them can be preferred."""
    index = TorchIndex(torch.tensor([[2.0, 1.0]] * 4 + [[0.1, 0.1]] * 2))
    queries = torch.tensor([[[1.0, 0.3], [0.2, 1.0], [0.5, 0.6]]])
    for merge in MERGES:
        recommended = soft_search(index, queries, torch.tensor([[0.5, 0.3, 0.2]]).log(), 2, merge)
        assert recommended.item_ids.tolist() == [[1, 2, 3, 4]], merge
        assert len(set(recommended.scores[0].tolist())) == 1, merge


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("per_query", [1, 3, 40])
def test_no_list_has_an_item_twice_scores_fall_and_the_end_is_padding(merge, per_query):
    index, queries = TorchIndex(numbers(12, 3, whole=True)), numbers(9, 4, 3, seed=1, whole=True)
    recommended = soft_search(index, queries, probabilities(9, 4), 15, merge, per_query)
    assert recommended.item_ids.shape[1] >= 15
    for ids, scores in zip(recommended.item_ids.tolist(), recommended.scores.tolist(), strict=True):
        length = sum(item > 0 for item in ids)
        assert length == len(set(ids) - {0}) <= 12
        assert ids[length:] == [0] * (len(ids) - length)
        assert scores[length:] == [-math.inf] * (len(ids) - length)
        assert scores[:length] == sorted(scores[:length], reverse=True)
        assert all(math.isfinite(score) for score in scores[:length])


@pytest.mark.parametrize("merge", MERGES)
def test_an_interest_without_probability_is_not_there(merge):
    index, queries, log_probs = TorchIndex(numbers(20, 3)), numbers(5, 3, 3, seed=1), probabilities(5, 3)
    log_probs[:, 1] = -torch.inf
    got = soft_search(index, queries, log_probs, 4, merge)
    without = soft_search(index, queries[:, [0, 2]], log_probs[:, [0, 2]], 4, merge)
    assert torch.equal(got.item_ids, without.item_ids)
    torch.testing.assert_close(got.scores, without.scores)


def test_the_score_temperature_weighs_scores_against_probabilities():
    index = TorchIndex(torch.eye(2))
    queries = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    log_probs = torch.tensor([[0.9, 0.1]]).log()  # item 1: log 0.9 + 1 / T; item 2: log 0.1 + 2 / T
    first = [
        int(soft_search(index, queries, log_probs, 1, "p_weighted", score_temperature=t).item_ids[0, 0])
        for t in (0.4, 0.5)
    ]
    assert first == [2, 1]  # equal at 1 / T = log 9


def test_all_queries_of_all_users_go_into_one_search():
    class Counting:
        num_items = 100
        calls: list[tuple[int, ...]] = []  # noqa: RUF012

        def search_with_ties(self, queries: Tensor, k: int) -> Found:
            self.calls.append((*queries.shape, k))
            return Found(torch.zeros(len(queries), k), torch.arange(1, k + 1).expand(len(queries), k))

    soft_search(Counting(), torch.zeros(5, 3, 2), torch.zeros(5, 3), 4, per_query=6)
    assert Counting.calls == [(15, 2, 6)]


def cells(num_items: int, num_codes: int, num_rows: int, num_queries: int) -> Cells:
    generator = torch.Generator().manual_seed(3)
    item_codes = torch.randint(num_codes, (num_items + 1,), generator=generator)
    # Padding carries code 0: it must never be found. Code `num_codes` is nobody's.
    return Cells(
        item_codes.index_fill(0, torch.tensor([0]), 0),
        torch.randint(num_codes + 1, (num_rows, num_queries), generator=generator),
    )


@pytest.mark.parametrize("similarity", ["inner_product", "cosine"])
@pytest.mark.parametrize("whole", [False, True], ids=["random", "many ties"])
@pytest.mark.parametrize("k", [1, 4, 25])
def test_a_query_that_is_restricted_to_its_code_finds_the_best_items_of_that_code(similarity, whole, k):
    table, queries, given = (
        numbers(25, 3, whole=whole) + 0.5,
        numbers(6, 4, 3, seed=1, whole=whole) + 0.25,
        cells(25, 4, 6, 4),
    )
    found = search_cells(TorchIndex(table, similarity), queries, k, given)
    assert found.scores.shape == found.item_ids.shape == (6, 4, found.scores.shape[2])
    for user in range(6):
        for j, got in enumerate(lists_of(found, user)):
            own = [i for i in range(1, 26) if given.item_codes[i] == given.codes[user, j]]
            left, right = queries[user, j].double(), table.double()
            score = {
                i: float(left @ right[i - 1])
                / (float(left.norm() * right[i - 1].norm()) if similarity == "cosine" else 1)
                for i in own
            }
            expected = ranking({i: round(s, 6) for i, s in score.items()}, k)
            assert [item for item, _ in got] == [item for item, _ in expected]
            assert [s for _, s in got] == pytest.approx([s for _, s in expected], abs=1e-5)


def test_restricted_lists_are_what_is_merged():
    index, queries, log_probs, given = (
        TorchIndex(numbers(25, 3)),
        numbers(6, 4, 3, seed=1),
        probabilities(6, 4),
        cells(25, 4, 6, 4),
    )
    for merge in MERGES:
        got = soft_search(index, queries, log_probs, 5, merge, restrict_to=given)
        lists = search_cells(index, queries, 5, given)
        assert torch.equal(got.item_ids, merge_interests(lists, log_probs, 5, merge).item_ids)
        found = [set(given.item_codes[ids[ids > 0]].tolist()) for ids in got.item_ids]
        assert all(codes <= set(row.tolist()) for codes, row in zip(found, given.codes, strict=True))


@pytest.mark.parametrize("merge", MERGES)
def test_no_users_get_no_lists(merge):
    index = TorchIndex(numbers(9, 3))
    given = Cells(torch.zeros(10, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long))
    for restrict_to in (None, given):
        got = soft_search(index, torch.zeros(0, 2, 3), torch.zeros(0, 2), 4, merge, restrict_to=restrict_to)
        assert got.item_ids.shape == got.scores.shape == (0, 4)


@pytest.mark.parametrize("shape", [(4, 3), (4, 0, 3)])
def test_queries_of_another_shape_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"users, queries of a user, width"):
        soft_search(TorchIndex(numbers(9, 3)), torch.zeros(shape), torch.zeros(shape[:2]), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"per_query": 0}, "per_query=0 must be at least 1"),
        ({"score_temperature": 0.0}, "score_temperature=0.0"),
        ({"score_temperature": math.nan}, "score_temperature=nan"),
        ({"merge": "mean"}, "'mean' must be one of max, p_weighted, sum, mixture, quota"),
        ({"log_probs": torch.tensor([[0.0, 0.0], [0.0, math.nan]])}, r"user 1 .* nan"),
        ({"log_probs": torch.tensor([[0.0, math.inf], [0.0, 0.0]])}, r"user 0 .* inf"),
        ({"log_probs": torch.full((2, 2), -math.inf)}, r"user 0 .* one at least a number"),
        ({"queries": torch.full((2, 2, 3), math.nan)}, "query 0 .* NaN"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(arguments, message):
    given = {"queries": torch.ones(2, 2, 3), "log_probs": torch.zeros(2, 2), "k": 2} | arguments
    with pytest.raises(InputError, match=message):
        soft_search(TorchIndex(numbers(9, 3)), **given)


def test_tensors_that_do_not_fit_the_queries_are_refused():
    index, queries = TorchIndex(numbers(9, 3)), torch.ones(2, 2, 3)
    with pytest.raises(ValueError, match=r"log_probs must be \(2, 2\) as the queries, got \(2, 3\)"):
        soft_search(index, queries, torch.zeros(2, 3), 2)
    codes = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"item_codes \(10,\) and codes \(2, 2\)"):
        soft_search(index, queries, torch.zeros(2, 2), 2, restrict_to=Cells(torch.zeros(9, dtype=torch.long), codes))
    with pytest.raises(ValueError, match=r"item_codes \(10,\) and codes \(2, 2\)"):
        soft_search(
            index, queries, torch.zeros(2, 2), 2, restrict_to=Cells(torch.zeros(10, dtype=torch.long), codes[:1])
        )


@pytest.mark.parametrize("merge", MERGES)
def test_with_lists_of_a_fixed_length_the_first_places_do_not_depend_on_how_many_are_wanted(merge):
    """An evaluation wants more places for a batch in which somebody has seen much."""
    index = TorchIndex(numbers(80, 6, seed=1))
    queries, log_probs = numbers(7, 3, 6, seed=2), probabilities(7, 3)
    few, many = (soft_search(index, queries, log_probs, k, merge, per_query=20).first(10) for k in (10, 35))
    assert torch.equal(few.item_ids, many.item_ids)
    torch.testing.assert_close(few.scores, many.scores)
