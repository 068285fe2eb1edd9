"""The bundled and the user's own models, by name; `trash` has the removed ones."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from pydantic import ValidationError

from napari_unet.errors import BadInput, BadModel, BadOutput, NeedsTrust
from napari_unet.files.atomic import atomic_path, bad_output, make_scratch, sweep
from napari_unet.models.bioimageio_package import is_package
from napari_unet.models.checkpoint import read_header, read_model, save_model
from napari_unet.models.model import Model, Passport
from napari_unet.models.web import is_url
from napari_unet.steps import run_to_end

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unet.steps import Progress

BUNDLED = Path(__file__).parent / "bundled"
SUFFIX = ".safetensors"
PACKAGE_SUFFIX = ".zip"  # of bioimage.io

_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def data_dir() -> Path:
    """Return the folder of all that is kept for the user (it may not exist yet).

    ``NAPARI_UNET_HOME`` overrides the platform's user data folder.
    """
    home = os.environ.get("NAPARI_UNET_HOME")
    return Path(home) if home else platformdirs.user_data_path("napari-unet", False)


def library_dir() -> Path:
    """Return the folder of the user's own models (it may not exist yet)."""
    return data_dir() / "models"


# --- finding ------------------------------------------------------------------


def list_models() -> dict[str, Path]:
    """Return the files of all models in the library by name, sorted.

    A model of the user hides a bundled one of the same name.
    """
    found: dict[str, Path] = {}
    for folder in (BUNDLED, library_dir()):
        if folder.is_dir():
            found |= {path.stem: path for path in folder.glob(f"*{SUFFIX}")}
    return dict(sorted(found.items()))


def is_bundled(name: str) -> bool:
    """Tell whether a name stands for a model that came with napari-unet."""
    path = list_models().get(name)
    return path is not None and path.parent == BUNDLED


def load_model(name_or_path: str | Path) -> Model:
    """Load a model from the library or from a file.

    Parameters
    ----------
    name_or_path : str or path
        A name in the library, which comes first, or the path of a checkpoint or of a
        bioimage.io package.

    Returns
    -------
    Model

    Raises
    ------
    BadModel
        If there is no such model or its file cannot be used.
    """
    path = list_models().get(str(name_or_path))
    if path is not None:
        return read_model(path)
    path = Path(name_or_path).expanduser()
    if is_package(path):
        from napari_unet.models.bioimageio import import_package

        return import_package(path)
    if not path.suffix and len(path.parts) == 1 and not path.is_file():
        raise _unknown(str(name_or_path), " or the path of a checkpoint")
    return read_model(path)


def find_model(name: str) -> Path:
    """Return the file of a model in the library.

    Parameters
    ----------
    name : str
        In the library.

    Raises
    ------
    BadModel
        If there is none of that name.
    """
    try:
        return list_models()[name]
    except KeyError:
        raise _unknown(name) from None


def _unknown(name: str, other: str = "") -> BadModel:
    names = ", ".join(list_models()) or "none"
    return BadModel(
        f"There is no model {name!r} in the library (there are: {names}). Name one of "
        f"these{other}."
    )


# --- names --------------------------------------------------------------------


def name_problem(name: str) -> str:
    """Say why a new model cannot be called so, "" if it can."""
    if not name:
        return "Give the new model a name."
    if _FORBIDDEN.search(name) or name.startswith(".") or len(name.encode()) > 100:
        return "The name is also a file's: use up to 100 letters, digits, '-' and '_'."
    if name.casefold() in {known.casefold() for known in list_models()}:
        return _taken(name)
    return ""


def _taken(name: str) -> str:
    return f"There is a model {name!r} in the library: choose another name."


def plain_name(text: str) -> str:
    """Make of any text what a model can be called, "" if nothing is left."""
    plain = _FORBIDDEN.sub("-", text).encode(errors="replace")[:80]
    return plain.decode(errors="ignore").strip(" .")


def _free_name(stem: str) -> str:
    """Return a name for what is imported, with a number if it is taken."""
    base = name = plain_name(stem) or "imported"
    number = 1
    while name_problem(name):
        number += 1
        name = f"{base}-{number}"
    return name


@contextmanager
def new_file(name: str) -> Iterator[Path]:
    """Reserve the file of a new model; it is given back when the block fails.

    Whoever asks for the same name meanwhile is refused.
    """
    if problem := name_problem(name):
        raise BadInput(problem)
    path = library_dir() / f"{name}{SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except FileExistsError:  # made by another program a moment ago
        raise BadInput(_taken(name)) from None
    except OSError as error:
        raise bad_output(path, error) from error


@contextmanager
def _scratch() -> Iterator[Path]:
    """Make a folder for files that are not complete yet, in the library."""
    library = library_dir()
    try:
        library.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_output(library, error) from error
    sweep(library)  # what killed programs have left
    folder = make_scratch(library)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def own_file(name: str) -> Path:
    """Return the file of one of the user's models; the bundled ones stay."""
    path = find_model(name)
    if path.parent == BUNDLED:
        raise BadInput(
            f"{name!r} came with napari-unet and stays as it is. Export it and import "
            "the file under another name to have one of your own."
        )
    return path


# --- changing -----------------------------------------------------------------


def import_model(
    path: str | Path, name: str | None = None, *, trust: bool = False
) -> str:
    """Copy a model into the library: `import_steps` to its end."""
    return run_to_end(import_steps(path, name, trust=trust))


