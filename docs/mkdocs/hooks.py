"""Hooks of the site: pages of the API and of files outside ``docs``, navigation, what is not drawn yet."""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments import architecture  # noqa: E402

DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(?ms)^```.*?^```")
# Pages that other parts of the project write; the navigation has room for them.
LATER = {"newtask.md", "tracking.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".json": "json"}


def _modules():
    """Group to its public modules, by the block of ``docs/architecture.md``; ``cut`` itself comes first."""
    known = [m for m in architecture.modules() if not m.rpartition(".")[2].startswith("_")]
    members = architecture.groups((DOCS / "architecture.md").read_text())
    return [(g, [m for m in known if g.holds(m)]) for g in members]


def on_config(config):
    """Leave out pages that are not there yet, add notebooks that are, and the API by group."""
    nav = []
    for entry in config.nav:
        ((title, pages),) = entry.items()
        if isinstance(pages, list):
            pages = [p for p in pages if not (p in LATER and not (DOCS / p).exists())]
        nav.append({title: pages})
    notebooks = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.glob("notebooks/*.md"))
    if notebooks:
        nav.insert(-1, {"Notebooks": notebooks})
    for group, modules in _modules():
        nav[-1]["Code"].append({group.name: [{m.removeprefix("cut."): f"reference/{m}.md"} for m in modules]})
    config.nav = nav
    return config


def on_files(files, config):
    """Pages of the API, and of the files outside ``docs`` that pages link to."""
    for _, modules in _modules():
        for module in modules:
            files.append(File.generated(config, f"reference/{module}.md", content=f"::: {module}\n"))
    for name in sorted({n for f in list(files) if f.is_documentation_page() for n in _outside(f)}):
        language = LANGUAGES.get(Path(name).suffix, "text")
        text = (ROOT / name).read_text()
        page = f"# `{name}`\n\n````{language}\n{text}````\n"
        files.append(File.generated(config, f"source/{name}.md", content=page))
    style = (Path(__file__).parent / "style.css").read_text()
    files.append(File.generated(config, "style.css", content=style))
    return files


def _shown(path):
    """Whether a file outside ``docs`` gets a page: text does, a notebook has a page of its own."""
    return (ROOT / path).is_file() and Path(path).suffix in {*LANGUAGES, ".txt", ""}


def _outside(file):
    """Paths, from the top of the project, of the files outside ``docs`` that a page links to."""
    text = FENCE.sub("", file.content_string)
    for _, _, target, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(file.src_uri), target))
        if not path.startswith("docs/") and path != "README.md" and _shown(path):
            yield path


def on_page_markdown(markdown, page, config, files):
    """Links out of ``docs`` lead to the pages made for them; figures that are not drawn yet are named."""
    folder = posixpath.dirname(page.file.src_uri)

    def changed(match):
        bang, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        up = posixpath.relpath("docs", posixpath.join("docs", folder))
        if bang and path.startswith("docs/figures/") and not (ROOT / path).exists():
            return f"*{text}: this figure is not drawn yet, its runs are missing.*"
        if path == "README.md":
            return f"[{text}]({up}/index.md)"
        if not path.startswith("docs/") and _shown(path):
            return f"{bang}[{text}]({up}/source/{path}.md{anchor})"
        if not path.startswith("docs/"):
            return text
        return match[0]

    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(changed, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(changed, markdown[last:])])
