"""What COBRA's training step and generation cost, against the same shape in torch's own layers without a cache.

    OMP_NUM_THREADS=1 python tests/benchmarks/cobra_speed.py

The shape is that of a public implementation (phonism/genrec), whose cost was measured elsewhere. The yardstick `Plain`
is that shape rebuilt here from `torch.nn`: every text is read whole by all layers, and every beam reads its whole
sequence again at each level. It runs in the same process, in turns with COBRA. CPU-seconds are those of the whole
process over all threads. Written to experiments/results/cobra_speed.md.
"""

import argparse
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from recsys_lightning.analysis.compare import markdown_table
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.memory import keep_freed_memory
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraObjective, CobraSearch, CobraTokens
from recsys_lightning.nn.item_encoders import TextItemEncoder
from recsys_lightning.retrieval.beam_fusion import beam_fusion
from recsys_lightning.retrieval.beam_search import Beams, beam_search
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.record import code_fingerprint

PUBLIC = {"training step": 6.6, "generation": 6.1}  # CPU-seconds of the public implementation on two such cores


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The public implementation's defaults, at batch 8, 10 items and 32 tokens a text."""

    users: int = 8
    items: int = 10  # of a sequence
    tokens: int = 32  # of a text
    dim: int = 384
    feedforward: int = 2048
    decoder_layers: int = 8
    decoder_heads: int = 6
    encoder_layers: int = 1
    encoder_heads: int = 8
    vocabulary: int = 32128
    levels: int = 3
    codes: int = 256
    catalogue: int = 2000
    beams: int = 20
    dropout: float = 0.1


