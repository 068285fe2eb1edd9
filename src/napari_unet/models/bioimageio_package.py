"""bioimage.io packages, wherever they lie: opened, and read file by file, safely.

Nothing is unpacked. A file of a package is read when it is asked for, within a limit,
never from outside the package, and its hash is checked where the package names one.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import stat
import struct
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from napari_unet.errors import BadModel
from napari_unet.models.plain_yaml import read_yaml
from napari_unet.models.web import download_steps, first_line, is_url, open_url

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from napari_unet.steps import Progress


NAMES = ("bioimageio.yaml", "rdf.yaml", "model.yaml")
MAX_FILE = 4 << 30  # bytes, of a package and of any file in it
_MAX_MEMBERS = 1000
_EXPANSION = 100  # by which a zip archive may grow; weights hardly do
_CHUNK = 1 << 20
_DAMAGED = "Get the package again."


class Package:
    """An open package.

    Parameters
    ----------
    title : str
        What messages call it.
    content : dict
        Its description, as it is written in its YAML.
    open_file : callable
        Opens a file by its clean relative name; raises `FileNotFoundError`.
    """

    def __init__(
        self,
        title: str,
        content: dict[str, Any],
        open_file: Callable[[str], BinaryIO],
    ):
        self.title = title
        self.content = content
        self._open_file = open_file

    def copy(
        self, source: str, sha256: str | None, target: BinaryIO, most: int = MAX_FILE
    ) -> None:
        """Copy a file of the package.

        Parameters
        ----------
        source : str
            As its description names it.
        sha256 : str or None
            What its content must have.
        target : binary file
            Where it is written to.
        most : int
            Bytes that it may have.

        Raises
        ------
        BadModel
            If it lies elsewhere, is missing, too large, damaged or another file.
        """
        digest, size = hashlib.sha256(), 0
        try:
            with self._open_file(_inside(source)) as file:
                while chunk := file.read(_CHUNK):
                    size += len(chunk)
                    if size > most:
                        raise BadModel(
                            f"Its file {source[:80]!r} is larger than expected ({most} "
                            f"bytes at most). {_DAMAGED}"
                        )
                    digest.update(chunk)
                    target.write(chunk)
        except FileNotFoundError:
            raise BadModel(
                f"Its file {source[:80]!r} is missing. Get the complete package."
            ) from None
        except _READ_ERRORS as error:
            raise BadModel(
                f"Its file {source[:80]!r} cannot be read ({first_line(error)}). "
                f"{_DAMAGED}"
            ) from error
        if sha256 is not None and digest.hexdigest() != str(sha256).lower():
            raise BadModel(
                f"Its file {source[:80]!r} is damaged or has been exchanged: its "
                f"checksum is not the one that the package names. {_DAMAGED}"
            )

    def read(self, source: str, sha256: str | None, most: int) -> bytes:
        """Return the content of a file; see `copy`."""
        target = io.BytesIO()
        self.copy(source, sha256, target, most)
        return target.getvalue()


_READ_ERRORS = (
    OSError,
    zipfile.BadZipFile,
    zlib.error,
    http.client.HTTPException,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
)


def _inside(source: str) -> str:
    """Return the name of a file in its package, or say that it is not in there."""
    if is_url(source):
        raise BadModel(
            f"Its file {source[:200]} is not in the package. Download it, put it "
            "beside the package's YAML file and name it there."
        )
    parts = PurePosixPath(source).parts
    plain = source.isprintable() and "\\" not in source and ":" not in source
    if not plain or not parts or ".." in parts or parts[0].startswith("/"):
        raise BadModel(f"It names the forbidden file {source[:80]!r}. {_DAMAGED}")
    return "/".join(parts)


def is_package(source: str | Path) -> bool:
    """Tell whether a folder, a zip archive or a YAML file is a bioimage.io package.

    Only names are looked at. What is no package, and what cannot be read, is not one.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return bool(_descriptions([entry.name for entry in path.iterdir()]))
        if path.suffix.lower() in (".yaml", ".yml"):
            return path.is_file()
        if not stat.S_ISREG(path.stat().st_mode):
            return False  # to open a pipe would wait for ever
        with path.open("rb") as file:
            if file.read(4) != b"PK\3\4":
                return False
            return bool(_descriptions([m.filename for m in _directory(file)]))
    except (BadModel, *_READ_ERRORS):
        return False


def _descriptions(names: list[str]) -> list[str]:
    """Return those names of a package's files that may be its description's."""
    for wanted in NAMES:
        if wanted in names:
            return [wanted]
    ends = tuple(f".{name}" for name in NAMES)
    return sorted(name for name in names if name.endswith(ends) and "/" not in name)


def _description_in(names: list[str]) -> str:
    """Return the name of the description among those of a package's files."""
    found = _descriptions(names)
    if not found:
        raise BadModel(
            "It is no bioimage.io package: it holds no bioimageio.yaml or rdf.yaml. "
            "Choose another file."
        )
    if len(found) > 1:
        raise BadModel(
            f"It has several descriptions ({', '.join(found[:5])}). Name one of these "
            "files."
        )
    return found[0]


