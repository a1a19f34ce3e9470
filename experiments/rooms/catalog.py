"""The furniture: which models there are, what each one is for, and which of them only test rooms may use."""

import hashlib
import re
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("BlendSwap-CC-0", "BlendSwap-CC-BY", "Scopia", "KatorLegaz")
PACKAGE = "sweethome3d-furniture"
INSTALLED = Path("/usr/share/sweethome3d/furniture")
CLASSES = (
    "wall", "floor", "ceiling", "bed", "chair", "sofa", "table", "cabinet", "lamp", "plant", "screen",
    "bathroom", "door_window", "appliance", "other",
)  # fmt: skip
HELD_OUT = 0.3
MAX_OBJ_BYTES = 4_000_000


@dataclass(frozen=True)
class Model:
    """One piece of furniture: where it lies, what it is for, how large it is in metres."""

    name: str
    title: str
    library: str
    creator: str
    path: str
    role: str
    label: int
    size: tuple[float, float, float]
    elevation: float
    top: float
    rotation: tuple[float, ...]
    wall_depth: float
    held_out: bool = False


@dataclass(frozen=True)
class Rule:
    """Gives a role and a class to every model whose title, category and height (metres) fit."""

    role: str
    label: str
    title: str
    category: str = ""
    low: float = 0.0
    high: float = 2.6
    widest: float = 3.0
    raised: float = 0.0

    def fits(self, title: str, category: str, size: tuple[float, float, float], elevation: float) -> bool:
        """Tell whether a model is meant: title and category match, size and elevation (m) are in range."""
        return (
            bool(re.search(self.title, title))
            and bool(re.search(self.category, category))
            and self.raised <= elevation
            and self.low <= size[1] <= self.high
            and max(size[0], size[2]) <= self.widest
        )


