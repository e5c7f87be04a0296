"""What SPARC learns: its losses as loops, who gets their gradients, and its codes from warm-up to checkpoint."""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcObjective, SparcSearch
from recsys_lightning.models.two_tower import PairObjective, TwoTower, UserSettings
from recsys_lightning.nn.item_tower import FeatureItemEncoder
from recsys_lightning.nn.quantize import residual_encode, residual_kmeans

HISTORIES, TARGETS = ([3, 7, 9, 20], [11, 12], [5, 6, 7]), [4, 13, 9]  # 7 and 9 are answers twice
ALONE = dict.fromkeys(
    ("bce_weight", "contrast_weight", "rq_weight", "bpr_weight", "item_contrast_weight", "interest_weight"), 0.0
)


@pytest.fixture
def build(catalog):
    def make(objective=None, codebooks=None, search=None, user=None, seed=0, started=True, **settings):
        torch.manual_seed(seed)
        model = SPARC(
            catalog,
            **({"dim": 8, "max_history": 8} | settings),
            item_encoder=partial(FeatureItemEncoder, text=True, dropout=0.0),
            user=UserSettings(**({"dropout": 0.0} | (user or {}))),
            codebooks=SparcCodebooks(**({"num_codes": 4, "warmup_steps": 0} | (codebooks or {}))),
            objective=SparcObjective(**({"negatives": 3, "bpr_weight": 2.0} | (objective or {}))),
            search=SparcSearch(**({"num_interests": 2} | (search or {}))),
        ).eval()
        if started:
            model.start_codes()
        return model

    return make


@pytest.fixture
def batch(batch_of):
    return batch_of(*HISTORIES, targets=TARGETS)


@pytest.fixture
def draws(monkeypatch):
    """What torch has drawn, by the name of the function and in order; the weights of each multinomial draw too."""
    seen = {"randint": [], "rand": [], "multinomial": [], "weights": []}

    def remembering(name, original):
        def draw(*args, **settings):
            seen[name].append(original(*args, **settings))
            if name == "multinomial":
                seen["weights"].append(args[0])
            return seen[name][-1]

        return draw

    for name in ("randint", "rand", "multinomial"):
        monkeypatch.setattr(torch, name, remembering(name, getattr(torch, name)))
    return seen


