"""Hostile, broken and remote packages: nothing runs, leaks or hangs."""

import copy
import hashlib
import http.server
import io
import os
import pickle
import stat
import struct
import threading
import time
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import yaml
from packages import Written, npy, sigmoid
from test_bioimageio_import import ZERO_MEAN, standard

from napari_unet.errors import BadInput, BadModel
from napari_unet.models import web
from napari_unet.models.bioimageio import import_package, import_package_steps
from napari_unet.models.bioimageio_description import describe_package
from napari_unet.models.bioimageio_package import Package, is_package
from napari_unet.models.bioimageio_processing import (
    normalization_of,
    postprocessing_of,
)
from napari_unet.models.library import load_model
from napari_unet.models.plain_yaml import read_yaml, write_yaml


@pytest.fixture(scope="module")
def made():
    return Written(before=standard, after=sigmoid)


@pytest.fixture
def content(made):
    return made.content([ZERO_MEAN], [{"id": "sigmoid"}])


@pytest.fixture
def good(made, content, tmp_path):
    return made.zip(tmp_path / "a.zip", content)


def refused(source, match, error=BadModel):
    start = time.perf_counter()
    with pytest.raises(error, match=match):
        import_package(source)
    assert time.perf_counter() - start < 10


# --- archives -----------------------------------------------------------------


def archive(path, made, content, add):
    made.zip(path, content)
    with zipfile.ZipFile(path, "a") as opened:
        add(opened)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../out.txt",
        "/etc/out.txt",
        "//etc/out.txt",
        "a/../../out",
        "C:out",
        "a\\..\\out",
    ],
)
def test_names_that_lead_elsewhere(tmp_path, made, content, name):
    path = archive(tmp_path / "b.zip", made, content, lambda z: z.writestr(name, "x"))
    assert is_package(path)
    refused(path, "forbidden")
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.zip"]


