"""Ranking metrics against the definitions averaged over every order of the ties, and against other libraries."""

import itertools
import math
import random

import numpy as np
import pytest
import pytrec_eval
import torch
from scipy.stats import hypergeom
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import HitRateAtK, MAPAtK, MRRAtK, NDCGAtK, RecallAtK, ranking_metrics
from recsys_lightning.metrics.ranks import TargetRanks, rank_targets
from recsys_lightning.metrics.ties import tie_groups

NAMES = ("recall", "ndcg", "comirec", "mrr", "hit_rate", "map")


def make(k: int) -> dict[str, torch.nn.Module]:
    kinds = (RecallAtK(k), NDCGAtK(k), NDCGAtK(k, "comirec"), MRRAtK(k), HitRateAtK(k), MAPAtK(k))
    return dict(zip(NAMES, kinds, strict=True))


# ------------------------------------------------------------------------------------------------------ the reference


def definitions(relevant: np.ndarray, num_relevant: int, k: int) -> list[float]:
    """All metrics of one list without ties; `relevant` says which places hold an answer."""
    hit = relevant[:k].astype(float)
    rank = np.arange(1, len(hit) + 1)
    best = [0.0, *np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))]  # by number of leading relevant places
    dcg, found = hit @ (1 / np.log2(rank + 1)), int(hit.sum())
    return [
        found / num_relevant,
        dcg / best[min(k, num_relevant)],
        dcg / best[found] if found else 0.0,
        1 / rank[hit.argmax()] if found else 0.0,
        float(found > 0),
        (hit * hit.cumsum() / rank).sum() / min(k, num_relevant),
    ]


def over_all_orders(ids: list[int], scores: list[float], answers: list[int], k: int) -> np.ndarray | None:
    """Mean of the definitions over every order of the items of equal score; None for a user without an answer."""
    wanted = sorted({answer for answer in answers if answer})
    if not wanted:
        return None
    once = [item if item not in ids[:place] else 0 for place, item in enumerate(ids)]  # a repeat only takes up room
    pairs = zip(once, scores, strict=True)
    groups = [[item for item, _ in group] for _, group in itertools.groupby(pairs, key=lambda pair: pair[1])]
    orders = itertools.product(*map(itertools.permutations, groups))
    lists = [np.array(list(itertools.chain(*order)), dtype=int) for order in orders]
    return np.mean([definitions(np.isin(items, wanted), len(wanted), k) for items in lists], axis=0)