_SKIPPED_CATEGORY = "Vehicles|Characters|Staircases"
_SKIPPED = (
    r"hospital|mezzanine|\bair |garage|elevator|street|park|lamppost|flashlight|camping|stone lantern|wheel|"
    r"relax|beach|deck|pool|tennis|football|railing|fence|chimney|furnace|plug|socket|switch|sconce|arched|"
    r"shutter|porch col|rails|hut|extinguisher|emergency|swing|umbrella|pallet|corner (cab|sofa)|"
    r"(lower|upper) corner|sign\b|hanger|fan$|swimming|jacuzzi|sandpit|fountain|rowboat|hydrant|sidewalk|"
    r"column|"
    r"surveillance|cctv|pine|blind|shower (head|door|curtain)|cooktop|induction|^stove$|smoke|bench press|"
    r"abdominal|bonsai|antique|deep fryer|chandelier|treadmill|fitness|basketball net|trampoline|antenna|"
    r"external"
)
RULES = (
    Rule("fridge", "appliance", r"fridge|refrigerator|chest freezer"),
    Rule("stove", "appliance", r"stove|\boven|cooker", "Kitchen", 0.55, 1.2),
    Rule("washer", "appliance", r"washing machine|dryer machine"),
    Rule("hood", "appliance", r"\bhood\b"),
    Rule("radiator", "appliance", r"radiator", low=0.4),
    Rule("wall_appliance", "appliance", r"water heater|air conditioning - internal", high=0.8),
    Rule("counter_appliance", "appliance",
         r"microwave|coffee (machine|maker|brewer)|toaster|mixer|blender|boiler|small oven|cooker|fryer"),
    Rule("floor_appliance", "appliance", r"water cooler|electric water heater$"),
    Rule("tv", "screen", r"^tv( 16:9)?$|wall flat tv"),
    Rule("computer", "screen", r"imac|laptop|ibook"),
    Rule("toilet", "bathroom", r"toilets unit|bidet", "Bathroom"),
    Rule("urinal", "bathroom", r"urinal", "Bathroom"),
    Rule("basin", "bathroom", r"washbasin|vanity|lavatory", "Bathroom"),
    Rule("tub", "bathroom", r"\bbath$|bathtub|shower stall", "Bathroom"),
    Rule("bed", "bed", r"\b(bed|crib|futon)$|opened convertible", "", 0.15, 1.8),
    Rule("sofa", "sofa", r"sofa|couch"),
    Rule("office_chair", "chair", r"chair|seat", "Office"),
    Rule("armchair", "chair", r"armchair|^puff$"),
    Rule("stool", "chair", r"stool|bar chair|high chair"),
    Rule("chair", "chair", r"chair|seat", "Living|Exterior|Kitchen"),
    Rule("bench", "chair", r"\bbench$", "Living|Exterior"),
    Rule("bedside", "table", r"bedside"),
    Rule("desk", "table", r"\bdesk\b(?! lamp)|dressing table"),
    Rule("desk", "table", r"table", "Office"),
    Rule("coffee_table", "table", r"table\b", "Living|Exterior", 0.3, 0.6),
    Rule("table", "table", r"table\b", "Living|Exterior", 0.6, 1.1),
    Rule("kitchen_tall", "cabinet", r"high cabinet", "Kitchen"),
    Rule("kitchen_wall", "cabinet", r"(upper|glass door) (shelves )?cabinet", "Kitchen"),
    Rule("kitchen_base", "cabinet", r"lower cabinet|drawers cabinet|^sink|^island$", "Kitchen"),
    Rule("tv_stand", "cabinet", r"tv stand|television cabinet"),
    Rule("wardrobe", "cabinet", r"wardrobe|cupboard", "Bedroom"),
    Rule("shelf", "cabinet", r"bookcase|shelves"),
    Rule("dresser", "cabinet", r"dresser|\bchest$|changing table|contemporary living room"),
    Rule("dresser", "cabinet", r"^box$", "Living|Office", 0.8),
    Rule("filing", "cabinet", r"filing cabinet|^safe$|locker"),
    Rule("ceiling_lamp", "lamp", r"hanging|pendant|ceiling lamp|fluorescent light|track|^lamp$", "Lights",
         raised=1),
    Rule("wall_lamp", "lamp", r"wall|porch|outdoor", "Lights"),
    Rule("floor_lamp", "lamp", r"lamp|lantern", "Lights", 0.7, 1.9),
    Rule("table_lamp", "lamp", r"lamp|candle|lantern", "Lights", 0.12, 0.7),
    Rule("plant", "plant", r"plant|ficus|yucca|flower|tulip|orchid|lily|spath|bamboo",
         "Living|Kitchen", 0.45, 2.1),
    Rule("small_plant", "plant", r"plant|flower|tulip|cactus|orchid|lily|bamboo",
         "Living|Exterior", 0.1, 0.6),
    Rule("window", "door_window", r"window", "Doors"),
    Rule("door", "door_window", r"door", "Doors"),
    Rule("rug", "other", r"rug$|carpet|bathmat|doormat", high=0.05),
    Rule("wall_piece", "other", r"fireplace|upright piano|white board|aquarium|clothes rack|guitar|^screen$"),
    Rule("floor_piece", "other",
         r"basket|dustbin|trash ?can|briefcase|suitcase|speaker|rocking horse|teddy|doll house|cardboard box|"
         r"recycling|trunck|backpack|potty|barrel|crate|bicycle|indoor bike|clothes horse|ladder|punching",
         low=0.17, high=1.9),
    Rule("decoration", "other",
         r"vase|book$|pottery|frame|radio|clock|phone|globe|deer|mini stereo|mp3|doll$|train|gift|chess|"
         r"camera",
         "Living|Misc|Bedroom|Office", 0.05, 0.6),
    Rule("office_item", "other", r"printer|letter tray|calendar|penbox|phone|headphones|book$", high=0.4),
    Rule("kitchen_item", "other",
         r"bowl|jar|bottle|apples|bread|knife|tools|pan$|teapot|kettle|scale|pot$|cake|towel holder|fruits|"
         r"milk|plate",
         "Kitchen", 0.05, 0.5),
    Rule("bath_item", "other", r"towel|brush|clothes basket|step|soap", "Bathroom", 0.1),
)  # fmt: skip