class Plain(nn.Module):
    """The shape in torch's own layers: mean-pooled text encoder, decoder over an empty memory, no cache."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.stride = shape, shape.levels + 1
        width, rest = shape.dim, {"dropout": shape.dropout, "batch_first": True}
        self.token, self.place = nn.Embedding(shape.vocabulary, width), nn.Embedding(shape.tokens, width)
        layer = nn.TransformerEncoderLayer(width, shape.encoder_heads, shape.feedforward, **rest)
        self.reader = nn.TransformerEncoder(layer, shape.encoder_layers)
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, width)
        self.code = nn.Embedding(shape.levels * shape.codes, width)
        self.kind, self.item_place = nn.Embedding(2, width), nn.Embedding(shape.items + 1, width)
        layer = nn.TransformerDecoderLayer(width, shape.decoder_heads, shape.feedforward, **rest)
        self.decoder = nn.TransformerDecoder(layer, shape.decoder_layers)
        self.heads = nn.ModuleList(nn.Linear(width, shape.codes) for _ in range(shape.levels))

    def read(self, texts: Tensor) -> Tensor:
        """Vectors (B, T, D) of texts (B, T, W)."""
        flat = texts.flatten(0, 1)
        there = flat != 0
        hidden = self.norm(self.reader(self.token(flat) + self.place.weight, src_key_padding_mask=~there))
        pooled = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return F.normalize(self.project(pooled), dim=-1).unflatten(0, texts.shape[:2])

    def decode(self, codes: Tensor, vectors: Tensor, begun: Tensor) -> Tensor:
        """States of codes (B, T, L) and vectors (B, T, D), followed by the `begun` codes (B, l) of one more item."""
        offset = torch.arange(self.shape.levels) * self.shape.codes
        whole = torch.cat(
            [self.code(codes + offset) + self.kind.weight[0], vectors[:, :, None] + self.kind.weight[1]], 2
        )
        whole = (whole + self.item_place.weight[: codes.shape[1], None]).flatten(1, 2)
        added = (
            self.code(begun + offset[: begun.shape[1]]) + self.kind.weight[0] + self.item_place.weight[codes.shape[1]]
        )
        x = torch.cat([whole, added], 1)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        hidden: Tensor = self.decoder(x, x[:, :0], tgt_mask=mask)
        return hidden

    def loss(self, codes: Tensor, texts: Tensor) -> Tensor:
        """Cross-entropy of every code and in-batch contrast of every vector but the first item's."""
        vectors = self.read(texts)
        hidden = self.decode(codes, vectors, codes[:, 0, :0])[:, self.stride - 1 : -1]
        windows = hidden.unflatten(1, (-1, self.stride)).flatten(0, 1)  # (P, S, D)
        target = codes[:, 1:].flatten(0, 1)
        sparse = [F.cross_entropy(head(windows[:, at]), target[:, at]) for at, head in enumerate(self.heads)]
        cosine = F.normalize(windows[:, -1], dim=-1) @ vectors[:, 1:].flatten(0, 1).detach().T
        return torch.stack(sparse).mean() + F.cross_entropy(cosine / 0.2, torch.arange(len(cosine)))

    @torch.no_grad()
    def generate(self, codes: Tensor, texts: Tensor, num_beams: int, dense: bool) -> tuple[Tensor, Tensor]:
        """The most likely IDs (B, M, L) over all codes, and their vectors (B, M, D); nothing is kept between levels.

        With `dense` each beam is read once more for a vector of its own; without, all have that of the history.
        """
        vectors, begun = self.read(texts), codes[:, :1, :0]  # (B, 1, 0)

        def last_states() -> Tensor:
            repeated = [part.repeat_interleave(begun.shape[1], 0) for part in (codes, vectors)]
            return self.decode(*repeated, begun.flatten(0, 1))[:, -1].unflatten(0, (len(codes), -1))  # (B, M, D)

        history = last = last_states()
        scores = torch.zeros(len(codes), 1)
        for level, head in enumerate(self.heads):
            last = last if level == 0 else last_states()
            grown = scores[..., None] + head(last).log_softmax(-1)  # (B, M, K)
            scores, best = grown.flatten(1).topk(num_beams, 1)
            parents = (best // self.shape.codes)[..., None].expand(-1, -1, level)
            begun = torch.cat([begun.gather(1, parents), (best % self.shape.codes)[..., None]], 2)
        return begun, last_states() if dense else history.expand(-1, num_beams, -1)


def without_cache(model: COBRA, batch: SequenceBatch, vectors: Tensor, num_beams: int) -> Beams:
    """What `COBRA.generate` answers, by COBRA's own modules, with each beam's whole sequence read at every level."""
    history = batch.history
    whole = model._embed(history, vectors[history])  # (B, T, D)
    stop, rows = whole.shape[1], torch.arange(len(history))[:, None]
    added: Tensor = whole[:, None, :0]  # (B, 1, 0, D)

    def advance(level: int, parents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal added
        token = model.code(codes + level * model.num_codes) + model.token_type.weight[level]
        token = token + model.position.weight[stop + level]
        added = torch.cat([added[rows, parents], token[:, :, None]], 2)  # (B, M, l, D)
        every = whole[:, None].expand(-1, codes.shape[1], -1, -1)
        hidden, _ = model.decoder(torch.cat([every, added], 2).flatten(0, 1))
        state = hidden[:, -1].unflatten(0, codes.shape)
        return (state, state) if level + 1 == model.num_levels else (model.heads[level + 1](state), state)

    assert model.trie is not None
    with torch.no_grad():
        return beam_search(model.trie, model.heads[0](model.decoder(whole)[0][:, -1]), advance, num_beams)


class Work(NamedTuple):
    """Two models with the same weights, and what they are given; no item stands in a batch twice."""

    model: COBRA
    early: COBRA  # takes the dense vector from the history, not after the ID
    learn: SequenceBatch
    ask: SequenceBatch


def build(shape: Shape, folder: Path) -> Work:
    """COBRA on random texts and codes; `folder` keeps its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(shape.vocabulary - 2)}  # [CLS] and padding come on top
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1").save_pretrained(folder)
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(len(words))}" for _ in range(shape.tokens)) for _ in range(shape.catalogue)]
    fields_ = pl.DataFrame({"item_id": [str(i) for i in range(shape.catalogue)], "title": texts})
    none = np.zeros((shape.catalogue + 1, 1), dtype=np.float32)
    catalog = Catalog(fields_, np.ones(shape.catalogue + 1, dtype=np.int64), ItemEmbeddings(none, "random", "none"))
    codes = torch.randint(0, shape.codes, (shape.catalogue + 1, shape.levels))
    codes[0] = 0
    encoder = partial(
        TextItemEncoder,
        fields=("title",),
        max_tokens=shape.tokens,
        num_layers=shape.encoder_layers,
        num_heads=shape.encoder_heads,
        feedforward=shape.feedforward,
        dropout=shape.dropout,
        vocabulary=str(folder),
    )
    decoder = CobraDecoder(
        num_layers=shape.decoder_layers,
        num_heads=shape.decoder_heads,
        feedforward=shape.feedforward,
        dropout=shape.dropout,
        max_items=shape.items + 1,
    )
    ids = SemanticIds(codes, shape.codes, "random", "random")
    objective, search = CobraObjective(temperature=0.2), CobraSearch(num_beams=shape.beams)
    model, early = (
        COBRA(catalog, ids, shape.dim, encoder, CobraTokens(order=order), decoder, objective, search)
        for order in ("cascade", "parallel")
    )
    early.load_state_dict(model.state_dict())
    items = 1 + torch.randperm(shape.catalogue)[: shape.users * shape.items].view(shape.users, -1)
    users, none_seen = torch.arange(shape.users), torch.empty(shape.users, 0, dtype=torch.long)
    learn = SequenceBatch(users, items[:, :-1], items[:, -1:], none_seen)
    return Work(model, early, learn, SequenceBatch(users, items, none_seen, none_seen))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Forward, backward, clipping and the optimizer."""
    optimizer.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def in_turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU-seconds of each call; they take turns, so that what else runs on the machine meets all alike."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # memory is allocated and kernels are chosen
    for _ in range(repeats):
        for name, call in calls.items():
            before = time.process_time()
            call()
            spent[name].append(time.process_time() - before)
    return {name: statistics.median(values) for name, values in spent.items()}


def adamw(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=fused)


def table_of(model: COBRA, items: Tensor) -> Tensor:
    """Item vectors (I+1, D) of which those of `items` are read from their texts; the others stay empty."""
    with torch.no_grad():
        table = torch.zeros(model.num_items + 1, model.code.embedding_dim)
        ids = items.unique()
        table[ids] = model.encode_items(ids)
    return table


def training(model: COBRA, plain: Plain, learn: SequenceBatch, repeats: int) -> dict[str, float]:
    """CPU-seconds of a training step and its parts."""
    model.train()
    plain.train()
    codes, texts = model.codes[learn.sequence], model.item_encoder.tokens[learn.sequence]
    optimizers = [adamw(model, True), adamw(model, False), adamw(plain, False)]

    def loss() -> Tensor:
        return torch.stack(list(model.losses(learn).values())).sum()

    calls: dict[str, Callable[[], object]] = {
        "step": lambda: step(model, optimizers[0], loss),
        "step, AdamW not fused": lambda: step(model, optimizers[1], loss),
        "plain": lambda: step(plain, optimizers[2], lambda: plain.loss(codes, texts)),
        "losses": loss,
        "item encoder": lambda: model.item_encoder(learn.sequence.flatten()),
        "losses and backward": lambda: loss().backward(),
        "clipping": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        "fused AdamW": optimizers[0].step,
    }
    return in_turns(calls, repeats)


def generating(work: Work, plain: Plain, shape: Shape, repeats: int) -> dict[str, float]:
    """CPU-seconds of generation, in the ways that the tables tell apart."""
    model, early, ask = work.model.eval(), work.early.eval(), work.ask
    plain.eval()
    codes, texts, beams = model.codes[ask.history], model.item_encoder.tokens[ask.history], shape.beams
    every = model.item_table()
    found, again = model.generate(ask, every, beams), without_cache(model, ask, every, beams)
    if not torch.equal(found.leaves, again.leaves):
        raise RuntimeError("the yardstick without a cache found other semantic IDs")
    assert model.trie is not None
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: model.generate(ask, table_of(model, ask.history), beams),
        "generate, vector from the history": lambda: early.generate(ask, table_of(early, ask.history), beams),
        "without cache": lambda: without_cache(model, ask, table_of(model, ask.history), beams),
        "plain": lambda: plain.generate(codes, texts, beams, dense=True),
        "plain, vector from the history": lambda: plain.generate(codes, texts, beams, dense=False),
        "item encoder": lambda: table_of(model, ask.history),
        "vectors ready": lambda: model.generate(ask, every, beams),
        "BeamFusion": lambda: beam_fusion(found, model.trie, every, 10),
    }
    return in_turns(calls, repeats)


def operators(call: Callable[[], object]) -> str:
    """The costliest operators of a call, by torch.profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            call()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [f"`{event.key}`", str(event.count // 3), f"{event.self_cpu_time_total / total:.1%}"] for event in events[:12]
    ]
    return markdown_table(["operator", "calls", "share"], rows)


def report(shape: Shape, repeats: int) -> str:
    """Measure everything and write it down."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = build(shape, Path(folder))
    model, plain = work.model, Plain(shape)
    train = training(model, plain, work.learn, repeats)
    answer = generating(work, plain, shape, repeats)
    optimizer, every = adamw(model, True), model.item_table()

    def line(name: str, ours: float, theirs: float, public: str | None) -> list[str]:
        quoted = [f"{PUBLIC[public]}", f"{PUBLIC[public] / ours:.1f}"] if public and shape == Shape() else ["", ""]
        return [name, f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.1f}", *quoted]

    early = "vector from the history"
    compared = [
        line("training step", train["step"], train["plain"], "training step"),
        line("training step, AdamW not fused", train["step, AdamW not fused"], train["plain"], "training step"),
        line(f"generate, {early}", answer[f"generate, {early}"], answer[f"plain, {early}"], "generation"),
        line("generate, a vector a beam", answer["generate"], answer["plain"], "generation"),
        line("the same, yardstick by COBRA's own modules", answer["generate"], answer["without cache"], None),
    ]
    decoding = train["losses"] - train["item encoder"]
    parts = [
        ["training step", "item encoder, forward", train["item encoder"], train["step"]],
        ["", "decoder and losses, forward", decoding, train["step"]],
        ["", "backward", train["losses and backward"] - train["losses"], train["step"]],
        ["", "clipping", train["clipping"], train["step"]],
        ["", "fused AdamW", train["fused AdamW"], train["step"]],
        ["generate", "item encoder", answer["item encoder"], answer["generate"]],
        [
            "",
            "decoder and beams: all there is when item vectors are ready",
            answer["vectors ready"],
            answer["generate"],
        ],
        ["afterwards", "BeamFusion", answer["BeamFusion"], answer["generate"]],
    ]
    code = code_fingerprint()
    settings = ", ".join(f"{field.name} {getattr(shape, field.name)}" for field in fields(shape))
    weights = [sum(p.numel() for p in part.parameters()) for part in (model, plain)]
    return "\n\n".join(
        [
            "# What COBRA's training step and decoding cost",
            f"Written by `{shlex.join(['python', *sys.argv])}`.",
            f"Shape: {settings}. Weights: COBRA {weights[0]:,}, yardstick {weights[1]:,}.",
            f"CPU-seconds of the process, median of {repeats} repeats in turns. The yardstick is the same shape in "
            "`torch.nn` layers: texts read whole and mean-pooled, attention to an empty memory, AdamW as it comes, "
            "sequences of all beams read again at every level. `public` are the CPU-seconds quoted for "
            "phonism/genrec, measured elsewhere. No item stands in a batch twice and no text repeats, so nothing is "
            "saved by reading an item once. Generation reads the texts of the histories.",
            "The public implementation takes the dense vector of all beams from the history; so does the third row "
            "(`tokens.order: parallel`). COBRA reads each beam's ID before its vector, which is one pass more: the "
            "last two rows, where the yardstick makes that pass too.",
            markdown_table(["what", "COBRA", "yardstick", "times less", "public", "times less"], compared),
            "## Where the time goes",
            markdown_table(
                ["of", "part", "CPU-seconds", "share"],
                [[of, part, f"{spent:.3g}", f"{spent / whole:.1%}"] for of, part, spent, whole in parts],
            ),
            "Operators of a training step (torch.profiler, own time):",
            operators(lambda: step(model.train(), optimizer, lambda: sum(model.losses(work.learn).values()))),  # type: ignore[arg-type,return-value]
            "Operators of generation with item vectors ready:",
            operators(lambda: model.eval().generate(work.ask, every, shape.beams)),
            f"Machine: {cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
            f"{platform.python_version()}. Code: {code['version']} {code['commit']} {(code['sha256'] or '')[:12]}.",
        ]
    )


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("experiments/results/cobra_speed.md"))
    given = vars(parser.parse_args())
    output, repeats = given.pop("output"), given.pop("repeats")
    keep_freed_memory()  # as `recsys fit` does on a CPU; the yardstick has it too
    written = report(Shape(**given), repeats)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(written + "\n")
    sys.stdout.write(output.read_text())


if __name__ == "__main__":
    main()
