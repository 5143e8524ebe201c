"""The house stands as it is drawn: imports go down only, and no module grows past what a reader can hold.

The source is read with ``ast``, imports inside functions and under ``TYPE_CHECKING`` included; nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_lifecycle"

# From the ground up. A room may use what is on its own floor or below; rooms of one floor do not use each other,
# except where ALLOWED says so.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("messages", "copies", "relied_on", "argument_checks", "bytecode", "libraries"),
    ("torch_internals",),
    ("errors",),
    ("processes",),
    ("early_stopping_outcome", "early_stopping_record", "global_batch"),
    ("early_stopping_replay",),
    ("early_stopping",),
    ("state",),
    ("data",),
    ("checkpoint",),
    ("mirror",),
    ("saving",),
    ("engine",),
    ("training_state",),
    ("trainer", "accelerate"),
    ("testing",),
    ("views",),
    ("cli",),
    ("__main__",),
)
# The same within a room that has folders: their names, from the ground up.
FOLDERS: dict[str, tuple[str, ...]] = {"checkpoint": ("files", "directory", "inspection")}
MOST_IN_A_FOLDER = 15
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# Only these rooms know these libraries.
GUESTS: dict[str, tuple[str, ...]] = {
    "transformers": ("trainer", "testing"),
    "accelerate": ("trainer", "accelerate", "testing"),
    "fsspec": ("mirror",),
    "matplotlib": ("views",),
    "tqdm": ("checkpoint",),
    "rich": ("views", "cli"),
    "typer": ("cli",),
}

# Imports that the rules above would refuse: (importing module, what it imports) -> reason. Each must be inside a
# function or under TYPE_CHECKING, so that it costs nothing and closes no circle when the module loads.
EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "early_stopping_replay",
        "views",
    ): "EarlyStopping.replay(...).plot() is the drawing's door; the decision needs none",
    ("early_stopping_replay", "matplotlib"): "the type of what plot() returns",
    ("trainer", "views"): "in a notebook the callback shows itself; only the host asks it to",
    ("training_state", "accelerate"): "TrainingStateManager is the loop's door too; as a file's door it needs none",
}

# Where everything is caught and kept for another thread, which raises it.
CARRIERS = {f"hf_lifecycle/saving/{name}.py" for name in ("files/direct", "snapshots/snapshot", "task")}
# Where a user's code, or what a library makes of a user's value, is asked for what it was not asked for before:
# whatever it raises is told, or done without.
CONVENIENCES = {
    "hf_lifecycle/data/objects.py",
    "hf_lifecycle/state/values/bindings.py",
    "hf_lifecycle/hosts/trainer/resume/schedule_dry_run.py",
    "hf_lifecycle/state/values/attributes.py",
}

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "mixins"}
MAX_LINES = 320


@dataclass(frozen=True, slots=True)
class Import:
    """One import of one module: ``room`` is the first name below the package, ``target`` what is imported."""

    path: Path
    line: int
    room: str
    target: str
    lazy: bool

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def target_room(self) -> str | None:
        """The room of this package that is imported, or None for another library."""
        package, *rest = self.target.split(".")
        return room_in(rest) if package == PACKAGE.name and rest else None


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room_in(parts: Sequence[str]) -> str:
    """The room of a module, by its path in the package. Each host is a room of its own."""
    return parts[1] if parts[0] == "hosts" and len(parts) > 1 else parts[0]


def room_of(path: Path) -> str:
    return room_in(path.relative_to(PACKAGE).with_suffix("").parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk_imports(node: ast.AST, path: Path, lazy: bool = False) -> Iterator[Import]:
    room = room_of(path)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, room, alias.name, lazy)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: imports are absolute"
            assert child.module is not None
            for alias in child.names:
                # "from hf_lifecycle import state" names a room, "from hf_lifecycle.state import rng" is in one.
                yield Import(path, child.lineno, room, f"{child.module}.{alias.name}", lazy)
        elif not isinstance(child, ast.expr):  # which has none
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk_imports(child, path, lazy or deferred or is_type_checking(child))


@cache
def imports() -> list[Import]:
    return [found for path in modules() if room_of(path) != "__init__" for found in walk_imports(parsed(path), path)]


def excepted(found: Import, target: str) -> bool:
    return found.lazy and (found.room, target) in EXCEPTIONS


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert sorted(rooms - FLOOR.keys()) == []


def test_imports_go_down_only() -> None:
    wrong = []
    for found in imports():
        target = found.target_room
        if target is None or target == found.room or excepted(found, target):
            continue
        assert target in FLOOR, f"{found.where}: {found.target} goes through the public names; import from its home"
        same_floor = FLOOR[target] == FLOOR[found.room] and not found.room.startswith("early_stopping")
        if FLOOR[target] > FLOOR[found.room] or same_floor:
            wrong.append(f"{found.where}: {found.room} imports {found.target}")
    assert wrong == []


@pytest.mark.parametrize("room", sorted(FOLDERS))
def test_imports_between_the_folders_of_a_room_go_down_only(room: str) -> None:
    folders, wrong = FOLDERS[room], []
    for found in imports():
        own, target = found.path.relative_to(PACKAGE).parts, found.target.split(".")
        within = found.room == room and found.target_room == room and len(own) > 2 and target[2] in folders
        if within and folders.index(target[2]) > folders.index(own[1]):
            wrong.append(f"{found.where}: {own[1]} imports {found.target}")
    assert wrong == []
    counts = {name: len(list((PACKAGE / room / name).glob("*.py"))) for name in folders}
    assert {name: count for name, count in counts.items() if count > MOST_IN_A_FOLDER} == {}


def test_no_imports_go_round_in_a_circle() -> None:
    """Of modules, not of rooms; imports inside functions and under ``TYPE_CHECKING`` count."""
    names = {
        path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules()
    }
    uses: dict[str, set[str]] = {name: set() for name in names.values()}
    for path, name in names.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                uses[name] |= {target if target in uses else node.module for target in targets} & set(uses)
            elif isinstance(node, ast.Import):
                uses[name] |= {alias.name for alias in node.names} & set(uses)
    left = {name: targets - {name} for name, targets in uses.items()}
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("library", sorted(GUESTS))
def test_library_is_known_to_its_rooms_alone(library: str) -> None:
    wrong = [
        f"{found.where}: {found.room} imports {found.target}"
        for found in imports()
        if found.target.partition(".")[0] == library
        and found.room not in GUESTS[library]
        and not excepted(found, library)
    ]
    assert wrong == []


def test_every_exception_is_still_used() -> None:
    used = {(found.room, found.target_room or found.target.partition(".")[0]) for found in imports() if found.lazy}
    assert sorted(EXCEPTIONS.keys() - used) == []


def test_package_imports_itself_lazily() -> None:
    path = PACKAGE / "__init__.py"
    eager = {found.target.partition(".")[0] for found in walk_imports(parsed(path), path) if not found.lazy}
    assert eager <= {"__future__", "importlib", "typing"}


def test_modules_say_what_they_are() -> None:
    named = [str(path) for path in PACKAGE.rglob("*") if path.stem in FORBIDDEN_NAMES]
    silent = [str(path.relative_to(ROOT)) for path in modules() if not ast.get_docstring(parsed(path))]
    assert (named, silent) == ([], [])


def test_modules_stay_readable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_nothing_is_swallowed() -> None:
    wrong = []
    for path in modules():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else "everything"
                broad = caught in ("everything", "Exception", "BaseException")
                carried = str(path.relative_to(ROOT)) in CARRIERS | CONVENIENCES
                if broad and not carried and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: catches {caught} and goes on")
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if room_of(path) not in ("cli", "__main__")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert wrong == []


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def constants_classes_functions(name: str) -> tuple[int, str]:
    """The order in which ruff sorts ``__all__``: CONSTANTS, Classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_all_is_sorted_and_real() -> None:
    wrong = []
    for path in modules():
        names, where = public_names(parsed(path)), path.relative_to(ROOT)
        if names is None:
            if path.name not in ("__init__.py", "__main__.py"):
                wrong.append(f"{where}: no __all__")
            continue
        if names != sorted(set(names), key=constants_classes_functions):
            wrong.append(f"{where}: __all__ is not sorted, or has a name twice")
        wrong += [f"{where}: __all__ has {name}" for name in sorted(set(names) - defined_names(parsed(path)))]
    assert wrong == []


