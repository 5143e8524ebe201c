"""Under FSDP2: adapters, compiled models, offloaded, uneven and unsharded parameters, and optimizers of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from .launching import launch, told

pytestmark = pytest.mark.slow

OF_TRAINER = ("trainer_adapters_checkpointed-full", "trainer_compiled", "trainer_compiled-full")
LOOPS = ("adapters", "compiled", "offloaded")
FULL = tuple(f"{name}-full" for name in LOOPS)
LOST = "trainer_adapters_checkpointed"
WARNED = (
    "Trainer saves only the adapter of a sharded model",
    "Trainer saves no tensor of it, so a resume will be refused: set state_dict_type to FULL_STATE_DICT in fsdp_config",
)


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, (*LOOPS, "trainer_adapters", LOST)),
        pytest.param(2, (*FULL, *OF_TRAINER), marks=pytest.mark.exhaustive),
        pytest.param(4, (*LOOPS, *FULL, *OF_TRAINER), marks=pytest.mark.exhaustive),
    ],
)
def test_sharded_training_of_any_kind_is_saved_in_the_background_resumes_exactly_and_is_loaded_by_the_host(
    ranks: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    code, output = launch("torchrun", ranks, "tests.distributed.variants_script", tmp_path, *names)
    assert code == 0, output
    for rank, found in enumerate(told(tmp_path, ranks)):
        assert set(found) == set(names), f"{found}\n{output}"
        for name in names:
            steps, differs, warned = found[name]
            assert differs == []
            if not name.startswith("trainer_adapters"):
                assert (steps, warned) == ([4, 6, 7 if name.startswith("trainer") else 8], [])
                continue
            assert steps == []
            if rank == 0:
                assert [line.endswith(WARNED) for line in warned] == [True], warned
