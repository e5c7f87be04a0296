"""The latency lab: timings, synthetic catalogues, tables and pictures."""

import gc
import math
from dataclasses import replace

import pytest
import torch

from recsys_lightning.analysis.latency import list_recall, with_timings
from recsys_lightning.analysis.latency_catalogue import NOISE, synthetic_catalogue
from recsys_lightning.analysis.latency_figure import latency_png, recall_png
from recsys_lightning.analysis.latency_plan import Cell, LabSettings, num_lists, planned_cells, sweep
from recsys_lightning.analysis.latency_report import (
    batch_rows,
    cells_frame,
    cost_rows,
    headline,
    left_out_rows,
    operating_points,
    recall_rows,
)
from recsys_lightning.analysis.latency_timing import TURN, WARM_UP, Timing, time_in_turns
from recsys_lightning.errors import InputError

# ---------------------------------------------------------------------------------------------------------- timings


class Clock:
    """Seconds that pass only when a search says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def search_of(clock: Clock, seconds: float, log: list[tuple[float, int]]):
    def search(number: int) -> torch.Tensor:
        clock.now += seconds
        log.append((seconds, number))
        return torch.tensor([[number]])

    return search


def test_percentiles_are_those_of_a_known_sample():
    timing = Timing(seconds=[0.001 * number for number in range(1, 102)])  # 1 to 101 ms
    assert timing.percentile(50) == pytest.approx(51.0)
    assert timing.percentile(99) == pytest.approx(100.0)
    assert timing.calls_per_second == pytest.approx(1000 / 51)


def test_no_p99_is_claimed_below_a_hundred_calls():
    assert Timing(seconds=[0.1] * 99).percentile(99) is None
    assert Timing(seconds=[0.1] * 99).percentile(50) == pytest.approx(100)
    assert Timing(seconds=[0.1] * 100).percentile(99) == pytest.approx(100)
    assert Timing().percentile(50) is None
    assert Timing().calls_per_second is None


def test_every_search_has_its_repeats_and_warm_up_calls_do_not_count():
    clock, log = Clock(), []
    searches = [search_of(clock, 1.0, log), search_of(clock, 2.0, log)]
    fast, slow = time_in_turns(searches, num_inputs=5, repeats=40, seconds=1e9, clock=clock)
    assert fast.seconds == [1.0] * 40
    assert slow.seconds == [2.0] * 40
    turns = math.ceil(40 / TURN)
    assert len(log) == 2 * (40 + turns * WARM_UP)
    assert {number: int(answer) for number, answer in fast.answers.items()} == {n: n for n in range(5)}


def test_searches_take_turns_so_that_a_disturbance_meets_all_of_them():
    clock, log = Clock(), []
    searches = [search_of(clock, 1.0, log), search_of(clock, 2.0, log)]
    time_in_turns(searches, num_inputs=5, repeats=2 * TURN, seconds=1e9, clock=clock)
    order = [seconds for seconds, _ in log]
    turn = TURN + WARM_UP
    assert order == ([1.0] * turn + [2.0] * turn) * 2


def test_a_search_stops_when_its_seconds_are_used_up():
    clock = Clock()
    (timing,) = time_in_turns([search_of(clock, 1.0, [])], num_inputs=5, repeats=500, seconds=7.5, clock=clock)
    assert len(timing.seconds) == 8


def test_a_search_whose_call_alone_is_too_long_is_given_up_and_so_are_dearer_ones():
    clock, log = Clock(), []
    searches = [search_of(clock, seconds, log) for seconds in (1.0, 6.0, 9.0)]
    fine, slow, dearer = time_in_turns(searches, num_inputs=5, repeats=20, seconds=5, clock=clock)
    assert len(fine.seconds) == 5
    assert not slow.seconds
    assert not dearer.seconds
    assert slow.gave_up == "a call took 6 s, limit 5 s"
    assert dearer.gave_up == "not tried: a cheaper search was given up, a call took 6 s, limit 5 s"
    assert 9.0 not in [seconds for seconds, _ in log]


def test_waiting_for_the_device_is_part_of_the_time():
    clock = Clock()

    def finish() -> None:
        clock.now += 0.5

    (timing,) = time_in_turns([search_of(clock, 1.0, [])], 5, repeats=3, seconds=1e9, finish=finish, clock=clock)
    assert timing.seconds == [1.5] * 3


def test_the_garbage_collector_is_off_while_searches_are_timed_and_on_afterwards():
    seen = []

    def search(_: int) -> torch.Tensor:
        seen.append(gc.isenabled())
        if len(seen) == 4:
            raise RuntimeError
        return torch.zeros(1)

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        time_in_turns([search], 5, repeats=10, seconds=1e9)
    assert seen == [False] * 4
    assert gc.isenabled()


# ------------------------------------------------------------------------------------------------------- catalogues


def test_a_catalogue_is_the_same_for_the_same_seed_and_of_unit_vectors():
    first, second = (synthetic_catalogue(500, 20, 4, 16, seed=3) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.queries, second.queries)
    assert not torch.equal(first.vectors, synthetic_catalogue(500, 20, 4, 16, seed=4).vectors)
    torch.testing.assert_close(first.vectors.norm(dim=1), torch.ones(500))
    torch.testing.assert_close(first.queries.norm(dim=2), torch.ones(20, 4))


def test_items_have_clusters_and_the_queries_of_a_user_lie_near_different_ones():
    catalogue = synthetic_catalogue(10_000, 200, 4, 128, seed=0)
    near = 1 / (1 + NOISE**2)  # expected cosine within a cluster; between clusters it is 0
    best = (catalogue.queries.flatten(0, 1) @ catalogue.vectors.T).topk(50, dim=1).values[:, 49].mean()
    assert best > near  # about 100 items share the cluster of a query, and the better half of them is above the mean
    own = torch.einsum("ukd,uld->kl", catalogue.queries, catalogue.queries) / 200
    assert (own - torch.eye(4)).abs().max() < near / 4


# ------------------------------------------------------------------------------------------------------------- plan


def test_every_combination_is_planned_once_and_sizes_ascend():
    settings = LabSettings(items=(4000, 1000, 4000), interests=(4, 1), indexes=("ivf", "exact"), users=8, batch=4)
    cells = planned_cells(settings)
    assert (
        len(cells) == len(set(cells)) == 2 * (1 + len(sweep("ivf", 1000, 50))) + 2 * (1 + len(sweep("ivf", 4000, 50)))
    )
    assert [cell.items for cell in cells] == sorted(cell.items for cell in cells)
    assert cells[0].interests == 1


@pytest.mark.parametrize("items", [10, 200, 10_000, 10**5, 10**6, 10**7])
def test_an_ivf_index_has_as_many_lists_as_can_be_trained_and_no_probe_beyond_them(items):
    lists = num_lists(items)
    assert math.log2(lists).is_integer()
    assert 1 <= lists <= max(1, items / 39)
    probes = [int(parameters.removeprefix("nprobe=")) for parameters in sweep("ivf", items, 50)]
    assert probes[0] == 1
    assert probes[-1] <= lists


@pytest.mark.parametrize("k", [1, 10, 50, 64, 100])
def test_hnsw_keeps_at_least_as_many_candidates_as_places(k):
    kept = [int(parameters.removeprefix("efSearch=")) for parameters in sweep("hnsw", 1000, k)]
    assert min(kept) >= k
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"indexes": ("exact", "annoy")}, "no index 'annoy'.*exact, ivf, hnsw"),
        ({"items": (40, 1000)}, "--k 50 is more than the 40 items"),
        ({"interests": (0, 4)}, "--interests 0 must be at least 1"),
        ({"items": (0,)}, "--items 0 must be at least 1"),
        ({"users": 10}, "--batch 64 is more than --users 10"),
        ({"seconds": 0.0}, "--seconds 0.0 must be at least"),
        ({"seconds": math.nan}, "--seconds nan must be at least"),
        ({"threads": 0}, "--threads 0 must be at least 1"),
        ({"repeats": 0}, "--repeats 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LabSettings(**settings)


# ----------------------------------------------------------------------------------------------------------- tables


def cell(items: int, index: str, parameters: str, interests: int, p50: float, recall: float = 1.0, **more) -> Cell:
    values = {"p50_ms": p50, "p99_ms": 2 * p50, "calls": 500, "recall": recall, "recall_users": 256}
    values |= {"batch_p50_ms": 10 * p50, "batch_p99_ms": 30 * p50, "batch_calls": 100}
    values |= {"users_per_second": 64.0, "queries_per_second": 64.0 * interests, "build_seconds": 1.5}
    values |= {"index_bytes": 2_000_000} | more
    return Cell(items=items, device="cpu", index=index, parameters=parameters, interests=interests, **values)


CELLS = [
    cell(1000, "exact", "", 1, 2.0),
    cell(1000, "exact", "", 4, 3.0),
    cell(1000, "ivf", "nprobe=1", 1, 0.1, 0.5),
    cell(1000, "ivf", "nprobe=1", 4, 0.4, 0.7),
    cell(1000, "ivf", "nprobe=8", 1, 0.5, 0.9),
    cell(1000, "ivf", "nprobe=8", 4, 1.5, 0.96),
    cell(1000, "ivf", "nprobe=64", 1, 2.5, 0.99),
    cell(1000, "ivf", "nprobe=64", 4, 9.0, 0.999),
]


def test_recall_is_the_share_of_the_exact_list_that_was_found():
    truth = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    answers = {0: torch.tensor([[4, 3, 2, 1]]), 2: torch.tensor([[9, 1, 0, 0]])}
    assert list_recall(answers, truth) == pytest.approx((1 + 0.25) / 2)
    assert list_recall({}, truth) is None


def test_users_and_queries_a_second_are_those_of_the_batches():
    settings = LabSettings(batch=8, users=16, k=2, items=(100,))
    alone = Timing(seconds=[0.002] * 3, answers={0: torch.tensor([[1, 2]]), 1: torch.tensor([[3, 0]])})
    together = Timing(seconds=[0.25] * 4)
    planned = Cell(items=100, device="cpu", index="exact", parameters="", interests=3)
    filled = with_timings(planned, alone, together, torch.tensor([[1, 2], [3, 4]]), settings)
    assert filled.users_per_second == pytest.approx(8 / 0.25)
    assert filled.queries_per_second == pytest.approx(3 * 8 / 0.25)
    assert (filled.p50_ms, filled.calls) == (pytest.approx(2.0), 3)
    assert (filled.batch_p50_ms, filled.batch_calls) == (pytest.approx(250.0), 4)
    assert (filled.recall, filled.recall_users, filled.left_out) == (0.75, 2, "")
    slow = with_timings(planned, alone, Timing(gave_up="a call took 9 s"), torch.tensor([[1, 2], [3, 4]]), settings)
    assert (slow.users_per_second, slow.left_out) == (None, "a batch: a call took 9 s")


def test_an_approximate_index_is_shown_with_the_fastest_parameter_of_good_recall():
    assert operating_points(CELLS) == {(1000, "cpu", "exact"): "", (1000, "cpu", "ivf"): "nprobe=8"}
    worse = [replace(one, recall=0.9 * one.recall) for one in CELLS]
    assert operating_points(worse)[1000, "cpu", "ivf"] == "nprobe=64"


def test_costs_are_relative_to_one_interest_on_the_same_index():
    assert cost_rows(CELLS[:2])[1] == ["1,000", "exact", "4", "1.000", "3.00", "6.00", "1.50", "1.50", "500"]
    ivf = cost_rows([CELLS[4], CELLS[5]])[1]
    assert ivf[:3] == ["1,000", "ivf nprobe=8", "4"]
    assert ivf[6] == "3.00"
    assert cost_rows([CELLS[1]])[0][6:8] == ["-", "-"]  # nothing to compare with
    assert batch_rows(CELLS[:2])[1][3:] == ["64.0", "256", "30.00", "90.00", "1.50", "1.50", "100"]
    assert headline(CELLS) == ["1,000 items, exact: K=4 takes 1.50 times the p50 and 1.50 times the p99 of K=1."]


def test_recall_at_equal_latency_is_the_best_within_the_limit():
    head, rows = recall_rows(CELLS)
    assert head == ["items", "K", "p50 at most", "exact", "ivf"]
    assert rows == [
        ["1,000", "1", "0.1 x exact K=1 = 0.200 ms", "-", "0.500 (nprobe=1)"],
        ["1,000", "1", "1 x exact K=1 = 2.00 ms", "1.000", "0.900 (nprobe=8)"],
        ["1,000", "1", "4 x exact K=1 = 8.00 ms", "1.000", "0.990 (nprobe=64)"],
        ["1,000", "4", "0.1 x exact K=1 = 0.200 ms", "-", "-"],
        ["1,000", "4", "1 x exact K=1 = 2.00 ms", "-", "0.960 (nprobe=8)"],
        ["1,000", "4", "4 x exact K=1 = 8.00 ms", "1.000", "0.960 (nprobe=8)"],
    ]


def test_without_an_exact_index_the_limits_are_fixed():
    _, rows = recall_rows(CELLS[2:])
    assert [row[2] for row in rows] == ["1 ms", "10 ms", "100 ms"] * 2
    assert rows[0][3] == "0.900 (nprobe=8)"


def test_what_was_left_out_is_named_with_its_reason():
    missing = [Cell(items=1000, device="cpu", index="hnsw", parameters="efSearch=64", interests=k) for k in (1, 4)]
    left_out = [replace(one, left_out="too large") for one in missing]
    assert left_out_rows(CELLS + left_out) == [["1,000", "hnsw", "efSearch=64", "1, 4", "too large"]]
    table = cells_frame(CELLS + left_out)
    assert table.height == len(CELLS) + 2
    assert table["left_out"].to_list() == [""] * len(CELLS) + ["too large"] * 2


@pytest.mark.parametrize("cells", [CELLS, CELLS[:1], [replace(one, items=n) for n in (10, 100, 1000) for one in CELLS]])
def test_pictures_are_1200_pixels_wide(cells):
    for picture in (latency_png(cells), recall_png(cells)):
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(picture[16:20]) == 1200


def test_cells_without_values_are_drawn_as_nothing():
    empty = [Cell(items=1000, device="cpu", index="hnsw", parameters="", interests=1, left_out="why")]
    assert latency_png(empty)
    assert recall_png(empty)
    assert latency_png(CELLS + empty)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"recsys_lightning\[plots\]"):
        latency_png(CELLS)
