"""The same training on 1, 2 and 4 processes, and over changes 4 -> 2 -> 1 -> 2: one launch of each for all tests."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import preloaded

from .launching import ROOT, Launcher, environment, launch, told

pytestmark = pytest.mark.slow

SCRIPT = "tests.distributed.elastic_script"
TRAINS = {"learning_rate": 1e-2}  # elsewhere weights stay, so that losses tell batches and random numbers apart
BOTH = {"global_batch_size": 8, **TRAINS}  # a step is the sum of two gradients, on 1 process as on 2
FIFTY = {"max_steps": 50, "save_steps": 1000, **TRAINS}
NEVER = [-1, 0, 0.0]  # to be killed
WORKERS = {"dataloader_num_workers": 2}
WORKING = {"workers": 2}  # the same of a loop
SHARDED = {"sharded": "SHARDED_STATE_DICT"}  # by FSDP2
GATHERED = {"sharded": "FULL_STATE_DICT"}  # whose files rank 0 writes
# What is left over at the end of a pass, a step is of more rows than divide it, goes into the first step of the next.
LEFT = {"stream": True, "global_batch_size": 32, "save_strategy": "epoch", **TRAINS}
SPOILED = ["trainer", "shards:spoiled", None, {**SHARDED, "spoiled": True}]
CHAINED: dict[str, tuple[str, dict[str, Any]]] = {  # beside map and loop
    "words": ("trainer", {"words": True}),
    "stream": ("trainer", {"stream": True}),
    "loop stream": ("loop", {"stream": True}),
    "left over": ("trainer", LEFT),
    "trained shards": ("trainer", {**GATHERED, **TRAINS}),
    "shards": ("trainer", SHARDED),
    "loop shards": ("loop", SHARDED),
}
WHOLE = {  # on 1 process, without shards
    **{name: CHAINED[name] for name in ("words", "loop stream", "left over")},
    "trained": ("trainer", TRAINS),
}
UNSHARDED = {"shards": "map", "loop shards": "loop", "trained shards": "trained"}  # the same without
STOPS = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "include_num_input_tokens_seen": "all",
    "callback": {"patience": 2, "min_delta": 1e9},
}


def attempt(ranks: int, folder: Path, plan: list[Any], launcher: Launcher = "torchrun", *, kills: bool = False) -> Any:
    """What each rank has told after one launch; None if it was killed, as it may be where it ``kills``."""
    for left in folder.glob("rank-*.json"):
        left.unlink()
    if ranks > 1:
        script = SCRIPT if launcher == "torchrun" else ROOT / f"{SCRIPT.replace('.', '/')}.py"
        soon = {"HF_LIFECYCLE_TIMEOUT": "8"} if kills else {}
        code, output = launch(launcher, ranks, script, folder, json.dumps(plan), **soon)
        failed = code != 0
    else:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", SCRIPT, str(folder), json.dumps(plan)]
        ended = preloaded.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=400)
        failed, output = ended.returncode != 0, ended.stdout + ended.stderr
    if failed and kills:
        return None
    assert not failed, output
    return told(folder, ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[list[dict[str, Any]]]:
    """What each rank of each launch has told: on 4, 2, 1 and 2 processes; most of CHAINED begins on 2."""
    folder = tmp_path_factory.mktemp("elastic")

    def whole(ranks: int) -> list[Any]:
        cases: list[Any] = [["trainer", "map", None, WORKERS], ["loop", "loop", None, {}]]
        cases += [
            ["trainer", "stopping", None, STOPS],
            ["trainer", "fifty", None, FIFTY],
            ["trainer", "stock", None, {"stock": True, **FIFTY}],
        ]
        if ranks < 4:
            cases += [["trainer", "stream", None, {"stream": True}], ["trainer", "drawn", None, {"replacement": True}]]
            cases += [["trainer", "exact", None, BOTH], ["loop", "exact loop", None, BOTH]]
        return [[kind, f"{name} on {ranks}", until, settings] for kind, name, until, settings in cases]

    def chain(until: int | None, *, begins: bool = False) -> list[Any]:
        started = CHAINED if not begins or request.config.getoption("--exhaustive") else {}
        more = [[kind, name, until, settings] for name, (kind, settings) in started.items()]
        return [["trainer", "map", until, {}], ["loop", "loop", until, WORKING], *more]

    plain = {"callback": {"elastic": False}}
    halves = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, **TRAINS}
    refused = [
        ["trainer", "plain", None, {"callback": {"elastic": False}}],
        ["trainer", "plain:elastic", None, {}],
        ["trainer", "exact:halves", None, halves],
        ["trainer", "exact:twice", None, {"global_batch_size": 16, **TRAINS}],
    ]
    alone = [[kind, f"{name} on 1", None, settings] for name, (kind, settings) in WHOLE.items()]
    plans = {
        4: [*whole(4), *chain(3, begins=True)],
        2: [*whole(2), ["trainer", "exact", 4, BOTH], ["trainer", "plain", 3, plain], *chain(7)],
        1: [*whole(1), *alone, *refused, ["trainer", "exact", 8, BOTH], *chain(9)],
    }
    sharded = [
        SPOILED,
        ["trainer", "exact:shards", None, {**SHARDED, **BOTH}],
        ["trainer", "shards:gathered", None, GATHERED],
        ["loop", "loop shards:gathered", None, GATHERED],
        ["trainer", "trained shards:sharded", None, {**SHARDED, **TRAINS}],
    ]
    first = len(plans[1]) - len([name for name in CHAINED if "shards" in name])
    unsharded = [["trainer", "shards:plain", None, {}], ["loop", "loop shards:plain", None, {}]]
    plans[1][first:first] = [*unsharded, *sharded]  # after all without shards
    found = [attempt(ranks, folder, plan) for ranks, plan in plans.items()]
    last = [["trainer", "exact", None, BOTH], *chain(None)]
    return [*found, attempt(2, folder, last, "accelerate")]


@pytest.mark.exhaustive
def test_run_that_is_killed_20_times_and_resumes_on_other_numbers_of_processes_ends_within_rounding(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    settings = {"max_steps": 600, "save_steps": 5, "save_total_limit": 2, **TRAINS}
    (whole,) = attempt(1, tmp_path, [["trainer", "whole", None, settings]])
    kills, sizes = 0, []
    while kills < 20 and not (tmp_path / "run/checkpoint-600").exists():
        ranks = draw.choice((1, 2, 2, 4))
        killed = [draw.randrange(ranks), draw.randrange(2, 14), draw.random() / 20]
        plan = [["trainer", "run", None, {**settings, "killed": killed}]]
        kills += attempt(ranks, tmp_path, plan, kills=True) is None
        sizes.append(ranks)
    (ended,) = attempt(1, tmp_path, [["trainer", "run", None, {**settings, "killed": NEVER}]])
    print(f"{kills} kills, on {sizes} processes")
    require_same_but_for_rounding(tmp_path, whole, ended)


def require_same_but_for_rounding(folder: Path, whole: dict[str, Any], ended: dict[str, Any]) -> None:
    """All batches of all attempts are those of the uninterrupted run, none is lost, and so are the weights."""
    traced: dict[int, set[str]] = {}
    for file in folder.glob("trace-*.txt"):
        for line in file.read_text().splitlines():
            number, digest = line.split()
            traced.setdefault(int(number), set()).add(digest)
    assert traced == {number: {one[0]} for number, one in computed([whole], "whole").items()}
    end, other = (torch.tensor(one) for one in (whole["whole"]["weights"], ended["run"]["weights"]))
    apart = float((end - other).norm() / end.norm())
    print(f"relative difference {apart}")
    assert apart <= 1e-5


@pytest.mark.exhaustive
def test_torchrun_takes_a_node_in_and_loses_it_and_the_same_run_continues(tmp_path: Path) -> None:
    settings = {"max_steps": 150, "save_steps": 5, "save_total_limit": 2, **TRAINS}
    (whole,) = attempt(1, tmp_path, [["trainer", "whole", None, settings]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    plan = json.dumps([["trainer", "run", None, {**settings, "killed": NEVER, "pause": 0.05}]])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "nodes"]
    command += ["--local-addr", "127.0.0.1", "--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1", "-m", SCRIPT]

    # With a shared store, torch 2.13 writes the address that a node waits for which joins only in the first round.
    env = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def node() -> Any:
        with (tmp_path / "said.txt").open("a") as said:
            given = {"cwd": ROOT, "env": env, "stdout": said, "stderr": said, "start_new_session": True}
            return preloaded.Popen([*command, str(tmp_path), plan], launches=True, **given)

    def wait_for(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < deadline, (tmp_path / "said.txt").read_text()
            time.sleep(0.1)

    first = node()
    wait_for(lambda: (tmp_path / "run/checkpoint-10").exists())
    second = node()
    wait_for(lambda: (tmp_path / "trace-1.txt").exists() and len((tmp_path / "trace-1.txt").read_text()) > 500)
    for process in (*psutil.Process(second.pid).children(recursive=True), second):
        process.kill()
    second.wait()
    assert first.wait(timeout=200) == 0, (tmp_path / "said.txt").read_text()
    require_same_but_for_rounding(tmp_path, whole, told(tmp_path, 1)[0])


@pytest.mark.exhaustive
def test_sharded_run_over_2_4_and_2_processes_computes_what_one_without_shards_does(tmp_path: Path) -> None:
    (whole,) = attempt(1, tmp_path, [["trainer", "map", None, {}], ["loop", "loop", None, {}]])
    over: dict[str, dict[int, list[str]]] = {"shards": {}, "loop shards": {}}
    for ranks, until in ((2, 4), (4, 8), (2, None)):
        told = attempt(ranks, tmp_path, [[CHAINED[name][0], name, until, SHARDED] for name in over])
        for name in over:
            over[name] |= computed(told, name)
    assert over == {"shards": computed([whole], "map"), "loop shards": computed([whole], "loop")}


def computed(ranks: list[dict[str, Any]], run: str) -> dict[int, list[str]]:
    """What was computed of each micro-batch, by its number among those of all ranks."""
    return {int(number): one for rank in ranks for number, one in rank[run]["computed"].items()}


@pytest.mark.parametrize("case", ["map", "loop", "stream", "drawn", "exact", "exact loop"])
def test_batches_losses_and_gradients_are_the_same_on_any_number_of_processes(case: str, trained: Any) -> None:
    four, two, one, _ = trained
    whole = computed(one, f"{case} on 1")
    assert sorted(whole) == list(range(len(whole)))
    assert len({tuple(each) for each in whole.values()}) == len(whole), "no two are alike"
    assert computed(two, f"{case} on 2") == whole
    if case in ("map", "loop"):
        assert computed(four, f"{case} on 4") == whole


@pytest.mark.parametrize("case", ["map", "loop", "words", "stream", "loop stream", "shards", "loop shards"])
def test_run_over_4_2_1_and_2_processes_computes_what_an_uninterrupted_one_does(case: str, trained: Any) -> None:
    whole, over = computed(trained[2], f"{UNSHARDED.get(case, case)} on 1"), {}
    for launched in trained:
        if case in launched[0]:
            attempted = computed(launched, case)
            assert not over.keys() & attempted.keys(), "none twice"
            over |= attempted
    assert over == whole  # and none lost


@pytest.mark.parametrize("case", ["left over", "trained shards"])
def test_run_over_4_2_1_and_2_processes_ends_as_an_uninterrupted_one_but_for_rounding(case: str, trained: Any) -> None:
    end, other = (
        torch.tensor(told[name]["weights"])
        for told, name in ((trained[2][0], f"{UNSHARDED.get(case, case)} on 1"), (trained[3][0], case))
    )
    apart = float((end - other).norm() / end.norm())
    print(f"relative difference {apart}")
    assert apart <= 1e-5


@pytest.mark.parametrize("case", ["shards", "loop shards"])
def test_sharded_tensors_are_compared_whole_where_other_ranks_saved_them(case: str, trained: Any) -> None:
    for launched in trained[2:]:  # 4 parameters, and 2 values of AdamW for each
        assert launched[0][case]["proved"][0]["gathered from shards"] == 12
    assert "layers.0.weight differs from what was saved" in trained[2][0]["shards:spoiled"]["error"]


@pytest.mark.parametrize("case", ["exact", "exact loop"])
def test_1_and_2_processes_end_bit_for_bit_alike(case: str, trained: Any) -> None:
    _, two, one, _ = trained
    assert two[0][f"{case} on 2"]["digests"] == one[0][f"{case} on 1"]["digests"]


def test_run_over_2_1_and_2_processes_ends_bit_for_bit_like_an_uninterrupted_one(trained: Any) -> None:
    assert trained[3][0]["exact"]["digests"] == trained[2][0]["exact on 1"]["digests"]
    said = [line for line in trained[3][0]["exact"]["said"] if "processes" in line]
    assert said == [
        "not exact: saved by 1 processes, resumed by 2: same batches, same randomness, sums rounded otherwise"
    ]


def test_schedules_logs_counters_and_early_stopping_are_the_same_at_the_same_step(trained: Any) -> None:
    four, two, one, _ = trained
    assert two[0]["exact loop on 2"]["rates"] == one[0]["exact loop on 1"]["rates"]
    for case in ("fifty", "stopping"):
        whole = one[0][f"{case} on 1"]["seen"]
        assert four[0][f"{case} on 4"]["seen"] == two[0][f"{case} on 2"]["seen"] == whole
    assert whole["steps"] == 6, "stopped after two evaluations without improvement"
    assert whole["tokens"] == 6 * 4 * 16


def test_weights_after_50_steps_differ_by_rounding_alone(trained: Any) -> None:
    def apart(case: str) -> dict[int, float]:
        ended = {len(ranks): torch.tensor(ranks[0][f"{case} on {len(ranks)}"]["weights"]) for ranks in trained[:3]}
        return {ranks: float((end - ended[1]).norm() / ended[1].norm()) for ranks, end in ended.items()}

    elastic, stock = apart("fifty"), apart("stock")
    print(f"relative difference to 1 process after 50 steps: elastic {elastic}, stock {stock}")
    assert max(elastic.values()) <= 1e-5
    assert min(stock[2], stock[4]) > 1e-2


def test_what_cannot_go_on_as_the_same_run_is_refused_and_says_what_to_do(trained: Any) -> None:
    one = trained[2][0]
    assert "a run that is started with elastic=True can change it" in one["plain"]["error"]
    assert "elastic (LifecycleCallback): None -> True (breaks exactness" in one["plain:elastic"]["error"]
    assert "with elastic=True, keep per_device_train_batch_size=4" in one["exact:halves"]["error"]
    assert "a step would have 16 examples" in one["exact:twice"]["error"]
    launcher = "started with torchrun or accelerate launch, also on one process"
    under = "under FSDP with state_dict_type={}_STATE_DICT"
    for case in ("shards:plain", "loop shards:plain"):
        assert f"it was saved {under.format('SHARDED')}, and this training is without FSDP" in one[case]["error"]
        assert launcher in one[case]["error"]
    assert (
        f"this training is {under.format('SHARDED')}, and the checkpoint was saved without"
        in one["exact:shards"]["error"]
    )
    assert "resume it without FSDP and DeepSpeed, or start from step 0" in one["exact:shards"]["error"]
    for case, was, now in (("shards:gathered", "SHARDED", "FULL"), ("trained shards:sharded", "FULL", "SHARDED")):
        for error in (one[each]["error"] for each in (case, f"loop {case}") if each in one):
            assert f"it was saved {under.format(was)}, and this training is {under.format(now)}" in error
            assert f"train {under.format(was)}, as the run that saved it" in error
