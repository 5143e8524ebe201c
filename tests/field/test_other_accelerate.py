"""Where an accelerate lacks a name that is relied on, what is lost is said, and the loop goes the plain way."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from hf_lifecycle.hosts.accelerate.intercept import RELIED_ON
from tests.accelerator.tiny import new_script
from tests.field.renaming import renamed

_NAMES = [name for row in RELIED_ON for name in row]
_SAYS = "lacks names that hf_lifecycle relies on"


def _break_off_and_resume(place: Path) -> dict[str, str]:
    new_script(place, generators=3).run(save_at=(3,), stop_at=5)
    script = new_script(place)
    assert script.manager.resume()
    assert script.manager.progress.step == 3
    return script.run().digests()


def _unbroken(place: Path) -> dict[str, str]:
    return new_script(place, generators=3).run().digests()


@pytest.mark.core
def test_this_accelerate_has_all_that_is_relied_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _break_off_and_resume(tmp_path / "broken") == _unbroken(tmp_path / "unbroken")
    assert _SAYS not in caplog.text


@pytest.mark.parametrize("name", _NAMES)
def test_missing_name_is_said_and_the_run_ends_the_same(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with renamed(name, Accelerator):
        assert _break_off_and_resume(tmp_path / "broken") == _unbroken(tmp_path / "unbroken")
    assert caplog.text.count(_SAYS) == 3  # once for each program
    assert caplog.text.count(f"no {name}: ") == 3


@pytest.mark.parametrize("name", ["_models", "_optimizers"])
def test_save_waits_where_nothing_can_be_captured(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with renamed(name, Accelerator):
        script = new_script(tmp_path / "saved", generators=3).run(save_at=(1, 2, 3), wait=False)
    assert script.digests() == _unbroken(tmp_path / "unbroken")
    assert caplog.text.count("save(wait=False) blocks until the checkpoint is written, as save() does") == 1
