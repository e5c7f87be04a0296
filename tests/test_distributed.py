"""Processes that talk to each other."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys_lightning.distributed import (
    copy_first_state,
    gather_rows,
    local_rank,
    rank,
    row_weight,
    sum_over_processes,
    world_size,
)


class Learned(torch.nn.Module):
    """A module whose whole state is a number."""

    def __init__(self, number):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(float(number)))
        self.register_buffer("count", torch.tensor(number))
        self.note = f"of {number}"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


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
    assert sum_over_processes(torch.tensor([1.0, number], requires_grad=True)).tolist() == [3, 3]
    # Each process has learned something of its own, extra state too: all have the first one's afterwards.
    learned = Learned(number)
    copy_first_state(learned)
    assert (learned.weight.item(), learned.count.item(), learned.note) == (0, 0, "of 0")
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
    assert torch.equal(sum_over_processes(x), x)
    module = Learned(3)
    copy_first_state(module)
    assert module.weight.item() == 3


def test_the_place_on_a_node_is_what_the_launcher_says(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert local_rank() == 3
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun, started by srun
    assert local_rank() == 1
