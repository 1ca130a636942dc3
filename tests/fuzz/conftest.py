from collections.abc import Iterator

import pytest

from tests.fuzz.harness import Bench


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One server for all fuzz tests of a process."""
    made = Bench(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.close()
