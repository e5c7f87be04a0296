"""The studies of BeamFusion on a tiny COBRA: users, pools, the grid and learned weights against counts by hand."""

import math

import numpy as np
import pytest
import torch

from recsys_lightning.analysis import study_fusion, study_learned_compare
from recsys_lightning.analysis.study_fusion import (
    FusionGrid,
    Measured,
    Setting,
    best_settings,
    fusion_study,
    measure_grid,
    own_setting,
)
from recsys_lightning.analysis.study_learned import (
    Teaching,
    answer_losses,
    best_pair,
    chosen_by,
    fixed,
    mean_loss,
    teach,
)
from recsys_lightning.analysis.study_learned_compare import (
    LEARNED,
    OWN,
    TAUGHT_PAIR,
    TUNED_PAIR,
    Ranked,
    bins_of,
    calibration_errors,
    compare_learned,
    rank_users,
)
from recsys_lightning.analysis.study_learned_report import learned_study
from recsys_lightning.analysis.study_run import Pool, StudiedRun, draw_users, pools
from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranks import rank_targets
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraSearch, CobraTokens
from recsys_lightning.retrieval.beam_fusion import Candidates, beam_fusion, log_scores
from recsys_lightning.retrieval.fusion_weights import FusionWeights
from recsys_lightning.semantic_ids.table import SemanticIds


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SequenceDataModule:
    source = Synthetic(num_users=60, num_themes=2, topics_per_theme=2, items_per_topic=5)
    made = SequenceDataModule(
        source,
        TfidfSVD(dim=8),
        template=("{title}", "{description}"),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        k_core=0,
        max_history=6,
        windows="all",
        eval_batch_size=16,
    )
    made.prepare_data()
    made.setup()
    return made


def cobra_run(data: SequenceDataModule, paths: str = "both", **search) -> StudiedRun:
    """An untrained COBRA: what is studied is the machinery."""
    items = data.catalog.num_items
    codes = torch.randint(0, 3, (items + 1, 2), generator=torch.Generator().manual_seed(1))
    codes[0] = 0
    table = SemanticIds(
        codes=codes, num_codes=3, embeddings_fingerprint=data.catalog.text_fingerprint, tokenizer="random"
    )
    torch.manual_seed(0)
    settings = CobraSearch(**{"num_beams": 4, "per_cell": 2, "tau": 0.7, "psi": 8.0, "fusion": "per_id"} | search)
    decoder = CobraDecoder(num_layers=1, num_heads=2, max_items=7)
    model = COBRA(data.catalog, table, 16, tokens=CobraTokens(paths=paths), decoder=decoder, search=settings)
    return StudiedRun("runs/tiny", model.eval(), data, {}, "best.ckpt", torch.device("cpu"))


@pytest.fixture(scope="module")
def run(data) -> StudiedRun:
    return cobra_run(data)


def all_pools(run: StudiedRun, stage: str = "val", num_beams: int = 4) -> list[Pool]:
    return list(pools(run, draw_users(run, stage), num_beams, silent, "beams"))


# ------------------------------------------------------------------------------------------------------------- users


def test_training_users_are_asked_for_their_last_training_item(run):
    interactions, stop = run.data.data.interactions, run.data.split.train_stop
    met = 0
    for batch in draw_users(run, "train", shuffled=True).batches:
        for user, history, target in zip(batch.user, batch.history, batch.target, strict=True):
            items = interactions.items[interactions.offsets[user] : stop[user]]
            assert target.tolist() == [items[-1]]
            assert history[history > 0].tolist() == items[:-1][-6:].tolist()
            met += 1
    assert met == sum(stop - interactions.offsets[:-1] >= 2)


def test_a_sample_is_of_different_users_and_follows_its_seed(run):
    def drawn(seed: int, shuffled: bool = False) -> list[int]:
        users = draw_users(run, "test", 20, seed, shuffled)
        assert (users.drawn, users.total) == (20, 60)
        return torch.cat([batch.user for batch in users.batches]).tolist()

    assert len(set(drawn(0))) == 20
    assert drawn(0) == drawn(0)
    assert set(drawn(0)) != set(drawn(1))
    assert set(drawn(0)) == set(drawn(0, shuffled=True))
    assert drawn(0) != drawn(0, shuffled=True), "the one by length, the other in random order"
    everybody = draw_users(run, "test", 1000)
    assert everybody.drawn == 60


