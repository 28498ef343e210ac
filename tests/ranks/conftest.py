"""What every test of several ranks has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield pool
    pool.close()
