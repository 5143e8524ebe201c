"""Python processes that begin with torch, transformers and this package imported: forked from a server.

:class:`Popen` and :func:`run` are used as those of ``subprocess``. A command ``python [-u] SCRIPT``, ``-m MODULE`` or
``-c CODE`` of this interpreter becomes a fork of the server, and a child of the caller like any other: to be waited
for and killed, with the arguments, directory, environment, standard streams and session that were asked for, a
``__main__`` and random numbers of its own. With ``launches=True``, what it starts itself with ``subprocess`` is forked
as well, as its own child: the ranks of torchrun and of accelerate launch, the kernel of a notebook.

It is a fresh process, as of ``subprocess``, where a fork cannot be the same: other options, other variables that are
read when torch and transformers are imported, a system that is not Linux, a server that does not answer. And always if
its environment has ``FRESH_PROCESSES``. Not promised: a hash seed and a command line in ``/proc`` of its own, and that
what the server imported, with the libraries in C, is taken apart at the end: what the process made itself is.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Popen", "run"]

READ_AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "LD_", "HF_", "TRANSFORMERS_", "TORCH_", "CUDA_", "MPLBACKEND")
READ_LATER = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONWARNINGS", "HF_LIFECYCLE_", "TORCH_NCCL_")
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.elastic.agent.server.api", "transformers.trainer")
OF_USERS = ("cli", "views", "__main__")  # what of this package no training needs
ANSWER = 300.0  # seconds: the first answer comes after the imports, on a machine that may be busy
LARGEST = 1 << 18  # bytes of a request
SET_CHILD_SUBREAPER = 36  # prctl

_Fresh = subprocess.Popen
_path_of_server: list[str] = []
_set_by_imports: dict[str, str] = {}
_imported: dict[str, ModuleType] = {}  # by the server, without Python's own


def _read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {key: env[key] for key in env if key.startswith(READ_AT_IMPORT) and not key.startswith(READ_LATER)}


class _Server:
    """The line to a server; of the process that opened it."""

    def __init__(self, line: socket.socket, settings: dict[str, str]) -> None:
        self.line, self.settings, self.owner, self.lock = line, settings, os.getpid(), threading.Lock()
        line.settimeout(ANSWER)

    def fork(self, request: dict[str, Any], streams: list[int]) -> int | None:
        """The process id of a new child of this process; none if there is no answer."""
        with self.lock:
            try:
                # The process is an orphan at once, so that this one, its next living ancestor to ask for it, adopts it.
                if ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
                    return None
                socket.send_fds(self.line, [json.dumps(request).encode()], streams)
                return int(self.line.recv(LARGEST))
            except (OSError, ValueError):  # the latter where it is closed at the other end
                self.line.close()  # and so for every later one
                return None
            finally:
                ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)


_server: _Server | None = None
_is_forked = False


def _server_for(env: Mapping[str, str]) -> _Server | None:
    """The server of this process, which the first call starts, if what was set when it imported is what ``env`` has."""
    global _server
    if sys.platform != "linux" or env.get("FRESH_PROCESSES"):
        return None
    if _server is None and not _is_forked:
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        code = "import sys; sys.path[0] = sys.argv[1]; import preloaded; preloaded.main(int(sys.argv[2]))"
        process = _Fresh(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(theirs.fileno())],
            env={key: value for key, value in env.items() if key not in READ_LATER},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        started = _server = _Server(ours, _read_at_import(env))

        def end() -> None:
            if os.getpid() == started.owner:
                process.kill()
                process.wait()

        atexit.register(end)
    usable = _server is not None and _server.owner == os.getpid() and _server.settings == _read_at_import(env)
    return _server if usable else None


class Popen(_Fresh):  # type: ignore[type-arg]
    """``subprocess.Popen``; the process is forked where it can be."""

    def __init__(self, args: Any, *given: Any, launches: bool = False, **named: Any) -> None:
        self._launches = launches
        super().__init__(args, *given, **named)

    def _execute_child(self, *given: Any) -> None:  # all by position, in this order since Python 3.9
        command, executable, preexec, close_fds, pass_fds, cwd, env, _, _, shell = given[:10]
        pipes, (restore_signals, gid, gids, uid, umask, session, *group) = given[10:16], given[16:]
        env = {os.fsdecode(key): os.fsdecode(value) for key, value in (os.environ if env is None else env).items()}
        usual = (executable, preexec, close_fds, tuple(pass_fds), shell, restore_signals, gid, gids, uid, umask, *group)
        program = _program(command) if usual[:10] == (None, None, True, (), False, True, None, None, None, -1) else None
        server = _server_for(env) if program is not None and group in ([], [-1]) else None
        request = {"program": program, "cwd": os.path.abspath(os.fsdecode(cwd or ".")), "env": env}
        request |= {"session": session, "launches": self._launches}
        streams = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        pid = server.fork(request, streams) if server is not None else None
        if pid is None:
            super()._execute_child(*given)
            return
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _program(command: Any) -> dict[str, Any] | None:
    """What a command of this interpreter is to run; none if it is of another, or has options that are not known."""
    first, *rest = [os.fsdecode(one) for one in ([command] if isinstance(command, (str, bytes)) else command)]
    unbuffered = rest[:1] == ["-u"]
    kind, *arguments = rest[unbuffered:] or [""]
    if first != sys.executable or kind == "" or (kind.startswith("-") and (kind not in ("-m", "-c") or not arguments)):
        return None
    return {"unbuffered": unbuffered, "kind": kind, "arguments": arguments}


def run(
    command: Any, *, timeout: float | None = None, check: bool = False, capture_output: bool = False, **named: Any
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run``, without ``input``."""
    if capture_output:
        named |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **named) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def main(line: int) -> None:
    """What the server is: it imports, and answers until the line is closed; its forks run what they are told."""
    global _is_forked
    before, _is_forked = dict(os.environ), True
    _path_of_server.extend(sys.path[1:])
    atexit.register(_leave_imported)  # before all others, and so called after them
    subprocess.Popen = Popen  # type: ignore[misc]  # before torch takes it for its ranks
    sys.path.insert(1, str(Path(__file__).parent.parent))
    for module in PRELOADED + _ours():
        importlib.import_module(module)
    _set_by_imports.update({key: value for key, value in os.environ.items() if before.get(key) != value})
    threads = [Path(f"/proc/self/task/{one}/comm").read_text().strip() for one in os.listdir("/proc/self/task")]
    if len([one for one in threads if one != "jemalloc_bg_thd"]) > 1:  # pyarrow's, which jemalloc sees over a fork
        sys.exit(f"threads, which no fork would have: {threads}")
    standard = sys.stdlib_module_names
    _imported.update((name, one) for name, one in sys.modules.items() if name.partition(".")[0] not in standard)
    for one in weakref.finalize._registry:  # type: ignore[attr-defined]
        one.atexit = False  # operators that torch would unregister
    gc.collect()
    gc.freeze()  # as in conftest.py: no full collection of a fork goes through all of torch, and copies it
    _execute(_forked_from(socket.socket(fileno=line), _read_at_import(before)))


