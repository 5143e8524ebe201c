"""Any fsspec file system as a place of copies: object stores, which have neither directories nor renames.

A copy is the objects below ``checkpoint-N/``. Its manifest is uploaded last and is the commit. Where objects of that
name are there already, it is ``checkpoint-N.1`` and so on; what it replaces goes after it has come. Before the first
object is written or removed, an object in ``.lifecycle/unfinished/`` names the copy, so that what a kill left there can
be told from what others put there, and is cleared away by the next upload.

Verified: sizes, as the store tells them, and with ``verify="bytes"`` the digest of every byte, read back.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, cast

from fsspec import AbstractFileSystem

from hf_lifecycle.checkpoint.directory.manifest import LARGEST_MANIFEST, MANIFEST, FileEntry, Manifest, parse_manifest
from hf_lifecycle.checkpoint.directory.store import PREFIX
from hf_lifecycle.checkpoint.files.regular import digest_of
from hf_lifecycle.errors import MirrorError, StateFileError
from hf_lifecycle.mirror.places import OWNER, Check, Contents, Copy, copy_bytes, copy_of, parse_owner

__all__ = ["ObjectPlace", "Verify"]

Verify = Literal["bytes", "sizes"]

_NAME = re.compile(r"checkpoint-(\d+)(?:\.\d+)?")
_UNFINISHED = ".lifecycle/unfinished"
_BLOCK = 8 << 20
# Their first component is a bucket: a missing one is an error, not an empty place.
_WITH_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2"})
# Clients that draw the time before a new try, or the next connection, from Python's global generator.
_DRAWING = ("botocore.retryhandler", "aiohttp.connector", "gcsfs.retry")


class ObjectPlace:
    """Copies below ``root`` of a file system.

    Args:
        root: The path in it, as ``files`` writes it.
        verify: Whether a copy is read back in full, or its sizes are compared alone.
    """

    def __init__(self, files: AbstractFileSystem, root: str, verify: Verify) -> None:
        self._files = files
        self._root = root.rstrip("/")
        self._verify = verify
        protocol = files.protocol
        self._has_buckets = bool(_WITH_BUCKETS & ({protocol} if isinstance(protocol, str) else set(protocol)))
        _give_generators_of_their_own()

    def look(self) -> Contents:
        self._files.invalidate_cache()
        names = self._names_in(self._root)
        if not names:
            self._require_bucket()
        owner = self._read_owner()
        copies, unreadable = [], []
        for name in names:
            if found := _NAME.fullmatch(name):
                try:
                    copies += self._copy(int(found[1]), name)
                except StateFileError as error:
                    unreadable.append(str(error))
        newest_first = sorted(copies, key=lambda copy: (copy.step, copy.manifest.created, copy.name), reverse=True)
        return Contents(owner, tuple(newest_first), tuple(unreadable))

    def put(self, source: Path, manifest: Manifest, owner: str, check: Check) -> Copy:
        self._files.invalidate_cache()
        self._require_bucket()
        if self._read_owner() is None:
            self._files.pipe_file(self._path(OWNER), owner.encode())
        self._clear_unfinished()
        copy = Copy(manifest.step, self._free_name(f"{PREFIX}{manifest.step}"), manifest)
        self._files.pipe_file(self._path(_UNFINISHED, copy.name), b"")
        for entry in manifest.files:
            self._send(source / entry.path, self._path(copy.name, entry.path))
            check(entry.size)
        self._require_whole(copy, check)
        # Invariant: last. Whatever has a manifest is there whole.
        self._files.pipe_file(self._path(copy.name, str(MANIFEST)), manifest.to_json())
        self._files.rm_file(self._path(_UNFINISHED, copy.name))
        return copy

    def get(self, copy: Copy, target: Path, check: Check) -> None:
        for entry in copy.manifest.files:
            copy_bytes(self._open(self._path(copy.name, entry.path)), target / entry.path, entry.size, check)

    def remove(self, copy: Copy) -> None:
        self._files.invalidate_cache()
        self._files.pipe_file(self._path(_UNFINISHED, copy.name), b"")
        # Invariant: first. Without its manifest it is no copy, whatever is left of it.
        self._files.rm_file(self._path(copy.name, str(MANIFEST)))
        self._remove_rest(copy.name)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _names_in(self, path: str) -> list[str]:
        try:
            found = self._files.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(each).rstrip("/").rpartition("/")[2] for each in found})

    def _require_bucket(self) -> None:
        bucket = self._root.partition("/")[0]
        if self._has_buckets and not self._files.exists(bucket):
            raise FileNotFoundError(f"there is no bucket {bucket!r}, or you may not read it; create it first")

    def _sizes(self, name: str) -> dict[str, int]:
        """The objects of a copy by their names in it."""
        root = self._path(name)
        found: Mapping[str, Mapping[str, Any]] = self._files.find(root, detail=True)
        cut = len(self._files._strip_protocol(root).strip("/")) + 1
        return {path.strip("/")[cut:]: int(facts.get("size") or 0) for path, facts in found.items()}

    def _copy(self, step: int, name: str) -> list[Copy]:
        """What is there under the name, if it has a manifest."""
        sizes = self._sizes(name)
        if str(MANIFEST) not in sizes:
            return []
        path = self._path(name, str(MANIFEST))
        if sizes.pop(str(MANIFEST)) > LARGEST_MANIFEST:
            raise StateFileError(path, f"larger than {LARGEST_MANIFEST >> 20} MiB, which no manifest is")
        with self._open(path) as file:
            manifest = parse_manifest(path, file.read(LARGEST_MANIFEST))
        return [copy_of(step, name, manifest, _differences(sizes, manifest.files))]

    def _read_owner(self) -> str | None:
        path = self._path(OWNER)
        try:
            with self._open(path) as file:
                return parse_owner(path, file.read(64))
        except FileNotFoundError:
            return None

    def _open(self, path: str) -> IO[bytes]:
        return cast("IO[bytes]", self._files.open(path, "rb", block_size=_BLOCK))

    def _send(self, source: Path, path: str) -> None:
        if not self._has_buckets:  # where there are directories, they are made; there, it would make the bucket
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(source), path)

    def _require_whole(self, copy: Copy, check: Check) -> None:
        """Compare what arrived with the manifest.

        Raises:
            MirrorError: Something differs.
        """
        self._files.invalidate_cache()
        wrong = _differences(self._sizes(copy.name), copy.manifest.files)
        if self._verify == "bytes" and not wrong:
            for entry in copy.manifest.files:
                with self._open(self._path(copy.name, entry.path)) as file:
                    if digest_of(file, check) != entry.xxh3_128:
                        wrong.append(f"{entry.path}: read back, its digest differs from the manifest")
        if wrong:
            raise MirrorError(self._path(copy.name), "; ".join(wrong))

    def _free_name(self, wanted: str) -> str:
        taken = set(self._names_in(self._root))
        names = (wanted if not n else f"{wanted}.{n}" for n in range(10_000))
        return next(name for name in names if name not in taken)

    def _clear_unfinished(self) -> None:
        for name in self._names_in(self._path(_UNFINISHED)):
            # Invariant: only what bears a checkpoint's name is removed, and no copy that was committed.
            if _NAME.fullmatch(name):
                if self._files.exists(self._path(name, str(MANIFEST))):
                    self._files.rm_file(self._path(_UNFINISHED, name))
                else:
                    self._remove_rest(name)

    def _remove_rest(self, name: str) -> None:
        """Remove what is left of a copy without manifest, and then the object that says so."""
        if self._files.exists(self._path(name)):
            self._files.rm(self._path(name), recursive=True)
        self._files.rm_file(self._path(_UNFINISHED, name))


def _differences(sizes: Mapping[str, int], entries: tuple[FileEntry, ...]) -> list[str]:
    """What differs between the objects found and those listed; objects that are not listed do no harm."""
    missing = [f"{entry.path}: missing" for entry in entries if entry.path not in sizes]
    return missing + [
        f"{entry.path}: {sizes[entry.path]} bytes, the manifest says {entry.size}"
        for entry in entries
        if entry.path in sizes and sizes[entry.path] != entry.size
    ]


def _give_generators_of_their_own() -> None:
    """Training's random numbers are Python's global ones, and no background thread may draw from those."""
    for name in _DRAWING:
        if name.partition(".")[0] in sys.modules and find_spec(name) is not None:
            module: Any = import_module(name)
            if getattr(module, "random", None) is random:
                module.random = random.Random()