def open_steps(
    source: str | Path, folder: Path
) -> Generator[Progress, None, Callable[[], Any]]:
    """Get a package, from the web if need be.

    Parameters
    ----------
    source : str or path
        A folder, zip archive or YAML file, or the address of one of the latter two.
    folder : Path
        An empty one for what is downloaded.

    Returns
    -------
    callable
        Returns the context manager of a `Package`.

    Raises
    ------
    BadModel
        If it cannot be had or is none.
    """
    if not is_url(source):
        return lambda: open_package(Path(source).expanduser())
    url = str(source)
    path = folder / "package"
    yield from download_steps(url, path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    name = PurePosixPath(urlsplit(url).path).name or url
    return lambda: _open_zip(path, name) if is_zip else _open_web(path, url, name)


@contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """Open a package that lies on this computer.

    Parameters
    ----------
    path : Path
        Of a folder, a zip archive or the YAML file in a folder.

    Raises
    ------
    BadModel
        If it cannot be read or is none.
    """
    try:
        if path.is_dir():
            path /= _description_in([entry.name for entry in path.iterdir()])
        if path.suffix.lower() not in (".yaml", ".yml"):
            with _open_zip(path, path.name) as package:
                yield package
            return
        root = path.parent.resolve()
        content = read_yaml(path.open("rb"))
    except OSError as error:
        raise BadModel(
            f"Cannot read {path}: {error.strerror or error}. Check the path."
        ) from error

    def open_file(name: str) -> BinaryIO:
        target = (root / name).resolve()
        if not target.is_relative_to(root) or not stat.S_ISREG(target.stat().st_mode):
            raise BadModel(
                f"Its file {name[:80]!r} is a link that leads out of the package, or "
                f"no regular file. {_DAMAGED}"
            )
        return target.open("rb")

    yield Package(path.name, content, open_file)


# --- zip archives -------------------------------------------------------------


@contextmanager
def _open_zip(path: Path, title: str) -> Iterator[Package]:
    try:
        with path.open("rb") as file:
            names = _members(file)
            found = _description_in(names)
            with zipfile.ZipFile(file) as archive:

                def open_file(name: str) -> Any:
                    if name not in names:
                        raise FileNotFoundError(name)
                    return archive.open(name)

                content = read_yaml(open_file(found))
                yield Package(title, content, open_file)
    except OSError as error:
        raise BadModel(
            f"Cannot read {path}: {error.strerror or error}. Check the path."
        ) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise BadModel(f"It is damaged ({first_line(error)}). {_DAMAGED}") from error


def _directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """Read the directory of a zip archive, unless it is larger than a package's."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 42))
    end = file.read()
    place = end.rfind(b"PK\5\6")
    if place < 0 or len(end) - place < 22:
        raise BadModel(f"It is incomplete: its end is missing. {_DAMAGED}")
    count, length = struct.unpack("<HI", end[place + 10 : place + 16])
    is_wide = end[max(0, place - 20) :].startswith(b"PK\6\7")  # has other numbers
    if is_wide or count > _MAX_MEMBERS or length > 512 * _MAX_MEMBERS:
        raise BadModel(
            f"It holds more than {_MAX_MEMBERS} files or {MAX_FILE >> 30} GB. Choose "
            "the package of one model."
        )
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except _READ_ERRORS as error:
        raise BadModel(f"Its directory is damaged. {_DAMAGED}") from error


def _members(file: BinaryIO) -> list[str]:
    """Check the directory of a zip archive; return the names of its files.

    Raises
    ------
    BadModel
        If it is damaged, or a member is a link, encrypted, there twice, has a name
        that leads elsewhere, or takes much more room than the archive.
    """
    members = _directory(file)
    size = file.seek(0, io.SEEK_END)
    seen: set[str] = set()
    for member in members:
        name = member.filename
        if stat.S_ISLNK(member.external_attr >> 16):
            raise BadModel(f"Its file {name[:80]!r} is a link. {_DAMAGED}")
        if member.flag_bits & 0x41:
            raise BadModel("It is encrypted. Unpack it and choose its folder.")
        if name.lower() in seen or member.orig_filename != name:
            raise BadModel(f"Its file {name[:80]!r} is there twice. {_DAMAGED}")
        seen.add(name.lower())
        _inside(name)
    expanded = sum(member.file_size for member in members)
    if expanded > min(MAX_FILE, _EXPANSION * size + (1 << 26)):
        raise BadModel(
            f"Unpacked it would have {expanded >> 20} MB, which no model needs. "
            f"{_DAMAGED}"
        )
    return [member.filename for member in members]


@contextmanager
def _open_web(path: Path, url: str, title: str) -> Iterator[Package]:
    """Open the package whose downloaded YAML names files beside it on the web."""
    content = read_yaml(path.open("rb"))

    def open_file(name: str) -> Any:
        return open_url(urljoin(url, quote(name)))

    yield Package(title, content, open_file)


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for what is downloaded or copied; it is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="napari-unet-") as folder:
        yield Path(folder)
