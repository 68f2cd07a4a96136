"""What holds for every test."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Generator, Iterator, Mapping
from functools import cache

import pytest
from hypothesis import settings

# The same examples in every run: whether a commit passes says something of the commit, not of the day. New ones
# are looked for with --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

collect_ignore = ["outside_project"]  # its tests run where it is installed: tests/test_kernels_outside.py


@cache
def _no_compiler() -> str | None:
    """Why the host runtime cannot compile here; by looking at the machine, not by asking what is under test."""
    if platform.system() != "Linux":
        return f"the host runtime works on Linux, this is {platform.system()}"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, names)) else f"none of {', '.join(names)} is on this machine"


@cache
def _no_nvrtc() -> str | None:
    """Why NVRTC cannot compile here, likewise: the packages that hold it are not installed."""
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime"):
        if not any(name.startswith(package) for name in installed):
            return f"{package} is not installed"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skip, with the reason, what needs the host runtime where there is no compiler; elsewhere it fails."""
    from gpucnn_kernels.runtime.host import HostUnavailableError

    try:
        return (yield)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HostUnavailableError):
            cause = cause.__cause__ or cause.__context__
        reason = _no_compiler()
        if cause is None or reason is None:
            raise
        pytest.skip(f"the kernels cannot run here: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """The same for what a test's fixtures need, and what it is marked to need."""
    for marker, missing in (("compiler", _no_compiler), ("nvrtc", _no_nvrtc)):
        reason = missing() if item.get_closest_marker(marker) is not None else None
        if reason is not None:
            pytest.skip(f"the kernels cannot be compiled here: {reason}")
    return (yield from pytest_runtest_call())


@cache
def _catalogued() -> frozenset[str]:
    from gpucnn_kernels import catalog

    return frozenset(source.fingerprint for source in catalog.variants())


@pytest.fixture(scope="session", autouse=True)
def _every_launch_is_in_the_catalog() -> Iterator[None]:
    """A kernel that runs in a form that the catalog lacks would be neither compiled in CI nor warmed up."""
    from gpucnn_kernels import catalog, source  # the catalog takes ``variant`` by name: before it is replaced

    assert catalog.variant is source.variant
    plain = source.variant

    def checked(
        name: str, scalar: str | None, definitions: Mapping[str, str | int] | None = None
    ) -> source.Source:
        made = plain(name, scalar, definitions)
        assert made.fingerprint in _catalogued(), (
            f"{made.title} is not in gpucnn_kernels.catalog: add it to SOURCES"
        )
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "variant", checked)
        yield
