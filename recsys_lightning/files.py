"""Files that are whole or absent, whenever the process dies."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write to a file that takes the place of `path` when the block ends, in one step and for good.

    Until then, and if the block raises, whatever was at `path` stays as it was. A reader sees the old file or the new
    one, never a part of either; so do processes that write the same file at once, of which the last wins. When the
    block has ended, the file and its name outlive a power cut. A link at `path` is replaced, not followed.

    Args:
        path: the target; its folder must exist.

    Raises:
        OSError: the file cannot be written; there is nothing new at `path` or beside it.
    """
    # In the target's own folder, since a rename is atomic within one file system only; each writer has his own name.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: a new name for bytes not yet on disk could outlive them
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut: new files, renamed and removed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
