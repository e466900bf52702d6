"""Rows of column-wise data: Parquet and Arrow files, save_to_disk folders, and the hub.

Values are taken from Arrow as they are: nothing is decoded, so that a column of images, which is
not wanted here, needs no library for images. Left out: CSV.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2srm.data.json_lines import one_line
from s2srm.data.schema import Row
from s2srm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH_ROWS = 1000
_LFS_POINTER = b"version https://git-lfs"


def read_parquet(file: Path) -> Iterator[Row]:
    """Streamed, so that no second copy of the file is written to a cache."""
    import pyarrow.parquet

    _refuse_pointer(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield from _rows(str(file), parquet.iter_batches(_BATCH_ROWS))
    # The errors of pyarrow and datasets have no common base; none may reach the user as a
    # traceback, and each keeps its text.
    except Exception as error:
        raise UserError(f"{file}: cannot be read as Parquet ({one_line(error)})") from error


def read_arrow(file: Path) -> Iterator[Row]:
    """A file of the Arrow stream, as datasets writes them into its cache."""
    import datasets

    _refuse_pointer(file)
    try:
        yield from _dataset_rows(str(file), datasets.Dataset.from_file(str(file)))
    except Exception as error:
        raise UserError(f"{file}: cannot be read as Arrow ({one_line(error)})") from error


def read_saved(folder: Path) -> Iterator[Row]:
    """What Dataset.save_to_disk wrote."""
    import datasets

    try:
        yield from _dataset_rows(str(folder), datasets.Dataset.load_from_disk(str(folder)))
    except Exception as error:
        raise UserError(
            f"{folder}: was written by save_to_disk and cannot be read ({one_line(error)})"
        ) from error


def read_hub(name: str, split: str, subset: str | None, hint: str = "") -> Iterator[Row]:
    """One split of a hub data set. hint is added to the error of a name that the hub lacks."""
    import datasets

    label = f"{name}[{split}]" if subset is None else f"{name}/{subset}[{split}]"
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    # Hub, HTTP and builder errors have no common base; see read_parquet.
    except Exception as error:
        raise UserError(
            f"data path {name!r} is neither a file or folder here nor a data set of which the hub "
            f"gave split {split!r} ({one_line(error)}){hint}"
        ) from error
    yield from _dataset_rows(label, rows)


def _dataset_rows(source: str, rows: Dataset) -> Iterator[Row]:
    return _rows(source, rows.with_format("arrow").iter(_BATCH_ROWS))


def _rows(source: str, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for data in batch.to_pylist():
            yield Row(source, f" row {number}", data=data)
            number += 1


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{file} is a pointer of Git LFS and not the data; run `git lfs pull`")