class Loops:
    """The losses of SPARC for one batch, one user, one position, one item and one level at a time."""

    def __init__(self, model, catalog, draws):
        self.model, self.aims, self.books = model, model.aims, model.books.codebooks
        z = model.encode_items(torch.arange(1, model.num_items + 1))
        self.z = torch.cat([torch.zeros_like(z[:1]), z])  # (I+1, D)
        counts = catalog.train_counts.tolist()
        self.log_p = [math.log(max(n, 1) / sum(counts)) for n in counts]
        self.codes = [self.greedy(item) for item in range(model.num_items + 1)]
        self.positions = []
        for history, target in zip(HISTORIES, TARGETS, strict=True):
            sequence = [*history, target]
            self.positions += [(sequence[:t], sequence[t]) for t in range(not model.user.start, len(sequence))]
        self.answers = [item for _, item in self.positions]
        uniform = self.aims.drawn_from == "uniform"
        self.pool = model.trained[draws["randint"][0]].tolist() if uniform else self.answers
        self.wrong = [[self.pool[n] for n in row] for row in draws["randint"][-1].tolist()]
        self.by_code = [row[0] < self.aims.own_share for row in draws["rand"][0].tolist()]
        self.shuffled = draws["multinomial"][0].tolist()

    def greedy(self, item):
        if not self.model.settings.joint:
            return self.model.codes[item].tolist()
        left, codes = self.z[item].detach(), []
        for book in self.books.detach():
            codes.append(int(((left - book) ** 2).sum(1).argmin()))
            left = left - book[codes[-1]]
        return codes

    def passed(self, item, words):
        """The sum of codewords that stand for an item, as the estimator and the share have it."""
        share, x, total = self.model.settings.gradient_share, self.z[item], sum(words)
        total = share * total + (1 - share) * total.detach()
        return total + (x - x.detach() if self.model.settings.estimator == "gather_straight_through" else 0)

    def first(self, item):
        return self.passed(item, [self.books[0, self.codes[item][0]]])

    def total(self, item):
        return self.passed(item, [book[code] for book, code in zip(self.books, self.codes[item], strict=True)])

    def user(self, prefix, query):
        model = self.model
        states = model.history(self.z[prefix][None], torch.zeros(1, 0, dtype=torch.long))
        u = model.reader(states, torch.tensor([0]), torch.tensor([states.shape[1] - 1]), query[None, None])[0, 0]
        return F.normalize(u, dim=0) if model.normalize else u

    def mixed(self, position, item):
        return self.first(item) if self.by_code[position] else self.total(item)

    def chance(self, item):
        """That an item is among the candidates: met by one of the positions, or drawn."""
        drawn = len(self.pool) if self.aims.contrast_pool and self.aims.drawn_from == "uniform" else 0
        stays_out = (1 - math.exp(self.log_p[item])) ** len(self.positions)
        return 1 - stays_out * (1 - 1 / len(self.model.trained)) ** drawn

    def contrast(self, query, vectors, candidates, own, log_q):
        """A cross-entropy of products over candidates, each of which stands there once."""
        scores = []
        for item in candidates:
            pair = (query, vectors[item])
            alike = F.cosine_similarity(*pair, dim=0) if self.aims.contrast_by == "cosine" else pair[0] @ pair[1]
            scores.append(alike / self.aims.temperature - (math.log(self.chance(item)) if log_q else 0))
        return -torch.stack(scores).log_softmax(0)[candidates.index(own)]

    def bce(self):
        rows = []
        for p, (prefix, item) in enumerate(self.positions):
            for other, label in [(item, 1.0), *((wrong, 0.0) for wrong in self.wrong[p])]:
                u = self.user(prefix, self.mixed(p, item if self.aims.shared_query else other))
                score = (u @ self.z[other]) * (self.model.scale if self.model.normalize else 1) + self.model.bias
                if self.aims.log_q and self.aims.drawn_from == "batch":
                    score = score - self.log_p[other]
                chance = score.sigmoid()
                rows.append(-(label * chance.log() + (1 - label) * (1 - chance).log()))
        return torch.stack(rows).mean()

    def candidates(self, with_pool):
        return sorted({*self.answers, *(self.pool if with_pool else ())})

    def user_contrast(self):
        items = self.candidates(self.aims.contrast_pool)
        vectors = {item: self.z[item] if self.aims.contrast_items else self.total(item) for item in items}
        return torch.stack([
            self.contrast(
                self.user(prefix, self.first(item) if self.aims.contrast_own else self.mixed(p, item)),
                vectors, items, item, self.aims.log_q,
            )
            for p, (prefix, item) in enumerate(self.positions)
        ]).mean()  # fmt: skip

    def item_contrast(self):
        items = self.candidates(False)
        vectors = {item: self.total(item) for item in items}
        return torch.stack([self.contrast(self.z[item], vectors, items, item, False) for item in items]).mean()

    def rq(self):
        settings, rows = self.model.settings, []
        for item in self.candidates(True):
            left, row, total = self.z[item], 0.0, 0.0
            for book, code in zip(self.books, self.codes[item], strict=True):
                word = book[code]
                codebook, commitment = ((left.detach() - word) ** 2).sum(), ((left - word.detach()) ** 2).sum()
                if settings.loss_form == "paper":
                    row = row + settings.commitment * codebook
                else:
                    row = row + settings.commitment * commitment + (codebook if settings.joint else 0)
                left, total = left - word.detach(), total + word
            rows.append(row + (((self.z[item] - total) ** 2).sum() if settings.loss_form == "paper" else 0))
        return torch.stack(rows).mean()

    def bpr(self):
        rows = []
        for p, (prefix, item) in enumerate(self.positions):
            better = self.user(prefix, self.first(item)) @ self.z[item]
            assert self.codes[item][0] not in self.shuffled[p]
            share = self.model.settings.gradient_share
            for code in self.shuffled[p]:
                word = self.books[0, code]
                worse = self.user(prefix, share * word + (1 - share) * word.detach()) @ self.z[item]
                rows.append(-(better - worse).sigmoid().log())
        return torch.stack(rows).mean()

    def log_interests(self, prefix):
        history = self.z[prefix] if self.aims.interest_reaches_items else self.z[prefix].detach()
        logits = self.model.interest(history[None], torch.zeros(1, 0, dtype=torch.long))
        return logits[0, -1].log_softmax(0)

    def interest(self):
        e, rows = self.aims.label_smoothing, []
        for prefix, item in self.positions:
            log_p = self.log_interests(prefix)
            rows.append(-(1 - e) * log_p[self.codes[item][0]] - e * log_p.mean())
        return torch.stack(rows).mean()

    def search(self):
        items, rows = self.candidates(self.aims.contrast_pool), []
        for prefix, item in self.positions:
            log_p = self.log_interests(prefix)
            best = log_p.argsort(descending=True)[: self.model.search.num_interests].tolist()
            weights, chance = [log_p[code].exp() for code in best], 0.0
            for code, weight in zip(best, weights, strict=True):
                word, share = self.books[0, code], self.model.settings.gradient_share
                u = self.user(prefix, share * word + (1 - share) * word.detach())
                scores = torch.stack([u @ self.z[other] / self.aims.temperature for other in items])
                chance = chance + weight / sum(weights) * scores.softmax(0)[items.index(item)]
            rows.append(-chance.log())
        return torch.stack(rows).mean()

    def losses(self):
        aims = self.aims
        terms = {
            "bce": (aims.bce_weight, self.bce),
            "contrast": (aims.contrast_weight, self.user_contrast),
            "rq": (aims.rq_weight, self.rq),
            "bpr": (aims.bpr_weight, self.bpr),
            "item_contrast": (aims.item_contrast_weight, self.item_contrast),
            "interest": (aims.interest_weight, self.interest),
            "search": (aims.search_weight, self.search),
        }
        return {name: weight * term() for name, (weight, term) in terms.items() if weight}


