"""What falign needs of other packages, what of it is here, and how to get the rest.

Needs nothing beside Python until it is asked, so that a missing package can be said without a traceback.
"""

from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Packages that are imported by another name than they are installed by."""
_OF_OTHER_EXTRAS = {"ray": "ray", "tensorboard": "tensorboard"}
_SHOWN = ("", "lab", "ray", "tensorboard")
"""Extras that a user may want; "" is what falign needs in any case."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One package that falign asks for.

    Attributes:
        package: Its name.
        extra: The extra that needs it; empty if falign itself does.
        wanted: The versions that will do, such as ``>=2.6``.
        found: The version that is installed; None if none is.
        fits: Whether that one will do.
    """

    package: str
    extra: str
    wanted: str
    found: str | None
    fits: bool

    @property
    def remedy(self) -> str:
        """The command that gets it."""
        return install(self.extra)


@cache
def requirements() -> tuple[Requirement, ...]:
    """What the installed falign asks for, that of each extra after its own; nothing where falign is not installed."""
    try:
        from packaging.requirements import Requirement as Line
        from packaging.version import InvalidVersion

        lines = [Line(text) for text in metadata.requires("falign") or ()]
    except (ImportError, metadata.PackageNotFoundError):
        return ()
    found: dict[str, Requirement] = {}
    for extra in _SHOWN:
        for line in lines:
            name = line.name.lower()
            applies = line.marker is None or line.marker.evaluate({"extra": extra})
            if not applies or name == "falign" or name in found:
                continue
            version = version_of(name)
            try:
                fits = version is not None and line.specifier.contains(version, prereleases=True)
            except InvalidVersion:  # of a build that names itself as it likes: nobody can say that it is too old
                fits = True
            found[name] = Requirement(
                package=name, extra=extra, wanted=str(line.specifier), found=version, fits=bool(fits)
            )
    return tuple(found.values())


def version_of(package: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install(extra: str) -> str:
    """The command that installs, or brings up to date, what an extra needs."""
    return f'pip install --upgrade "falign[{extra}]"' if extra else "pip install --upgrade falign"


def lacking(error: BaseException) -> str | None:
    """What to say of an error that comes from a package that is missing, too old or broken.

    Args:
        error: What ended a command.

    Returns:
        One sentence; None if falign's own code is at fault.
    """
    name = ((error.name if isinstance(error, ImportError) else None) or "").partition(".")[0]
    package = _PACKAGES.get(name, name)
    remedy = f'pip install "falign[{_OF_OTHER_EXTRAS.get(package, "lab")}]"'
    if isinstance(error, ModuleNotFoundError) and name and name != "falign" and not _there(name):
        return f"the package {package} is missing, which this command needs: {remedy}"
    for each in requirements():
        if each.found is not None and not each.fits:
            return f"{each.package} {each.found} is installed, expected {each.wanted}: {each.remedy}"
    if not isinstance(error, ImportError) or name == "falign":
        return None
    what = f"the package {package}" if package else "a package that this command needs"
    return f"{what} cannot be used ({error}): it is damaged or too old, {remedy} --upgrade --force-reinstall"


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
