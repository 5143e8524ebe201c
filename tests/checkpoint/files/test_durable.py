"""A file is wholly old or wholly new."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from hf_lifecycle.checkpoint.files.durable import make_directories, sync_parents, write_atomically


def test_a_new_file_has_the_content_and_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.pt", lambda file: file.write(b"new"))
    finally:
        os.umask(before)
    assert (tmp_path / "a.pt").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), KeyboardInterrupt()]
)
def test_a_writer_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    target = tmp_path / "a.pt"
    target.write_bytes(b"old")

    def writer(file):
        file.write(b"half of the n")
        raise fault

    with pytest.raises(type(fault)) as caught:
        write_atomically(target, writer)
    assert caught.value is fault
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_an_error_of_the_disk_names_the_file_and_not_the_temporary_one(tmp_path):
    def writer(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a.pt", writer)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: {str(tmp_path / 'a.pt')!r}"


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "no" / "a.pt", lambda file: file.write(b"x"))
    assert caught.value.filename == str(tmp_path / "no" / "a.pt")


def test_a_link_stays_and_the_file_it_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real" / "a.pt")
    write_atomically(tmp_path / "link.pt", lambda file: file.write(b"1"))
    write_atomically(tmp_path / "link.pt", lambda file: file.write(b"2"))
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real" / "a.pt").read_bytes() == b"2"
    assert os.listdir(tmp_path / "real") == ["a.pt"]


def test_a_reader_keeps_the_old_file_while_a_new_one_takes_its_place(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"old")
    with open(tmp_path / "a.pt", "rb") as reader:
        write_atomically(tmp_path / "a.pt", lambda file: file.write(b"new"))
        assert reader.read() == b"old"


def test_a_folder_or_a_pipe_is_not_replaced(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder.pt", lambda file: file.write(b"x"))
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(tmp_path / "pipe.pt", lambda file: file.write(b"x"))
    assert sorted(os.listdir(tmp_path)) == ["folder.pt", "pipe.pt"]


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path):
    target = tmp_path / ("n" * 252 + ".pt")
    write_atomically(target, lambda file: file.write(b"x"))
    assert target.read_bytes() == b"x"


def test_folders_are_made_and_those_there_are_left(tmp_path):
    make_directories(tmp_path / "a" / "b")
    make_directories(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_every_folder_above_a_directory_is_flushed_whoever_made_it(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    (tmp_path / "a" / "b" / "run").mkdir(parents=True)  # as Trainer makes it
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    sync_parents(tmp_path / "link" / "run")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(flushed)


def test_folder_that_cannot_be_flushed_is_a_warning_alone(tmp_path, monkeypatch, caplog):
    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    sync_parents(tmp_path / "run")
    assert "could not be flushed" in caplog.text