# Each option with a loss of its own is on at least once; the first is the paper's text.
CASES = {
    "literal": {},
    "one query": {"objective": {"shared_query": True, "contrast_own": True, "own_share": 0.0, "num_shuffled": 1}},
    "batch": {"objective": {"drawn_from": "batch", "log_q": True, "contrast_items": True, "own_share": 1.0}},
    "pool": {"objective": {"contrast_pool": True, "pool": 9, "search_weight": 0.7, "log_q": True, "bpr_weight": 0.0}},
    "cosine": {"objective": {"contrast_by": "cosine", "temperature": 0.3, "label_smoothing": 0.2, "search_weight": 1}},
    "unit length": {"normalize": True, "objective": {"temperature": 0.5, "search_weight": 1.0, "rq_weight": 0.5}},
    "straight through": {"codebooks": {"estimator": "gather_straight_through", "gradient_share": 0.3}},
    "held back": {"codebooks": {"gradient_share": 0.3}, "objective": {"search_weight": 1.0, "interest_weight": 3.0}},
    "interest alone": {"objective": {"interest_reaches_items": False, "search_weight": 1.0, "bce_weight": 0.0}},
    "paper form": {"codebooks": {"loss_form": "paper", "commitment": 0.7, "num_levels": 2}},
    "static": {"codebooks": {"joint": False}},
    "static, paper form": {"codebooks": {"joint": False, "loss_form": "paper"}, "objective": {"bpr_weight": 0.0}},
    "start": {"user": {"start": True}, "objective": {"item_contrast_weight": 2.0, "contrast_weight": 0.3}},
}


