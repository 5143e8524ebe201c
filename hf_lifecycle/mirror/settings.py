"""The settings of a mirror: where it is, what is kept there, how long the end of training waits for it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from hf_lifecycle.argument_checks import read_choice, read_path
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy
from hf_lifecycle.errors import LifecycleError, MirrorError, StateFileError
from hf_lifecycle.mirror.objects import ObjectPlace, Verify
from hf_lifecycle.mirror.places import FolderPlace, Interrupted, Place

__all__ = ["Mirror"]

_LOCAL = frozenset({"file", "local"})


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror for the checkpoints of one run.

    Args:
        url: A folder (a mounted drive), or an fsspec URL such as ``s3://bucket/run``, ``gs://…``, ``hf://…``.
        storage_options: Options of the fsspec file system, such as credentials and an endpoint. They are never shown.
        keep: Which copies to keep. Default: what the run keeps in its output directory.
        wait_seconds: How long the end of training waits for the last copy.
        verify: ``"bytes"``: a copy is read back in full before it counts, which doubles the traffic. ``"sizes"``: only
            sizes are compared. A folder is always read back.

    Raises:
        ValueError: An unknown kind of URL, a chain of file systems, or a number or word out of range.
        TypeError: An argument has the wrong type.
        ImportError: The URL needs a package that is not installed; the message names it.

    Example:
        >>> Mirror("/mnt/drive/run-7", wait_seconds=60)
        Mirror('/mnt/drive/run-7', keep=None, wait_seconds=60, verify='bytes')
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    keep: RetentionPolicy | None = None
    wait_seconds: float = 600.0
    verify: Verify = "bytes"

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", read_path("mirror", self.url, hint=", an fsspec URL or a Mirror"))
        if not isinstance(self.storage_options, Mapping):
            raise TypeError(f"storage_options must be a mapping, got a {type(self.storage_options).__qualname__}")
        if self.keep is not None and not isinstance(self.keep, RetentionPolicy):
            raise TypeError(f"keep must be a RetentionPolicy, got {self.keep!r}")
        if isinstance(self.wait_seconds, bool) or not isinstance(self.wait_seconds, (int, float)):
            raise TypeError(f"wait_seconds must be a number, got {self.wait_seconds!r}")
        if not (math.isfinite(self.wait_seconds) and self.wait_seconds >= 0):
            raise ValueError(f"wait_seconds must be at least 0, got {self.wait_seconds}")
        read_choice("verify", self.verify, ("bytes", "sizes"))
        self._check_url()

    def __repr__(self) -> str:
        return f"Mirror({self.shown!r}, keep={self.keep!r}, wait_seconds={self.wait_seconds}, verify={self.verify!r})"

    @classmethod
    def of(cls, value: str | os.PathLike[str] | Mirror) -> Mirror:
        """A mirror as it may be given: itself, or its URL alone."""
        return value if isinstance(value, Mirror) else cls(value)  # type: ignore[arg-type]

    @property
    def shown(self) -> str:
        """The URL as it may be shown and logged: without the password that it may hold."""
        return re.sub(r"(://)[^/@]*@", r"\1…@", self.url)

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        protocol, separator, rest = self.url.partition("://")
        if not separator:
            return Path(self.url).expanduser().absolute()
        return Path(rest) if protocol in _LOCAL else None

    def require_apart(self, directory: Path) -> None:
        """Raise ``ValueError`` where it is ``directory`` itself, in which the checkpoints are that it is to copy."""
        if self.folder is not None and os.path.realpath(self.folder) == os.path.realpath(directory):
            raise ValueError(
                f"mirror: {self.shown} is the output directory itself; give another folder, on another disk"
            )

    @property
    def why_not_there(self) -> str:
        """Why a folder cannot be copied to as things are; empty where nothing shows that, and for what is no folder."""
        if self.folder is None or self.folder.parent.is_dir():
            return ""
        return f"{self.folder.parent} does not exist; mount the drive, or create that folder"

    def open(self) -> Place:
        """The place itself. Nothing is asked of it yet, though a client may look for its credentials."""
        folder = self.folder
        if folder is not None:
            return FolderPlace(folder)
        files, root = fsspec.core.url_to_fs(self.url, **self.storage_options)
        return ObjectPlace(files, root, self.verify)

    @contextmanager
    def trouble(self) -> Iterator[None]:
        """Whatever goes wrong at the place within the block is a :class:`MirrorError` that names it.

        Raises:
            MirrorError: With what the client raised as its cause.
        """
        try:
            yield
        except StateFileError as error:
            raise MirrorError(self.shown, str(error)) from error
        except (LifecycleError, Interrupted):
            raise
        except Exception as error:  # clients have errors of every kind: OSError, their own, or their library's
            text = str(error) or "no more is known"
            raise MirrorError(self.shown, f"{type(error).__name__}: {text}") from error

    def _check_url(self) -> None:
        protocol, separator, rest = self.url.partition("://")
        if not self.url or (separator and not (protocol and rest.strip("/"))):
            raise ValueError(f"mirror must be a folder, or an fsspec URL such as s3://bucket/run, got {self.shown!r}")
        if "::" in self.url:
            # What is read back through a cache says nothing of what lies behind it.
            raise ValueError(f"mirror: {self.shown}: chained file systems are not supported; give the last one alone")
        if not separator or protocol in _LOCAL:
            return
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            raise ValueError(
                f"mirror: {self.shown}: no installed package knows {protocol}://. fsspec has s3:// with the package "
                "s3fs, gs:// with gcsfs, abfs:// with adlfs, hf:// with huggingface_hub; or give a folder"
            ) from error
        except ImportError as error:  # it names the package
            raise ImportError(f"mirror: {self.shown}: {error}") from error
