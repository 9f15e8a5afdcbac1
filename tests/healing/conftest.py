from __future__ import annotations

import pytest

from tests.healing.tiny_heal import Family, make_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Read it; copy it before changing it."""
    return make_family(tmp_path_factory.mktemp("family"))
