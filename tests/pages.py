"""Pages: the code blocks of Markdown files, and how they are run.

A comment on the line before a block says what is special about it:

    <!-- file: mine.py -->      the block is a file; it is written, and a later block runs it
    <!-- run: slow -->          minutes long, run by make test-all, in a copy of the project
    <!-- run: with model -->    runs with the names of a small trained model
    <!-- run: no, REASON -->    not run; the reasons that are allowed are in test_pages.py

All other blocks of Python and shell are run as they stand, in the order of the page, in one temporary folder.

A page is read in a shell of its own that nothing has prepared: what it shows must switch the environment on
(``. .venv/bin/activate``) before a command is called by its bare name, for ``cut`` alone is Unix's.
"""

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?ms)((?:^<!-- (?:run|file): [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$")
SHELL = ("sh", "bash")
ACTIVATE = [".", ".venv/bin/activate"]
PROGRAMS = ("cut", "python", "pip")  # found in an environment that is switched on, or not at all, or another's


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        language: After the three ticks.
        code: What is in it.
        file: The name that it is written under, if it is a file.
        run: ``""``, ``"slow"``, ``"with model"`` or ``"no, REASON"``.
    """

    language: str
    code: str
    file: str = ""
    run: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is a program."""
        return self.language in (*SHELL, "python") and not self.file


def pages() -> list[Path]:
    """The README and the pages of the documentation; not tables, notebooks (run by themselves) and templates."""
    found = sorted(p for p in (ROOT / "docs").rglob("*.md") if not {"tables", "notebooks"} & set(p.parts))
    return [ROOT / "README.md", *(p for p in found if not p.name.endswith(".template.md"))]


def blocks(text: str) -> list[Block]:
    """The blocks of a page in its order."""
    found = []
    for notes, language, code in BLOCK.findall(text):
        said = dict(re.findall(r"<!-- (run|file): (.*?) -->", notes))
        found.append(Block(language, code, said.get("file", ""), said.get("run", "")))
    return found


def commands(code: str) -> list[list[str]]:
    """The words of every command of a shell block, comments left out."""
    joined = code.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def run_page(path: Path, folder: Path, names: dict) -> int:
    """Run the quick blocks of a page in a folder; returns how many.

    Args:
        path: The page.
        folder: Empty; what pages read of the project is put there.
        names: What blocks "with model" know.
    """
    furnish(folder)
    space, count, active = {"__name__": "__main__"}, 0, False
    for block in blocks(path.read_text()):
        if block.file:
            (folder / block.file).write_text(block.code)
        elif block.runs and block.run in ("", "with model"):
            count += 1
            if block.language == "python":
                exec(compile(block.code, f"{path.name}, block {count}", "exec"), space | names if block.run else space)
            else:
                for words in commands(block.code):
                    assert active or words[0] not in PROGRAMS, f"{words}: {shlex.join(ACTIVATE)} comes first"
                    active = active or words == ACTIVATE
                    assert words == ACTIVATE or run_here(words) == 0, words
    return count


def furnish(folder: Path) -> None:
    """What pages read of the project: configs, one picture and the committed models."""
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "docs/images").mkdir(parents=True)
    shutil.copy(ROOT / "docs/images/room.jpg", folder / "docs/images")
    models = folder / "experiments/records/demo/models"
    models.parent.mkdir(parents=True)
    models.symlink_to(ROOT / "experiments/records/demo/models")


def run_here(words: list[str]) -> int:
    """One command in this process, which has the large libraries loaded already; returns its exit code.

    Raises:
        ValueError: If it is no command of ours; such blocks are to be marked.
    """
    program, *argv = words
    if program.endswith("cut"):
        return importlib.import_module("cut.cli").main(argv)
    if program.endswith("python") and argv[0] == "-m":
        module, *argv = argv[1:]
        return importlib.import_module("cut.cli" if module == "cut" else module).main(argv)
    if program.endswith("python") and argv[0].endswith(".py"):
        before, sys.argv = sys.argv, argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        finally:
            sys.argv = before
        return 0
    raise ValueError(f"{shlex.join(words)} is no command of ours: mark its block as slow, or say why it is not run")


def copy_of_the_project(folder: Path) -> Path:
    """The project's files in another folder, with this environment as its ``.venv``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def newcomer() -> dict[str, str]:
    """The variables of a shell that was just opened: the environment that runs the tests is not switched on in it."""
    ours = Path(sys.prefix, "bin").resolve()
    path = [p for p in os.environ["PATH"].split(os.pathsep) if Path(p).resolve() != ours]
    # The number of threads is the suite's, whose tests run side by side; a newcomer has none.
    left = {n: v for n, v in os.environ.items() if n not in ("VIRTUAL_ENV", "PYTHONHOME", "OMP_NUM_THREADS")}
    return left | {"PATH": os.pathsep.join(path)}


def run_slowly(path: Path, folder: Path) -> int:
    """Run all marked and quick shell blocks of a page in a copy of the project, in one new shell.

    Returns:
        How many were marked.
    """
    shown = blocks(path.read_text())
    files = {block.file: block.code for block in shown if block.file}
    assert len(files) == sum(bool(block.file) for block in shown), f"{path.name} has two files of one name"
    for name, code in files.items():
        (folder / name).write_text(code)
    run = [b for b in shown if b.language in SHELL and not b.file and b.run in ("", "slow")]
    # The suite that runs this is what make test runs: only its recipe is read here.
    code = re.sub(r"(?m)^make test\b", "make --dry-run test", "\n".join(b.code for b in run))
    environment = newcomer() | {"PYTHONPATH": str(folder)}  # the copy's code, not that of the folder it is made of
    subprocess.run(["bash", "-e", "-c", code], cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)
    return sum(b.run == "slow" for b in run)
