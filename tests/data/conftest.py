from pathlib import Path

import pytest
from layout_files import LAYOUTS, write_set
from rooms_files import write_rooms


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an intact set; not to be changed."""
    return write_rooms(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="session", params=LAYOUTS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A layout's name and the folder of an intact set; not to be changed."""
    return request.param, write_set(request.param, tmp_path_factory.mktemp(request.param))
