"""Whole files: nothing half written, nothing left behind, links and permissions as the user expects."""

import errno
import os
import stat
import threading

import pytest
import torch
from safetensors.torch import save_file

import fastsched as fs
from fastsched.measurement.to_file import measure_to_file
from fastsched.sampling import files
from fastsched.sampling.files import absolute_file, check_writable, write_whole


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
    with pytest.raises(OSError, match=r"No space left on device: .*a\.bin"):
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


def test_simultaneous_writers_do_not_collide(tmp_path):
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
    with pytest.raises(FileNotFoundError, match="create it first"):
        check_writable(tmp_path / "missing" / ".." / "file")  # could be written to, but not read again
    check_writable(tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_devices_are_written_to_directly():
    write_whole(os.devnull, b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_pipe_is_written_to_if_it_is_read_and_refused_if_not(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"no program reads this pipe.*pipe"):
        write_whole(path, b"x")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(path, b"y")
        assert os.read(reader, 9) == b"y"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(os.stat(path).st_mode)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system has no names for open pipes")
def test_open_pipes_are_written_to_by_their_names():
    reader, writer = os.pipe()
    try:
        check_writable(f"/dev/fd/{writer}")  # as the shell names the pipe of >(command)
        write_whole(f"/dev/fd/{writer}", b"y")
        assert os.read(reader, 9) == b"y"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_link_to_itself_is_left_alone(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for act in (check_writable, lambda path: write_whole(path, b"x")):
        with pytest.raises(OSError, match="a link that leads back to itself"):
            act(tmp_path / "a")
    assert os.readlink(tmp_path / "a") == "b"


@pytest.mark.parametrize("load", [fs.Schedule.load, fs.PathStatistics.load])
def test_only_regular_files_are_read(load, tmp_path):
    """A pipe would be waited for, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to zero").symlink_to("/dev/zero")
    for name in ("pipe", "link to zero"):
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder; name a s"):
        load(tmp_path)
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0)
    with pytest.raises(ValueError, match="pipe is no regular file"):
        fs.measure(denoiser, (3,), levels=8, samples=1, checkpoint=tmp_path / "pipe", progress=False)


def test_no_file_replaces_one_of_another_kind(tmp_path):
    denoiser = fs.Denoiser.from_denoiser(fs.oracles.Gaussian(0.5, (3,)).denoise, 0.01, 9.0)
    options = {"levels": 12, "samples": 2, "model_calls": 90, "progress": False, "checkpoint": tmp_path / "fit"}
    schedule = fs.fit(denoiser, (3,), 3, **options)
    for name in ("fit", "fit.runs"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ValueError, match=r"path must not be that of (statistics|runs), which .*fit"):
            schedule.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    (tmp_path / "s.json").write_text("another program's")
    for _ in range(2):
        schedule.save(tmp_path / "s.json")
    assert fs.Schedule.load(tmp_path / "s.json") == schedule
    stats = fs.PathStatistics.load(tmp_path / "fit")
    compared = fs.compare(denoiser, {"fit": schedule}, shape=(3,), samples=2, progress=False)
    for write in (stats.save, compared.to_csv):
        with pytest.raises(ValueError, match=r"path must not be that of a schedule, which .*s\.json"):
            write(tmp_path / "s.json")
    assert fs.Schedule.load(tmp_path / "s.json") == schedule


@pytest.mark.parametrize("missing", [os.R_OK, os.W_OK])
def test_a_protected_file_is_left_alone(missing, tmp_path, monkeypatch):
    """The folder's permissions allow to replace it, and what it holds may not be known."""
    path, access = tmp_path / "protected", os.access
    path.write_bytes(b"precious")
    denied = lambda name, mode: not (str(name) == str(path) and mode & missing) and access(name, mode)
    monkeypatch.setattr(os, "access", denied)  # everything is allowed to root, who may run the tests
    for act in (check_writable, lambda path: write_whole(path, b"x"), fs.Schedule([1.0, 0.0], "ddim", "ve").save):
        with pytest.raises(PermissionError, match=r"no permission to read and replace this file: .*protected"):
            act(path)
    assert path.read_bytes() == b"precious"
    assert [each.name for each in tmp_path.iterdir()] == ["protected"]


@pytest.mark.parametrize("load", [fs.Schedule.load, fs.PathStatistics.load])
def test_a_file_that_cannot_be_read_is_not_called_damaged(load, tmp_path, monkeypatch):
    """The advice for a damaged file is to make it again, which may take hours."""
    path, usual = tmp_path / "whole", open
    path.write_bytes(b"{}")

    def broken(name, *arguments, **options):
        if str(name) == str(path):
            raise OSError(errno.EIO, "Input/output error")  # a read error has no file name
        return usual(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*whole"):
        load(path)


@pytest.mark.parametrize("form", ["safetensors", "with metadata", "zip", "pickle"])
def test_no_file_replaces_the_weights_of_a_network(form, tmp_path):
    """A statistics file has the ending of such weights, and often the model's name."""
    file = tmp_path / "model.safetensors"
    weights = {"layer": torch.ones(3)}
    if form in ("safetensors", "with metadata"):
        save_file(weights, file, metadata={"tags": "x" * 20_000} if form == "with metadata" else None)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
    before, asked = file.read_bytes(), []
    denoiser = fs.Denoiser.from_denoiser(lambda z, s: asked.append(1) or z / (1 + s[:, None] ** 2), 0.01, 9.0)
    stats = fs.measure(denoiser, (3,), levels=12, samples=2, progress=False)
    asked.clear()
    for write in (
        stats.save,
        fs.optimal_schedule(stats, 3).save,
        lambda path: measure_to_file(denoiser, (3,), path, levels=12, samples=2, progress=False, overwrite=True),
    ):
        with pytest.raises(ValueError, match=r"path must not be that of the weights of a network, which .*model"):
            write(file)
    assert file.read_bytes() == before
    assert not asked


def test_a_file_far_larger_than_a_schedule_is_not_read(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    with pytest.raises(ValueError, match=r"huge\.json is larger than"):
        fs.Schedule.load(tmp_path / "huge.json")


def test_a_name_that_no_file_can_have_is_known_before_the_calls(tmp_path):
    calls = []
    network = lambda z, s: calls.append(s) or fs.oracles.Gaussian(0.5, (3,)).denoise(z, s)
    denoiser = fs.Denoiser.from_denoiser(network, 0.01, 9.0)
    with pytest.raises(OSError, match="name too long"):
        fs.measure(denoiser, (3,), levels=8, samples=1, checkpoint=tmp_path / ("x" * 256), progress=False)
    assert calls == []


@pytest.mark.parametrize("name", ["x" * 255, "\u540d" * 85])
def test_the_longest_names_are_written(tmp_path, name):
    check_writable(tmp_path / name)
    write_whole(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_a_path_must_be_text():
    """As of `os.scandir(b".")`: the parts of a name are joined to text."""

    class Named:
        def __fspath__(self):
            return b"schedule.json"

    for action in (fs.Schedule([1.0, 0.0], "ddim").save, fs.Schedule.load, fs.PathStatistics.load):
        with pytest.raises(TypeError, match="path must be the path of a file as text"):
            action(Named())


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a current folder")
@pytest.mark.parametrize("write", [lambda path: write_whole(path, b"{}"), check_writable, absolute_file])
def test_a_file_in_a_removed_current_folder_is_named(tmp_path, monkeypatch, write):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match=r"schedule\.json"):
        write("schedule.json")