# ------------------------------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("mode", ["global", "per_id"])
def test_ranks_are_those_of_beam_fusions_lists(run, mode):
    vectors = run.model.item_table()
    for batch, pool in zip(draw_users(run, "val").batches, all_pools(run), strict=True):
        beams = run.model.generate(batch, vectors, 4)
        listed = beam_fusion(beams, run.model.trie, vectors, 50, 0.9, 6.0, 2, mode)
        expected = rank_targets(listed.item_ids, listed.scores, batch.target)
        found = pool.ranks(log_scores(pool.found, pool.log_probs, 0.9, 6.0, mode))
        assert torch.equal(found.first, expected.first)
        assert torch.equal(found.tied, expected.tied)
        assert torch.equal(pool.reached, expected.first[:, 0] > 0)
        assert pool.length.tolist() == batch.history_mask.sum(1).tolist()
    assert found.first.max() > 1


def test_tied_answers_are_counted_with_their_equals():
    pool = hand_made([[0.0, 0.0, -1.0]], [[0.5, 0.5, 0.5]], [2])
    found = pool.ranks(torch.tensor([1.0, 1.0, 0.0]))
    assert (found.first.item(), found.tied.item()) == (1, 2)


def hand_made(log_probs: list[list[float]], cosines: list[list[float]], answers: list[int]) -> Pool:
    """A pool of users whose beams reach one item each: beam m item m + 1."""
    log_p, cosine = torch.tensor(log_probs), torch.tensor(cosines)
    users, beams = log_p.shape
    row = torch.arange(users).repeat_interleave(beams)
    items = torch.arange(1, beams + 1).repeat(users)
    answer = torch.tensor(answers)
    hit = items == answer[row]
    reached = torch.zeros(users, dtype=torch.bool).index_fill(0, row[hit], True)
    found = Candidates(row, torch.arange(users * beams), items, cosine.flatten())
    return Pool(torch.arange(users), torch.ones(users), answer, log_p, found, reached, hit.nonzero()[:, 0])


# -------------------------------------------------------------------------------------------------------------- grid

SMALL = FusionGrid(beams=(2, 4), taus=(0.5, 1.0), psis=(4.0, 16.0), k=5)


def test_every_setting_is_measured_and_the_runs_own_beside_them(run):
    found = measure_grid(run, SMALL, silent)
    assert len({tuple(vars(m.setting).values()) for m in found}) == len(found) == 2 * 2 * 2 * 2 + 1
    own = [m for m in found if m.own]
    assert [(m.setting, m.in_grid) for m in own] == [(Setting(mode="per_id", beams=4, tau=0.7, psi=8.0), False)]
    inside = measure_grid(cobra_run(run.data, tau=0.5, psi=4.0), SMALL, silent)
    assert len(inside) == 16
    assert [m.in_grid for m in inside if m.own] == [True]


def test_a_run_without_beam_fusion_has_no_setting_of_its_own(data):
    assert own_setting(cobra_run(data, fusion="nearest")) is None


