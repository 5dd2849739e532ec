"""Packages that falign needs: which are installed, in which versions, and how to get the others.

Imports the standard library only, so that a missing package can be named without a traceback.
"""

from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Packages that are imported by another name than they are installed by."""
_OF_OTHER_EXTRAS = {
    "ray": "ray",
    "tensorboard": "tensorboard",
    "optuna": "tune",
    "duckdb": "query",
    "nicegui": "explore",
}
_SHOWN = ("", "lab", *_OF_OTHER_EXTRAS.values())
"""Extras that a user may want; "" stands for the packages that falign needs in any case."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One package that falign asks for.

    Attributes:
        package: Its name.
        extra: The extra that needs it; empty if falign itself does.
        wanted: The versions that will do, such as ``>=2.6``.
        installed: The version there is; None if none is.
        fits: Whether that one will do.
    """

    package: str
    extra: str
    wanted: str
    installed: str | None
    fits: bool

    @property
    def remedy(self) -> str:
        """The command that gets it."""
        return install(self.extra)


@cache
def requirements() -> tuple[Requirement, ...]:
    """List the requirements of the installed falign, those of the extras last; none if falign is not installed."""
    try:
        from packaging.requirements import Requirement as Line
        from packaging.version import InvalidVersion

        lines = [Line(text) for text in metadata.requires("falign") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return ()
    by_name: dict[str, Requirement] = {}
    for extra in _SHOWN:
        for line in lines:
            name = line.name.lower()
            applies = line.marker is None or line.marker.evaluate({"extra": extra})
            if not applies or name == "falign" or name in by_name:
                continue
            version = _version_of(name)
            try:
                fits = version is not None and line.specifier.contains(version, prereleases=True)
            except InvalidVersion:  # a private build: it cannot be said to be too old
                fits = True
            by_name[name] = Requirement(
                package=name, extra=extra, wanted=str(line.specifier), installed=version, fits=bool(fits)
            )
    return tuple(by_name.values())


def _version_of(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install(extra: str) -> str:
    """Return the command that installs or upgrades the packages of an extra."""
    return f'pip install --upgrade "falign[{extra}]"' if extra else "pip install --upgrade falign"


def lacking(error: BaseException) -> str | None:
    """Explain an error that comes from a package that is missing, too old or broken.

    Args:
        error: The error that ended a command.

    Returns:
        One sentence; None if falign's own code is at fault.
    """
    name = ((error.name if isinstance(error, ImportError) else None) or "").partition(".")[0]
    package = PACKAGES.get(name, name)
    remedy = f'pip install "falign[{_OF_OTHER_EXTRAS.get(package, "lab")}]"'
    if isinstance(error, ModuleNotFoundError) and name and name != "falign" and not _there(name):
        return f"the package {package} is missing, which this command needs: {remedy}"
    for each in requirements():
        if each.installed is not None and not each.fits:
            return f"{each.package} {each.installed} is installed, expected {each.wanted}: {each.remedy}"
    if not isinstance(error, ImportError) or name == "falign":
        return None
    what = f"the package {package}" if package else "a package that this command needs"
    return f"{what} cannot be used ({error}): it is damaged or too old, {remedy} --upgrade --force-reinstall"


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
