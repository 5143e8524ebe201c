"""A tree comes back from a file with its types and its bits, or is refused."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch

from hf_lifecycle.checkpoint.files.statefile import TensorInfo, read_structure, read_tree, write_tree
from hf_lifecycle.checkpoint.files.tree import encode, require_storable
from hf_lifecycle.errors import StateFileError, UnsafeStateError

SUFFIXES = (".pt", ".safetensors")
DTYPES = sorted(
    (value for name, value in vars(torch).items() if isinstance(value, torch.dtype) and not name.startswith("q")),
    key=str,
)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal in type, order and bits."""
    if type(a) is torch.nn.Parameter:
        a = a.detach()
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or b.requires_grad or b.device.type != "cpu":
            return False
        return a.numel() == 0 or torch.equal(raw(a), raw(b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same([[*pair] for pair in a.items()], [[*pair] for pair in b.items()])
    return bool(a == b)


def there_and_back(path, tree):
    write_tree(path, tree, kind="test")
    back = read_tree(path, kind="test")
    assert same(tree, back)
    return back


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"state{request.param}"


PLAIN = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**63, -(2**63), 2**64, 10**5000, -(10**40)],
    "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
    "odd nan": struct.unpack("d", struct.pack("Q", 0xFFF8000000001234))[0],
    "texts": ["", "a\0b", "é\U0001f600", "\ud800", "$x"],
    "bytes": [b"", b"\x00\xff" * 5],
    "lists": [[], [[]], (), (1,), (1, (2, [3]))],
    "dicts": {"b": 1, "a": {}, "$tensor": "not a plain tensor", "": 0},
    "keys": {1: "a", None: "b", 2.5: "c", b"k": "d", (1, ("x",)): "e", "s": "f", False: "g", -1.5: "h"},
    "ordered": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "torch": [torch.Size([1, 0]), torch.bfloat16, torch.device("cuda", 1)],
}

ARRAYS = {
    "scalars": [
        np.float64(0.1),
        np.float32("nan"),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1j),
    ],
    "key": {np.int64(3): 1},
    "arrays": [
        np.arange(6).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.arange(20)[::3],
        np.array(2.5),
        np.zeros((0, 3), np.float16),
        np.array([1, 2], ">f4"),
        np.array([1.5], np.longdouble),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.broadcast_to(np.array([1.0]), (3, 2)),
        np.array([1 + 2j]).imag,
        np.arange(4.0)[1::3],
        np.arange(4.0)[1:2:3],
        np.array([[1.0, 2.0]])[:, 1],
    ],
}


def test_plain_values_come_back_with_their_types_and_bits(path):
    there_and_back(path, PLAIN)