@pytest.mark.parametrize("number", [0, 3, 16])
def test_measured_values_are_counted_by_hand(run, number):
    measured = measure_grid(run, SMALL, silent)[number]
    chosen, model = measured.setting, run.model
    vectors, leaves = model.item_table(), model.trie.leaf_of_item
    ranks, diversity = [], []
    for batch in draw_users(run, "val").batches:
        beams = model.generate(batch, vectors, chosen.beams)
        lists = beam_fusion(beams, model.trie, vectors, 50, chosen.tau, chosen.psi, 2, chosen.mode)
        for items, target in zip(lists.item_ids.tolist(), batch.target[:, 0].tolist(), strict=True):
            ranks.append(items.index(target) + 1 if target in items else math.inf)
            diversity.append(len({int(leaves[item]) for item in items[:5] if item}))
    values = measured.values
    assert values["recall@5"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    assert values["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(r + 1) if r <= 10 else 0 for r in ranks]))
    assert values["diversity@5"] == pytest.approx(np.mean(diversity))
    assert values["answer in a beam"] == pytest.approx(np.mean([rank < math.inf for rank in ranks]))


def test_beams_are_generated_once_for_all_settings_of_a_number(run, monkeypatch):
    asked = []
    generate = COBRA.generate
    monkeypatch.setattr(COBRA, "generate", lambda *args: asked.append(args[3]) or generate(*args))
    measure_grid(run, SMALL, silent)
    assert asked == [2] * 4 + [4] * 4  # 60 users in batches of 16


def test_the_best_of_a_mode_and_number_is_of_the_grid(run):
    def measured(mode: str, beams: int, tau: float, score: float, in_grid: bool = True) -> Measured:
        setting = Setting(mode=mode, beams=beams, tau=tau, psi=4.0)
        return Measured(setting, not in_grid, in_grid, {"ndcg@10": score})

    rows = [
        measured("global", 2, 0.5, 0.1),
        measured("global", 2, 1.0, 0.3),
        measured("global", 2, 1.5, 0.3),
        measured("global", 2, 0.9, 0.9, in_grid=False),
        measured("global", 4, 0.5, 0.2),
        measured("per_id", 2, 0.5, 0.0),
    ]
    assert [(m.setting.mode, m.setting.beams, m.setting.tau) for m in best_settings(rows)] == [
        ("global", 2, 1.0),
        ("global", 4, 0.5),
        ("per_id", 2, 0.5),
    ]


@pytest.mark.parametrize(("paths", "lacks"), [("dense", "semantic IDs"), ("sparse", "dense vectors")])
def test_a_run_with_one_half_has_nothing_to_fuse(data, paths, lacks):
    half = cobra_run(data, paths, fusion="global")
    for study in (lambda: measure_grid(half, SMALL, silent), lambda: learned_study(half, FEW, None, None, silent)):
        with pytest.raises(InputError, match=f"has no {lacks}"):
            study()


@pytest.mark.parametrize("wrong", [{"taus": ()}, {"beams": (0,)}, {"psis": (4.0, 4.0)}, {"psis": (-1.0,)}, {"k": 0}])
def test_a_grid_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        FusionGrid(**wrong)


def test_the_study_reports_best_settings_the_runs_own_and_all_numbers(run):
    found = fusion_study(run, SMALL, silent)
    assert [row[:3] for row in found.tables[0].body] == [
        ["best", "global", "2"],
        ["best", "per_id", "2"],
        ["best", "global", "4"],
        ["best", "per_id", "4"],
        ["the run's own", "per_id", "4"],
    ]
    assert len(found.files[".csv"].decode().splitlines()) == 1 + 17
    assert found.pictures[".png"].startswith(b"\x89PNG")
    recalls = ["recall@5", "recall@10", "recall@50"]
    assert study_fusion.shown_names(5) == [*recalls, "ndcg@10", "diversity@5", "answer in a beam"]


# ----------------------------------------------------------------------------------------------------------- learned

FEW = Teaching(epochs=3, seed=0)


@pytest.mark.parametrize("mode", ["global", "per_id"])
def test_the_loss_is_the_cross_entropy_of_the_answer_among_the_candidates(run, mode):
    for pool in all_pools(run, "train"):
        scores = log_scores(pool.found, pool.log_probs, 0.9, 6.0, mode)
        losses = answer_losses(pool, (0.9, 6.0), mode).tolist()
        for user in range(len(pool.user)):
            mine = pool.found.row == user
            place = (pool.found.items[mine] == pool.answer[user]).nonzero()
            assert bool(pool.reached[user]) == (len(place) == 1)
            if len(place):
                chance = float(scores[mine].exp()[place] / scores[mine].exp().sum())
                assert losses.pop(0) == pytest.approx(-math.log(chance), rel=1e-4)
        assert not losses


def test_within_an_id_phi_is_a_probability_over_the_candidates(run):
    pool = all_pools(run)[0]
    scores = log_scores(pool.found, pool.log_probs, 0.9, 6.0, "per_id")
    sums = torch.zeros(len(pool.user)).index_add(0, pool.found.row, scores.exp())
    torch.testing.assert_close(sums, torch.ones(len(pool.user)))


@pytest.mark.parametrize("mode", ["global", "per_id"])
def test_gradients_for_tau_and_psi_are_the_slopes_of_the_loss(run, mode):
    pool = all_pools(run, "train")[0]
    pair = [torch.full((len(pool.user),), value, requires_grad=True) for value in (0.9, 6.0)]
    answer_losses(pool, (pair[0], pair[1]), mode).sum().backward()
    step = 1e-2
    for number, part in enumerate(pair):
        sides = [[0.9, 6.0], [0.9, 6.0]]
        sides[0][number], sides[1][number] = sides[0][number] + step, sides[1][number] - step
        above, below = (float(answer_losses(pool, tuple(side), mode).double().sum()) for side in sides)
        assert float(part.grad.sum()) == pytest.approx((above - below) / (2 * step), abs=2e-2)


def two_kinds(users: int = 400) -> list[Pool]:
    """Sure beams are right for half of the users; for the others, whose beams are not sure, the cosine is."""
    rng = np.random.default_rng(0)
    log_probs, cosines, answers = [], [], []
    for user in range(users):
        sure = user % 2 == 0
        log_p = np.log([0.7, 0.2, 0.1] if sure else [0.36, 0.33, 0.31])
        cosine = rng.permutation([0.6, 0.1, 0.0])
        log_probs.append(log_p.tolist())
        cosines.append(cosine.tolist())
        answers.append(int((log_p if sure else cosine).argmax()) + 1)
    size = users // 4
    parts = [slice(start, start + size) for start in range(0, users, size)]
    return [hand_made(log_probs[part], cosines[part], answers[part]) for part in parts]


def test_learned_weights_beat_every_fixed_pair_where_users_differ():
    batches = two_kinds()
    pairs = [(tau, psi) for tau in (0.5, 1.0, 1.5) for psi in (4.0, 8.0, 16.0, 32.0)]
    best = best_pair(batches, pairs, "global")
    assert mean_loss(batches, fixed(*best), "global") == min(mean_loss(batches, fixed(*p), "global") for p in pairs)
    taught = teach(batches, best, "global", Teaching(epochs=60, lr=0.05), silent)
    assert mean_loss(batches, chosen_by(taught.weights), "global") < 0.5 * mean_loss(batches, fixed(*best), "global")
    tau, psi = chosen_by(taught.weights)(batches[0])
    assert tau[0] / psi[0] > 3 * tau[1] / psi[1], "beams count more for those who are sure"
    assert (taught.users, taught.reached) == (400, 400)


def test_learning_begins_with_the_fixed_pair_and_keeps_the_best_epoch():
    batches = two_kinds()
    everybody = Teaching(epochs=4, held_out=0.5)
    taught = teach(batches, (1.0, 16.0), "global", everybody, silent)
    assert len(taught.losses) == 5
    assert taught.losses[0] == pytest.approx(mean_loss(batches, fixed(1.0, 16.0), "global"), rel=0.2)
    assert taught.losses[taught.best_epoch] == min(taught.losses)
    again = teach(batches, (1.0, 16.0), "global", everybody, silent)
    assert again.losses == taught.losses
    assert teach(batches, (1.0, 16.0), "global", Teaching(epochs=4, seed=1), silent).losses != taught.losses


def test_users_held_out_judge_and_do_not_teach():
    """The held-out users contradict the others: what is learned from these makes them worse, and is not kept."""
    users, seed = 100, 5
    held = np.zeros(users, dtype=bool)
    held[np.random.default_rng(seed).permutation(users)[:10]] = True
    log_probs = [[math.log(0.6), math.log(0.4)]] * users
    cosines = [[0.0, 0.0]] * users
    batches = [hand_made(log_probs, cosines, [2 if out else 1 for out in held])]
    taught = teach(batches, (1.0, 16.0), "global", Teaching(epochs=5, seed=seed), silent)
    assert taught.best_epoch == 0
    assert all(later > taught.losses[0] for later in taught.losses[1:])
    assert taught.losses[0] == pytest.approx(-math.log(0.4))
    assert chosen_by(taught.weights)(batches[0])[0].tolist() == pytest.approx([1.0] * users)


def test_users_whose_answer_is_in_no_beam_are_counted_and_do_not_teach():
    batches = two_kinds(40)
    lost = hand_made([[0.0, -1.0, -2.0]] * 3, [[0.0, 0.0, 0.0]] * 3, [9, 9, 9])
    taught = teach([*batches, lost], (1.0, 16.0), "global", FEW, silent)
    assert (taught.users, taught.reached) == (43, 40)
    with pytest.raises(InputError, match="answers of 0 of 3 training users"):
        teach([lost], (1.0, 16.0), "global", FEW, silent)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"hidden": 0}, {"held_out": 1.0}])
