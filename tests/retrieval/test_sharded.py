"""Several processes, each with a slice of the items, answer as one process with all of them."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys_lightning.distributed import rank
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.measured import MeasuredIndex
from recsys_lightning.retrieval.sharded import ShardedIndex
from recsys_lightning.retrieval.torch_index import TorchIndex

SHARDED = IndexSettings(sharded=True)
BOUNDS = {2: (1, 4, 41), 3: (1, 23, 26, 41)}  # 40 items in uneven shards: first item of each, and the end
ROWS = {2: [(5, 3), (4, 0), (0, 0), (1, 1)], 3: [(5, 0, 3), (0, 2, 2), (0, 0, 0), (1, 7, 1)]}  # queries of each rank


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def answers(world):
    """Every case on this process: expected from one index of all items, found by the sharded one."""
    bounds = BOUNDS[world]
    mine = slice(bounds[rank()] - 1, bounds[rank() + 1] - 1)
    for kind, similarity, make in (("ties", "inner_product", whole), ("real", "cosine", random)):
        vectors = make(40, 3)
        index = build_index(vectors[mine], SHARDED, similarity, first_item=bounds[rank()])
        for number, rows in enumerate(ROWS[world]):
            queries = make(sum(rows), 3, seed=number).split(rows)[rank()]
            for k in (1, 6 + 3 * rank(), 55):  # another k on every rank
                for ask in ("search", "search_with_ties"):
                    whole_index = TorchIndex(vectors, similarity)
                    yield kind, getattr(whole_index, ask)(queries, k), getattr(index, ask)(queries, k)


def refusals(world):
    """What every process must raise alike, and then go on."""
    bounds = BOUNDS[world]
    vectors = random(40, 3)[bounds[rank()] - 1 : bounds[rank() + 1] - 1]
    index = build_index(vectors, SHARDED, "inner_product", first_item=bounds[rank()])
    bad = random(2, 3) if rank() else random(2, 3).index_fill(0, torch.tensor(1), torch.nan)
    huge = vectors if rank() == 0 else vectors * 1e30
    overflowing = build_index(huge, SHARDED, "inner_product", first_item=bounds[rank()])
    yield "query 1 ", lambda: index.search(bad, 3)
    yield "k=0", lambda: index.search_with_ties(random(2, 3), 0 if rank() == 1 else 4)
    yield "one shape", lambda: index.search(random(2, 3 + rank()), 2)
    yield "width 3", lambda: index.search(random(2, 4), 2)
    yield "finite" if rank() else "another process", lambda: overflowing.search(random(2, 3) * 1e30, 3)
    yield "all item vectors", lambda: index.table
    yield "hold 1..", lambda: ShardedIndex(TorchIndex(vectors, first_item=1))


def process(number, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    for kind, expected, found in answers(world):
        assert torch.equal(found.item_ids, expected.item_ids), (kind, found, expected)
        torch.testing.assert_close(found.scores, expected.scores)
        if kind == "ties":
            assert torch.equal(found.scores, expected.scores)
    for says, ask in refusals(world):
        with pytest.raises((InputError, ValueError), match=says):
            ask()
    check_recall_is_measured_together(world)
    dist.barrier()
    dist.destroy_process_group()


def check_recall_is_measured_together(world):
    """The ranks stop asking the exact index at the same search, or they would wait for each other for ever."""
    bounds, vectors = BOUNDS[world], random(40, 3)
    mine, first = vectors[bounds[rank()] - 1 : bounds[rank() + 1] - 1], bounds[rank()]
    other = build_index(-mine, SHARDED, "inner_product", first_item=first)  # finds the worst for the best
    index = MeasuredIndex(other, build_index(mine, SHARDED, "inner_product", first_item=first), limit=world + 1)
    for _ in range(3):
        index.search(random(1, 3, seed=rank()), 20)
    assert (index.found, index.wanted) == (0, 40)  # two searches: after the first, `world` queries had been asked


@pytest.mark.parametrize("world", [2, 3])
def test_processes_answer_as_one(world, tmp_path):
    mp.spawn(process, args=(world, tmp_path), nprocs=world)


def test_one_process_needs_no_others():
    vectors, queries = whole(40, 3), whole(7, 3, seed=1)
    index = build_index(vectors, SHARDED, "inner_product")
    assert isinstance(index, ShardedIndex)
    for ask in ("search", "search_with_ties"):
        found, expected = getattr(index, ask)(queries, 9), getattr(TorchIndex(vectors), ask)(queries, 9)
        assert torch.equal(found.item_ids, expected.item_ids)
        assert torch.equal(found.scores, expected.scores)
    assert index.num_items == 40
    assert torch.equal(index.table[1:], vectors)


def test_a_slice_alone_is_not_a_catalogue():
    with pytest.raises(ValueError, match=r"they hold 5\.\.6"):
        ShardedIndex(TorchIndex(random(2, 3), first_item=5))
