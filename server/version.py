"""The version of Peregrine."""

from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("peregrine")
    except PackageNotFoundError:
        return "0+uninstalled"  # run from a folder


VERSION = _installed_version()
