"""Processes that share out the texts leave what one process leaves; one that fails stops all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys_lightning.data.encoders import BatchedEncoder, SentenceTransformerEncoder, TextEncoder, Vectors
from recsys_lightning.data.shared_text import embed_together, embed_unless_shared
from recsys_lightning.data.text import embed_texts
from recsys_lightning.errors import InputError

TEXTS = [f"{'soap ' * (number * 7 % 5)}{number}" for number in range(53)]


class Sums(BatchedEncoder):
    """Sums of characters, by batches of 3, with what is in a batch in the last column; notes what it was asked for."""

    def __init__(self, failing: str = "", fallback: TextEncoder | None = None, reachable: bool = True):
        self.failing, self.fallback, self.reachable = failing, fallback, reachable
        self.asked: list[str] = []

    @property
    def identity(self) -> str:
        return "sums"

    @property
    def alternatives(self) -> list[TextEncoder]:
        return [self, self.fallback] if self.fallback else [self]

    def resolve(self) -> TextEncoder:
        return self if self.reachable or self.fallback is None else self.fallback

    def batches(self, texts: list[str]) -> list[list[int]]:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        return [order[start : start + 3] for start in range(0, len(order), 3)]

    def encode_batch(self, texts: list[str]) -> Vectors:
        if self.failing in texts:
            raise RuntimeError("out of memory")
        self.asked += texts
        of_batch = float(sum(map(len, texts)))
        rows = [[sum(map(ord, text)), len(text), of_batch] for text in texts]
        return np.array(rows, dtype=np.float32)

    def encode(self, texts: list[str]) -> Vectors:
        vectors = np.zeros((len(texts), 3), dtype=np.float32)
        for batch in self.batches(texts):
            vectors[batch] = self.encode_batch([texts[place] for place in batch])
        return vectors


class Whole(TextEncoder):
    """An encoder that needs all texts at once."""

    identity = "whole"

    def encode(self, texts: list[str]) -> Vectors:
        return np.array([[len(texts), len(text)] for text in texts], dtype=np.float32)


def in_processes(number: int, world: int, folder: Path, model: str | None) -> None:
    """All promises one after another in one world: to start processes is what costs."""
    os.environ["LOCAL_RANK"] = str(number % 2)  # nodes of two processes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    node = number // 2

    # One cache for all nodes.
    encoder = Sums()
    found = embed_together(TEXTS, encoder, folder / "shared")
    assert (folder / "shared").is_dir()
    (folder / f"asked-{number}.json").write_text(json.dumps(encoder.asked))
    # The second time nobody encodes.
    again = Sums()
    assert np.array_equal(embed_together(TEXTS, again, folder / "shared").vectors, found.vectors)
    assert not again.asked
    # A cache of its own for each node, of which one has the vectors already.
    if number == 0:
        embed_texts(TEXTS, Sums(), folder / "node-0")
    dist.barrier()
    assert np.array_equal(embed_together(TEXTS, Sums(), folder / f"node-{node}").vectors, found.vectors)
    # Fewer batches than processes.
    assert embed_together(["a"], Sums(), folder / "one").vectors[1].tolist() == [97, 1, 1]

    # One process that fails stops all, and nothing is left.
    with pytest.raises((RuntimeError, InputError), match="out of memory") as error:
        embed_together(TEXTS, Sums(failing=TEXTS[5]), folder / "broken")
    (folder / f"failed-{number}").write_text(f"{type(error.value).__name__}: {error.value}")
    dist.barrier()
    assert list((folder / "broken").iterdir()) == []
    # A folder that cannot be written to: the writers say so, all stop.
    (folder / "file").touch()
    with pytest.raises(InputError, match=r"writable cache folder"):
        embed_together(TEXTS, Sums(), folder / "file" / "cache")

    # An encoder that must see all texts has run on one process of each node.
    if number % 2 == 0:
        embed_unless_shared(TEXTS, Whole(), folder / f"node-{node}")
        embed_unless_shared(TEXTS, Sums(), folder / f"unless-{node}")  # leaves what can be shared out
        assert not (folder / f"unless-{node}").exists()
    dist.barrier()
    assert embed_together(TEXTS, Whole(), folder / f"node-{node}").encoder == "whole"
    # Where one process cannot have the model, all take its fallback.
    one_cut_off = Sums(fallback=Whole(), reachable=number != 1)
    assert embed_together([*TEXTS, "new"][:-1], one_cut_off, folder / f"node-{node}").encoder == "sums"  # is cached
    if number % 2 == 0:
        embed_texts([*TEXTS, "new"], Whole(), folder / f"node-{node}")
    dist.barrier()
    assert embed_together([*TEXTS, "new"], one_cut_off, folder / f"node-{node}").encoder == "whole"
    with pytest.raises(InputError, match=r"no item vectors of whole"):
        embed_together([*TEXTS, "newer"], one_cut_off, folder / f"node-{node}")

    if model is not None:
        embed_together(TEXTS, SentenceTransformerEncoder(model, batch_size=4, device="cpu"), folder / "model")
    dist.destroy_process_group()


def test_processes_leave_the_file_that_one_process_leaves_and_fail_together(tmp_path, request):
    pytest.importorskip("sentence_transformers")
    model = str(request.getfixturevalue("tiny_t5"))
    folder = tmp_path / "several"
    folder.mkdir()
    mp.spawn(in_processes, args=(3, folder, model), nprocs=3)
    one = tmp_path / "one"
    embed_texts(TEXTS, Sums(), one)
    (vectors,) = one.glob("*.npy")
    for cache in ("shared", "node-0", "node-1"):
        assert (folder / cache / vectors.name).read_bytes() == vectors.read_bytes(), cache
        about = vectors.with_suffix(".json").name
        assert (folder / cache / about).read_bytes() == (one / about).read_bytes()
    asked = [json.loads((folder / f"asked-{number}.json").read_text()) for number in range(3)]
    assert sorted(text for share in asked for text in share) == sorted(TEXTS), (
        "each text is encoded once, by one process"
    )
    assert all(len(share) >= len(TEXTS) // 3 - 3 for share in asked)
    reasons = [(folder / f"failed-{number}").read_text() for number in range(3)]
    assert sorted(reason.partition(":")[0] for reason in reasons) == ["InputError", "InputError", "RuntimeError"]
    assert sum("not encoded by process" in reason for reason in reasons) == 2

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    embed_texts(TEXTS, SentenceTransformerEncoder(model, batch_size=4, device="cpu"), one)
    torch.set_num_threads(threads)
    (found,) = (folder / "model").glob("*.npy")
    assert found.read_bytes() == (one / found.name).read_bytes(), "batches are those of one process"