def test_links(tmp_path, made, content):
    def add(opened):
        link = zipfile.ZipInfo("link.npy")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, "/etc/passwd")

    refused(archive(tmp_path / "b.zip", made, content, add), "is a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name(tmp_path, made, content):
    path = archive(
        tmp_path / "b.zip", made, content, lambda z: z.writestr("IN.npy", "x")
    )
    refused(path, "there twice")


def test_bombs(tmp_path, made, content):
    path = archive(
        tmp_path / "b.zip",
        made,
        content,
        lambda z: z.writestr("zeros", bytes(200 << 20), zipfile.ZIP_DEFLATED),
    )
    refused(path, "Unpacked it would have 200 MB")


def test_a_second_directory_with_other_numbers(tmp_path, made, content):
    """A 64-bit record, which zipfile would believe."""
    path = made.zip(tmp_path / "b.zip", content)
    data = path.read_bytes()
    place = data.rfind(b"PK\5\6")
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
    path.write_bytes(data[:place] + locator + data[place:])
    assert not is_package(path)
    refused(path, "more than 1000 files or 4 GB")


def test_too_many_files(tmp_path, made, content):
    def add(opened):
        for number in range(1100):
            opened.writestr(f"{number}", b"")

    refused(
        archive(tmp_path / "b.zip", made, content, add), "more than 1000 files or 4 GB"
    )


def test_truncated_and_flipped_archives(good, tmp_path):
    """At 60 places each; none crashes, and no wrong model comes out."""
    data = good.read_bytes()
    random = np.random.default_rng(0)
    wanted = import_package(good).network.state_dict()
    path = tmp_path / "c.zip"
    for place in random.integers(0, len(data), 60).tolist():
        path.write_bytes(data[:place])
        with pytest.raises(BadModel):
            import_package(path)
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            model = import_package(path)
        except BadModel:
            continue
        # What nobody reads, e.g. the date of a file.
        for name, tensor in model.network.state_dict().items():
            assert (tensor == wanted[name]).all()


def test_a_hash_that_does_not_fit(tmp_path, made, content):
    for name in ("weights.pt", "in.npy"):
        changed = made.files[name] + b"\0"
        path = made.zip(tmp_path / "b.zip", content, **{name: changed})
        refused(path, "damaged or has been exchanged")


def test_missing_files(tmp_path, made, content):
    content["weights"]["pytorch_state_dict"]["source"] = "other.pt"
    refused(made.zip(tmp_path / "b.zip", content), "'other.pt' is missing")


def test_files_outside_the_package(tmp_path, made, content):
    secret = tmp_path / "secret.npy"
    secret.write_bytes(made.files["in.npy"])
    folder = made.folder(tmp_path / "p", content)
    (folder / "in.npy").unlink()
    (folder / "in.npy").symlink_to(secret)
    refused(folder, "leads out of the package")
    for name in ("../secret.npy", str(secret)):
        content["inputs"][0]["test_tensor"] = {"source": name}
        (folder / "rdf.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(BadModel):
            import_package(folder)


def test_links_within_the_package_are_followed(tmp_path, made, content):
    folder = made.folder(tmp_path / "p", content)
    (folder / "in.npy").rename(folder / "real.npy")
    (folder / "in.npy").symlink_to("real.npy")
    import_package(folder)


# --- the YAML, and test images ------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "empty"),
        (b"a: [1, 2", "no readable YAML"),
        (b"- 1\n- 2\n", "empty or damaged"),
        (b"<!doctype html><p>Not found", "web page"),
        (b"type: dataset\nformat_version: 0.3.0\n", "describes dataset"),
        (b"a: !!python/object/apply:os.system ['touch ran']\n", "no readable YAML"),
        (b"a: &a [*a]\n", "contains itself"),
        (b"a: " + b"[" * 9000, "no readable YAML|larger than"),
        (b"a: b\n" * 300_000, "larger than"),
        (
            b"a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
            + b"".join(
                b"a%d: &a%d [%s]\n" % (i + 1, i + 1, b", ".join([b"*a%d" % i] * 9))
                for i in range(9)
            ),
            "too large",
        ),
    ],
    ids=[
        *("empty", "cut", "list", "page", "dataset", "gadget", "loop", "deep", "long"),
        "laughs",
    ],
)
def test_descriptions(tmp_path, text, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p" / "rdf.yaml"
    path.parent.mkdir()
    path.write_bytes(text)
    refused(path.parent, match)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"type: 1" + b":1" * 150_000, "describes 1:1:1:1"),  # base 60 in YAML 1.1
        (b"a:\n" + b"-\n" * 400_000, "too large"),
        (b"? a\n" * 200_000, "too large"),
        (b"?\n" * 400_000, "too large"),
        (b"a:\r" * 300_000, "too large"),
        (b"%A b\n" * 200_000 + b"--- {}\n", "larger than"),
        (b"a: !!float 1" + b":1" * 99_000, "no readable YAML"),
        (b"a: " + b"1" * 900_000, "no readable YAML"),
    ],
    ids=[
        "base 60",
        "dashes",
        "keys",
        "bare keys",
        "colons",
        "directives",
        "float of base 60",
        "digits",
    ],
)
def test_descriptions_that_take_long_to_read(tmp_path, text, match):
    (tmp_path / "rdf.yaml").write_bytes(text)
    start = time.process_time()
    refused(tmp_path, match)
    assert time.process_time() - start < 2


def test_numbers_of_a_description_are_those_of_yaml_1_2():
    told = {
        "a": 12,
        "b": "1:30",
        "c": "0o17",
        "d": "010",
        "e": "1_0",
        "f": -3,
        "g": 2.5,
    }
    assert read_yaml(io.BytesIO(write_yaml(told))) == told
    assert yaml.safe_load(write_yaml(told)) == told
    theirs = io.BytesIO(b"a: 010\nb: 0x1F\nc: 0o17\nd: 1:30\ne: 1e3\nf: 0.4.9\n")
    assert list(read_yaml(theirs).values()) == [10, 31, 15, "1:30", 1000.0, "0.4.9"]


