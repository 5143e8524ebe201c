"""Whose code something is: of a library wherever that is installed, or of a user whose folder has a library's name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from safetensors import safe_open

from hf_lifecycle.libraries import is_of_user, library_of, module_of

_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from hf_lifecycle.libraries import library_of, lies_with_user
from hf_lifecycle.state.reachable import is_of_library
import aim.part
print(json.dumps([library_of("aim.part"), is_of_library(aim.part.Rows), lies_with_user("aim.part")]))
"""


def _package(place: Path) -> None:
    (place / "aim").mkdir(parents=True)
    (place / "aim" / "__init__.py").touch()
    (place / "aim" / "part.py").write_text("class Rows:\n    pass\n")


def _metadata(place: Path, url: str | None = None) -> None:
    folder = place / "aim-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: aim\nVersion: 1.0\n")
    if url is not None:
        (folder / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {"editable": True}}, indent=None))


@pytest.mark.parametrize("kind", ["a user's folder", "installed into a folder", "a checkout", "site-packages"])
def test_name_of_a_library_decides_only_with_where_it_lies(kind: str, tmp_path: Path) -> None:
    place = tmp_path / ("site-packages" if kind == "site-packages" else "src")
    _package(place)
    paths = [str(place)]
    if kind == "installed into a folder":
        _metadata(place)
    if kind == "a checkout":
        _metadata(tmp_path / "elsewhere", place.as_uri())
        paths.append(str(tmp_path / "elsewhere"))
    code = _CHILD.replace("sys.path.insert(0, sys.argv[1])", "sys.path[:0] = sys.argv[1:]")
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    expected = ["", False, True] if kind == "a user's folder" else ["aim", True, False]
    assert json.loads(done.stdout) == expected


def test_parts_of_python_and_installed_packages_are_libraries_and_this_test_is_none() -> None:
    assert [library_of(name) for name in ("logging", "_thread", "torch.nn", "transformers")] == [
        *("logging", "_thread", "torch", "transformers")
    ]
    assert library_of(__name__) == ""
    assert library_of(None) == ""


def test_class_of_code_without_a_name_is_not_of_python() -> None:
    variables: dict[str, object] = {}
    exec("class Own:\n    pass\nclass Part(Own):\n    __slots__ = ()", variables)
    assert [module_of(variables[name]) for name in ("Own", "Part")] == ["None", "None"]
    assert {module_of(one) for one in (object, dict, KeyError, safe_open, type(len))} == {"builtins"}


def test_class_in_c_whose_module_has_another_name_is_no_users() -> None:
    assert type(regex.compile("a")).__module__ not in sys.modules
    assert not is_of_user(type(regex.compile("a")))
