"""Processes that talk to each other."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys_lightning.distributed import gather_rows, rank, row_weight, world_size


def process(number, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    assert (rank(), world_size()) == (number, world)
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float64):
        parts = [torch.arange(6 * rows).view(rows, 3, 2).to(dtype) for rows in (4, 0, 1)]
        gathered = gather_rows(parts[number])
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.cat(parts))
    assert gather_rows(torch.full((number,), number)).tolist() == [1, 2, 2]
    assert gather_rows(torch.zeros(0, 5)).shape == (0, 5)
    assert gather_rows(torch.zeros(number, 0)).shape == (3, 0)
    wide = torch.full((3, 2), float(number), requires_grad=True)
    gathered = gather_rows(wide.T)  # rows that do not lie one after another in memory
    assert gathered.tolist() == [[float(n)] * 3 for n in (0, 0, 1, 1, 2, 2)]
    assert not gathered.requires_grad
    # Every process uses row r of all for r * (number + 1): each row gets the sum of that over the processes.
    own = torch.full(((2, 0, 1)[number], 2), 1.0, requires_grad=True)
    weights = torch.arange(3.0)[:, None] * (number + 1)
    (gather_rows(own, gradient=True) * weights).sum().backward()
    assert own.grad is not None
    assert own.grad.tolist() == [[6.0 * row] * 2 for row in ([0, 1], [], [2])[number]]
    # Means over 3, 0 and 1 rows, weighted, average to the mean over all rows: (3 * 5 + 1 * 9) / 4.
    share = row_weight((3, 0, 1)[number], torch.device("cpu"))
    mine = share * torch.tensor([(5.0, 0.0, 9.0)[number]])
    assert gather_rows(mine).mean().item() == pytest.approx(6.0)
    for other in (
        torch.zeros(2, 3 if number else 4),
        torch.zeros(2, 3, dtype=torch.int32 if number else torch.float32),
    ):
        with pytest.raises(ValueError, match="one shape and type"):
            gather_rows(other)
    dist.destroy_process_group()


def test_rows_come_in_the_order_of_ranks_in_any_number_and_of_any_type(tmp_path):
    mp.spawn(process, args=(3, tmp_path), nprocs=3)


def test_a_single_process_is_rank_0_of_1_and_keeps_its_rows():
    assert (rank(), world_size()) == (0, 1)
    x = torch.ones(3, 2)
    assert gather_rows(x) is x
    assert gather_rows(x, gradient=True) is x
    assert row_weight(7, x.device) == 1
