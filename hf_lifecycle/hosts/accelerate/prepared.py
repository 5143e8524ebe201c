"""What an accelerator prepared, by name: models, optimizers, schedulers without accelerate's wrappers.

Of what DeepSpeed and Megatron-LM hold in their own engines, the schedulers alone are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf_lifecycle.data.datasets import IterableStream, MapStream
from hf_lifecycle.data.samplers import TicketSampler
from hf_lifecycle.engine.load_proof import Trained
from hf_lifecycle.hosts.accelerate.intercept import loaders_of, models_of, optimizers_of, registered_with, schedulers_of
from hf_lifecycle.hosts.accelerate.run_state.plain_loaders import PlainLoaders
from hf_lifecycle.state.alive import holders
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.values.functions import Variable, numbers_of_program

__all__ = ["ENGINES", "Prepared", "model_name", "optimizer_name"]

ENGINES = ("DEEPSPEED", "MEGATRON_LM")  # values of accelerate's DistributedType, which is not imported for it


class Prepared:
    """Of one accelerator, as it is whenever it is asked.

    Args:
        objects: What the user carries beside it.

    Attributes:
        plain: The loaders that it did not prepare.
    """

    def __init__(self, accelerator: Any, objects: Mapping[str, Stateful]) -> None:
        self._accelerator = accelerator
        self._objects = objects
        self._holders: dict[str, Any] | None = None
        self.plain = PlainLoaders(lambda: loaders_of(accelerator))

    @property
    def all(self) -> list[Any]:
        """Everything, as accelerate wrapped it."""
        accelerator = self._accelerator
        return [*models_of(accelerator), *optimizers_of(accelerator), *schedulers_of(accelerator)]

    def models(self) -> dict[str, torch.nn.Module]:
        if self._accelerator.distributed_type in ENGINES:
            return {}
        return {model_name(number): unwrapped(one) for number, one in enumerate(models_of(self._accelerator))}

    def optimizers(self) -> dict[str, Any]:
        if self._accelerator.distributed_type in ENGINES:
            return {}
        every = enumerate(optimizers_of(self._accelerator))
        return {optimizer_name(number): getattr(one, "optimizer", one) for number, one in every}

    def trained(self) -> Trained:
        """What is proved once it is loaded."""
        models = {f"{name}.": model for name, model in self.models().items()}
        accelerator = self._accelerator
        return Trained(models, self.optimizers(), self.schedulers(), accelerator.scaler, accelerator.distributed_type)

    def whole_models(self) -> dict[str, torch.nn.Module]:
        """Those of which every process has all parameters, as the optimizers hold them."""
        return {} if self._accelerator.distributed_type == "FSDP" else self.models()

    def names_of_optimizers(self) -> dict[int, str]:
        """By the identity of each and of its wrapper."""
        wrappers = zip(optimizers_of(self._accelerator), self.optimizers().items(), strict=False)
        return {id(one): name for wrapper, (name, inner) in wrappers for one in (wrapper, inner)}

    def schedulers(self) -> dict[str, Any]:
        every = enumerate(schedulers_of(self._accelerator))
        return {f"scheduler {number}": getattr(one, "scheduler", one) for number, one in every}

    def wrappers(self) -> dict[str, Any]:
        """The accelerator, and what it put around optimizers and schedulers."""
        every: dict[str, Any] = {"accelerator": self._accelerator}
        for called, held in (
            ("optimizer", optimizers_of(self._accelerator)),
            ("scheduler", schedulers_of(self._accelerator)),
        ):
            every |= {f"prepared {called} {number}": one for number, one in enumerate(held)}
        return every

    def shared(self) -> dict[str, Any]:
        """Objects of libraries beside these, on which a program may keep something."""
        state, gradients = self._accelerator.state, self._accelerator.gradient_state
        loaders = {f"loader {number}": one for number, one in enumerate(loaders_of(self._accelerator))}
        return {"accelerator.state": state, "accelerator.gradient_state": gradients, **loaders}

    def data(self) -> dict[str, Any]:
        """The datasets and collators of the loaders, without what they were put under."""
        found: dict[str, Any] = {}
        for called, base in self._loaders():
            dataset, collator = getattr(base, "dataset", None), getattr(base, "collate_fn", None)
            if isinstance(dataset, (MapStream, IterableStream)):
                dataset, collator = dataset.inner, dataset.inner_collate
            found |= {f"{called}.dataset": dataset, f"{called}.collate_fn": collator}
        return found

    def with_lasting_workers(self) -> list[str]:
        """The loaders whose data workers keep what they were started with."""
        return [called for called, base in self._loaders() if getattr(base, "persistent_workers", False)]

    def _loaders(self) -> Iterator[tuple[str, Any]]:
        for number, loader in enumerate(loaders_of(self._accelerator)):
            yield f"loader {number}", getattr(loader, "base_dataloader", loader)
        yield from self.plain.all().items()

    def orders(self) -> dict[str, Any]:
        """The samplers of the loaders, without what they were put under."""
        found = {}
        for called, base in self._loaders():
            sampler = getattr(base, "batch_sampler", None)
            if sampler is None:
                sampler = getattr(base, "sampler", None)
            found[f"{called}.sampler"] = sampler.inner if isinstance(sampler, TicketSampler) else sampler
        return found

    def numbers(self) -> list[Variable]:
        """Generators, tensors and arrays that the program that has called keeps in its variables."""
        return numbers_of_program()

    def objects(self) -> dict[str, Any]:
        """What the user registered for checkpointing or named in ``objects=``."""
        registered = {f"registered {number}": one for number, one in enumerate(registered_with(self._accelerator))}
        return {**registered, **self._objects}

    def look_again(self) -> None:
        """Let :meth:`holders` look anew."""
        self._holders = None

    def holders(self) -> dict[str, Any]:
        """The objects of a user's classes that hold a model, an optimizer or a scheduler, as they were looked for last.

        What the user carries is not among them, nor is what makes batches.
        """
        if self._holders is None:
            things = {**self.models(), **self.optimizers(), **self.schedulers()}
            names = {id(one): name for name, one in things.items()} | self.names_of_optimizers()
            wrapped = zip(models_of(self._accelerator), self.models(), strict=False)
            names |= {id(one): name for one, name in wrapped}
            passed = [*self.objects().values(), *self.data().values(), self._accelerator]
            found = holders(names)
            self._holders = {name: one for name, one in found.items() if not any(one is each for each in passed)}
        return self._holders

    def known(self) -> list[Any]:
        """All of it, the accelerator and its wrappers too."""
        inner = (self.models(), self.optimizers(), self.schedulers(), self.objects())
        stepping = [one for wrapped in optimizers_of(self._accelerator) for one in _within(wrapped)]  # an engine's too
        return [self._accelerator, *self.all, *stepping, *(one for each in inner for one in each.values())]


def _within(optimizer: Any) -> Iterator[Any]:
    while (optimizer := getattr(optimizer, "optimizer", None)) is not None:
        yield optimizer


def model_name(number: int) -> str:
    """What the model of this number is called where its tensors are named."""
    return f"model {number}"


def optimizer_name(number: int) -> str:
    """What the optimizer of this number is called where its values are named."""
    return f"optimizer {number}"
