"""The leakage audit's checks of models: what they are built from, what they minimise, and where semantic IDs are from.

A model is built from the catalogue as it is and from that of data whose held-out answers are other items, with the same
weights and the same random numbers. Whatever it takes from the catalogue, negatives and their weights included, its
losses and gradients must then be the same to the last bit.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recsys_lightning.analysis.audit_check import Check, not_checked, verdict
from recsys_lightning.analysis.audit_data import Batch
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.semantic_ids.collisions import Policy, resolve
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, tokenize
from recsys_lightning.training import checkpoints
from recsys_lightning.training.checkpoints import Build, Learner, State

SAME_CODES = 0.999  # share of items whose codes must be found again; rounding may move one on the edge of two cells


def load_weights(model: Learner, state: State) -> None:
    """Load a checkpoint's weights, but leave the model the facts that its catalogue gave it.

    Raises:
        InputError: they are the weights of another model.
    """
    checkpoints.load_weights(model, state, keep=_facts(model))


def check_catalogue_facts(model: Recommender, state: State) -> Check:
    """Buffers of the checkpoint that are facts of the catalogue are those of a model built anew from the catalogue."""
    name, facts, buffers = "facts in the checkpoint", _facts(model), dict(model.named_buffers())
    kept = set(model.state_dict())
    unnamed = sorted((kept & set(buffers)) - set(facts))
    problems = []
    for fact in facts:
        if fact not in state:
            problems.append(f"the checkpoint holds no {fact}")
        elif state[fact].shape != buffers[fact].shape:
            problems.append(
                f"{fact} is {tuple(state[fact].shape)}, a model built anew has {tuple(buffers[fact].shape)}"
            )
        else:
            wrong = int((state[fact] != buffers[fact]).sum())
            if wrong:
                total = buffers[fact].numel()
                problems.append(f"{wrong:,} of {total:,} values of {fact} are not those of a model built anew")
    if not facts and unnamed:
        return not_checked(name, f"{type(model).__name__} does not say whether it learns {', '.join(unnamed)}")
    learned = f"; learned, so not compared: {', '.join(unnamed)}" if unnamed else ""
    passed = f"{', '.join(facts)} as in a model built anew" if facts else f"{type(model).__name__} keeps none"
    return verdict(name, problems, passed + learned, {"facts": len(facts)})


def check_losses(build: Build, clean: Catalog, changed: Catalog, state: State, batches: Sequence[Batch]) -> Check:
    """A model's construction, losses and gradients do not change with the held-out answers.

    Args:
        build: makes the model.
        clean: the catalogue.
        changed: that of data in which every held-out answer is another item.
        state: the checkpoint's weights, loaded into both models.
        batches: training batches, given to both.
    """
    name = "negatives and losses"
    traces = [_trace(build, catalog, state, batches) for catalog in (clean, changed)]
    differing = _differing(*traces)
    if differing and _differing(traces[0], _trace(build, clean, state, batches)):
        return not_checked(name, "losses cannot be repeated on this machine, not even on the same data")
    figures = {kind: sum(key.startswith(kind) for key in traces[0]) for kind in ("built", "loss", "gradient")}
    shown = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    problems = [f"{shown} change with the held-out items"] if differing else []
    passed = (
        f"{figures['built']} parameters and buffers, {figures['loss']} losses of {len(batches)} batches and "
        f"{figures['gradient']} gradients do not change with the held-out items"
    )
    return verdict(name, problems, passed, figures)


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def _trace(build: Build, catalog: Catalog, state: State, batches: Sequence[Batch]) -> dict[str, str]:
    """Digests of a model as it is built, of its losses, and of the gradients of the first batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(catalog)
        found = {f"built {key}": _digest(value) for key, value in _tensors(model).items()}
        load_weights(model, state)
        model.train()
        for number, batch in enumerate(batches, 1):
            torch.manual_seed(number)
            losses = model.losses(batch)  # type: ignore[arg-type] # the data module's batches are the model's
            found |= {f"loss {key} of batch {number}": _digest(value) for key, value in losses.items()}
            if number == 1 and losses:
                torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
                gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
                found |= {f"gradient of {k}": _digest(grad) for k, grad in gradients.items() if grad is not None}
                model.zero_grad()
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(values)).hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def _facts(model: Learner) -> tuple[str, ...]:
    return model.catalogue_facts if isinstance(model, Recommender) else ()


def check_texts(clean: Catalog, changed: Catalog) -> Check:
    """The item embeddings are a matter of item texts alone."""
    problems = []
    if clean.text_fingerprint != changed.text_fingerprint:
        problems.append("their fingerprint changes with the held-out items")
    if not torch.equal(clean.text_embeddings(), changed.text_embeddings()):
        problems.append("the embeddings change with the held-out items")
    passed = f"{clean.num_items:,} text embeddings do not change with the held-out items"
    return verdict("item texts", problems, passed, {"items": clean.num_items, "width": clean.text_width})


def check_semantic_ids(
    table: SemanticIds,
    catalog: Catalog,
    tokenizer: ItemTokenizer | None,
    why_not: str = "",
    collisions: Policy = "none",
) -> Check:
    """The semantic IDs are what their tokenizer makes of the item texts, and nothing else.

    Args:
        table: the semantic IDs.
        catalog: with the text embeddings they should come from.
        tokenizer: the trained tokenizer that should have made them; None if there is none to ask.
        why_not: the reason for that.
        collisions: what its run does about them.
    """
    name = "semantic IDs"
    if table.embeddings_fingerprint != catalog.text_fingerprint:
        ours, theirs = catalog.text_fingerprint[:12], table.embeddings_fingerprint[:12]
        return verdict(name, [f"they come from embeddings {theirs}, the catalogue's texts have {ours}"], "")
    if table.num_items != catalog.num_items:
        return verdict(name, [f"they are of {table.num_items:,} items, the catalogue has {catalog.num_items:,}"], "")
    if tokenizer is None:
        return not_checked(name, f"they name the catalogue's text embeddings as their origin, but {why_not}")
    embeddings = catalog.text_embeddings()
    raw = tokenize(tokenizer, embeddings, table.embeddings_fingerprint, "", catalog.fields)
    again = resolve(collisions, tokenizer, embeddings, raw).table
    if again.codes.shape != table.codes.shape:
        shapes = f"{again.num_levels} codes an item, the table has {table.num_levels}"
        return verdict(name, [f"their tokenizer makes {shapes}"], "")
    equal = int((again.codes[1:] == table.codes[1:]).all(1).sum())
    share = equal / table.num_items
    line = f"the tokenizer's checkpoint makes the same codes of {equal:,} of {table.num_items:,} item texts"
    figures = {"items": table.num_items, "same_codes": equal, "share": share}
    return verdict(name, [] if share >= SAME_CODES else [line], f"{line} ({share:.2%})", figures)
