"""Many names in few words."""

from __future__ import annotations

import pytest

from hf_lifecycle import RankFailed, ResumeMismatch
from hf_lifecycle.messages import few_by_owner


@pytest.mark.core
@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["Mine.best"], "Mine.best"),
        (["Mine.best", "trainer.ema"], "Mine.best, trainer.ema"),
        (["model._is_hf_initialized", "model.scale", "model._b"], "model.scale and 2 more of model"),
        (["_Hidden.a", *(f"model.{number}" for number in range(100))], "model.0 and 99 more of model, _Hidden.a"),
        (["a.x", "b.x", "c.x", "d.x", "e.x"], "a.x, b.x, c.x, and 2 more"),
    ],
)
def test_paths_are_named_by_what_holds_them_and_a_users_own_first(paths: list[str], said: str) -> None:
    assert few_by_owner(paths) == said


def test_errors_of_several_lines_that_another_error_lists_have_one_line_each() -> None:
    own = ResumeMismatch("checkpoint-4", ["a was 1", "b was 2"], "do this")
    said = str(RankFailed("resuming", {rank: str(own) for rank in range(64)}))
    assert len(said.splitlines()) == 9
    one = "checkpoint-4: resuming would not continue the same run: a was 1; b was 2; do this"
    assert said.splitlines()[1] == f"  - rank 0: {one}"
