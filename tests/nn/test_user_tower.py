"""The towers of the user against their formulas, one state, head and query at a time."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.nn.user_tower import HistoryEncoder, InterestReader, InterestTower

DIM = 8


def encoder(seed=0, **settings):
    torch.manual_seed(seed)
    given = {"num_layers": 1, "num_heads": 2, "dropout": 0.0, "max_history": 6}
    return HistoryEncoder(DIM, **(given | settings)).eval()


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def without_features(rows=2):
    return torch.zeros(rows, 0, dtype=torch.long)


@pytest.mark.parametrize("start", [False, True])
def test_a_state_is_read_off_normed_items_with_positions_and_the_users_features_are_added(start):
    tower = encoder(start=start, feature_sizes=(4, 3))
    vectors, features = drawn(2, 3, DIM), torch.tensor([[3, 0], [1, 2]])
    states = tower(vectors, features)
    for row, (first, second) in enumerate(features.tolist()):
        read = [F.layer_norm(item, (DIM,)) for item in vectors[row]]
        read = [tower.start[0], *read] if start else read
        tokens = torch.stack([x + tower.position.weight[t] for t, x in enumerate(read)])
        expected = tower.transformer(tokens[None])[0][0] + tower.features[0].weight[first]
        torch.testing.assert_close(states[row], expected + tower.features[1].weight[second])


def test_an_unknown_user_feature_adds_nothing():
    tower = encoder(feature_sizes=(4,))
    vectors, none, plain = drawn(1, 3, DIM), torch.tensor([[0]]), encoder()
    plain.load_state_dict({name: value for name, value in tower.state_dict().items() if "features" not in name})
    torch.testing.assert_close(tower(vectors, none), plain(vectors, without_features(1)))
    tower(vectors, none).sum().backward()
    assert not tower.features[0].weight.grad.any()


@pytest.mark.parametrize("start", [False, True])
def test_a_state_knows_what_came_before_it_and_nothing_of_what_came_after(start):
    tower = encoder(start=start)
    one = drawn(1, 5, DIM)
    other = one.clone()
    other[:, 3] *= -1
    before, after = tower(one, without_features(1)), tower(other, without_features(1))
    first = 3 + int(start)  # the state that has read the fourth item
    torch.testing.assert_close(before[:, :first], after[:, :first])
    assert ((before[:, first:] - after[:, first:]).abs().amax(-1) > 1e-3).all()


def test_with_a_start_token_an_empty_history_has_a_state():
    assert encoder(start=True)(torch.zeros(2, 0, DIM), without_features()).shape == (2, 1, DIM)


def test_user_features_change_every_state_of_their_user_alone():
    tower = encoder(feature_sizes=(4,))
    vectors = drawn(2, 3, DIM)
    one, other = (tower(vectors, torch.tensor([[1], [code]])) for code in (1, 2))
    torch.testing.assert_close(one[0], other[0])
    difference = tower.features[0].weight[2] - tower.features[0].weight[1]
    torch.testing.assert_close(other[1] - one[1], difference.expand(3, -1))


def test_what_the_encoder_cannot_read_is_named():
    with pytest.raises(InputError, match=r"dim=8 must be a multiple of user\.num_heads=3"):
        encoder(num_heads=3)
    with pytest.raises(InputError, match=r"history of 7 items.*positions for 6.*max_history"):
        encoder()(drawn(2, 7, DIM), without_features())
    with pytest.raises(InputError, match=r"batch has 0 user features and the model was built for 1"):
        encoder(feature_sizes=(4,))(drawn(2, 3, DIM), without_features())


def read_by_hand(reader, states, query):
    """u of the docstring for the last of the states (S, D) and one query (D,)."""
    s, q = states[-1], F.layer_norm(query, (DIM,), reader.norm.weight, reader.norm.bias)
    asked = reader.ask(q) + reader.ask_state(s)
    keys, values = reader.keys_values(states).chunk(2, -1)
    width, heads = DIM // reader.num_heads, []
    for head in range(reader.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = (keys[:, part] @ asked[part] / width**0.5).softmax(0)
        heads.append(weights @ values[:, part])
    a = torch.cat(heads)
    hidden = reader.hidden_query.weight @ q + reader.hidden_query.bias
    hidden = hidden + reader.hidden_attended.weight @ a + reader.hidden_state.weight @ s
    return s + reader.output.weight @ F.gelu(hidden) + reader.output.bias


@pytest.mark.parametrize("num_heads", [1, 2])
def test_target_attention_is_its_formula_one_query_at_a_time(num_heads):
    torch.manual_seed(0)
    reader = InterestReader(DIM, num_heads, 0.5).eval()
    states, queries = drawn(2, 4, DIM), drawn(3, 2, DIM)
    row, at = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])
    found = reader(states, row, at, queries)
    for p in range(3):
        for j in range(2):
            expected = read_by_hand(reader, states[row[p], : at[p] + 1], queries[p, j])
            torch.testing.assert_close(found[p, j], expected)


def test_the_size_of_a_query_changes_nothing_and_its_direction_does():
    """Codewords grow while they are trained."""
    torch.manual_seed(0)
    reader = InterestReader(DIM, 2, 0.0)
    states, queries, where = drawn(1, 3, DIM), drawn(1, 2, DIM), (torch.tensor([0]), torch.tensor([2]))
    found = reader(states, *where, queries)
    torch.testing.assert_close(reader(states, *where, 100 * queries), found, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=1e-3)


def test_dropout_is_at_work_in_training_only():
    torch.manual_seed(0)
    reader, given = InterestReader(DIM, 2, 0.5), (drawn(1, 3, DIM), torch.tensor([0]), torch.tensor([2]))
    queries = drawn(1, 2, DIM)
    assert not torch.equal(reader(*given, queries), reader(*given, queries))
    reader.eval()
    assert torch.equal(reader(*given, queries), reader(*given, queries))


def test_interest_logits_are_an_mlp_on_the_states_of_the_towers_own_encoder():
    own = encoder()
    tower = InterestTower(own, DIM, 5, 0.3).eval()
    vectors = drawn(2, 3, DIM)
    logits = tower(vectors, without_features())
    assert logits.shape == (2, 3, 5)
    first, *_, last = [layer for layer in tower.head if isinstance(layer, torch.nn.Linear)]
    torch.testing.assert_close(logits, last(first(own(vectors, without_features())).relu()))
