"""A message about many tensors, objects or files is short, and shows no value of a tensor, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, TrainingStateManager, latest_checkpoint
from tests.trainer.runs import BrokenOff, Ends, Rows, new_trainer, reseal

MANY = 40
MARK = 74747.0  # a value that no message may show
MOST = 10  # lines


class Wide(nn.Module):
    """Many layers, of which each has a buffer."""

    _keys_to_ignore_on_save = None

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 1) for _ in range(MANY))
        for number in range(MANY):
            self.register_buffer(f"held_{number}", torch.full((2,), float(number)), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = sum(layer(x) for layer in self.layers).squeeze(-1)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Wide()


class FirstAlone(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = {name: one for name, one in self.model.state_dict().items() if name.startswith("layers.0.")}
        super()._save(output_dir, state_dict=state)


class Makes(TrainerCallback):
    """Makes many modules while training runs, or has them from the begin."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.made: list[nn.Module] = [nn.Linear(2, 2) for _ in range(MANY)] if when == "at once" else []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "later" and not self.made:
            self.made = [nn.Linear(2, 2) for _ in range(MANY)]
        with torch.no_grad():
            for one in self.made:
                one.weight += MARK


class WritesTo(TrainerCallback):
    """Writes to all layers but the first, which alone an optimizer holds."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for layer in list(kwargs["model"].layers)[1:]:
                layer.weight += MARK


def in_file(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model*.safetensors"))
    save_file({name: torch.full_like(one, MARK) for name, one in load_file(file).items()}, file, {"format": "pt"})
    reseal(checkpoint)


def in_optimizer(checkpoint: Path) -> None:
    file = next(checkpoint.glob("optimizer.*"))
    state = torch.load(file, weights_only=True)
    for one in state["state"].values():
        one["exp_avg"].fill_(MARK)
    torch.save(state, file)
    reseal(checkpoint)


def torn(checkpoint: Path) -> None:
    for number in range(MANY):
        (checkpoint / f"file-{number}.bin").write_text("")
    reseal(checkpoint)
    for number in range(MANY):
        (checkpoint / f"file-{number}.bin").unlink()


def nothing(_: Path) -> None:
    pass


def own_objects(count: int) -> dict[str, nn.Module]:
    return {f"own {number}": nn.Linear(1, 1) for number in range(count)}


def of_first_layer() -> dict[str, Any]:
    model = wide()
    optimizer = torch.optim.SGD(model.layers[0].parameters(), lr=0.01)  # type: ignore[index, union-attr]
    return {"model": model, "with_trainer": {"optimizers": (optimizer, None)}}


def trained(
    place: Path, *callbacks: Any, resume: bool = False, strict: bool = True, objects: int = 0, **how: Any
) -> None:
    ours = LifecycleCallback(strict=strict, objects=own_objects(objects), async_save=False)
    how = {"model": wide(), **how}
    trainer = new_trainer(place, *callbacks, ours, **how)
    if not resume:
        trainer.add_callback(Ends(4))
    trainer.train(resume_from_checkpoint=latest_checkpoint(place) if resume else None)


def looped(place: Path, *, resume: bool = False, objects: int = 0, strict: bool = True) -> None:
    accelerator = Accelerator(cpu=True)
    given = own_objects(objects)
    manager = TrainingStateManager(accelerator, place, objects=given, strict=strict)
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), batch_size=4))
    try:
        manager.resume()
        for _ in manager.epochs(2 if resume else 1):
            for batch in manager.batches(loader):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            manager.save()
    finally:
        manager.close()


Case = tuple[Callable[[Path], object], Callable[[Path], None], Callable[[Path], object] | None]
CASES: dict[str, Case] = {
    "weights that differ": (trained, in_file, lambda place: trained(place, resume=True)),
    "weights that differ, not strict": (trained, in_file, lambda place: trained(place, resume=True, strict=False)),
    "an optimizer that differs": (trained, in_optimizer, lambda place: trained(place, resume=True)),
    "files that lack": (trained, torn, lambda place: trained(place, resume=True)),
    "objects that lack": (
        lambda place: trained(place, objects=MANY),
        nothing,
        lambda place: trained(place, resume=True),
    ),
    "new objects, not strict": (
        trained,
        nothing,
        lambda place: trained(place, resume=True, strict=False, objects=MANY),
    ),
    "weights that are left out": (lambda place: trained(place, kind=FirstAlone), nothing, None),
    "modules made in training": (lambda place: trained(place, Makes("later")), nothing, None),
    "modules that lack": (
        lambda place: trained(place, Makes("at once")),
        nothing,
        lambda place: trained(place, resume=True),
    ),
    "weights that nobody holds": (
        lambda place: trained(place, WritesTo(), **of_first_layer()),
        nothing,
        None,
    ),
    "weights of a loop that differ": (looped, in_file, lambda place: looped(place, resume=True)),
    "an optimizer of a loop that differs": (looped, in_optimizer, lambda place: looped(place, resume=True)),
    "objects of a loop that lack": (
        lambda place: looped(place, objects=MANY),
        nothing,
        lambda place: looped(place, resume=True),
    ),
    "files of a loop that lack": (looped, torn, lambda place: looped(place, resume=True)),
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("WARNING", logger="hf_lifecycle"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_message_about_many_things_is_short_and_shows_no_value(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin, change, again = CASES[name]
    errors: list[str] = []
    for number, work in enumerate(each for each in (begin, again) if each is not None):
        if number == 1:
            newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
            for path in set(tmp_path.glob("checkpoint-*")) - {newest}:
                path.rename(tmp_path / f"kept-{path.name}")
            change(newest)
        try:
            work(tmp_path)
        except BrokenOff:
            pass
        except Exception as error:  # noqa: BLE001  whatever is told is looked at
            errors.append(str(error))
    told = [each.getMessage() for each in caplog.records if each.name.startswith("hf_lifecycle")]
    assert told or errors
    assert [text for text in (*told, *errors) if len(text.splitlines()) > MOST] == []
    assert len(told) <= MOST
    assert [text for text in (*told, *errors) if "74747" in text or "7.4747" in text] == []
    assert max(map(len, (*told, *errors))) < 2500, max((*told, *errors), key=len)
    many = [text for text in (*told, *errors) if " more" in text or str(MANY - 1) in text or str(MANY) in text]
    assert many, (told, errors)
