"""The queue of item vectors: what stays, what leaves, and that no item is there twice."""

import torch

from recsys_lightning.nn.item_queue import ItemQueue


def vectors(*values):
    return torch.tensor(values, dtype=torch.float)[:, None].expand(-1, 2)


def held(queue):
    return {int(i): float(v[0]) for i, v in zip(queue.ids, queue.vectors, strict=True) if i}


def test_the_oldest_items_leave_first():
    queue = ItemQueue(3, 2)
    queue.push(torch.tensor([1, 2]), vectors(10, 20))
    queue.push(torch.tensor([3, 4]), vectors(30, 40))
    assert held(queue) == {2: 20, 3: 30, 4: 40}


def test_an_item_pushed_again_has_its_new_vector_once():
    queue = ItemQueue(4, 2)
    queue.push(torch.tensor([1, 2]), vectors(10, 20))
    queue.push(torch.tensor([2]), vectors(21))
    assert held(queue) == {1: 10, 2: 21}


def test_items_of_the_batch_are_not_among_what_it_is_given():
    queue = ItemQueue(4, 2)
    queue.push(torch.tensor([1, 2, 3]), vectors(10, 20, 30))
    assert queue.without(torch.tensor([2, 9])).tolist() == [[10, 10], [30, 30]]
    assert ItemQueue(4, 2).without(torch.tensor([1])).shape == (0, 2)


def test_more_items_than_places_fill_the_queue_from_all_over_the_catalogue():
    queue = ItemQueue(3, 2)
    queue.push(torch.arange(1, 101), vectors(*range(1, 101)))
    assert held(queue) == {1: 1, 50: 50, 100: 100}


def test_the_queue_keeps_no_gradient_and_travels_with_the_state():
    queue = ItemQueue(2, 2)
    queue.push(torch.tensor([1]), vectors(10).clone().requires_grad_())
    assert not queue.without(torch.tensor([5])).requires_grad
    other = ItemQueue(2, 2)
    other.load_state_dict(queue.state_dict())
    other.push(torch.tensor([2]), vectors(20))
    assert held(other) == {1: 10, 2: 20}
