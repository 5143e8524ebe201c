"""A process forked from the server is like a fresh one, but for its imports; where it cannot be, it is a fresh one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import preloaded

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("FRESH_PROCESSES"), reason="all processes are fresh"
)

IMPORTED = "import sys; print('torch' in sys.modules)"


def told(code: str, *arguments: str, **named: Any) -> list[str]:
    """The lines that it prints, by an interpreter that ends well."""
    command = [sys.executable, "-c", code, *arguments]
    ran = preloaded.run(command, capture_output=True, text=True, timeout=120, check=True, **named)
    assert ran.stderr == ""
    return ran.stdout.splitlines()


def test_it_has_imported_torch_and_is_a_child_with_what_it_was_given(tmp_path: Path) -> None:
    code = "print(*sys.argv, os.getppid(), os.getcwd(), os.environ['A'], 'B' in os.environ, __name__, sep='\\n')"
    env = os.environ | {"A": "é", "B": ""}
    assert told(f"{IMPORTED}; import os; {code}", "one", "two words", cwd=tmp_path, env=env) == [
        *("True", "-c", "one", "two words", str(os.getpid()), str(tmp_path), "é", "True", "__main__")
    ]
    assert told(f"{IMPORTED}; import os; print('B' in os.environ, os.getcwd())") == ["True", f"False {os.getcwd()}"]


def test_scripts_and_modules_are_run_as_python_runs_them(tmp_path: Path) -> None:
    said = "import sys, beside; print(__name__, __file__, *sys.argv, sys.path[0], sys.modules['__main__'].beside.x)"
    (tmp_path / "script.py").write_text(said)
    (tmp_path / "beside.py").write_text("x = 5")
    for arguments in (["script.py", "-m"], ["-m", "script", "-c"], ["-u", str(tmp_path / "script.py")]):
        ran, real = (
            run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            for run in (preloaded.run, subprocess.run)
        )
        assert ran == real


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("", 0),
        ("import sys; sys.exit(7)", 7),
        ("import os; os._exit(8)", 8),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    ],
)
def test_it_ends_as_it_ends(code: str, ends: int) -> None:
    command = [sys.executable, "-c", f"import atexit; atexit.register(print, 'the end', flush=True)\n{code}"]
    ran = preloaded.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == ends
    assert ran.stdout == ("the end\n" if ends in (0, 1, 7, -signal.SIGINT) else "")
    assert ("ZeroDivisionError: division by zero" in ran.stderr) == (ends == 1)


def test_what_it_made_is_taken_apart_at_its_end_and_written_out(tmp_path: Path) -> None:
    code = f"""
import ctypes, torch
class Held:
    def __del__(self):
        print("the end of it", flush=True)
held, unclosed = Held(), open({str(tmp_path / "file")!r}, "w")
unclosed.write("written")
ctypes.CDLL(None).printf(b"by C\\n")
print("by Python")
"""
    assert sorted(told(code)) == ["by C", "by Python", "the end of it"]
    assert (tmp_path / "file").read_text() == "written"


def test_another_hf_lifecycle_on_its_path_is_the_one_that_it_imports(tmp_path: Path) -> None:
    code = "import hf_lifecycle; print(hf_lifecycle.__file__)"
    (own := tmp_path / "hf_lifecycle.py").write_text("")
    ours = Path(preloaded.__file__).parent.parent / "hf_lifecycle" / "__init__.py"
    assert told(code, cwd=tmp_path) == [str(own)]
    assert told(code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ours.parent.parent)}) == [str(own)]


def test_signals_reach_it_and_its_group() -> None:
    code = "import os, time; print(os.getpid() == os.getpgid(0) == os.getsid(0), flush=True); time.sleep(600)"
    for new_session, send in ((False, os.kill), (True, os.killpg)):
        command = [sys.executable, "-c", code]
        process = preloaded.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=new_session)
        with process:
            assert process.stdout is not None
            said = process.stdout.readline()
            send(process.pid, signal.SIGTERM)
        assert said == f"{new_session}\n"
        assert process.returncode == -signal.SIGTERM


def test_random_numbers_are_its_own() -> None:
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(()).item())"
    one, other = (told(code)[0].split() for _ in range(2))
    assert not set(one) & set(other)


def test_what_it_launches_is_forked_and_its_child_and_nothing_is_left_when_it_is_killed() -> None:
    code = """
import os, subprocess, sys, time
ask = "import os, sys; print('torch' in sys.modules, os.getppid(), flush=True)"
told = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True).stdout
print(told.split() == ["True", str(os.getpid())], flush=True)
time.sleep(600)
"""
    process = preloaded.Popen([sys.executable, "-c", code], launches=True, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        said, its_servers = process.stdout.readline(), psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert said == "True\n"
    _, alive = psutil.wait_procs(its_servers, timeout=10)
    assert (len(its_servers), alive) == (1, [])


def test_other_settings_and_other_options_are_of_fresh_processes() -> None:
    assert told(IMPORTED) == ["True"]
    for name in ("PYTHONHASHSEED", "HF_HOME", "OMP_WAIT_POLICY", "FRESH_PROCESSES"):
        assert told(IMPORTED, env=os.environ | {name: "1"}) == ["False"], name
    ran = preloaded.run([sys.executable, "-S", "-c", IMPORTED], capture_output=True, text=True)
    assert ran.stdout == "False\n"


def test_where_the_server_is_gone_it_is_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(IMPORTED) == ["True"]
    assert preloaded._server is not None
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    theirs.close()
    monkeypatch.setattr(preloaded, "_server", preloaded._Server(ours, preloaded._server.settings))
    assert [told(IMPORTED), told(IMPORTED)] == [["False"], ["False"]]
