"""Download of one published file: mirrors in turn, verified, never half."""

from dataclasses import dataclass
from pathlib import Path

import pooch

from falign.lab.data.content import GZIP_FAULTS, atomic, digest
from falign.lab.data.dataset import DataError
from falign.lab.data.progress import download_bar

_TIMEOUT = 30.0
_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file of a data set as its authors publish it.

    Attributes:
        name: Its name.
        unpacked: Name of the file or folder that it unpacks to, accepted in its place.
        sha256: Checksum of its content as :func:`falign.lab.data.content.digest` gives it; None if nobody
            published the file, and then it is not verified.
        mirrors: Addresses that ``name`` is appended to, tried in turn; none if the file is never downloaded.
    """

    name: str
    unpacked: str
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()

    def find(self, folder: Path) -> Path | None:
        """The file in a folder, or what it unpacks to; None if there is neither."""
        return next((path for path in (folder / self.name, folder / self.unpacked) if path.exists()), None)

    def fault(self, path: Path) -> str | None:
        """What is wrong with a copy; None if it is the published content, or cannot be verified.

        A folder, and a file without checksum, cannot be verified.
        """
        if self.sha256 is None or path.is_dir():
            return None
        try:
            came = digest(path)
        except GZIP_FAULTS as error:
            return f"is no intact gzip file ({error})"
        return None if came == self.sha256 else f"has SHA-256 {came}, expected {self.sha256} for its content"

    def check(self, path: Path) -> None:
        """Refuse a copy that is not the published content.

        Args:
            path: What :meth:`find` gave.

        Raises:
            DataError: If it has a fault.
        """
        if fault := self.fault(path):
            raise DataError(
                f"{path} {fault}: it is damaged or of another data set, so get it anew, or load its folder "
                "by path if the data are your own"
            )


def fetch(file: PublishedFile, folder: Path, *, progress: bool) -> Path:
    """Download a file from the first mirror that serves it intact; one already there is only verified.

    Args:
        file: The file.
        folder: Where it is put, created if needed.
        progress: Whether to show a bar on standard error.

    Returns:
        Its path.

    Raises:
        DataError: If no mirror served it intact, with the reason for each, or if the one there is not intact.
    """
    target = folder / file.name
    if target.exists():
        file.check(target)
        return target
    refusals = []
    for mirror in file.mirrors:
        url = mirror + file.name
        try:
            with atomic(target) as partial, download_bar(file.name, shown=progress) as bar:
                fetcher = pooch.HTTPDownloader(
                    progressbar=bar,  # pyright: ignore[reportArgumentType]  (a bar object is documented)
                    chunk_size=_CHUNK,
                    timeout=_TIMEOUT,
                )
                fetcher(url, str(partial), None)
                if fault := file.fault(partial):
                    raise DataError(f"what it served {fault}")
            return target
        except (OSError, DataError) as error:  # every error of the network is an OSError
            refusals.append(f"{url}: {_reason(error)}")
    raise DataError(
        f"{file.name} could not be downloaded to {folder} ({'; '.join(refusals)}), expected one mirror to "
        "serve it intact: connect to the network and try again, or put the file there by hand"
    )


def _reason(error: Exception) -> str:
    """The error in few words; those of requests repeat the address and their whole chain of causes."""
    response = getattr(error, "response", error)  # only errors of requests have one, or None
    if response is error:
        return str(error)
    status = getattr(response, "status_code", None)
    return f"HTTP status {status}" if status else type(error).__name__