def test_docstrings_open_with_one_line() -> None:
    wrong = []
    for path in modules():
        docstring = ast.get_docstring(parsed(path)) or ""
        first, _, rest = docstring.partition("\n")
        if not first.endswith((".", ":")) or (rest and not rest.startswith("\n")):
            wrong.append(f"{path.relative_to(ROOT)}: {first!r}")
    assert wrong == []


# Where names stand that transformers, accelerate, torch and NumPy do not promise.
PRIVATE_ROOMS = {
    "hosts/accelerate/intercept.py",
    "hosts/trainer/host.py",
    "hosts/trainer/intercept.py",
    "processes/data_workers.py",
    "state/buckets.py",
    "state/rng/numpy_rng.py",
    "torch_internals.py",
}
# Of Python, of fsspec, of datasets and of torchdata, which are not looked at here.
OF_OTHERS = {"_getframe", "_name_", "_preload_modules", "_register_atexit", "_replace", "_type_", "_value_"}
OF_OTHERS |= {"_current_frames", "_exit"}  # which Python documents, as _getframe
OF_OTHERS |= {"_ex_iterable", "_initial_iter_for_state_dict", "_iterator", "_sampler_iter", "_strip_protocol"}


def private_names(path: Path) -> Iterator[tuple[int, str]]:
    """Attributes that a module takes of others and that begin with ``_``, by ``getattr`` and the like too."""
    tree = parsed(path)
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= defined_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = getattr(node.args[1], "value", "") if len(node.args) > 1 else ""
        else:
            continue
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in own:
            yield node.lineno, name


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_libraries_stand_in_their_rooms() -> None:
    wrong = []
    for path in modules():
        where = path.relative_to(PACKAGE).as_posix()
        if where not in PRIVATE_ROOMS:
            wrong += [f"{where}:{line}: {name}" for line, name in private_names(path) if name not in OF_OTHERS]
    assert wrong == []
