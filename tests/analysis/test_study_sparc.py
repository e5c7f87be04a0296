"""The studies of soft search on a tiny SPARC: the evaluator's numbers, every setting, interests and cost by hand."""

import dataclasses
import math

import polars as pl
import pytest
import torch

from recsys_lightning.analysis import study_sparc_interests
from recsys_lightning.analysis.latency_timing import Timing
from recsys_lightning.analysis.study_run import StudiedRun, Users, draw_users
from recsys_lightning.analysis.study_sparc import RememberedIndex, level1_codes, measure, over_seeds, shown_score
from recsys_lightning.analysis.study_sparc_interests import (
    InterestGrid,
    costs,
    interest_tower,
    measure_interests,
    numbers_of,
)
from recsys_lightning.analysis.study_sparc_interests_report import interest_study
from recsys_lightning.analysis.study_sparc_temperature import (
    BEST_ALONE,
    MAX,
    TOP_1,
    UNIFORM,
    Point,
    TemperatureGrid,
    measure_temperatures,
    own_point,
    searches_of,
    temperature_study,
)
from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcSearch
from recsys_lightning.retrieval.torch_index import TorchIndex
from recsys_lightning.training.evaluation import EvaluationSettings, Evaluator


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def data_of(folder, encoder=None) -> SequenceDataModule:
    made = SequenceDataModule(
        Synthetic(num_users=60, num_themes=2, topics_per_theme=2, items_per_topic=5),
        encoder,
        template=("{title}", "{description}"),
        cache_dir=str(folder),
        k_core=0,
        max_history=6,
        eval_batch_size=16,
    )
    made.prepare_data()
    made.setup()
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SequenceDataModule:
    return data_of(tmp_path_factory.mktemp("cache"), TfidfSVD(dim=8))


def sparc_run(data: SequenceDataModule, seed: int = 0, started: bool = True, num_codes: int = 6, **search):
    """An untrained SPARC: what is studied is the machinery. Its towers are made loud, so that interests differ."""
    torch.manual_seed(seed)
    settings = SparcSearch(**{"num_interests": 3, "merge": "quota"} | search)
    books = SparcCodebooks(num_levels=2, num_codes=num_codes)
    model = SPARC(data.catalog, 16, 6, codebooks=books, search=settings).eval()
    with torch.no_grad():
        for parameter in model.interest.parameters():
            parameter.mul_(3)
    if started:
        model.start_codes()
    config = {"seed_everything": seed, "codes": num_codes, "search": dataclasses.asdict(settings)}
    results = {"model": "SPARC", "seed": seed, "data": {"fingerprint": "0" * 64}, "config": config, "metrics": {}}
    return StudiedRun(f"runs/tiny-seed{seed}-{num_codes}", model, data, results, "best.ckpt", torch.device("cpu"))


@pytest.fixture
def run(data) -> StudiedRun:
    return sparc_run(data)


def evaluated(run: StudiedRun, search: SparcSearch, k: int, stage: str = "val") -> dict[str, float]:
    """What the project's evaluator says of a setting."""
    run.model.search = search
    settings = EvaluationSettings(ks=(k,), metrics=("recall", "ndcg"))
    lengths = run.data.data.interactions.lengths
    evaluator = Evaluator(settings, run.data.catalog, lengths, run.model.prefix_trie)
    index = run.model.build_index()
    for batch in draw_users(run, stage).batches:
        evaluator.update(batch, run.model.recommend(batch, k + batch.seen.shape[1], index))
    return {name: float(value) for name, value in evaluator.compute().items()}


# ----------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("merge", ["max", "p_weighted", "sum", "quota"])
def test_a_setting_is_measured_as_the_evaluator_does(run, merge):
    own = run.model.search
    search = SparcSearch(num_interests=4, merge=merge, temperature=0.3)
    found = measure(run, draw_users(run, "test"), {"it": search}, 5, silent, "")["it"]
    assert run.model.search is own, "the run's own setting stands again"
    expected = evaluated(run, search, 5, "test")
    for column in ("", "-unseen"):
        for name in ("recall", "ndcg", "tail/recall", "coverage", "intra-list-distance", "distinct-codes"):
            key = f"{column}/{name}@5"
            assert found[key] == pytest.approx(expected[key], abs=1e-6), key
    assert found["/recall@5"] > 0