def random_users(rng: random.Random) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Up to 6 users with ties, repeated items, lists that end early, several answers, some of them twice or none."""
    ids, scores, answers = [], [], []
    num_answers = rng.randint(1, 5)
    for _ in range(rng.randint(1, 6)):
        levels = rng.choice([[1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [0.1 * n for n in range(50)]])
        ids.append([rng.randint(1, 8) for _ in range(rng.choice([0, 1, 2, 3, 4, 5, 5]))])
        scores.append(sorted(rng.choices(levels, k=len(ids[-1])), reverse=True))
        answers.append([rng.randint(0, 8) if rng.random() < 0.9 else 0 for _ in range(num_answers)])
    return ids, scores, answers


def padded(rows: list[list[float]], value: float) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def ranks_of(ids: list[list[int]], scores: list[list[float]], answers: list[list[int]]) -> TargetRanks:
    items = padded(ids, 0).long()
    return rank_targets(items, padded(scores, -math.inf), torch.tensor(answers))


def test_400_random_cases_equal_the_mean_over_every_order_of_the_ties():
    rng = random.Random(0)
    for _ in range(400):
        case = random_users(rng)
        k = rng.choice([1, 2, 3, 4, 5, 9])
        expected = [over_all_orders(*user, k) for user in zip(*case, strict=True)]
        scored = [values for values in expected if values is not None]
        ranks = ranks_of(*case)
        for number, (name, metric) in enumerate(make(k).items()):
            by_user = metric.values(ranks).tolist()
            assert by_user == pytest.approx(
                [math.nan if values is None else values[number] for values in expected], abs=1e-12, nan_ok=True
            ), (name, k, case)
            metric.update(ranks)
            assert int(metric.num_users) == len(scored)
            mean = np.mean([values[number] for values in scored]) if scored else math.nan
            assert metric.compute().item() == pytest.approx(mean, abs=1e-12, nan_ok=True)


def test_a_slice_of_the_answers_takes_the_others_for_wrong_items():
    rng = random.Random(1)
    for _ in range(100):
        ids, scores, answers = random_users(rng)
        mask = torch.tensor([[answer % 2 == 0 for answer in row] for row in answers])
        ranks = ranks_of(ids, scores, answers).only(mask)
        even = [[answer for answer in row if answer % 2 == 0] for row in answers]
        expected = [over_all_orders(*user, 3) for user in zip(ids, scores, even, strict=True)]
        for number, metric in enumerate(make(3).values()):
            wanted = [math.nan if values is None else values[number] for values in expected]
            assert metric.values(ranks).tolist() == pytest.approx(wanted, abs=1e-12, nan_ok=True)


# ------------------------------------------------------------------------------------------------------ known answers


def all_tied(num_items: int, num_answers: int, start: int = 1) -> TargetRanks:
    first = torch.full((1, num_answers), start)
    return TargetRanks(first, torch.full_like(first, num_items), torch.ones_like(first, dtype=torch.bool))


@pytest.mark.parametrize("num_answers", [1, 7, 300])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_a_model_that_scores_all_items_alike_is_worth_chance(num_answers, k):
    num_items = 12_101
    metrics = {name: metric.values(all_tied(num_items, num_answers)).item() for name, metric in make(k).items()}
    assert metrics["recall"] == pytest.approx(k / num_items, rel=1e-12)
    found = hypergeom(num_items, num_answers, k)
    assert metrics["hit_rate"] == pytest.approx(1 - found.pmf(0), rel=1e-9)
    discount = 1 / np.log2(np.arange(1, k + 1) + 1)
    assert metrics["ndcg"] == pytest.approx(
        num_answers / num_items * discount.sum() / discount[:num_answers].sum(), rel=1e-12
    )
    number = np.arange(1, k + 1)
    comirec = (found.pmf(number) * number * discount.mean() / discount.cumsum()).sum()
    assert metrics["comirec"] == pytest.approx(comirec, rel=1e-9)


def test_a_group_of_nothing_but_answers_is_no_gamble():
    for name, metric in make(4).items():
        expected = 1.0 if name != "recall" else 4 / 9
        assert metric.values(all_tied(9, 9)).item() == pytest.approx(expected, abs=1e-12), name


def test_chances_of_large_groups_do_not_underflow():
    """9 of 10 items are answers: the chance that none of 400 places holds one is 1e-400, below all float64."""
    metrics = {name: metric.values(all_tied(100_000, 90_000)).item() for name, metric in make(400).items()}
    number = np.arange(1, 401)
    discount = 1 / np.log2(number + 1)
    comirec = (hypergeom(100_000, 90_000, 400).pmf(number) * number * discount.mean() / discount.cumsum()).sum()
    assert metrics["comirec"] == pytest.approx(comirec, rel=1e-9)
    assert metrics["hit_rate"] == pytest.approx(1, abs=1e-12)


def test_a_tie_across_the_cut_by_hand():
    """Answer 2 shares ranks 2 to 4 with two other items; k = 3 takes in two of the three."""
    ranks = rank_targets(torch.tensor([[9, 2, 5, 7]]), torch.tensor([[4.0, 1.0, 1.0, 1.0]]), torch.tensor([[2]]))
    values = {name: metric.values(ranks).item() for name, metric in make(3).items()}
    ndcg = (1 / math.log2(3) + 1 / math.log2(4)) / 3
    mrr = (1 / 2 + 1 / 3) / 3
    expected = {"recall": 2 / 3, "ndcg": ndcg, "comirec": ndcg, "mrr": mrr, "hit_rate": 2 / 3, "map": mrr}
    assert values == pytest.approx(expected, abs=1e-12)


def test_one_answer_gives_the_usual_leave_one_out_values():
    ids, scores = torch.tensor([[9, 4, 3], [9, 8, 4]]), torch.tensor([[3.0, 2.0, 1.0]] * 2)
    metrics = ranking_metrics((2, 5), kinds=("recall", "ndcg", "mrr"))
    metrics.update(rank_targets(ids, scores, torch.tensor([[4], [4]])))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {
            "recall@2": 1 / 2,
            "ndcg@2": (1 / math.log2(3)) / 2,
            "mrr@2": (1 / 2) / 2,
            "recall@5": 1,
            "ndcg@5": (1 / math.log2(3) + 1 / 2) / 2,
            "mrr@5": (1 / 2 + 1 / 3) / 2,
        },
        abs=1e-12,
    )


def test_a_perfect_list_scores_one_even_with_more_answers_than_k():
    ids, scores = torch.arange(1, 8)[None], torch.arange(7.0, 0, -1)[None]
    ranks = rank_targets(ids, scores, ids)
    for name, metric in make(3).items():
        assert metric.values(ranks).item() == pytest.approx(3 / 7 if name == "recall" else 1, abs=1e-12)


def comirec_evaluation(lists: list[list[int]], answers: list[list[int]]) -> float:
    """NDCG as in `evaluate_full` of ComiRec's public code (arXiv:2005.09347), rewritten."""
    total = 0.0
    for recommended, wanted in zip(lists, answers, strict=True):
        found, dcg = 0, 0.0
        for place, item in enumerate(recommended):
            if item in set(wanted):
                found += 1
                dcg += 1.0 / math.log(place + 2, 2)
        if found > 0:
            total += dcg / sum(1.0 / math.log(place + 2, 2) for place in range(found))
    return total / len(lists)


