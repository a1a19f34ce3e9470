from pathlib import Path

import pytest
from rooms_files import write_rooms


@pytest.fixture(scope="session")
def rooms_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an intact set; not to be changed."""
    return write_rooms(tmp_path_factory.mktemp("rooms"))
