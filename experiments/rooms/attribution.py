"""Who made the furniture: the file that a set of rooms must be passed on with."""

import re
import zipfile
from collections import defaultdict
from pathlib import Path

from experiments.rooms.catalog import LIBRARIES, Model, read_catalog
from experiments.rooms.pack import read_rooms, write_atomically

LICENCES = {
    "BlendSwap-CC-0": (
        "Public domain (CC0 1.0), https://creativecommons.org/publicdomain/zero/1.0/. "
        "Credit is not asked for but gladly given. By various authors, from https://www.blendswap.com."
    ),
    "BlendSwap-CC-BY": (
        "Creative Commons Attribution 3.0, https://creativecommons.org/licenses/by/3.0/. "
        "By various authors, from https://www.blendswap.com."
    ),
    "Scopia": (
        "Creative Commons Attribution 3.0 Unported, https://creativecommons.org/licenses/by/3.0/. "
        "Copyright Emmanuel PUYBARET / eTeks <info@eteks.com> and Scopia Visual Interfaces Systems, s.l. "
        "(http://www.scopia.es)."
    ),
    "KatorLegaz": (
        "Creative Commons Attribution 3.0 United States, https://creativecommons.org/licenses/by/3.0/us/. "
        "Copyright 2003-2008 Andrew Kator & Jennifer Legaz."
    ),
}
HEAD = """# Attribution of the Rooms set

The pictures of the Rooms set (`cut/data/embedded/`, and every set that `make rooms` renders) show
furniture of the *Sweet Home 3D* model libraries (http://www.sweethome3d.com, Debian package
`sweethome3d-furniture` 1.8), collected, cleaned and converted by Emmanuel Puybaret / eTeks. The models
were changed: scaled to their catalog size, recoloured, put into rooms with walls and floors drawn by
`experiments/rooms`, and rendered. None of the creators endorses this project. The people of the
Reallusion library are not used.

The pictures and labels themselves may be used under Creative Commons Attribution 3.0 with this file,
which names the {count} models that the set shows and their creators. It is written by
`python -m experiments.rooms attribution`.
"""


def write_attribution(folder: Path, furniture: Path, out: Path) -> None:
    """Write the creators of all models in a set as Markdown, by library and creator.

    Args:
        folder: Of the set.
        furniture: Folder of the archives.
        out: The file.
    """
    used = {name for room in read_rooms(folder) for name in room.entry["models"]}
    shown = [model for model in read_catalog(furniture) if model.name in used]
    sections = [HEAD.format(count=len(shown))]
    for library in LIBRARIES:
        mine = [model for model in shown if model.library == library]
        with zipfile.ZipFile(furniture / f"{library}.sh3f") as archive:
            sections.append(_section(library, mine, archive))
    write_atomically(out, "\n".join(sections).encode())


def _section(library: str, models: list[Model], archive: zipfile.ZipFile) -> str:
    by_creator: dict[str, list[str]] = defaultdict(list)
    for model in models:
        by_creator[model.creator].append(model.title + _source(model, archive))
    lines = [f"## {library}", "", LICENCES[library], ""]
    for creator in sorted(by_creator, key=str.lower):
        lines.append(f"- **{creator}**: {'; '.join(sorted(by_creator[creator]))}")
    return "\n".join(lines) + "\n"


def _source(model: Model, archive: zipfile.ZipFile) -> str:
    """The work's own title, author and page, from the licence file beside a model where there is one."""
    name = model.path.rsplit("/", 1)[0] + "/BLENDSWAP_LICENSE.txt"
    if name not in archive.namelist():
        return ""
    text = archive.read(name).decode("utf-8", "replace")
    work = re.search(r'downloading "(.+?)" by (.+?)\s*$', text, re.M)
    page = re.search(r"Downloaded from (\S+)", text)
    said = f'"{work[1]}" by {work[2]}' if work else ""
    where = page[1] if page else ""
    return f" ({', '.join(part for part in (said, where) if part)})" if said or where else ""