def test_settings_measured_together_are_those_measured_alone(run):
    searches = {T: SparcSearch(num_interests=3, merge="quota", temperature=T) for T in (0.05, 1.0, 20.0)}
    together = measure(run, draw_users(run, "val"), searches, 5, silent, "")
    for key, search in searches.items():
        alone = measure(run, draw_users(run, "val"), {key: search}, 5, silent, "")
        assert alone[key] == together[key]
    assert len({values["/distinct-codes@5"] for values in together.values()}) > 1, "the temperature matters"


def test_the_same_queries_are_searched_once_and_others_anew():
    torch.manual_seed(0)
    asked = []

    class Counted(TorchIndex):
        def search_with_ties(self, queries, k):
            asked.append(("ties", k))
            return super().search_with_ties(queries, k)

        def search(self, queries, k):
            asked.append(("plain", k))
            return super().search(queries, k)

    plain = Counted(torch.randn(9, 4))
    index, queries = RememberedIndex(plain), torch.randn(3, 4)
    first = index.search_with_ties(queries, 2)
    first.scores.zero_()  # what a caller does to its answer is its own affair
    again = index.search_with_ties(queries.clone(), 2)
    assert asked == [("ties", 2)]
    expected = plain.search_with_ties(queries, 2)
    assert torch.equal(again.scores, expected.scores)
    assert torch.equal(again.item_ids, expected.item_ids)
    asked.clear()
    for other in ((queries + 1, 2), (queries[:2], 2), (queries, 3)):
        assert torch.equal(index.search_with_ties(*other).item_ids, TorchIndex(plain.vectors).search(*other).item_ids)
    assert torch.equal(index.search(queries, 2).item_ids, expected.item_ids)
    assert asked == [("ties", 2), ("ties", 2), ("ties", 3), ("plain", 2)]
    assert torch.equal(index.table, plain.table)


def test_a_run_that_never_left_its_warm_up_is_refused(data):
    early = sparc_run(data, started=False)
    with pytest.raises(InputError, match=r"has no codes: its training ended before codebooks\.warmup_steps"):
        temperature_study([early], TemperatureGrid(k=5), silent)
    with pytest.raises(InputError, match="has no codes"):
        interest_study([early], InterestGrid(k=5), silent)


