"""What is trained on several ranks: cases of the matrix, and some that only several ranks have."""

from __future__ import annotations

from typing import Any

from tests.resume.cases import CASES as MATRIX
from tests.resume.cases.streams import Stream
from tests.resume.cases.tiny import NOISES, Rows, regression
from tests.resume.harness import Break, Case

__all__ = ["CASES", "OWN"]


def rows(**settings: Any) -> Any:
    return lambda run: regression(run, train=Rows(48, noise=NOISES["torch"]), **settings)


def stream(**settings: Any) -> Any:
    return lambda run: regression(run, train=Stream(112, noise="numpy"), **settings)


def _settings(**config: Any) -> dict[str, Any]:
    return {"accelerator_config": config}


OWN = (
    Case("ranks_rows_2", "noise and dropout, 2 workers", rows(dataloader_num_workers=2)),
    Case("ranks_split", "split_batches", rows(**_settings(split_batches=True))),
    Case("ranks_dispatch", "map-style data made on rank 0", rows(**_settings(dispatch_batches=True))),
    Case(
        "ranks_dispatch_split",
        "the same, split",
        rows(**_settings(dispatch_batches=True, split_batches=True)),
    ),
    Case("ranks_stream_dispatch", "a stream made on rank 0", stream(dataloader_num_workers=2)),
    Case("ranks_stream_shard", "a stream that every rank runs through", stream(**_settings(dispatch_batches=False))),
    Case(
        "ranks_stream_shard_2",
        "the same with 2 workers",
        stream(dataloader_num_workers=2, **_settings(dispatch_batches=False)),
    ),
    Case(
        "ranks_best",
        "the best weights at the end, a limit",
        rows(
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            save_total_limit=2,
        ),
        breaks=(Break(5), Break(9)),
    ),
    Case(
        "ranks_accumulation",
        "gradient accumulation, ragged epochs",
        lambda run: regression(run, train=Rows(44, noise=NOISES["python"]), gradient_accumulation_steps=2),
    ),
    Case("ranks_ragged", "epochs that the ranks cannot share evenly", lambda run: regression(run, train=Rows(27))),
)
CASES: tuple[Case, ...] = (*OWN, *MATRIX)
