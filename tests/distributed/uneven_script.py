"""A loop whose ranks have unlike numbers of batches, with torch's ``Join``, as a user has it.

Arguments: the run's directory, a folder for what each rank has to say, the number of epochs, the steps from save to
save within ``Join`` (0: it saves at the end of each epoch alone), and the optimizer, "sgd" or "adam".
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from tests.resume.cases.tiny import Regressor, Rows


def main(directory: Path, answers: Path, epochs: int, every: int, kind: str) -> None:
    """Train to the end, and write what this rank ended with."""
    set_seed(7)
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    manager = TrainingStateManager(accelerator, directory, signals=())
    model = Regressor()
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}
    model, optimizer = accelerator.prepare(model, kinds[kind](model.parameters(), lr=1e-2))
    loader = DataLoader(Rows(20 - 8 * rank, seed=rank), 4, shuffle=True)
    told: dict[str, Any] = {"resumed": None, "error": "", "seen": []}
    resumed = manager.resume()
    told["resumed"] = None if resumed is None else resumed.name
    began = time.monotonic()
    try:
        for _ in manager.epochs(epochs):
            with Join([model]):
                for batch in manager.batches(loader):
                    told["seen"].append(batch["labels"].tolist())
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
                    if every and manager.progress.step % every == 0:
                        manager.save(wait=False)
            manager.save()
        digests = {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}
        told["digests"] = digests | leaf_digests(optimizer.state_dict(), "optimizer")
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        told["seconds"] = time.monotonic() - began
        (answers / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