def test_a_pipe_is_no_package_and_keeps_nobody_waiting(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes here")
    os.mkfifo(tmp_path / "model.pt")
    assert not is_package(tmp_path / "model.pt")
    with pytest.raises(BadModel, match="not a regular file"):
        load_model(tmp_path / "model.pt")


def test_several_descriptions(tmp_path):
    for name in ("a.rdf.yaml", "b.rdf.yaml"):
        (tmp_path / name).write_text("type: model")
    refused(tmp_path, r"several descriptions \(a\.rdf\.yaml, b\.rdf\.yaml\)")


def test_what_is_no_package(tmp_path):
    for name, data in (("a.zip", b"PK\3\4"), ("b", b""), ("c.pth", b"\x80\2")):
        (tmp_path / name).write_bytes(data)
        assert not is_package(tmp_path / name)
    assert not is_package(tmp_path)
    assert not is_package(tmp_path / "missing")


class Gadget:
    def __reduce__(self):
        return open, ("ran", "w")


def hostile_arrays():
    target = io.BytesIO()
    np.save(target, np.array([Gadget()], dtype=object), allow_pickle=True)
    header = np.lib.format.magic(1, 0) + (110).to_bytes(2, "little")
    huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 99999, 99999)}"
    return {
        "pickled objects": target.getvalue(),
        "a plain pickle": pickle.dumps(Gadget()),
        "a huge shape": header + huge.ljust(109).encode() + b"\n" + bytes(64),
        "no shape": header + b"x" * 110,
        "three axes": npy(np.zeros((1, 4, 4), np.float32)),
        "texts": npy(np.full((1, 1, 4, 4), "abc")),
        "empty": npy(np.zeros((1, 1, 0, 4), np.float32)),
        "cut": npy(np.zeros((1, 1, 4, 4), np.float32))[:-1],
    }


