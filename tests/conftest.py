"""What holds for every test."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from functools import cache

import pytest

collect_ignore = ["outside_project"]  # its tests run where it is installed: tests/test_kernels_outside.py


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skip, with the reason, what needs the host runtime where that cannot be; .ci/run sees that it can."""
    from gpucnn_kernels.runtime.host import HostUnavailableError

    try:
        return (yield)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HostUnavailableError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        pytest.skip(f"the kernels cannot run here: {cause}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """The same for what a test's fixtures need, and what it is marked to need."""
    if item.get_closest_marker("compiler") is not None:
        from gpucnn_kernels.runtime.host_build import HostUnavailableError, find_compiler

        try:
            find_compiler()
        except HostUnavailableError as error:
            pytest.skip(f"the kernels cannot run here: {error}")
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