def test_numpy_values_come_back_with_their_types_and_bits(path):
    back = there_and_back(path, ARRAYS)
    back["arrays"][0][0, 0] = 9  # they may be written to


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_every_type_and_shape_come_back_or_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    kept, refused = {}, {}
    for dtype in DTYPES:
        for shape in ((), (0,), (0, 3), (4,), (2, 4)):
            size = math.prod(shape) * dtype.itemsize
            try:
                raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
                tensor = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
            except RuntimeError:
                continue  # torch itself cannot make one
            try:
                encode({"x": tensor})
            except UnsafeStateError as error:
                refused[dtype] = error.key
                with pytest.raises(UnsafeStateError, match=re.escape(error.key)):
                    require_storable({"x": tensor})
                continue
            require_storable({"x": tensor})
            kept[f"{dtype}{shape}"] = tensor
    there_and_back(path, kept)
    usual = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32}
    usual |= {torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
    usual |= {torch.complex128, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2}
    assert not usual & refused.keys()
    assert all(str(dtype) in key for dtype, key in refused.items())
    assert len(kept) > 5 * len(usual) - 1


def test_views_conjugates_parameters_and_shared_storage_come_back_by_value(path):
    base = torch.arange(1000.0)
    tree = {
        "slice": base[10:12],
        "transposed": base[:6].reshape(2, 3).t(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "one of a stride": torch.arange(10.0)[3::9],
        "number of a stride": torch.arange(10.0).reshape(2, 5)[1, 2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "tied": [base, base],
    }
    back = there_and_back(path, tree)
    back["tied"][0][0] = 5.0
    assert back["tied"][1][0] == 0.0
    assert path.stat().st_size < 14_000  # a slice does not bring all of its storage


def test_optimizer_and_module_states_come_back(path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    back = there_and_back(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    torch.optim.AdamW(model.parameters(), lr=0.1).load_state_dict(back["optimizer"])


def test_names_that_clash_or_are_odd_keep_their_tensors_apart(path):
    ones = [torch.tensor(float(i)) for i in range(6)]
    tree = {
        "a/b": ones[0],
        "a": {"b": ones[1], "ü": ones[2], "ö": ones[3]},
        "__metadata__": ones[4],
        "x" * 300: ones[5],
    }
    there_and_back(path, tree)


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write_tree(tmp_path / name, {**PLAIN, **ARRAYS}, kind="test")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class Colour(IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


class MyTensor(torch.Tensor):
    pass


UNSAFE = {
    "function": (lambda: 0, "state['a'][1]['fn']"),
    "module": (torch.nn.Linear(1, 1), "state['a'][1]['fn']"),
    "enum": (Colour.RED, "state['a'][1]['fn']"),
    "named tuple": (Point(1), "state['a'][1]['fn']"),
    "default dict": (defaultdict(int), "state['a'][1]['fn']"),
    "set": ({1}, "state['a'][1]['fn']"),
    "objects": (np.array([object()]), "state['a'][1]['fn'] (of dtype object)"),
    "texts": (np.array(["a"]), "state['a'][1]['fn'] (of dtype <U1)"),
    "sparse": (torch.eye(2).to_sparse(), "state['a'][1]['fn'] (only dense tensors that hold data can be stored)"),
    "meta": (torch.empty(2, device="meta"), "state['a'][1]['fn'] (only dense tensors that hold data can be stored)"),
    "subclass": (torch.ones(2).as_subclass(MyTensor), "state['a'][1]['fn']"),
    "key": ({Colour.RED: 1}, "the key <Colour.RED: 1> of state['a'][1]['fn']"),
    "tensor key": ({(1, frozenset()): 1}, "the key (1, frozenset()) of state['a'][1]['fn'][1]"),
}


@pytest.mark.parametrize(("value", "key"), UNSAFE.values(), ids=UNSAFE)
def test_what_cannot_be_stored_safely_is_refused_by_its_place_before_anything_is_written(path, value, key):
    write_tree(path, {"old": 1}, kind="test")
    with pytest.raises(UnsafeStateError) as caught:
        write_tree(path, {"state": {"a": (0, {"fn": value})}}, kind="test")
    assert caught.value.key == key
    assert read_tree(path, kind="test") == {"old": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_state_that_contains_itself_is_refused_and_one_that_repeats_is_not(path):
    loop: dict[str, Any] = {}
    loop["again"] = [loop]
    with pytest.raises(ValueError, match=r"state\['again'\]\[0\] contains itself"):
        write_tree(path, {"state": loop}, kind="test")
    shared = [1]
    there_and_back(path, {"a": shared, "b": [shared, shared]})


def test_nesting_beyond_all_measure_is_refused_and_the_limit_can_be_read(path):
    def nested(depth):
        value: Any = 1
        for _ in range(depth):
            value = {0: value}
        return value

    there_and_back(path, {"state": nested(50)})
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        write_tree(path, {"state": nested(51)}, kind="test")


def test_other_suffixes_and_root_keys_are_refused(tmp_path):
    for name in ("state", "state.bin", "state.pt.gz"):
        with pytest.raises(ValueError, match=r"\.pt or \.safetensors"):
            write_tree(tmp_path / name, {}, kind="test")
        with pytest.raises(ValueError, match=r"\.pt or \.safetensors"):
            read_tree(tmp_path / name, kind="test")
    for key in ("$tensor", "hf_lifecycle", "", 1):
        with pytest.raises(ValueError, match="root"):
            write_tree(tmp_path / "a.pt", {key: 1}, kind="test")


def test_a_structure_that_outgrows_the_header_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree(path, {"old": 1}, kind="test")
    with pytest.raises(ValueError, match="store long lists of numbers as tensors"):
        write_tree(path, {"text": "x" * 100_000_001}, kind="test")
    assert read_tree(path, kind="test") == {"old": 1}


def test_a_pt_file_is_a_plain_dict_to_torch(tmp_path):
    write_tree(tmp_path / "a.pt", {"epoch": 3, "x": torch.ones(2)}, kind="test")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["epoch"] == 3
    assert torch.equal(content["hf_lifecycle"]["tensors"]["x"], torch.ones(2))


def test_a_safetensors_file_is_read_by_the_format_s_own_reader(tmp_path):
    tree = {"rng": {"torch": torch.arange(3, dtype=torch.uint8), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, **ARRAYS}
    write_tree(tmp_path / "a.safetensors", tree, kind="test")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert same(tensors["rng/torch"], tree["rng"]["torch"])
    assert same(tensors["rng/b"], tree["rng"]["b"])
    assert same(tensors["arrays/0"].numpy(), tree["arrays"][0])


def test_the_structure_is_read_without_torch_and_without_tensors(tmp_path):
    tree = {
        "e": 1,
        "x": torch.ones(2, 3, dtype=torch.bfloat16),
        "n": np.zeros(4, ">f4"),
        "d": torch.bfloat16,
        "b": b"ab",
    }
    write_tree(tmp_path / "a.safetensors", tree, kind="test")
    assert read_structure(tmp_path / "a.safetensors", kind="test") == {
        "e": 1,
        "x": TensorInfo("tensor", "bfloat16", (2, 3)),
        "n": TensorInfo("array", ">f4", (4,)),
        "d": "torch.bfloat16",
        "b": TensorInfo("bytes", "uint8", (2,)),
    }
    script = (
        "import sys; from hf_lifecycle.checkpoint.files.statefile import read_structure; "
        f"read_structure({str(tmp_path / 'a.safetensors')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
    with pytest.raises(ValueError, match="without torch"):
        read_structure(tmp_path / "a.pt")


def test_another_kind_and_a_newer_format_are_named(path):
    write_tree(path, {"a": 1}, kind="test")
    with pytest.raises(StateFileError, match="'test' file, not a 'best' file"):
        read_tree(path, kind="best")
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes().replace(b'"hf_lifecycle.format":"1"', b'"hf_lifecycle.format":"2"'))
        with pytest.raises(StateFileError, match=r"format 2.*upgrade"):
            read_structure(path)
    else:
        content = torch.load(path, weights_only=True)
        content["hf_lifecycle"]["format"] = 2
        torch.save(content, path)
    with pytest.raises(StateFileError, match=r"format 2.*upgrade") as caught:
        read_tree(path, kind="test")
    assert str(path) in str(caught.value)


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        read_tree(path, kind="test")


def test_writing_and_reading_draws_no_random_number(path):
    import random

    before = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
    there_and_back(path, {**PLAIN, **ARRAYS})
    after = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
    assert before == after
