"""Which errors say that a file could not be written, in whichever words a writer has for it.

Python's own writing raises ``OSError``. The writers of torch, safetensors and tokenizers are not in Python: what the
disk told them arrives as text in an error of their own.
"""

from __future__ import annotations

import os
import re
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_lifecycle.errors import RankFailed

__all__ = ["annotate", "as_errors_of_ranks", "cause_in_words", "file_at_fault", "in_words", "is_write_fault"]

_SAYS_SO = re.compile(
    r"\(os error \d+\)"  # safetensors and tokenizers: how Rust prints an error of the system
    r"|inline_container|PytorchStreamWriter"  # torch's archive
    r"|iostream error|basic_ios"  # C++ streams
)

_ARCHIVES = {".pt", ".pth", ".bin"}  # what torch writes is a zip archive, whose directory lies at its end


def is_write_fault(error: BaseException) -> bool:
    """Whether ``error`` is that of a file that could not be written: a full disk, an I/O error, a missing permission.

    What is wrong with the state itself, with a device or with the program is none.
    """
    return isinstance(error, OSError) or (isinstance(error, Exception) and _SAYS_SO.search(str(error)) is not None)


def cause_in_words(error: BaseException) -> str:
    """What to look at, said after an ``error`` of a writer that hides what the disk told it; empty after any other."""
    hidden = is_write_fault(error) and not isinstance(error, OSError) and "os error" not in str(error)
    return " (the file could not be written completely: is the disk full, or a quota reached?)" if hidden else ""


def file_at_fault(error: BaseException, folder: Path) -> str | None:
    """The file that could not be written, where ``error`` names none itself and its frames or ``folder`` tell.

    None for an error that is not of writing: a file that looks torn then is one that another rank is writing.
    """
    if isinstance(error, RankFailed) or (isinstance(error, OSError) and error.filename is not None):
        return None
    if not is_write_fault(error):
        return None
    if type(error).__name__ == "SafetensorError":  # its writer leaves nothing to be found
        return _given_to_safetensors(error) or "a .safetensors file"
    # On several ranks another may be removing the folder meanwhile: os.walk skips what is gone.
    files = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    torn = sorted(path.name for path in files if path.suffix in _ARCHIVES and not zipfile.is_zipfile(path))
    return torn[0] if torn else None


def in_words(error: BaseException, folder: Path, *, found_in: BaseException | None = None) -> str:
    """``error`` with its type, and with the file that could not be written into ``folder`` where that is known.

    It is looked for in ``found_in``, if ``error`` is another one's cause.
    """
    file = file_at_fault(error if found_in is None else found_in, folder)
    return f"{f'{file}: ' if file is not None else ''}{type(error).__name__}: {error}"


def annotate(error: BaseException, said: str) -> None:
    """Let the traceback of ``error`` end with ``said``: the writers of torch name neither file nor checkpoint."""
    if hasattr(error, "add_note"):  # before Python 3.11 the log alone has it
        error.add_note(said)


@contextmanager
def as_errors_of_ranks() -> Iterator[None]:
    """Let an error of ``torch.distributed.checkpoint``, which is no ``Exception``, be that of the rank that it names.

    Raises:
        OSError: A file could not be written; with the rank in its text.
        RuntimeError: Anything else, or what a writer that is not in Python makes of it.
    """
    try:
        yield
    except BaseException as error:
        failures = getattr(error, "failures", None)
        if type(error).__name__ != "CheckpointException" or not failures:
            raise
        rank, (cause, _) = min(failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"rank {rank}: {cause.strerror or cause}", cause.filename) from error
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


def _given_to_safetensors(error: BaseException) -> str | None:
    """The name of the file that safetensors' ``save_file`` was called with, as the frames of ``error`` have it."""
    given = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "save_file":
            given = frame.f_locals.get("filename")
    return Path(given).name if isinstance(given, (str, os.PathLike)) else None
