"""What was committed by version 1 of the formats reads as it was written, and the same content gives the same bytes.

``python tests/checkpoint/test_golden.py FOLDER`` writes such a checkpoint, for a new version of a format; those in
``golden/`` stay as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lifecycle.checkpoint.directory.manifest import (
    FileEntry,
    Manifest,
    Metric,
    manifest_path,
    parse_manifest,
    read_manifest,
)
from hf_lifecycle.checkpoint.directory.store import commit, problems_of, staging_folder
from hf_lifecycle.checkpoint.files.statefile import read_structure, read_tree, write_tree
from hf_lifecycle.checkpoint.files.structure import dump
from hf_lifecycle.checkpoint.files.tree import encode
from hf_lifecycle.errors import StateFileError

GOLDEN = Path(__file__).parent / "golden" / "version-1" / "checkpoint-40"
RANK_FILE = Path("lifecycle") / "rank-00000.safetensors"

TREE: dict[str, Any] = {
    "epoch": 3,
    "loss": 0.1,
    "huge": -(10**30),
    "specials": (float("nan"), float("inf"), -0.0, None, True, "text \N{GREEK SMALL LETTER ALPHA}", b"\0bytes"),
    "weights": torch.arange(12.0).reshape(3, 4),
    "half": torch.tensor([1.0, -2.0, float("inf")], dtype=torch.bfloat16),
    "complex": torch.tensor([1 + 2j]),
    "empty": torch.empty(0, 3),
    "words": np.arange(5, dtype=np.uint32),
    "scalar": np.float64(2.5),
    "keys": {1: "a", 2.5: [1.5], None: "none", "$odd": (), (1, "x"): 0},
    "ordered": OrderedDict(b=1, a=2),
    "types": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
}


def describe(files: Any) -> Manifest:
    """The manifest of the golden checkpoint."""
    return Manifest(
        attempt="0123456789abcdef0123456789abcdef",
        step=40,
        epoch=2.5,
        world_size=1,
        created="2026-01-01T00:00:00+00:00",
        metric=Metric("eval_loss", 0.1),
        files=files,
    )


def write_golden(folder: Path) -> Path:
    """Write ``checkpoint-40`` in ``folder``."""
    staged = staging_folder(folder) / "checkpoint-40"
    (staged / "lifecycle").mkdir(parents=True)
    (staged / "trainer_state.json").write_bytes(b'{"global_step": 40}\n')
    write_tree(staged / "lifecycle" / "rank-00000.safetensors", TREE, kind="golden")
    write_tree(staged / "state.pt", TREE, kind="golden")
    commit(staged, folder / "checkpoint-40", describe)
    return folder / "checkpoint-40"


def bits(tree: dict[str, Any]) -> str:
    """All of a tree, types and tensors' digests included, as one text."""
    return dump(encode(tree)[0])


def test_golden_checkpoint_verifies_and_its_manifest_reads_as_it_was_written() -> None:
    assert problems_of(GOLDEN, full=True) == []
    manifest = read_manifest(GOLDEN)
    assert replace(manifest, files=()) == describe(())
    assert manifest.files[0] == FileEntry(RANK_FILE.as_posix(), 1840, "a01b196d7dde52cf969e229e28953e09")


@pytest.mark.parametrize("name", [RANK_FILE, Path("state.pt")], ids=str)
def test_golden_state_file_reads_with_the_same_types_and_bits(name: Path) -> None:
    assert bits(read_tree(GOLDEN / name, kind="golden")) == bits(TREE)


def test_golden_state_file_reads_without_its_tensors() -> None:
    assert read_structure(GOLDEN / RANK_FILE)["weights"].shape == (3, 4)


def test_same_manifest_and_same_tree_give_the_same_bytes(tmp_path: Path) -> None:
    assert read_manifest(GOLDEN).to_json() == manifest_path(GOLDEN).read_bytes()
    write_tree(tmp_path / RANK_FILE.name, TREE, kind="golden")
    assert (tmp_path / RANK_FILE.name).read_bytes() == (GOLDEN / RANK_FILE).read_bytes()


def test_manifest_of_a_newer_version_is_refused_by_name_whatever_else_it_holds(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-40"
    shutil.copytree(GOLDEN, checkpoint)
    body = json.loads(manifest_path(checkpoint).read_text())
    manifest_path(checkpoint).write_text(json.dumps({**body, "version": 3, "new": {}}))
    with pytest.raises(StateFileError, match=r"manifest\.json: format version 3, .* install a newer one"):
        read_manifest(checkpoint)
    assert "format version 3" in problems_of(checkpoint, full=True)[0]


def test_manifest_that_names_no_older_run_is_written_as_the_first_version_wrote_it(tmp_path: Path) -> None:
    manifest = describe(())
    first, second = manifest.to_json(), replace(manifest, older=("0123", "checkpoint-7")).to_json()
    assert (json.loads(first)["version"], json.loads(second)["version"]) == (1, 2)
    assert parse_manifest("m", second).older == ("0123", "checkpoint-7")
    for wrong in ('"older": 3', '"older": [3]', '"younger": []'):
        text = first.replace(b'"version": 1', b'"version": 2').replace(b'"files"', f'{wrong}, "files"'.encode())
        with pytest.raises(StateFileError, match="not a valid manifest"):
            parse_manifest("m", text)


def test_safetensors_state_file_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "newer.safetensors"
    whole = (GOLDEN / RANK_FILE).read_bytes()
    newer = whole.replace(b'"hf_lifecycle.format":"1"', b'"hf_lifecycle.format":"2"')
    assert newer != whole
    path.write_bytes(newer)
    with pytest.raises(StateFileError, match=r"newer\.safetensors: it has format 2, .*upgrade"):
        read_tree(path, kind="golden")


def test_pt_state_file_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "newer.pt"
    content = torch.load(GOLDEN / "state.pt", weights_only=True)
    content["hf_lifecycle"]["format"] = 2
    torch.save(content, path)
    with pytest.raises(StateFileError, match=r"newer\.pt: it has format 2, .*upgrade"):
        read_tree(path, kind="golden")


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
