"""Whole files: nothing half written, nothing left behind, links and permissions as the user expects."""

import errno
import os
import stat
import threading

import pytest

from fastsched.sampling import files
from fastsched.sampling.files import check_writable, write_whole


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"one", b"another"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path, exists):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to("real.json")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    for name in ("a.json.unfinished", ".a.json.unfinished", "a.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "a.json", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_are_those_of_a_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    errors, whole = [], {bytes([n]) * 10_000 for n in range(8)}

    def write(data):
        try:
            for _ in range(20):
                write_whole(tmp_path / "a", data)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in whole]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / "a").read_bytes() in whole
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="create it first"):
        check_writable(tmp_path / "no" / "such" / "file")
    check_writable(tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_devices_are_written_to_directly():
    write_whole(os.devnull, b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
