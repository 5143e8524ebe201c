"""What is trained on several ranks: cases of the matrix, and some that only several ranks have."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from tests.distributed.sharded_cases import normed
from tests.resume.cases import CASES as MATRIX
from tests.resume.cases.streams import Stream
from tests.resume.cases.tiny import NOISES, Rows, regression
from tests.resume.harness import Attempt, Break, Case

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
    Case(
        "ranks_norm",
        "BatchNorm, whose buffers differ between ranks",
        lambda run: regression(run, model=normed(), train=Rows(48)),
    ),
    Case("ranks_ragged", "epochs that the ranks cannot share evenly", lambda run: regression(run, train=Rows(27))),
    Case(
        "ranks_stopping",
        "metrics that differ between ranks: rank 0's decide",
        lambda run: stopping(run),
        breaks=(Break(9),),
    ),
)


class ByRank(Trainer):
    """Evaluates to something else on every rank, as a metric that is computed by each alone does."""

    def evaluate(self, *given: Any, **named: Any) -> dict[str, float]:
        handler, told = self.callback_handler, self.callback_handler.on_evaluate

        def tell(args: Any, state: Any, control: Any, metrics: dict[str, float]) -> Any:
            number = len([row for row in state.log_history if "eval_loss" in row])
            metrics["eval_own"] = (
                (0.5, 0.4, 0.45, 0.41, 0.42, 0.43)[number - 1] if args.process_index == 0 else 1 / number
            )
            return told(args, state, control, metrics)

        handler.on_evaluate = tell
        try:
            return super().evaluate(*given, **named)
        finally:
            del handler.on_evaluate


def stopping(run: Attempt) -> Trainer:
    return regression(
        run,
        train=Rows(48),
        kind=ByRank,
        callbacks=run.callbacks(patience=3, monitor="own", mode="min"),
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_own",
        greater_is_better=False,
        load_best_model_at_end=True,
        max_steps=20,
    )


CASES: tuple[Case, ...] = (*OWN, *MATRIX)