def test_teaching_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match="need epochs"):
        Teaching(**wrong)


# -------------------------------------------------------------------------------------------------------- comparison


def test_users_are_ranked_with_their_own_weights(run):
    batches = all_pools(run)
    weights = FusionWeights(0.7, 8.0, "per_id", 4)
    torch.nn.init.normal_(weights.mlp[-1].weight, generator=torch.Generator().manual_seed(0))
    found = rank_users(batches, chosen_by(weights), "per_id")
    vectors, at = run.model.item_table(), 0
    for batch, pool in zip(draw_users(run, "val").batches, batches, strict=True):
        tau, psi = (part.detach() for part in chosen_by(weights)(pool))
        lists = beam_fusion(run.model.generate(batch, vectors, 4), run.model.trie, vectors, 50, tau, psi, 2, "per_id")
        for user in range(len(batch)):
            items = lists.item_ids[user].tolist()
            target = int(batch.target[user, 0])
            assert found.values["recall@5"][at] == (target in items[:5])
            assert found.correct[at] == (items[0] == target)
            assert found.phi[at] == pytest.approx(float(lists.scores[user, 0].exp()), rel=1e-4)
            assert found.claimed[at] == pytest.approx(found.phi[at], rel=1e-4), "within an ID Phi sums to 1"
            assert found.tau[at] == pytest.approx(float(tau[user]))
            at += 1
    assert at == len(found.correct) == 60
    assert found.tau.std() > 0
    everywhere = rank_users(batches, fixed(0.7, 8.0), "global")
    assert (everywhere.claimed > 2 * everywhere.phi).all(), "over all candidates Phi sums to far less"