def _ours() -> tuple[str, ...]:
    root = Path(__file__).parent.parent
    found = [path.relative_to(root).with_suffix("").parts for path in sorted((root / "hf_lifecycle").rglob("*.py"))]
    return tuple(".".join(one).removesuffix(".__init__") for one in found if one[1] not in OF_USERS)


def _leave_imported() -> None:
    """Have the end of a fork take apart what it made and imported itself, and copy no page of what the server did."""
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)
    libc.on_exit(libc.fcloseall, None)  # before it
    for name, module in _imported.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))


def _forked_from(line: socket.socket, settings: dict[str, str]) -> dict[str, Any]:
    """Serve. Returns in a fork only: what it is to run."""
    global _server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it ends with who asks
    while True:
        told, streams, *_ = socket.recv_fds(line, LARGEST, 3)
        if not told:
            os._exit(0)
        request = json.loads(told)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            break
        os.close(writing)
        for one in streams:
            os.close(one)
        os.waitpid(between, 0)
        line.send(os.read(reading, 20))
        os.close(reading)
    _become(request, streams)
    os.write(writing, str(os.getpid()).encode())
    for one in (reading, writing, line.detach(), *streams):
        os.close(one)
    while os.getppid() == between:
        time.sleep(0.0005)
    if not request["launches"]:
        subprocess.Popen = _Fresh  # type: ignore[misc]
        return request
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        return _forked_from(theirs, settings)
    theirs.close()
    _server = _Server(ours, settings)
    return request


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take over what ``subprocess`` would have given to the process, and what Python makes of it as it starts."""
    import numpy as np
    import torch

    if request["session"]:
        os.setsid()
    for number, one in enumerate(streams):
        os.dup2(one, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(_set_by_imports | request["env"])
    program = request["program"]
    if program["unbuffered"] or os.environ.get("PYTHONUNBUFFERED"):
        for name, number in (("stdout", 1), ("stderr", 2)):
            old, raw = getattr(sys, name), io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, old.encoding, old.errors, write_through=True))
    warnings._processoptions(filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")))  # type: ignore[attr-defined]
    np.random.seed()  # Python does as much for its own
    torch.default_generator.seed()


def _forget_ours_unless_found() -> None:
    """Where another hf_lifecycle, or none, is on the path, it is not the one that the server imported."""
    found = PathFinder.find_spec("hf_lifecycle")
    if found is None or found.origin != sys.modules["hf_lifecycle"].__file__:
        for name in [name for name in sys.modules if name.partition(".")[0] == "hf_lifecycle"]:
            del sys.modules[name]


def _execute(request: dict[str, Any]) -> None:
    """Run it as ``__main__``, as ``python`` does."""
    kind, arguments = request["program"]["kind"], request["program"]["arguments"]
    sys.argv = ["-m", *arguments[1:]] if kind == "-m" else [kind, *arguments[kind == "-c" :]]
    sys.orig_argv = [sys.executable, kind, *arguments]
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, os.path.dirname(os.path.realpath(kind)))
    more = [os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    sys.path[:] = [first, *more, *_path_of_server]
    importlib.invalidate_caches()
    _forget_ours_unless_found()
    sys.modules["__main__"] = here = ModuleType("__main__")
    if kind == "-m":
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
        return
    if kind == "-c":
        exec(compile(arguments[0], "<string>", "exec"), here.__dict__)
        return
    here.__dict__["__file__"] = file = os.path.abspath(kind)
    exec(compile(Path(file).read_bytes(), file, "exec"), here.__dict__)
