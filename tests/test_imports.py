"""Importing the package costs nothing, and every public name is there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_lifecycle

HEAVY = ("torch", "transformers", "accelerate", "numpy", "safetensors", "matplotlib")


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running ``code``."""
    report = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(ran.stdout))


def test_import_loads_neither_torch_nor_transformers() -> None:
    assert not modules_after("import hf_lifecycle").intersection(HEAVY)


def test_errors_and_dir_load_neither_torch_nor_transformers() -> None:
    code = "import hf_lifecycle; dir(hf_lifecycle); hf_lifecycle.LifecycleError; hf_lifecycle.__version__"
    assert not modules_after(code).intersection(HEAVY)


def test_early_stopping_needs_neither_torch_nor_transformers() -> None:
    code = "from hf_lifecycle import EarlyStopping; EarlyStopping(patience=1).step(0.5)"
    assert not modules_after(code).intersection({"torch", "transformers", "accelerate", "matplotlib"})


def test_retention_policies_need_nothing_at_all() -> None:
    code = "from hf_lifecycle import KeepBest, KeepLast; KeepLast(2) | KeepBest(1, 'min')"
    assert not modules_after(code).intersection(HEAVY)


def test_training_state_loads_no_transformers_and_no_accelerate() -> None:
    code = "from hf_lifecycle import TrainingStateManager; TrainingStateManager()"
    assert not modules_after(code).intersection({"transformers", "accelerate", "matplotlib"})


@pytest.mark.parametrize("name", hf_lifecycle.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(hf_lifecycle, name)
    if isinstance(value, type):
        assert value.__name__ == name
        assert value.__doc__


def test_dir_lists_the_public_names() -> None:
    assert dir(hf_lifecycle) == sorted(hf_lifecycle.__all__)


def test_unknown_attribute_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_lifecycle.no_such_name


def test_importing_an_unknown_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="no_such_name"):
        from hf_lifecycle import no_such_name  # noqa: F401


def test_version_is_that_of_the_installed_distribution() -> None:
    assert hf_lifecycle.__version__ == version("hf-lifecycle")


def test_package_is_marked_as_typed() -> None:
    assert hf_lifecycle.__file__ is not None
    assert (Path(hf_lifecycle.__file__).parent / "py.typed").is_file()


def test_no_public_name_is_that_of_a_module_which_would_take_its_place() -> None:
    modules = {path.stem for path in Path(hf_lifecycle.__file__).parent.iterdir() if path.name != "__pycache__"}
    assert modules & set(hf_lifecycle.__all__) == set()
