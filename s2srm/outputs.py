"""Whether a folder or file can be written, asked before anything heavy, and said in one line.

Nothing is left behind, so that a run that is refused for another reason has made no folder. Left
out: how much space there is. A disk that fills up later is one line as well (`writing`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from s2srm.errors import UserError


def reason(error: OSError | ValueError) -> str:
    """`No space left on device`: what the system says, without number and name."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk inside becomes a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written: {reason(error)}") from error
    except Exception as error:
        # safetensors and tokenizers (Rust) pass on the system's errors in classes of their own.
        if "(os error " not in str(error):
            raise
        raise UserError(f"{path} cannot be written: {error}") from error


def probe_folder(key: str, folder: Path) -> None:
    """Write a file into the folder, or into the nearest one above it that is there already.

    key is the setting that the error names. UserError if there is something in the way, the name
    cannot be, or nothing can be written.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)
        nearest = next(level for level in (folder, *folder.parents) if os.path.lexists(level))
        if nearest.is_symlink() and not nearest.exists():
            to = os.readlink(nearest)
            raise UserError(f"{key}: {folder}: {nearest} is a link to {to}, which is not there")
        if not nearest.is_dir():
            raise UserError(f"{key}: {folder}: {nearest} is a file, not a folder")
        _write_in(nearest)
    except UserError:
        raise
    except NotADirectoryError as error:
        blocking = next(p for p in folder.parents if os.path.lexists(p) and not p.is_dir())
        raise UserError(f"{key}: {folder}: {blocking} is a file, not a folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder} cannot be written: {reason(error)}") from error


def _write_in(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except FileNotFoundError as error:  # As /proc says it.
        raise OSError(0, f"no file can be made in {folder}") from error


def probe_file(key: str, path: Path) -> None:
    """Whether a file can be made or replaced; UserError as in `probe_folder`."""
    probe_folder(key, path.parent)
    try:
        if path.is_dir():
            raise UserError(f"{key}: {path} is a folder; give the name of a file")
        if path.exists():
            with path.open("ab"):
                pass
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be written: {reason(error)}") from error
