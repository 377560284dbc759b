"""Hugging Face datasets: saved folders, parquet and arrow files, and the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l3m_like.core.errors import UserError, did_you_mean
from l3m_like.data.columns import Columns, undecoded
from l3m_like.data.paths import DataMissing, resolve

if TYPE_CHECKING:
    from datasets import Dataset

FILES = (".parquet", ".arrow")


class HFDataset:
    """Rows of a Hugging Face dataset, in its order. Images, audio and video are not decoded: their values are the bytes.

    Args:
        path: a folder made by ``save_to_disk``, ``.parquet`` or ``.arrow`` files (a pattern, see
            ``l3m_like.data.paths.resolve``), or the name of a dataset on the hub, which is downloaded. Parquet is converted to
            arrow in the cache of Hugging Face.
        split: of a folder or name that has several. May be left out where there is one.
        name: of the dataset's configuration, on the hub.
        where: ``{column: value}``: only the rows with these values; a class may be given by its name.
        columns: ``{name: column}``: what a sample holds (see ``l3m_like.data.columns``), e.g. ``{png: image, cls: label}``. Other
            columns are not read. None: all columns under their own names.

    The dataset is opened by the first ``len()``; ``read`` may then be called from any thread.

    Raises (by ``len``):
        DataMissing: it is not on this machine and cannot be downloaded. UserError: no such split or column; ``where`` selects
            nothing; a damaged file.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        name: str | None = None,
        where: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        if name is not None and _is_local(path):
            raise UserError(f"name: '{name}' is a configuration on the hub, but path: '{path}' is on this machine. Remove it.")
        self.path = path
        self.split = split
        self.name = name
        self.where = dict(where or {})
        self.columns = Columns(columns)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> dict[str, Any]:
        """Row ``index`` as ``{column: value}``, or what ``columns`` makes of it."""
        (row,) = self._table[int(self._rows[index])].to_pylist()
        return self.columns({name: undecoded(value) for name, value in row.items()})

    def reference(self, index: int) -> str:
        """``NAME#ROW`` or ``NAME/SPLIT#ROW``, rows of the dataset (all of them) counted from 0."""
        place = Path(self.path).name if _is_local(self.path) else self.path
        return f"{place}{'' if self.split is None else f'/{self.split}'}#{self._rows[index]}"

    @cached_property
    def _dataset(self) -> Dataset:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"path: '{self.path}' needs the package `datasets` ({error}). Run: pip install datasets") from error
        try:
            made = self._open(datasets)
        except UserError:
            raise
        except (ConnectionError, FileNotFoundError) as error:
            raise DataMissing(
                self.path, f"path: the dataset '{self.path}' is not on this machine and cannot be downloaded: {error}"
            ) from error
        except Exception as error:  # of pyarrow and the library, of no common type
            cause = error.__cause__ or error
            raise UserError(f"path: the dataset '{self.path}' cannot be read: {type(cause).__name__}: {cause}") from error
        if isinstance(made, dict):  # a DatasetDict
            if self.split is None and len(made) == 1:
                return next(iter(made.values()))
            if self.split not in made:
                raise UserError(f"split: '{self.path}' has no split '{self.split}'. {did_you_mean(str(self.split), made)}")
            return made[self.split]
        return made

    def _open(self, datasets: Any) -> Any:
        """A Dataset, or the DatasetDict of several splits."""
        if self.path.endswith(FILES):
            if self.split is not None:
                raise UserError(f"split: files have no splits. Remove '{self.split}', or name its files in path.")
            files = [str(file) for file in resolve(self.path)]
            if self.path.endswith(".parquet"):
                return datasets.load_dataset("parquet", data_files=files, split="train")
            return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        folder = Path(os.path.expanduser(self.path))
        if folder.is_dir():
            made = datasets.load_from_disk(str(folder))
            if self.split is not None and not isinstance(made, dict):
                raise UserError(f"split: '{self.path}' has no splits. Remove '{self.split}'.")
            return made
        if _is_local(self.path):
            raise DataMissing(self.path, f"path: nothing at {folder.absolute()}. Put the data there, or give its place.")
        return datasets.load_dataset(self.path, self.name, split=self.split)

    @cached_property
    def _table(self) -> Dataset:
        """The dataset, its rows given as arrow tables, which decode nothing."""
        self.columns.check(self._dataset.column_names)
        table = self._dataset.with_format("arrow")
        if self.columns.names is not None:
            table = table.select_columns(sorted(set(self.columns.names.values())))
        return table

    @cached_property
    def _rows(self) -> np.ndarray:
        """Numbers of the rows that ``where`` selects."""
        rows = np.arange(len(self._table))
        seen = []
        for column, value in self.where.items():
            if column not in self._dataset.column_names:
                raise UserError(f"where: there is no column '{column}'. {did_you_mean(column, self._dataset.column_names)}")
            names = getattr(self._dataset.features[column], "names", None)  # of classes
            if isinstance(value, str) and names:
                if value not in names:
                    raise UserError(f"where: '{column}' has no class '{value}'. {did_you_mean(value, names)}")
                value = names.index(value)
            values = self._dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
            seen.append(f"{column} is one of {sorted(set(map(str, values)))[:8]}")
            rows = rows[[values[row] == value for row in rows]]
        if not len(rows):
            raise UserError(
                f"where: {self.where} selects no row of {self.path}. {'; '.join(seen)}" if seen else f"{self.path} is empty."
            )
        return rows


def _is_local(path: str) -> bool:
    """Whether it is a place on this machine and not a name on the hub (``NAME`` or ``OWNER/NAME``)."""
    return path.endswith(FILES) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or Path(path).is_dir()