def test_the_comirec_normalizer_is_that_of_comirecs_evaluation():
    rng = random.Random(2)
    lists = [rng.sample(range(1, 60), 20) for _ in range(50)]
    answers = [rng.sample(range(1, 60), 6) for _ in range(50)]
    ranks = ranks_of(lists, [[float(-place) for place in range(20)]] * 50, answers)
    metrics = ranking_metrics((20,), kinds=("ndcg",), ndcg_normalizer="comirec")
    metrics.update(ranks)
    assert metrics.compute()["ndcg@20"].item() == pytest.approx(comirec_evaluation(lists, answers), abs=1e-12)
    assert comirec_evaluation(lists, answers) > NDCGAtK(20).values(ranks).mean() + 0.1


# ----------------------------------------------------------------------------------------------------- other libraries


def full_rankings(most: int, seed: int, users: int = 40, items: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Different scores (users, items) and labels with 1 to `most` relevant items a user."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(users, items, generator=rng)
    number = torch.randint(1, most + 1, (users, 1), generator=rng)
    return scores, torch.rand(users, items, generator=rng).argsort(1).argsort(1) < number


def ours(scores: torch.Tensor, labels: torch.Tensor) -> TargetRanks:
    ordered = scores.sort(1, descending=True)
    items = torch.arange(1, scores.shape[1] + 1)
    return rank_targets(ordered.indices + 1, ordered.values, labels * items)


@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.parametrize("k", [1, 5, 10, 30])
def test_torchmetrics_retrieval_agrees(k, most):
    scores, labels = full_rankings(most, seed=k)
    users = torch.arange(len(scores))[:, None].expand_as(scores)
    theirs = {
        "recall": RetrievalRecall(top_k=k),
        "ndcg": RetrievalNormalizedDCG(top_k=k),
        "mrr": RetrievalMRR(top_k=k),
        "hit_rate": RetrievalHitRate(top_k=k),
    }
    if most == 1:  # with several, torchmetrics divides by the relevant items that were found
        theirs["map"] = RetrievalMAP(top_k=k)
    for name, metric in theirs.items():
        metric.update(scores.flatten(), labels.flatten(), indexes=users.flatten())
        mean = make(k)[name].values(ours(scores, labels)).mean().item()
        assert mean == pytest.approx(metric.compute().item(), abs=1e-6), name


@pytest.mark.parametrize("k", [5, 10, 30])
def test_trec_eval_agrees_user_by_user(k):
    scores, labels = full_rankings(8, seed=100 + k)
    runs = {str(u): {str(i): float(s) for i, s in enumerate(row)} for u, row in enumerate(scores)}
    truth = {str(u): {str(i): int(label) for i, label in enumerate(row)} for u, row in enumerate(labels)}
    measures = {f"recall.{k}", f"ndcg_cut.{k}", f"map_cut.{k}", f"success.{k}", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(runs)
    values = {name: metric.values(ours(scores, labels)).tolist() for name, metric in make(k).items()}
    for user in range(len(scores)):
        expected = theirs[str(user)]
        for name, measure in {"recall": "recall", "ndcg": "ndcg_cut", "hit_rate": "success"}.items():
            assert values[name][user] == pytest.approx(expected[f"{measure}_{k}"], abs=1e-6)
        first = expected["recip_rank"]  # trec_eval does not cut it
        assert values["mrr"][user] == pytest.approx(first if 1 / first <= k + 0.5 else 0, abs=1e-6)
        if labels[user].sum() <= k:  # trec_eval divides by all relevant items, whatever k
            assert values["map"][user] == pytest.approx(expected[f"map_cut_{k}"], abs=1e-6)


# ------------------------------------------------------------------------------------------------ batches, ranks, names


def some_ranks(count: int = 21) -> TargetRanks:
    """Users with 12 of 30 items and coarse scores; every fifth has no answer."""
    rng = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(30, generator=rng)[:12] + 1 for _ in range(count)])
    scores = torch.randint(0, 6, (count, 12), generator=rng).sort(1, descending=True).values.float()
    answers = torch.randint(0, 31, (count, 4), generator=rng) * (torch.arange(count) % 5 != 0)[:, None]
    return rank_targets(ids, scores, answers)


def rows(ranks: TargetRanks, start: int, end: int) -> TargetRanks:
    return TargetRanks(*(part[start:end] for part in ranks))