def gradients(total, parameters):
    return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_loops_over_positions_items_and_levels(build, batch, catalog, draws, case):
    model = build(**CASES[case])
    for seen in draws.values():
        seen.clear()
    found = model.losses(batch)
    expected = Loops(model, catalog, draws).losses()
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term, msg=lambda m, n=name: f"{n}: {m}")
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    one, other = (gradients(sum(terms.values()), list(parameters.values())) for terms in (found, expected))
    for name, *pair in zip(parameters, one, other, strict=True):
        torch.testing.assert_close(*pair, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_shuffled_codes_are_drawn_as_answers_of_the_batch_have_them_among_the_other_codes(build, batch, draws):
    model = build()
    model.losses(batch)
    own = model.item_codes()[torch.tensor([7, 9, 20, 4, 12, 13, 6, 7, 9]) - 1, 0]
    assert own.unique().numel() > 2
    counts = torch.bincount(own, minlength=4)
    for code, weights in zip(own.tolist(), draws["weights"][0], strict=True):
        expected = [0 if other == code else int(count) for other, count in enumerate(counts)]
        assert weights.tolist() == expected


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("estimator", ["gather", "gather_straight_through", "rotation"])
@pytest.mark.parametrize("own_share", [1.0, 0.0])
def test_bce_alone_moves_every_codeword_that_was_asked_with_and_no_other(build, batch_of, draws, estimator, own_share):
    """Section 3.2: the recommendation loss trains the codebooks."""
    only_bce = ALONE | {"bce_weight": 1.0, "own_share": own_share, "negatives": 1}
    model = build(only_bce, {"num_codes": 9, "estimator": estimator})
    for seen in draws.values():
        seen.clear()
    model.losses(batch_of([3, 7], targets=[9]))["bce"].backward()
    wrong = model.trained[draws["randint"][0]][draws["randint"][1]].flatten().tolist()
    used = model.item_codes()[torch.tensor([7, 9, *wrong]) - 1]  # (4, L)
    for level, grad in enumerate(model.books.codebooks.grad):
        asked = set(used[:, level].tolist()) if own_share == 0.0 or level == 0 else set()
        assert grad.isfinite().all()
        assert {code for code in range(9) if grad[code].abs().sum() > 0} == asked, level


def test_the_textbooks_straight_through_estimator_is_refused_with_its_reason():
    with pytest.raises(InputError, match=r"straight_through gives the codebooks no gradient; use gather, "):
        SparcCodebooks(estimator="straight_through")


@pytest.mark.parametrize("estimator", ["gather", "rotation"])
def test_gradient_share_scales_what_codebooks_get_from_recommending_and_nothing_else(build, batch, estimator):
    objectives = {"recommending": {"rq_weight": 0.0, "search_weight": 1.0}, "rq": ALONE | {"rq_weight": 1.0}}
    for name, objective in objectives.items():
        found = []
        for share in (1.0, 0.25, 0.0):
            model = build(objective, {"estimator": estimator, "gradient_share": share})
            torch.manual_seed(5)
            sum(model.losses(batch).values()).backward()
            found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
        whole, quarter, nothing = found
        books = whole.pop("books.codebooks")
        assert books.abs().sum() > 0
        shares = (0.25, 0.0) if name == "recommending" else (1.0, 1.0)
        for part, share in zip((quarter, nothing), shares, strict=True):
            torch.testing.assert_close(part.pop("books.codebooks"), share * books, atol=1e-6, rtol=1e-4)
            for key, grad in whole.items():
                torch.testing.assert_close(part[key], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["gather", "gather_straight_through", "rotation"])
def test_the_item_tower_learns_from_queries_where_the_estimator_says_so(build, batch, estimator):
    """An item that is asked with, but scored nowhere: of L_CL_ui the candidates' vectors reach only the estimator."""
    model = build(ALONE | {"contrast_weight": 1.0}, {"estimator": estimator})
    model.losses(batch)["contrast"].backward()
    last_answers = model.item_encoder.item.weight.grad[[4, 13]]  # in no history
    assert bool((last_answers.abs().sum(1) > 0).all()) is (estimator != "gather")


def test_the_interest_loss_moves_no_codebook(build, batch):
    """Its label is the code of the right item, which has no gradient."""
    model = build(ALONE | {"interest_weight": 1.0})
    model.losses(batch)["interest"].backward()
    assert model.books.codebooks.grad is None or not model.books.codebooks.grad.any()
    assert all(value.grad.abs().sum() > 0 for value in model.interest.head.parameters())


def test_static_codebooks_and_codes_stay_bit_for_bit_where_k_means_has_left_them(build, batch):
    model = build(codebooks={"joint": False, "warmup_steps": 1}, started=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    books, codes, before = [], [], model.item_table()
    for _ in range(5):
        sum(model.losses(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if model.has_codes:
            books.append(model.books.codebooks.detach().clone())
            codes.append(model.item_codes().clone())
            assert model.books.codebooks.grad is None
    assert len(books) == 4
    assert all(torch.equal(books[0], later) for later in books)
    assert all(torch.equal(codes[0], later) for later in codes)
    assert not torch.allclose(model.item_table(), before, atol=0.1)  # the items did move


# ----------------------------------------------------------------------------------------- from warm-up to codes


def test_codes_are_those_of_the_item_vectors_as_they_stand_and_their_words_add_up(build):
    model = build()
    vectors = model.item_table()[1:]
    assert torch.equal(model.item_codes(), residual_encode(vectors, model.books.codebooks))
    quantized = model.quantizer(vectors)
    assert torch.equal(quantized.codes, model.item_codes())
    words = [book[code] for book, code in zip(model.books.codebooks, model.item_codes().T, strict=True)]
    torch.testing.assert_close(quantized.vectors, sum(words))
    with torch.no_grad():
        model.item_encoder.item.weight.mul_(-3)
    assert not torch.equal(model.item_codes(), quantized.codes)
    assert torch.equal(model.prefix_trie.codes_of_leaf, model.item_codes().unique(dim=0))


def two_tower_of(sparc, catalog):
    """The plain model with the weights of a SPARC."""
    shared = {f.name: getattr(sparc.aims, f.name) for f in dataclasses.fields(PairObjective)}
    plain = TwoTower(
        catalog, sparc.dim, sparc.max_history, sparc.normalize, partial(FeatureItemEncoder, text=True, dropout=0.0),
        sparc.user, PairObjective(**shared),
    )  # fmt: skip
    plain.load_state_dict({name: value for name, value in sparc.state_dict().items() if name in plain.state_dict()})
    return plain.eval()


def training_step(model, batch, seed):
    torch.manual_seed(seed)
    return {name: float(term.detach()) for name, term in model.losses(batch).items()}


def test_in_the_warm_up_sparc_is_a_plain_two_tower_model(build, batch, catalog):
    model = build(codebooks={"warmup_steps": 2}, started=False).train()
    plain = two_tower_of(model, catalog)
    for step in range(2):
        assert training_step(model, batch, step) == training_step(plain, batch, step)
        assert not model.has_codes
    one, other = (m.recommend(batch, 9, m.build_index()) for m in (model, plain))
    assert torch.equal(one.item_ids, other.item_ids)
    assert torch.equal(one.scores, other.scores)
    assert model.prefix_trie is None
    with pytest.raises(RuntimeError, match="before the warm-up is over"):
        model.item_codes()
    assert training_step(model, batch, 2).keys() == {"bce", "contrast", "rq", "bpr", "item_contrast", "interest"}
    assert model.has_codes


def test_evaluation_neither_counts_steps_nor_ends_the_warm_up(build, batch):
    model = build(codebooks={"warmup_steps": 1}, started=False)
    for _ in range(3):
        assert training_step(model, batch, 0).keys() == {"bce", "contrast"}
    model.train()
    assert training_step(model, batch, 0).keys() == {"bce", "contrast"}
    assert "rq" in training_step(model, batch, 0)


def test_in_the_warm_up_the_search_loss_is_that_of_the_users_only_vector(build, batch, catalog):
    model = build({"search_weight": 2.0, "temperature": 0.5}, started=False)
    plain = two_tower_of(model, catalog)
    # A contrast over the same items by inner products, with one vector a user, is that very loss.
    assert training_step(model, batch, 0)["search"] == pytest.approx(2 * training_step(plain, batch, 0)["contrast"])


def test_codebooks_start_from_residual_k_means_on_the_items_that_training_has_met(build, batch, catalog):
    catalog.train_counts[[4, 17]] = 0
    model = build(codebooks={"seed": 3, "dead_code_threshold": 0.0}, started=False).train()
    with torch.no_grad():
        model.item_encoder.item.weight[[4, 17]] += 100  # had they a say, each would have a code of its own
    model.losses(batch)
    met = [item for item in range(1, 38) if item not in (4, 17)]
    expected = residual_kmeans(model.item_table()[met], 3, 4, seed=3)
    assert torch.equal(model.books.codebooks, expected)
    assert model.item_codes().shape == (37, 3)  # those two have codes too


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_checkpoint_goes_on_where_it_was_taken_in_the_warm_up_and_after_it(build, batch, joint, steps):
    settings = {"codebooks": {"joint": joint, "warmup_steps": 2}, "started": False}
    model, other = build(**settings).train(), build(**settings, seed=1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        torch.manual_seed(step)
        sum(model.losses(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    other.load_state_dict(model.state_dict())
    assert other.has_codes is (steps > 2)
    lists = [m.recommend(batch, 9, m.build_index()) for m in (model, other)]
    assert torch.equal(lists[0].item_ids, lists[1].item_ids)
    assert torch.equal(lists[0].scores, lists[1].scores)
    for step in range(3):
        assert training_step(model, batch, step) == training_step(other, batch, step)
    assert model.has_codes
    assert other.has_codes


def test_a_code_that_nothing_uses_is_revived_in_joint_training_only(build, batch):
    for joint in (True, False):
        model = build(codebooks={"joint": joint, "dead_code_threshold": 0.5}).train()
        with torch.no_grad():
            model.books.usage[0, 2] = 0.0
        before = model.books.codebooks.detach().clone()
        model.losses(batch)
        assert torch.equal(model.books.codebooks[0, 2], before[0, 2]) is not joint


# ------------------------------------------------------------------------------------------------- settings


CODEBOOKS = {
    "num_levels": 2,
    "num_codes": 5,
    "joint": False,
    "estimator": "rotation",
    "gradient_share": 0.5,
    "loss_form": "paper",
    "commitment": 0.5,
    "warmup_steps": 1,
    "dead_code_threshold": 0.9,
    "seed": 7,
}
OBJECTIVE = {
    "rq_weight": 2.0,
    "bpr_weight": 5.0,
    "num_shuffled": 1,
    "item_contrast_weight": 2.0,
    "interest_weight": 2.0,
    "label_smoothing": 0.2,
    "interest_reaches_items": False,
    "own_share": 0.1,
    "shared_query": True,
    "contrast_own": True,
    "contrast_items": True,
    "search_weight": 1.0,
}


def test_every_setting_of_codebooks_and_objective_changes_training(build, batch, trace):
    inherited = {f.name for f in dataclasses.fields(PairObjective)}  # the tests of the two-tower model have them
    assert OBJECTIVE.keys() == {f.name for f in dataclasses.fields(SparcObjective)} - inherited
    assert CODEBOOKS.keys() == {f.name for f in dataclasses.fields(SparcCodebooks)}
    calm = {"dead_code_threshold": 0.0}
    plain = trace(build(codebooks=calm, started=False), batch)
    assert trace(build(codebooks=calm, started=False), batch) == plain
    variants = [{"codebooks": calm | {name: value}} for name, value in CODEBOOKS.items()]
    variants += [{"codebooks": calm, "objective": {name: value}} for name, value in OBJECTIVE.items()]
    for settings in variants:
        assert trace(build(**settings, started=False), batch) != plain, settings


def test_a_loss_without_weight_is_left_out(build, batch):
    names = ("bce", "contrast", "rq", "bpr", "item_contrast", "interest")
    for name in names:
        assert set(build({f"{name}_weight": 0.0}).losses(batch)) == set(names) - {name}
    assert set(build(ALONE | {"search_weight": 1.0}).losses(batch)) == {"search"}
    assert build(ALONE).losses(batch) == {}
    assert build(ALONE, started=False).losses(batch) == {}