@pytest.mark.parametrize("kind", hostile_arrays())
def test_test_images(tmp_path, made, content, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content["inputs"][0]["test_tensor"] = {"source": "in.npy"}
    data = hostile_arrays()[kind]
    path = made.zip(tmp_path / "b.zip", content, **{"in.npy": data})
    refused(path, "test image of its 'raw' is damaged")
    assert not (tmp_path / "ran").exists()


def test_a_test_image_with_other_channels(tmp_path, made, content):
    content["inputs"][0]["test_tensor"] = {"source": "in.npy"}
    data = npy(np.zeros((1, 2, 32, 32), np.float32))
    refused(made.zip(tmp_path / "b.zip", content, **{"in.npy": data}), "has 2 channels")


def test_a_test_image_that_no_network_should_be_tried_with(tmp_path, made, content):
    zeros = npy(np.zeros((1, 1, 4096, 2560), np.float32))
    digest = hashlib.sha256(zeros).hexdigest()
    for tensor in (*content["inputs"], *content["outputs"]):
        tensor["test_tensor"]["sha256"] = digest
    files = {"in.npy": zeros, "out.npy": zeros, "more": os.urandom(300_000)}
    path = made.zip(tmp_path / "a.zip", content, **files)
    assert path.stat().st_size < 500_000
    refused(path, r"10 million pixels \(8 at most\), too many to try")


def test_covers_that_are_none_do_not_matter(tmp_path, made, content):
    for name, data in (("c.png", b"\x89PNG\r\n\x1a\n"), ("c.jpg", b"")):
        content["covers"] = [name]
        path = made.zip(tmp_path / f"{name}.zip", content, **{name: data})
        assert import_package(path).passport.thumbnail == ""


# --- the web ------------------------------------------------------------------


@contextmanager
def server(answers):
    """Serve bytes by path; what was asked for is in ``asked``."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers.get(self.path.partition("?")[0])
            if isinstance(answer, str):
                self.send_response(302)
                self.send_header("Location", answer)
                self.end_headers()
                return
            if answer is None:
                self.send_error(404)
                return
            data, length = answer if isinstance(answer, tuple) else (answer, None)
            self.send_response(200)
            self.send_header("Content-Length", str(length or len(data)))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # cancelled
                data(self.wfile.write) if callable(data) else self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", asked
        finally:
            running.shutdown()
            thread.join()


def test_packages_by_address(good, made, content):
    answers = {"/m/a.zip": good.read_bytes(), "/m/rdf.yaml": yaml.safe_dump(content)}
    answers["/m/rdf.yaml"] = answers["/m/rdf.yaml"].encode()
    answers |= {f"/m/{name}": data for name, data in made.files.items()}
    with server(answers) as (address, asked):
        model = import_package(f"{address}/m/a.zip")
        assert asked == ["/m/a.zip"]
        other = import_package(f"{address}/m/rdf.yaml?download=1")
        assert "/m/net.py" not in asked  # what is not needed is not fetched
    assert model.passport == other.passport


def test_a_slow_download_tells_how_far_it_is_and_can_be_cancelled(good, tmp_path):
    data = good.read_bytes()

    def drip(write):
        for place in range(0, len(data), 500):
            write(data[place : place + 500])
            time.sleep(0.05)

    with server({"/slow.zip": (drip, len(data))}) as (address, _):
        steps = import_package_steps(f"{address}/slow.zip")
        start = time.perf_counter()
        seen = [next(steps) for _ in range(3)]
        steps.close()
        assert time.perf_counter() - start < 5
    assert seen[0].message == "connecting"
    assert "downloading, 0." in seen[2].message
    assert 0 < seen[1].done < seen[2].done < seen[2].total


def test_files_at_other_addresses_are_not_fetched(made, content, tmp_path):
    with server({"/weights.pt": made.files["weights.pt"]}) as (address, asked):
        content["weights"]["pytorch_state_dict"]["source"] = f"{address}/weights.pt"
        content["covers"] = [f"{address}/cover.png"]
        content["documentation"] = f"{address}/README.md"
        refused(made.zip(tmp_path / "b.zip", content), "is not in the package")
        assert asked == []


def test_downloads_that_fail(good, tmp_path, monkeypatch):
    data = good.read_bytes()
    answers = {
        "/half.zip": (data[: len(data) // 2], len(data)),
        "/page.zip": b"<!doctype html><p>Sign in",
        "/secret.zip": "file:///etc/passwd",
        "/moved.zip": "/good.zip",
        "/good.zip": data,
    }
    with server(answers) as (address, _):
        refused(f"{address}/half.zip", "broke off after", BadInput)
        refused(f"{address}/page.zip", "web page")
        refused(f"{address}/secret.zip", "not allowed", BadInput)
        refused(f"{address}/none.zip", "says 404", BadInput)
        assert import_package(f"{address}/moved.zip").passport.name == "By hand"
        monkeypatch.setattr(web, "MAX_DOWNLOAD", 100)
        refused(f"{address}/good.zip", "no model needs", BadInput)
    refused(f"{address}/good.zip", "cannot be reached", BadInput)
    refused("https://", "cannot be reached", BadInput)


# --- descriptions with anything anywhere ----------------------------------------

JUNK = (
    *(None, 0, -1, 10**30, 1e308, float("nan"), "", "x", "../../x", "http://[", True),
    *([], {}, [[]], [None], {"id": "x"}, "é" * 1000, ["x", "y"]),
)


def places(value, place=()):
    """All paths into nested dicts and lists."""
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*place, key)
        yield from places(item, (*place, key))


def test_any_mistake_in_a_description_is_told_in_words(made, content):
    content["inputs"][0]["preprocessing"].append({"id": "clip", "kwargs": {"min": 0.0}})
    old = made.content_0_4(
        [
            {
                "name": "zero_mean_unit_variance",
                "kwargs": {"mode": "per_sample", "axes": "yx"},
            }
        ],
        [{"name": "sigmoid"}],
    )
    random = np.random.default_rng(0)
    fits = []
    for base in (content, old):
        found = list(places(base))
        for number in range(100):
            changed = copy.deepcopy(base)
            *parents, key = found[random.integers(len(found))]
            inner = changed
            for parent in parents:
                inner = inner[parent]
            if number == 0:
                pass  # as it is
            elif random.random() < 0.2:
                del inner[key]
            else:
                inner[key] = JUNK[random.integers(len(JUNK))]
            try:
                info = describe_package(Package("p", changed, io.BytesIO))
            except (BadModel, BadInput) as error:
                assert len(str(error)) < 800  # noqa: PT017
                assert number
            else:
                fits.append(info)
    assert fits
    for info in fits:
        for tensor in info.inputs:
            with suppress(BadModel):
                normalization_of(tensor, 1)
        for tensor in info.outputs:
            with suppress(BadModel):
                postprocessing_of(tensor)


def test_sizes_that_would_fill_the_memory(made):
    content = made.content_0_4()
    content["inputs"][0]["shape"][1] = 10**30
    info = describe_package(Package("p", content, io.BytesIO))
    assert len(info.inputs[0].axes[1].channels) <= 4096