@pytest.mark.parametrize("size", [1, 4, 7, 21])
def test_the_size_of_the_batches_does_not_matter(size):
    ranks = some_ranks()
    whole, parts = ranking_metrics((1, 3, 5, 20)), ranking_metrics((1, 3, 5, 20))
    whole.update(ranks)
    for start in range(0, 21, size):
        parts.update(rows(ranks, start, start + size))
    for name, value in whole.compute().items():
        assert parts.compute()[name].item() == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("split", [0, 1, 10])
def test_two_ranks_merge_by_summing_their_states(split):
    ranks = some_ranks()
    for whole, first, second in zip(make(5).values(), make(5).values(), make(5).values(), strict=True):
        whole.update(ranks)
        first.update(rows(ranks, 0, split))  # with split 0 this rank has no user
        second.update(rows(ranks, split, 21))
        value = pytest.approx(whole.compute().item(), abs=1e-12)
        total, users = first.total + second.total, first.num_users + second.num_users
        assert (total / users).item() == value
        other = {torch.float64: second.total, torch.long: second.num_users}

        def gather(state, group, other=other):
            return [state, other[state.dtype]]

        first.sync(dist_sync_fn=gather, distributed_available=lambda: True)
        assert (first.total / first.num_users).item() == value
        first.unsync()
        first.merge_state(second)
        assert first.compute().item() == value


def test_metrics_of_a_collection_equal_the_same_metrics_alone():
    metrics = ranking_metrics((3, 8), ndcg_normalizer="comirec")
    metrics.update(some_ranks())
    values = metrics.compute()
    for k in (3, 8):
        alone = {name: metric.values(some_ranks()).nanmean().item() for name, metric in make(k).items()}
        for name in ("recall", "mrr", "hit_rate", "map"):
            assert values[f"{name}@{k}"].item() == pytest.approx(alone[name], abs=1e-12)
        assert values[f"ndcg@{k}"].item() == pytest.approx(alone["comirec"], abs=1e-12)


def test_metrics_that_agree_on_the_first_batch_stay_apart():
    """torchmetrics would otherwise join recall@1 and recall@2, which are both 0 on the first batch."""
    metrics = ranking_metrics((1, 2))
    yes = torch.tensor([[True]])
    metrics.update(TargetRanks(torch.tensor([[0]]), torch.tensor([[0]]), yes))
    metrics.update(TargetRanks(torch.tensor([[2]]), torch.tensor([[1]]), yes))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert (values["recall@1"], values["recall@2"], values["mrr@2"]) == (0, 0.5, 0.25)


def test_names_are_kind_at_k_and_the_default_ks_are_those_of_the_papers():
    names = {f"{name}@{k}" for k in (5, 10, 20, 50) for name in ("recall", "ndcg", "mrr", "hit_rate", "map")}
    assert set(ranking_metrics().keys()) == names
    assert set(ranking_metrics().clone(prefix="val/").keys()) == {f"val/{name}" for name in names}
    assert set(ranking_metrics((7,), kinds=("map", "recall")).keys()) == {"map@7", "recall@7"}


def test_sums_stay_float64_when_the_model_moves_to_bfloat16():
    module = torch.nn.ModuleDict({"metrics": ranking_metrics((5,), kinds=("recall",))}).to(torch.bfloat16)
    metric = module["metrics"]["recall@5"]
    for _ in range(600):  # a sum of ones in bfloat16 stops at 256
        metric.update(TargetRanks(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[True]])))
    assert metric.total.dtype == metric.compute().dtype == torch.float64
    assert (metric.total.item(), metric.num_users.item()) == (600, 600)


@pytest.mark.parametrize("ks", [(), (5, 5), (0, 5)])
def test_senseless_ks_are_refused(ks):
    with pytest.raises(InputError, match="different ks of at least 1"):
        ranking_metrics(ks)


def test_unknown_kinds_and_normalizers_are_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="'recal': did you mean 'recall'"):
        ranking_metrics(kinds=("ndcg", "recal"))
    with pytest.raises(InputError, match="'comi': did you mean 'comirec'"):
        ranking_metrics(ndcg_normalizer="comi")
    for kinds in ((), ("map", "map")):
        with pytest.raises(InputError, match="different kinds"):
            ranking_metrics(kinds=kinds)
    with pytest.raises(InputError, match="k=0"):
        RecallAtK(0)


def test_ranks_that_cannot_be_are_refused():
    one = torch.ones(4, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(4, 1\), \(4, 1\), \(3, 1\)"):
        tie_groups(TargetRanks(one, one, torch.ones(3, 1, dtype=torch.bool)))
    two = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="more answers"):
        RecallAtK(5).update(TargetRanks(two, two, two.bool()))