def find_furniture(folder: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """Find the folder that holds the furniture archives, fetching the Debian package where needed.

    Args:
        folder: Where to look, and nowhere else. Without it: the installed package, then the cache, then
            ``apt-get download`` into the cache (nothing is installed).
        cache: Folder for a fetched package; default ``~/.cache/cut/furniture``.

    Raises:
        ValueError: The archives are in none of these places; the text names the Debian package.
    """
    if folder is not None:
        return _checked(Path(folder))
    cache = Path(cache or Path.home() / ".cache" / "cut" / "furniture")
    unpacked = cache / "usr/share/sweethome3d/furniture"
    for place in (INSTALLED, unpacked):
        if all((place / f"{library}.sh3f").is_file() for library in LIBRARIES):
            return place
    try:
        _fetch(cache)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"no furniture in {INSTALLED} and {PACKAGE} could not be fetched ({error}): install the Debian "
            f"package {PACKAGE} (apt-get install {PACKAGE}) or name a folder with the .sh3f archives"
        ) from error
    return _checked(unpacked)


def _checked(folder: Path) -> Path:
    missing = [library + ".sh3f" for library in LIBRARIES if not (folder / f"{library}.sh3f").is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: these archives are in Debian's {PACKAGE}")
    return folder


def _fetch(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True)
        package = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(cache)], check=True, capture_output=True)


def properties(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """List the entries of an archive's catalog file, each a mapping from key to text."""
    text = archive.read("PluginFurnitureCatalog.properties").decode("latin1")
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*)$", text, re.M):
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value.strip())
        entries.setdefault(int(number), {})[key] = value
    return [entries[number] for number in sorted(entries)]


def read_catalog(folder: Path) -> list[Model]:
    """List the models a room may use, each with its role, class and whether it is held out for test.

    Args:
        folder: What :func:`find_furniture` gives.
    """
    models: list[Model] = []
    for library in LIBRARIES:
        with zipfile.ZipFile(folder / f"{library}.sh3f") as archive:
            found = (_model(library, archive, entry) for entry in properties(archive))
            models += [model for model in found if model is not None]
    return _hold_out(models)


def _model(library: str, archive: zipfile.ZipFile, entry: dict[str, str]) -> Model | None:
    title, category = entry["name"].lower(), entry["category"]
    if re.search(_SKIPPED_CATEGORY, category) or re.search(_SKIPPED, title):
        return None
    size = (float(entry["width"]) / 100, float(entry["height"]) / 100, float(entry["depth"]) / 100)
    elevation, top = (
        float(entry.get("elevation", 0)) / 100,
        float(entry.get("dropOnTopElevation", size[1] * 100)),
    )
    rule = next((rule for rule in RULES if rule.fits(title, category, size, elevation)), None)
    path = entry["model"].lstrip("/")
    if rule is None or archive.getinfo(path).file_size > MAX_OBJ_BYTES:
        return None
    rotation = tuple(float(x) for x in entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split())
    return Model(
        name=entry["id"],
        title=entry["name"],
        library=library,
        creator=entry["creator"],
        path=path,
        role=rule.role,
        label=CLASSES.index(rule.label),
        size=size,
        elevation=elevation,
        top=top / 100,
        rotation=rotation,
        wall_depth=_wall_depth(entry, size[2]),
    )


def _wall_depth(entry: dict[str, str], depth: float) -> float:
    """How deep a door or window sits in the wall, in metres."""
    thickness = float(entry.get("doorOrWindowWallThickness", depth * 100))
    return min(thickness + float(entry.get("doorOrWindowWallDistance", 0)), depth * 100 - 1) / 100


def _hold_out(models: list[Model]) -> list[Model]:
    """Mark a quarter of each role's models, chosen by the hash of their names, as test's own."""
    kept: list[Model] = []
    for role in dict.fromkeys(model.role for model in models):
        group = sorted((m for m in models if m.role == role), key=lambda m: _digest(m.name))
        held = max(1, round(HELD_OUT * len(group))) if len(group) > 1 else 0
        kept += [Model(**{**model.__dict__, "held_out": i < held}) for i, model in enumerate(group)]
    return sorted(kept, key=lambda model: (model.role, model.name))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