def test_calibration_is_over_all_users_and_over_those_with_their_answer_in_a_beam():
    zeros = np.zeros(4)
    ranked = Ranked({}, zeros + 0.5, zeros + 0.25, np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 0]), zeros, zeros)
    expected = {"ECE": 0.25, "ECE, answer in a beam": 0.0}
    assert calibration_errors(ranked, "per_id") == pytest.approx(expected)
    assert calibration_errors(ranked, "global") == pytest.approx(expected | {"ECE of Phi": 0.0})
    assert bins_of(ranked, ranked.claimed, only_reached=True).cases.tolist() == [2]


def test_the_comparison_has_each_way_on_each_split(run):
    drawn = {stage: draw_users(run, stage, shuffled=stage == "train") for stage in ("train", "val", "test")}
    found = compare_learned(run, "per_id", FEW, drawn, silent, resamples=100)
    assert {stage: list(ways) for stage, ways in found.ranked.items()} == {
        stage: [OWN, TAUGHT_PAIR, TUNED_PAIR, LEARNED] for stage in ("val", "test")
    }
    val = {name: all_pools_value(run, "val", ranked) for name, ranked in found.ranked["val"].items()}
    assert val[TUNED_PAIR] >= max(val[OWN], val[TAUGHT_PAIR])
    assert found.train_losses[TAUGHT_PAIR] <= found.train_losses[TUNED_PAIR]
    own = found.ranked["test"][OWN]
    assert own.tau == pytest.approx(np.full(60, 0.7))
    assert set(own.psi) == {8.0}
    for (stage, name, metric), test in found.tests.items():
        ways = found.ranked[stage]
        difference = ways[LEARNED].values[metric].mean() - ways[name].values[metric].mean()
        assert test.difference == pytest.approx(difference, abs=1e-12)
        assert test.p_holm >= test.p
    assert len(found.tests) == 2 * 3 * 4
    assert len(found.entropy) == 60


def all_pools_value(run: StudiedRun, stage: str, ranked: Ranked) -> float:
    assert len(ranked.values[study_learned_compare.TUNED_BY]) == draw_users(run, stage).drawn
    return float(ranked.values[study_learned_compare.TUNED_BY].mean())


def test_the_study_needs_a_mode_where_the_run_has_none(data):
    nearest = cobra_run(data, fusion="nearest")
    with pytest.raises(InputError, match="say --mode"):
        learned_study(nearest, FEW, None, None, silent)
    found = learned_study(nearest, FEW, "global", 30, silent, resamples=100)
    assert "mode global" in found.introduction[0]
    assert [row[:2] for row in found.tables[0].body][:2] == [["val", OWN], ["val", TAUGHT_PAIR]]
    assert "ECE of Phi" in found.tables[0].head
    assert "val 30 of 60" in found.settings["users"]
    assert found.pictures[".png"].startswith(b"\x89PNG")
