"""The file at fault is told where the error does not tell it, and looking for it never fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle.checkpoint.files.write_errors import cause_in_words, file_at_fault


def test_torn_archive_is_the_file(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "scheduler.pt")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "optimizer.pt").write_bytes(b"PK\x03\x04 and no directory")
    assert file_at_fault(RuntimeError("inline_container.cc"), tmp_path) == "optimizer.pt"
    assert file_at_fault(OSError(28, "No space left on device", "a.json"), tmp_path) is None
    assert file_at_fault(ValueError("not a matter of writing"), tmp_path) is None  # whoever is writing that file


def test_error_that_hides_what_the_disk_said_is_told_in_words() -> None:
    assert "is the disk full" in cause_in_words(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
    )
    assert cause_in_words(OSError(28, "No space left on device")) == ""
    assert cause_in_words(RuntimeError("File too large (os error 27)")) == ""
    assert cause_in_words(ValueError("not a matter of writing")) == ""


def test_folder_that_another_rank_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "staged"
    (folder / "part").mkdir(parents=True)
    scan = os.scandir

    def removed_in_between(path: Any = ".") -> Iterator[Any]:
        entries = scan(path)
        if not isinstance(path, int) and Path(path) == folder:
            with entries:
                found = list(entries)
            shutil.rmtree(folder)
            return _Entries(found)
        return entries

    monkeypatch.setattr(os, "scandir", removed_in_between)
    assert file_at_fault(OSError(28, "No space left on device"), folder) is None
    assert not folder.exists()


class _Entries(list[Any]):
    def __enter__(self) -> Iterator[Any]:
        return iter(self)

    def __exit__(self, *error: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def __next__(self) -> Any:
        if not self:
            raise StopIteration
        return self.pop(0)
