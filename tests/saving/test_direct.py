"""Files come out as they were written, whatever the pieces; what the disk refuses is told with the file's name."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from hf_lifecycle.saving.files import descriptors, direct
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.snapshots.memory import host_memory


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    made = Blocks(block=1 << 16)
    yield made
    made.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1_000_003])
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_bytes_size_and_digest_are_what_was_written(blocks: Blocks, tmp_path: Path, size: int, piece: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    with blocks.file(tmp_path / "file") as file:
        for begin in range(0, size, piece):
            file.write(data[begin : begin + piece])
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert file.size == size
    assert file.xxh3_128 == xxhash.xxh3_128_hexdigest(data.tobytes())


@pytest.mark.parametrize("size", [0, 1, 4097, (1 << 19) - 1, 1 << 19, (1 << 19) + 1, 2_000_003])
@pytest.mark.parametrize("piece", [1000, 70_000, 1 << 20])
def test_what_lies_in_an_image_is_written_and_digested_as_it_is_elsewhere(
    blocks: Blocks, tmp_path: Path, size: int, piece: int
) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    image = host_memory(-(-size // 4096) * 4096 + 4096)[0].numpy()
    image[:] = 7  # of the save before
    with blocks.file(tmp_path / "file", image) as file:
        for number, begin in enumerate(range(0, size, piece)):
            part = data[begin : begin + piece]
            if number % 3:  # it lies at its place already
                image[begin : begin + part.size] = part
                part = image[begin : begin + part.size]
            file.write(part)
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert file.size == size
    assert file.xxh3_128 == xxhash.xxh3_128_hexdigest(data.tobytes())


def test_file_that_is_there_is_not_overwritten(blocks: Blocks, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError), blocks.file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_failed_write_names_the_file_and_the_blocks_go_on(
    blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised, blocks.file(tmp_path / "optimizer.pt") as file:
        file.write(b"x" * (10 << 16))
    assert raised.value.filename == str(tmp_path / "optimizer.pt")
    monkeypatch.undo()
    with blocks.file(tmp_path / "next") as file:
        file.write(b"y" * 100_000)
    assert (tmp_path / "next").read_bytes() == b"y" * 100_000


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("of a library"), KeyboardInterrupt()])
@pytest.mark.parametrize("in_image", [False, True])
def test_whatever_fails_in_the_thread_of_the_blocks_is_raised_and_the_blocks_go_on(
    error: BaseException, in_image: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, found = Blocks(block=1 << 16), list[BaseException]()
    image = host_memory(1 << 20)[0].numpy() if in_image else None

    def fail(descriptor: int, data: Any) -> None:
        raise error

    def write() -> None:
        try:
            with blocks.file(tmp_path / "file", image) as file:
                file.write(b"x" * (10 << 16))
        except BaseException as raised:  # noqa: BLE001 - it is compared below
            found.append(raised)

    with monkeypatch.context() as patch:
        patch.setattr(direct, "write_whole", fail)
        writing = threading.Thread(target=write, daemon=True)  # so that one that waits for ever fails the test alone
        writing.start()
        writing.join(10)
        assert not writing.is_alive()
    assert found == [error]
    with blocks.file(tmp_path / "next") as file:
        file.write(b"y" * 300_000)
    blocks.close()
    assert (tmp_path / "next").read_bytes() == b"y" * 300_000


def test_error_between_two_writes_leaves_the_blocks_usable(blocks: Blocks, tmp_path: Path) -> None:
    for _ in range(5):  # a block that was lost would be missed by the third
        with pytest.raises(ZeroDivisionError), blocks.file(tmp_path / "file") as file:
            file.write(b"x" * (100 // (len(b"x") - 1)))
        (tmp_path / "file").unlink()


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_file_system_without_direct_writes_is_said_once(
    refuses: str, blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no direct writes here at all")
    import fcntl

    real_open, real_write = os.open, os.write

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def write(descriptor: int, data: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    monkeypatch.setattr(descriptors, "_said", threading.Event())
    monkeypatch.setattr(direct.os, refuses, open_ if refuses == "open" else write)
    with caplog.at_level(logging.DEBUG, "hf_lifecycle"):
        for name in "ab":
            with blocks.file(tmp_path / name) as file:
                file.write(b"z" * 300_001)
    assert (tmp_path / "b").read_bytes() == b"z" * 300_001
    assert caplog.text.count("no direct writes") == 1