def test_mean_and_deviation_are_over_seeds():
    scores = over_seeds([{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert list(scores) == ["a"], "what one run lacks has no mean"
    assert shown_score(scores["a"]) == f"2.0000 ± {math.sqrt(2):.4f}"
    assert shown_score(over_seeds([{"a": 0.25}])["a"], 1) == "0.2"
    assert shown_score(None) == "-"


# ------------------------------------------------------------------------------------------------------- temperature

SMALL = TemperatureGrid(temperatures=(0.1, 1.0), merges=("quota", "sum"), k=5)


def test_every_merge_has_every_temperature_and_both_limits():
    own = SparcSearch(num_interests=3, merge="quota", temperature=0.7, per_interest=9)
    found = searches_of(own, SMALL)
    weighted = [Point(merge, t) for merge in ("quota", "sum") for t in (0.1, 1.0, UNIFORM)]
    assert set(found) == {BEST_ALONE, MAX, Point("quota", 0.7), *weighted}
    assert found[Point("quota", 0.7)] is own
    assert found[BEST_ALONE].num_interests == 1
    assert found[Point("sum", UNIFORM)].interests == "uniform"
    assert {search.per_interest for search in found.values()} == {9}, "all else is as the run has it"
    for point in weighted[:2]:
        assert (found[point].merge, found[point].temperature) == point
        assert found[point].interests == "predicted"
    more = searches_of(own, dataclasses.replace(SMALL, num_interests=5))
    assert {search.num_interests for search in more.values()} == {1, 5}
    assert Point("quota", 0.7) not in more, "with another number of interests it is not the run's own"


def test_the_runs_own_point_is_told_by_merge_and_weights():
    assert own_point(SparcSearch(merge="max", temperature=3.0)) == MAX
    assert own_point(SparcSearch(merge="sum", temperature=3.0)) == Point("sum", 3.0)
    assert own_point(SparcSearch(merge="sum", interests="uniform")) == Point("sum", UNIFORM)


def test_small_temperatures_tend_to_the_best_interest_alone_and_large_ones_to_equal_weights(run):
    grid = TemperatureGrid(temperatures=(1e-3, 1e3), merges=("quota", "p_weighted"), k=5)
    found = {measured.point: measured.scores for measured in measure_temperatures([run], grid, silent)}
    for merge in grid.merges:
        for name in ("/recall@5", "/coverage@5", "/distinct-codes@5"):
            assert found[Point(merge, 1e-3)][name].mean == pytest.approx(found[BEST_ALONE][name].mean)
            assert found[Point(merge, 1e3)][name].mean == pytest.approx(
                found[Point(merge, UNIFORM)][name].mean, abs=0.1
            )


def test_where_a_search_stays_in_its_code_more_weight_to_others_is_more_codes(data):
    grid = TemperatureGrid(temperatures=(1e-3, 1e3), merges=("quota",), k=3)
    inside = sparc_run(data, num_codes=4, restrict_to_code=True)
    found = {measured.point: measured.scores for measured in measure_temperatures([inside], grid, silent)}
    few, many = (found[Point("quota", t)]["/distinct-codes@3"].mean for t in (1e-3, 1e3))
    assert few < 2
    assert many == pytest.approx(3, abs=0.2), "three interests share three places"


def test_seeds_are_averaged_and_other_differences_refused(data, run):
    other = sparc_run(data, seed=1)
    both = {m.point: m for m in measure_temperatures([run, other], SMALL, silent)}
    single = [{m.point: m for m in measure_temperatures([each], SMALL, silent)} for each in (run, other)]
    for point, measured in both.items():
        values = tuple(each[point].scores["/recall@5"].mean for each in single)
        assert measured.scores["/recall@5"].values == values
        assert measured.own == (point == Point("quota", 1.0))
    with pytest.raises(InputError, match="differ in more than their seed: study them apart"):
        measure_temperatures([run, sparc_run(data, seed=1, num_codes=5)], SMALL, silent)
    with pytest.raises(InputError, match="one configuration with the same seed"):
        measure_temperatures([run, run], SMALL, silent)


def test_one_interest_has_nothing_to_weight(data):
    hard = sparc_run(data, num_interests=1)
    with pytest.raises(InputError, match="say --num_interests 2 or more"):
        temperature_study([hard], SMALL, silent)
    assert temperature_study([hard], dataclasses.replace(SMALL, num_interests=2), silent).settings["interests"] == "2"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"temperatures": ()}, "--temperatures : need different values"),
        ({"temperatures": (1.0, 1.0)}, "--temperatures 1.0 1.0: need different values"),
        ({"temperatures": (1.0, 0.0)}, "--temperatures 0: need finite values above 0"),
        ({"temperatures": (math.inf,)}, "--temperatures inf: need finite"),
        ({"merges": ("max",)}, "--merges max: the temperature matters to quota, p_weighted, mixture, sum alone"),
        ({"k": 0}, "--k 0"),
        ({"num_interests": 0}, "--num_interests 0"),
    ],
)
def test_a_temperature_grid_that_cannot_be_is_refused(wrong, line):
    with pytest.raises(InputError, match=line):
        TemperatureGrid(**wrong)


