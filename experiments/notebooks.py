"""Notebooks: run those of ``notebooks/`` from the first cell to the last and render them for the docs.

    python -m experiments.notebooks            # all of them, into docs/notebooks
    python -m experiments.notebooks --only 3   # those whose name begins so

They lie in the repository without outputs; what they show is made here. Needs the extra ``notebooks``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cut.files import write_atomically

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds of one cell, before it is given up
# A bar that libraries would draw with a widget is text in a page, and none of the page's matter.
QUIET = "ignore:IProgress not found"


def found(folder: Path, only: str = "") -> list[Path]:
    """The notebooks of a folder by name.

    Raises:
        ValueError: If none begins with ``only``.
    """
    paths = sorted(folder.glob("*.ipynb"))
    chosen = [p for p in paths if p.name.startswith(only)]
    if not chosen:
        raise ValueError(f"no notebook {only!r} in {folder}; allowed: {', '.join(p.stem for p in paths) or 'none'}")
    return chosen


def title(notebook: Any) -> str:
    """The first heading of a notebook."""
    first = str(notebook.cells[0].source).splitlines()[0] if notebook.cells else ""
    return first.lstrip("# ")


def execute(path: Path, console: Console | None = None) -> Any:
    """Run a notebook in a kernel of its own, in the repository's root, and give it back with its outputs.

    Raises:
        ValueError: If a cell fails; the message names the notebook and shows the error.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    notebook = nbformat.read(path, as_version=4)
    count = sum(c.cell_type == "code" for c in notebook.cells)

    def told(cell: Any, cell_index: int, **_: Any) -> None:
        if console is not None and console.is_terminal:
            done = sum(c.cell_type == "code" for c in notebook.cells[: cell_index + 1])
            console.print(f"{path.stem}: cell {done} of {count}", end="\r")

    resources = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, timeout=LIMIT, resources=resources, on_cell_start=told)
    if sys.platform != "win32":
        client.create_kernel_manager().transport = "ipc"  # over TCP the kernel warns of listeners
    warnings = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), QUIET)))
    try:
        client.execute(env={**os.environ, "PYTHONWARNINGS": warnings})
    except (CellExecutionError, CellTimeoutError) as error:
        raise ValueError(f"{path.name} failed: {re.sub(chr(27) + r'.*?m', '', str(error))}") from error
    return notebook


def render(notebook: Any, name: str, out: Path) -> Path:
    """Write a run notebook as Markdown, its pictures beside it.

    Args:
        notebook: With outputs.
        name: Of the page, without suffix.
        out: Folder; pictures go into ``<name>/``.

    Returns:
        The page.
    """
    from nbconvert import MarkdownExporter

    notebook.metadata.pop("widgets", None)  # a bar that has ended
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for picture, content in resources["outputs"].items():
        write_atomically(out / name / picture, content)
        text = text.replace(f"]({picture})", f"]({name}/{picture})")
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.DOTALL)
    text = text.replace("![png](", "![what the cell above shows](")
    source = f"*Made by running `notebooks/{name}.ipynb` on the committed records.*\n"
    head, _, rest = text.lstrip().partition("\n")
    page = out / f"{name}.md"
    write_atomically(page, f"{head}\n\n{source}{rest.rstrip()}\n")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a notebook failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.notebooks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/notebooks")
    parser.add_argument("--only", default="", help="those whose file name begins with this")
    args = parser.parse_args(argv)
    console, failed = Console(), 0
    try:
        import nbclient  # noqa: F401
        import nbconvert  # noqa: F401

        paths = found(args.folder, args.only)
    except ImportError:
        print("error: notebooks need the extra 'notebooks': pip install 'cut[notebooks]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        start = time.perf_counter()
        try:
            notebook = execute(path, console)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        page = render(notebook, path.stem, args.out)
        console.print(f"{title(notebook)}: {time.perf_counter() - start:.0f} s, {page}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
