"""Files that are either whole or not there: a temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_atomic", "write_atomic"]


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete.

    What is written goes to a hidden file beside `path`. If the block ends without an error, the data is forced to the
    disk and the file takes its name in one step; otherwise it is removed, and a file that `path` held before stays as
    it was.

    Args:
        path: where the file is to be; its folder must exist. A symbolic link is followed.

    Yields:
        A binary file, open for writing and seeking.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: `path` is a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open_atomic(Path(folder, "a.bin")) as file:
        ...         _ = file.write(b"whole")
        ...     Path(folder, "a.bin").read_bytes(), len(list(Path(folder).iterdir()))
        (b'whole', 1)
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)!r}: it is a folder, a file name is needed")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {os.fspath(path)!r}: its folder does not exist; create it first")
    # Not `tempfile`: its files are readable by their owner only, and the mode would survive the rename.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:  # after the rename there is nothing left to remove
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file at once, or, on any error, nothing.

    Args:
        path: where the file is to be; its folder must exist.
        data: the contents; text is written as UTF-8.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: `path` is a folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder, "a.txt"), "whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open a folder have no need of it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