def test_the_report_has_a_row_a_setting_in_table_and_file(data, run):
    found = temperature_study([run, sparc_run(data, seed=1)], SMALL, silent)
    rows = found.tables[0].body
    assert [row[:2] for row in rows] == [
        ["-", "top-1"],
        *(["quota", shown] for shown in ("0.1", "1 (the run's own)", "uniform")),
        *(["sum", shown] for shown in ("0.1", "1", "uniform")),
        ["max", "-"],
    ]
    assert "±" in rows[0][2]
    table = pl.read_csv(found.files[".csv"]).to_dicts()
    assert len(table) == 8
    assert {row["seeds"] for row in table} == {2}
    assert "/intra-list-distance@5 sd" in table[0]
    assert found.pictures[".png"].startswith(b"\x89PNG")
    assert "60 of 60 users of the val split" in found.introduction[0]
    assert not found.remarks


def test_users_and_split_are_those_asked_for(run):
    part = dataclasses.replace(SMALL, stage="test", users=10, seed=3)
    found = temperature_study([run], part, silent)
    assert found.settings["users"] == "10 of 60, test split, seed 3"
    expected = measure(run, draw_users(run, "test", 10, 3), {0: run.model.search}, 5, silent, "")[0]
    rows = pl.read_csv(found.files[".csv"]).to_dicts()
    assert next(row for row in rows if row["own"])["/recall@5"] == pytest.approx(expected["/recall@5"])


def test_without_text_there_is_no_distance_and_the_report_says_so(tmp_path):
    bare = sparc_run(data_of(tmp_path))
    found = temperature_study([bare], SMALL, silent)
    assert "no text embeddings" in found.remarks[0]
    place = found.tables[0].head.index("intra-list distance")
    assert {row[place] for row in found.tables[0].body} == {"-"}
    assert found.pictures[".png"].startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------------- interests


def test_the_tower_is_asked_of_every_user_and_counted_by_hand(run):
    model, users = run.model, draw_users(run, "val")
    tower = interest_tower(run, users, silent)
    codes = level1_codes(run)
    counts = torch.zeros(6).index_add_(0, codes[1:], torch.as_tensor(run.data.catalog.train_counts[1:]).float())
    favourites = counts.argsort(descending=True, stable=True).tolist()
    at = 0
    for batch in users.batches:
        for row in range(len(batch)):
            chances = model.interest_logits(batch)[row].double().softmax(-1)
            best = chances.argsort(descending=True).tolist()
            code = int(codes[batch.target[row, 0]])
            for number in range(1, 7):
                assert tower.share[at, number - 1] == (code in best[:number])
                assert tower.popular[at, number - 1] == (code in favourites[:number])
                assert float(tower.claimed[at, number - 1]) == pytest.approx(float(chances[best[:number]].sum()))
            at += 1
    assert at == len(tower.share) == 60
    values = tower.values(2)
    assert values["accuracy"] == pytest.approx(float(tower.share[:, 1].mean()))
    assert tower.values(6)["accuracy"] == tower.values(6)["popular"] == 1
    assert tower.values(6)["ece"] == pytest.approx(0, abs=1e-9), "all codes together are certain"
    bins = tower.bins(2)
    by_hand = sum(n * abs(c - o) for n, c, o in zip(bins.cases, bins.claimed, bins.observed, strict=True)) / 60
    assert values["ece"] == pytest.approx(float(by_hand))


def test_of_several_answers_the_share_counts_and_users_without_one_do_not(run):
    batch = next(iter(draw_users(run, "val").batches))
    best = run.model.interest_logits(batch).argsort(-1, descending=True)[0, :3].tolist()
    codes = level1_codes(run)[1:].tolist()
    inside, outside = (1 + [code in best for code in codes].index(within) for within in (True, False))
    target = torch.zeros(len(batch), 3, dtype=torch.long)
    target[0] = torch.tensor([inside, outside, 0])
    target[1] = torch.tensor([1, 0, 0])
    tower = interest_tower(run, Users([dataclasses.replace(batch, target=target)], 2, 2), silent)
    assert len(tower.share) == 2
    assert float(tower.share[0, 2]) == 0.5
    nobody = Users([dataclasses.replace(batch, target=torch.zeros_like(target))], 0, 0)
    with pytest.raises(InputError, match="no user has an answer"):
        interest_tower(run, nobody, silent)


