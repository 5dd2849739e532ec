"""Members of a tar or zip archive, read by exact name and never extracted to disk."""

import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from falign.lab.data.dataset import DataError


def members(path: Path, root: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read files of an archive, or of the folder that it unpacks to.

    Args:
        path: A ``.zip`` or ``.tar.gz`` file, or a folder.
        root: The folder inside the archive that the names are relative to.
        names: The members wanted, separated by ``/``.

    Yields:
        Name and content of every member wanted; of a tar archive in its own order, else in the order asked.

    Raises:
        DataError: If the archive is damaged, or a member is missing or no regular file.
    """
    if path.is_dir():
        return _from_folder(path, names)
    return (_from_zip if path.suffix == ".zip" else _from_tar)(path, root, names)


def _from_folder(path: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        if not (path / name).is_file():
            raise _missing(path, name)
        yield name, (path / name).read_bytes()


def _from_zip(path: Path, root: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                try:
                    yield name, archive.read(f"{root}/{name}")
                except KeyError:
                    raise _missing(path, name) from None
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _from_tar(path: Path, root: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    wanted = {f"{root}/{name}": name for name in names}
    try:
        # one pass: going back in a compressed archive means unpacking it from the start again
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() and member.name in wanted else None
                if stream is not None:
                    yield wanted.pop(member.name), stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _damaged(path, error) from error
    for name in wanted.values():
        raise _missing(path, name)


def _missing(path: Path, name: str) -> DataError:
    return DataError(f"{path} has no file {name}, expected the complete published data set: get it anew")


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as an archive ({error}), expected the published one: get it anew")