def import_steps(
    path: str | Path, name: str | None = None, *, trust: bool = False
) -> Generator[Progress, None, str]:
    """Copy a model into the library.

    Parameters
    ----------
    path : path
        Any file that `load_model` reads, or the address of a bioimage.io package on
        the web. It is not changed.
    name : str, optional
        In the library; by default that of the file or package, with a number if it is
        taken.
    trust : bool
        Whether the user has consented to what `trust.explain` says, so that a program
        (a pickled network, TorchScript) may be converted.

    Yields
    ------
    Progress
        While something is downloaded or converted.

    Returns
    -------
    str
        The name that it got.

    Raises
    ------
    NeedsTrust
        If the file is a program, and ``trust`` is not given.
    BadModel
        If the file cannot be used.
    BadInput
        If the name cannot be used or is taken.
    BadOutput
        If the library cannot be written.
    """
    if name is not None and (problem := name_problem(name)):
        raise BadInput(problem)  # before a long look at the file
    model, stem = yield from _import_steps(path, trust)
    name = name or _free_name(stem)
    passport = model.passport
    if passport.name == Passport().name:
        passport = passport.model_copy(update={"name": name})
    with _scratch() as folder:
        saved = save_model(Model(model.network, passport), folder / name)
        with new_file(name) as file:
            move_file(saved, file)
    return name


def _import_steps(
    source: str | Path, trust: bool
) -> Generator[Progress, None, tuple[Model, str]]:
    """Make a model of anything; with it return what it could be called."""
    path = Path(source).expanduser()
    if is_url(source) or is_package(path):
        from napari_unet.models.bioimageio import import_package_steps

        where = source if is_url(source) else path
        model = yield from import_package_steps(where, trust=trust)
        return model, model.passport.name
    try:
        return load_model(path.absolute()), path.stem
    except NeedsTrust:
        if not trust:
            raise
    from napari_unet.models.foreign import import_checked
    from napari_unet.models.trust import convert_steps

    return import_checked(path, (yield from convert_steps(path))), path.stem


def export_model(
    name: str,
    path: str | Path,
    *,
    overwrite: bool = False,
    authors: Sequence[str] = (),
    license: str = "",
    image: NDArray | None = None,
) -> Path:
    """Copy a model out of the library, to pass it on.

    Parameters
    ----------
    name : str
        In the library.
    path : path
        Of the file, or an existing folder. One that ends in ``.zip`` becomes a
        bioimage.io package; to others ``.safetensors`` is added when missing.
    overwrite : bool
        Whether a file of that name is replaced.
    authors, license, image
        Of a bioimage.io package; see `bioimageio_export.export_package`.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    BadModel
        If there is no such model, its file is damaged, or the format is not for it.
    BadInput
        If a package cannot be made of this.
    BadOutput
        If the file is there already or cannot be written.
    """
    source = find_model(name)
    path = Path(path).expanduser()
    if path.is_dir():
        path /= source.name
    elif path.suffix not in (SUFFIX, PACKAGE_SUFFIX):
        path = path.with_name(path.name + SUFFIX)
    folder = path.parent.resolve()
    if folder in (BUNDLED.resolve(), library_dir().resolve()):
        raise BadOutput(f"{folder} is the library itself; choose another folder.")
    if path.exists() and not overwrite:
        raise BadOutput(
            f"{path} exists already; choose another name, or replace it (--overwrite)."
        )
    model = read_model(source)  # what is passed on is whole
    if path.suffix == PACKAGE_SUFFIX:
        from napari_unet.models.bioimageio_export import export_package

        export_package(model, path, authors=authors, license=license, image=image)
        return path
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
    return path


def rename_model(name: str, new: str) -> None:
    """Give a model of the user another name in the library.

    Parameters
    ----------
    name : str
        That it has.
    new : str
        That it gets.

    Raises
    ------
    BadModel
        If there is no such model.
    BadInput
        If it is a bundled one, or the new name cannot be used or is taken.
    BadOutput
        If the library cannot be written.
    """
    path = own_file(name)
    if new.casefold() == name.casefold() and new not in list_models():
        move_file(path, path.with_name(f"{new}{SUFFIX}"))  # other capitals, same file
        return
    with new_file(new) as file:
        move_file(path, file)


def correct_model(name: str, facts: Mapping[str, Any]) -> None:
    """Correct what the passport of one of the user's models says.

    Parameters
    ----------
    name : str
        In the library.
    facts : mapping
        Fields of `Passport` with their new values.

    Raises
    ------
    BadModel
        If there is no such model, its file is damaged, or the number of classes,
        channels or pixel sizes is not that of its network.
    BadInput
        If it is a bundled one, or a value cannot be.
    BadOutput
        If the file cannot be written; it is as before.
    """
    path = own_file(name)
    before, model = read_header(path), read_model(path)
    former = (*before.passport.former_sha256, before.sha256)
    try:
        passport = Passport.model_validate(
            before.passport.model_dump() | dict(facts) | {"former_sha256": former}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    unchanged = {"former_sha256": before.passport.former_sha256}
    if passport.model_copy(update=unchanged) != before.passport:
        save_model(Model(model.network, passport), path)


def move_file(source: Path, target: Path) -> None:
    """Give a file another name, or say why that fails."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise bad_output(target, error) from error
