"""Files are complete or absent, whatever fails and whenever the process dies."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_unet.errors import BadOutput
from napari_unet.files import atomic
from napari_unet.files.atomic import (
    atomic_folder,
    atomic_path,
    check_writable,
    sweep,
)
from napari_unet.files.outputs import write_labels, write_probabilities

posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def run_script(script: str, *arguments: object) -> dict:
    """Run a script in a process of its own and return the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_file_appears_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_path(target) as part:
        part.write_text("new")
        assert not target.exists()
        assert part.parent == tmp_path
        assert part.name.startswith(".a.txt.")
        assert part.name.endswith(".part")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_any_exception_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write():
        with atomic_path(target) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "not allowed"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "disk reports an error"),
        (errno.EBUSY, "choose another folder"),
    ],
)
def test_system_errors_say_what_to_do(tmp_path, number, words):
    with (
        pytest.raises(BadOutput, match=words) as caught,
        atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert caught.value.exit_code == 4
    assert names(tmp_path) == []


def test_missing_folder_file_in_the_way_and_folder_of_that_name(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, words in [
        ("missing/a.txt", "folder does not exist"),
        ("file/a.txt", "is a file, not a folder"),
        ("folder", "there is a folder of that name"),
        ("n" * 300, "too long"),
    ]:
        with pytest.raises(BadOutput, match=words), atomic_path(tmp_path / path):
            pass
    assert names(tmp_path) == ["file", "folder"]


def test_link_is_replaced_and_its_target_is_not(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with atomic_path(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "name", ["n" * 251 + ".tif", "é" * 120 + ".tif", "🔬" * 62 + ".tif", "a\nb"]
)
def test_long_and_odd_names(tmp_path, name):
    with atomic_path(tmp_path / name) as part:
        part.write_text("new")
        assert len(os.fsencode(part.name)) <= 255
    assert (tmp_path / name).read_text() == "new"
    assert names(tmp_path) == [name]


def test_check_writable(tmp_path, monkeypatch):
    check_writable(tmp_path)
    check_writable(tmp_path / "new.tif")
    (tmp_path / "old.tif").write_text("old")
    check_writable(tmp_path / "old.tif")
    assert names(tmp_path) == ["old.tif"]
    with pytest.raises(BadOutput, match="does not exist"):
        check_writable(tmp_path / "missing" / "new.tif")
    with pytest.raises(BadOutput, match="is a file, not a folder"):
        check_writable(tmp_path / "old.tif" / "new.tif")

    def deny(*_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    # Root ignores the permissions of folders.
    monkeypatch.setattr(atomic.os, "open", deny)
    with pytest.raises(BadOutput, match="read-only"):
        check_writable(tmp_path)


def test_sweep_deletes_only_what_dead_processes_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        host, tail = atomic._host(), "0" * 32 + ".part"
        stale = tmp_path / f".a.tif.{host}-{dead.pid}.{tail}"
        kept = [
            f".a.tif.{host}-{alive.pid}.{tail}",
            f".a.tif.{host}-{os.getpid()}.{tail}",
            # Of another computer that uses the folder: its processes are unknown.
            f".a.tif.{'f' * 8}-{dead.pid}.{tail}",
            ".someone-else.part",
            f"a.tif.{host}-{dead.pid}.{tail}",
            "a.tif",
        ]
        for name in [stale.name, *kept]:
            (tmp_path / name).write_text("")
        assert sweep(tmp_path) == [stale]
        assert names(tmp_path) == sorted(kept)
        # The number of a dead process is given to a new one.
        reused = tmp_path / kept[0]
        os.utime(reused, (1e9, 1e9))
        assert sweep(tmp_path) == [reused]
    finally:
        alive.communicate(b"\n")
    assert sweep(tmp_path / "missing") == []


@posix
def test_sweep_deletes_what_a_process_left_that_nobody_has_buried(tmp_path):
    """Where a batch runs as the first process of a container, its workers stay so."""
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        stale = tmp_path / f".a.tif.{atomic._host()}-{dead.pid}.{'0' * 32}.part"
        stale.touch()
        assert sweep(tmp_path) == [stale]


def test_sweep_deletes_abandoned_folders_and_gives_old_ones_their_name_back(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, tail = atomic._host(), "0" * 32 + ".part"

    def make(name: str, content: str) -> Path:
        folder = tmp_path / name
        (folder / "new" / "0").mkdir(parents=True)
        (folder / "new" / "0" / "chunk").write_text(content)
        return folder

    stale = make(f".a.zarr.{host}-{dead.pid}.{tail}", "half")
    # Died between the two renames: the old image has no name.
    cut = make(f".b.zarr.{host}-{dead.pid}.{tail}", "half")
    (cut / "old" / "b.zarr").mkdir(parents=True)
    (cut / "old" / "b.zarr" / "chunk").write_text("precious")
    # Died after them: the old image is not needed any more.
    late = make(f".c.zarr.{host}-{dead.pid}.{tail}", "")
    (late / "old" / "c.zarr").mkdir(parents=True)
    make("c.zarr", "complete")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("precious")
    link = tmp_path / f".d.zarr.{host}-{dead.pid}.{tail}"
    link.symlink_to(tmp_path / "precious")
    kept = [
        make(f".a.zarr.{host}-{os.getpid()}.{tail}", "being written").name,
        make(f".a.zarr.{'f' * 8}-{dead.pid}.{tail}", "of another computer").name,
        make(f"a.zarr.{host}-{dead.pid}.{tail}", "not ours").name,
    ]
    assert sweep(tmp_path) == sorted([stale, cut, late])
    assert names(tmp_path) == sorted([*kept, "b.zarr", "c.zarr", "precious", link.name])
    assert (tmp_path / "b.zarr" / "chunk").read_text() == "precious"
    assert (tmp_path / "c.zarr" / "new" / "0" / "chunk").read_text() == "complete"
    assert (tmp_path / "precious" / "data").read_text() == "precious"


def test_folder_appears_at_the_end_of_the_block(tmp_path):
    target = tmp_path / ("n" * 250 + ".zarr")
    for content in ["first", "second"]:
        with atomic_folder(target) as part:
            (part / "deep").mkdir()
            (part / "deep" / "file").write_text(content)
            assert content == "second" or not target.exists()
        assert (target / "deep" / "file").read_text() == content
        assert names(tmp_path) == [target.name]

    def fail():
        with atomic_folder(target) as part:
            (part / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "deep" / "file").read_text() == "second"
    (tmp_path / "file").write_text("precious")
    for path, words in [
        ("missing/a", "folder does not exist"),
        ("file", "a file of that name"),
        ("file/a", "is a file, not a folder"),
    ]:
        with pytest.raises(BadOutput, match=words), atomic_folder(tmp_path / path):
            pass
    assert names(tmp_path) == ["file", target.name]


def test_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "old").write_text("old")
    real = os.replace

    def replace(source, target):
        if Path(source).name == "new":
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    with pytest.raises(BadOutput, match="not allowed"):
        with atomic_folder(tmp_path / "a.zarr") as part:
            (part / "new").write_text("new")
    assert names(tmp_path) == ["a.zarr"]
    assert (tmp_path / "a.zarr" / "old").read_text() == "old"


def test_folder_that_several_processes_replace_at_once(tmp_path):
    """As when a worker that was taken for dead ends beside the one that follows it."""
    script = """
    import pathlib, sys
    from napari_unet.files.atomic import atomic_folder

    folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    input()
    for _ in range(300):
        with atomic_folder(folder / "a.zarr") as part:
            for name in "012":
                (part / name).write_text(version)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    writers = [subprocess.Popen([*command, str(i)], **pipes) for i in range(3)]
    for writer in writers:
        assert writer.stdout.readline().strip() == b"ready"
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    for writer in writers:
        told = writer.communicate(timeout=120)[1]
        assert writer.returncode == 0, told
    assert names(tmp_path) == ["a.zarr"]
    written = [(tmp_path / "a.zarr" / name).read_text() for name in "012"]
    assert len(set(written)) == 1
    assert written[0] in "012"


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder by their path."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def put_labels(path: Path, value: int) -> None:
    labels = np.full((2, 64, 64), value, np.uint32)
    write_labels(path, labels, axes="ZYX", pixel_size={}, overwrite=True)


def put_probabilities(path: Path, value: int) -> None:
    values = np.full((2, 64, 64), value, np.float32)
    write_probabilities(
        path, values, axes="CYX", pixel_size={}, class_names="ab", overwrite=True
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("put", [put_labels, put_probabilities])
@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif", "a.ome.zarr"])
@pytest.mark.parametrize("is_new", [True, False])
def test_nth_failing_call_leaves_nothing_or_what_was_there(
    tmp_path, monkeypatch, is_new, name, put, number
):
    """Let each call that touches the disk fail in turn until none is left."""
    reason = "the disk is full" if number == errno.ENOSPC else "you are not allowed"
    state, os_open = {"left": 0}, os.open

    def counted(real):
        def call(*args, **kwargs):
            # Not the opening of folders to delete what is in them.
            counts = real is not os_open or bool(args[1] & os.O_CREAT)
            state["left"] -= counts
            if counts and state["left"] == 0:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    put(tmp_path / name, 70_000)
    new = contents(tmp_path)
    put(tmp_path / name, 1)
    old = contents(tmp_path)
    messages = []
    for nth in range(1, 1000):
        with monkeypatch.context() as patch:
            if is_new:
                shutil.rmtree(tmp_path / name, ignore_errors=True)
                (tmp_path / name).unlink(missing_ok=True)
            for owner, call in [
                *((os, call) for call in ("open", "fsync", "replace", "mkdir")),
                *((Path, call) for call in ("open", "mkdir", "replace")),
                *((tifffile.FileHandle, call) for call in ("write", "flush")),
                (tifffile.FileHandle, "write_array"),
                (Path, "write_bytes"),
                (Path, "write_text"),
            ]:
                patch.setattr(owner, call, counted(getattr(owner, call)))
            state["left"] = nth
            try:
                put(tmp_path / name, 70_000)
            except BadOutput as error:
                messages.append(str(error))
                state["left"] = 0
                assert contents(tmp_path) == ({} if is_new else old), nth
                assert names(tmp_path) == ([] if is_new else [name])
            else:
                # Only the sync of the folder, after the renaming, may fail unseen.
                used = state["left"] <= 0
                state["left"] = 0
                assert contents(tmp_path) == new
                if not used:
                    break
                put(tmp_path / name, 1)
    else:
        pytest.fail("the write never succeeded")
    assert names(tmp_path) == [name]
    assert len(messages) > 5
    for message in messages:
        assert message.startswith(f"Cannot write {tmp_path / name}: {reason}")
        assert ". " not in message


@posix
def test_disk_that_is_full_after_n_bytes(tmp_path):
    """The kernel itself refuses to write more: no partial and no torn file."""
    result = run_script(
        """
        import json, pathlib, resource, signal, sys
        import numpy as np
        from napari_unet.errors import BadOutput
        from napari_unet.files.outputs import write_labels, write_probabilities

        folder = pathlib.Path(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        random = np.random.default_rng(0)
        labels = random.integers(0, 2**20, (3, 50, 60))
        target = folder / "labels.tif"
        write_labels(target, labels, axes="ZYX", pixel_size={})
        whole = target.read_bytes()
        refused, messages = 0, set()
        for limit in range(0, len(whole) + 200, 97):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            other = labels + 1 if limit % 2 else labels
            try:
                write_labels(target, other, axes="ZYX", pixel_size={}, overwrite=True)
            except BadOutput as error:
                refused += 1
                messages.add(str(error).partition(": ")[2])
                assert target.read_bytes() == whole, limit
            else:
                whole = target.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert [p.name for p in folder.iterdir()] == ["labels.tif"], limit
        print(json.dumps([refused, len(whole), sorted(messages)]))
        """,
        tmp_path,
    )
    refused, size, messages = result
    assert refused == pytest.approx(size / 97, abs=25)
    assert messages
    for message in messages:
        assert "choose another folder" in message


@posix
def test_killed_writer_leaves_a_complete_file(tmp_path):
    """Forty writers are killed at random moments; the file is always one of two."""
    kills = 40
    result = run_script(
        """
        import json, os, pathlib, random, signal, sys, time
        import numpy as np
        import tifffile
        from napari_unet.files.atomic import sweep
        from napari_unet.files.outputs import write_labels

        folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        target = folder / "labels.tif"
        versions = [
            np.random.default_rng(i).integers(0, 60000, (4, 200, 200)) for i in (0, 1)
        ]

        def write(version):
            write_labels(
                target, versions[version], axes="ZYX", pixel_size={}, overwrite=True
            )

        write(0)
        expected = [target.read_bytes()]
        write(1)
        expected.append(target.read_bytes())
        random.seed(0)
        torn = stray = left = 0
        seen = set()
        for _ in range(kills):
            child = os.fork()
            if child == 0:
                for i in range(10**6):
                    write(i % 2)
            time.sleep(random.uniform(0.005, 0.08))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            content = target.read_bytes()
            torn += content not in expected
            seen.add(expected.index(content) if content in expected else -1)
            stray += len(list(folder.iterdir())) - 1
            sweep(folder)
            left += len(list(folder.iterdir())) - 1
        print(json.dumps([torn, stray, left, sorted(seen)]))
        """,
        tmp_path,
        kills,
    )
    torn, stray, left, seen = result
    assert torn == 0
    assert left == 0
    # The kills did hit writers at work.
    assert stray > 0
    assert seen == [0, 1]