def test_numbers_of_interests_are_those_the_codebook_allows(run):
    assert numbers_of(run, InterestGrid()) == [1, 2, 3, 4], "3 is the run's own, and there are 6 codes"
    assert numbers_of(run, InterestGrid(numbers=(6, 2))) == [2, 6]
    with pytest.raises(InputError, match=r"--numbers 7: .* has 6 codes at level 1"):
        interest_study([run], InterestGrid(numbers=(2, 7)), silent)


@pytest.mark.parametrize("wrong", [{"numbers": ()}, {"numbers": (2, 2)}, {"numbers": (0,)}, {"k": 0}, {"calls": 0}])
def test_an_interest_grid_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        InterestGrid(**wrong)


def test_a_cost_is_that_of_a_user_asked_alone_and_in_batches(run, monkeypatch):
    own, asked = run.model.search, []
    recommend = SPARC.recommend

    def counted(self, batch, k, index):
        asked.append((self.search.num_interests, len(batch)))
        return recommend(self, batch, k, index)

    def timed(searches, num_inputs, *_):
        for search in searches:
            search(num_inputs - 1)
        return [Timing([0.016, 0.032 * number, 9.0]) for number in (1, 2)]

    monkeypatch.setattr(SPARC, "recommend", counted)
    searches = [dataclasses.replace(own, num_interests=number) for number in (1, 3)]
    assert all(values["ms"] > 0 for values in costs(run, searches, InterestGrid(calls=2, k=5), silent))
    assert set(asked) == {(number, size) for number in (1, 3) for size in (1, 16)}, "no batch is short"
    assert run.model.search is own
    monkeypatch.setattr(study_sparc_interests, "time_in_turns", timed)
    found = costs(run, searches, InterestGrid(calls=4, k=5), silent)
    assert found == [pytest.approx({"ms": 32, "batch_ms": 2}), pytest.approx({"ms": 64, "batch_ms": 4})], "medians"


def test_groups_stand_side_by_side_and_seeds_are_averaged(data, run):
    runs = [run, sparc_run(data, seed=1), sparc_run(data, seed=2, num_codes=5)]
    found = measure_interests(runs, InterestGrid(numbers=(1, 4), k=5, calls=2), silent)
    assert [(row.number, row.num_codes, row.own) for row in found.rows] == [
        (1, 6, False),
        (4, 6, False),
        (1, 5, False),
        (4, 5, False),
    ]
    first = found.rows[1]
    alone = measure(
        run, draw_users(run, "val"), {4: dataclasses.replace(run.model.search, num_interests=4)}, 5, silent, ""
    )
    assert first.scores["/recall@5"].values[0] == alone[4]["/recall@5"]
    assert len(first.scores["ms"].values) == len(first.scores["accuracy"].values) == 2
    assert len(found.rows[2].scores["ece"].values) == 1
    assert list(found.reliability) == [found.rows[0].group, found.rows[2].group]


def test_the_interest_report_has_both_tables_and_all_numbers(data, run):
    found = interest_study([run, sparc_run(data, seed=1)], InterestGrid(k=5, calls=2), silent)
    lists, tower = found.tables
    assert [row[1] for row in lists.body] == ["1 of 6", "2 of 6", "3 of 6 (own)", "4 of 6"]
    assert lists.head[-2:] == ["CPU ms a user", "CPU ms a user in batches"]
    assert all("±" in cell for row in lists.body for cell in row[2:])
    accuracies = [float(row[2].split()[0]) for row in tower.body]
    assert accuracies == sorted(accuracies)
    rows = pl.read_csv(found.files[".csv"]).to_dicts()
    assert [(row["interests"], row["codes"], row["seeds"]) for row in rows] == [(n, 6, 2) for n in (1, 2, 3, 4)]
    assert {"/recall@5", "-unseen/tail/recall@5", "ms sd", "ece", "popular"} <= set(rows[0])
    assert found.pictures[".png"].startswith(b"\x89PNG")


def test_top_1_is_one_limit_of_the_temperature():
    assert Point("-", TOP_1).shown == "top-1"
    assert Point("sum", UNIFORM).shown == "uniform"
    assert MAX.shown == "-"
