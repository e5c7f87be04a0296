"""`recsys append`."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch

from recsys_lightning.cli.audit import open_run, run_folder
from recsys_lightning.cli.messages import while_running
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.collisions import append
from recsys_lightning.semantic_ids.health import describe
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, tokenize
from recsys_lightning.training.checkpoints import trained_model
from recsys_lightning.training.tokenizer import FILE_NAME, TokenizerModule

# Share of the known items that the tokenizer must still give their old codes, but for the last, which a policy of
# collisions may have changed: fewer, and their embeddings are not those that it was trained on.
SAME_ITEMS = 0.99

_HELP = f"""usage: recsys append RUN --output FILE [options]

Give the items of a catalogue that has grown their semantic IDs, without training anything: items that are known keep
theirs to the digit, new ones get what the tokenizer makes of their texts, kept from colliding as the run's policy says.
RUN is the folder of a tokenizer that `recsys fit` wrote; the new data are named like those of any run.

options, given after RUN:
  -h, --help            show this text
  --output FILE         the new table, a .safetensors file
  --semantic_ids FILE   the table that is appended to (default: RUN/{FILE_NAME})
  --ckpt_path PATH      the checkpoint: best, last or a file (default: best)
  --KEY VALUE           change any other setting, such as --data.raw_dir DIR
"""


def run(arguments: Sequence[str]) -> None:
    """Append a catalogue's new items to a table, and say what became of it.

    Raises:
        InputError: there is no such run or table, or the embeddings of the known items have changed.
    """
    words = list(arguments[1:])
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP)
        return
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    if len(names) != 1:
        raise InputError("append: name one run folder, before any options; see `recsys append --help`")
    output, words = _taken("--output", words[1:])
    known, options = _taken("--semantic_ids", words)
    if output is None or output.suffix != ".safetensors":
        raise InputError("append: --output FILE is missing, or is no .safetensors file; see `recsys append --help`")
    folder = run_folder(names[0])
    opened = open_run(folder, options)
    if not isinstance(opened.module, TokenizerModule):
        raise InputError(f"append: {folder} holds no tokenizer; name the run that made the semantic IDs")
    table = SemanticIds.load(known or folder / FILE_NAME)
    try:
        opened.data.prepare_data()
        opened.data.setup()
        catalog = opened.data.catalog
        tokenizer = trained_model(opened.module, catalog, opened.checkpoint)
        old, new = _known_items(table, catalog)
        grown = appended(opened.module, tokenizer, table, catalog, old)  # type: ignore[arg-type]
    except Exception as error:
        line = while_running(error)
        if line is None:
            raise
        raise InputError(f"{folder}: {line}") from error
    grown.save(output)
    gone = table.num_items - int((old > 0).sum())
    sys.stdout.write(
        f"{int((old > 0).sum())} items keep their semantic IDs, {new} are new, {gone} are no longer there\n"
        f"{describe(grown.collision_report())}\n"
        + (_wider(table, grown) if grown.num_codes > table.num_codes else "")
        + f"written to {output}\n"
    )


def appended(
    module: TokenizerModule, tokenizer: ItemTokenizer, table: SemanticIds, catalog: Catalog, known: torch.Tensor
) -> SemanticIds:
    """The table of a catalogue, in which the items that `table` knows have their codes from there.

    Args:
        module: of the run that made the table; its policy of collisions holds for the new items too.
        tokenizer: of that run, trained.
        table: with raw ids.
        catalog: with embeddings by the same encoder.
        known: (I+1,) item ids in the table of the catalogue's items, 0 for new ones and padding.

    Raises:
        InputError: the table knows no raw ids, none of its items is in the catalogue, or the tokenizer no longer gives
            them their codes.
    """
    if table.item_ids is None:
        raise InputError("the semantic IDs hold no raw item ids, by which known items are found; make them anew")
    if not bool(known.any()):
        raise InputError("none of the items that have semantic IDs is in these data: is this the catalogue that grew?")
    _check_same_embeddings(tokenizer, table, catalog, known)
    embeddings = catalog.text_embeddings()
    fingerprint = catalog.text_fingerprint
    return append(module.collisions, tokenizer, embeddings, table, known, fingerprint, catalog.fields)


def _known_items(table: SemanticIds, catalog: Catalog) -> tuple[torch.Tensor, int]:
    """(I+1,) item ids in the table of the catalogue's items, 0 for new ones and padding, and how many are new."""
    number = {raw: position for position, raw in enumerate(table.item_ids or (), 1)}
    known = torch.tensor([0, *(number.get(raw, 0) for raw in catalog.raw_ids)])
    return known, int((known[1:] == 0).sum())


def _check_same_embeddings(tokenizer: ItemTokenizer, table: SemanticIds, catalog: Catalog, known: torch.Tensor) -> None:
    now = tokenize(tokenizer, catalog.text_embeddings(), "", "", catalog.fields)
    levels = max(1, tokenizer.num_levels - 1)
    old = known.nonzero()[:, 0]
    same = (now.codes[old, :levels] == table.codes[known[old], :levels]).all(-1).float().mean()
    if same < SAME_ITEMS:
        raise InputError(
            f"the tokenizer gives only {float(same):.1%} of the known items the codes they have: their embeddings have "
            "changed, with the encoder or with the texts that it was fitted on; train a new tokenizer instead"
        )


def _wider(table: SemanticIds, grown: SemanticIds) -> str:
    return (
        f"there are {grown.num_codes} codes a level now, before {table.num_codes}: a model trained on the old table "
        "must be trained anew\n"
    )


def _taken(option: str, words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of an option, given as one word or as two, and the other words."""
    rest, value, expecting = [], None, False
    for word in words:
        if expecting:
            value, expecting = Path(word), False
        elif word == option:
            expecting = True
        elif word.startswith(f"{option}="):
            value = Path(word.partition("=")[2])
        else:
            rest.append(word)
    if expecting:
        raise InputError(f"append: {option} needs a file; see `recsys append --help`")
    return value, rest
