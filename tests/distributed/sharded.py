"""What each of two ranks runs: a model that ``fully_shard`` shares out, saved, loaded, proved, and trained on.

accelerate's FSDP plugin does not start on a CPU; what it saves and loads it saves and loads with
``torch.distributed.checkpoint``, as is done here in its place. Argument: a folder for ``rank-N.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lifecycle.accelerator.trained import Trained
from hf_lifecycle.ranks import Ranks
from tests.resume.cases.tiny import Regressor


def made(seed: int) -> tuple[Any, Any, Trained]:
    """A model that is shared out, its optimizer, and the proof of both."""
    torch.manual_seed(seed)
    model = fully_shard(Regressor(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    host = SimpleNamespace(
        distributed_type=DistributedType.FSDP, _models=[model], _optimizers=[optimizer], _schedulers=[], scaler=None
    )
    return model, optimizer, Trained(host, Ranks.current())


def step(model: Any, optimizer: Any, number: int) -> None:
    """One step on rows of this rank's own."""
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    torch.manual_seed(number)
    x = torch.randn(4, 8, generator=generator)
    model(x, x.sum(dim=1))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def main(folder: Path) -> None:
    """Save after two steps, take a third; load elsewhere, prove, take the third again."""
    dist.init_process_group("gloo")
    model, optimizer, trained = made(7)
    for number in (1, 2):
        step(model, optimizer, number)
    saved = trained.state_dict()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "shards")
    step(model, optimizer, 3)
    unbroken = trained.state_dict()

    model, optimizer, trained = made(8)
    step(model, optimizer, 9)  # an optimizer has a state to load into once it has stepped
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "shards")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    proof, problems = trained.prove(saved, folder)
    step(model, optimizer, 3)
    told = {
        "proof": dict(proof),
        "problems": problems,
        "same": trained.state_dict()["model"] == unbroken["model"],
        "same optimizer": trained.state_dict()["optimizer"] == unbroken["optimizer"],
    }
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(iter(model.parameters())).to_local().add_(1.0)
    told["tampered"] = trained.prove(unbroken, folder)[1]
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
    Ranks.current().barrier(what="the end")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
