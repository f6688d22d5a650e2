"""The package's shape: imports point along one line and in no circle, nobody reaches into a module, public names are
documented, functions, classes and calls stay small, nothing stands twice.

Every list of breaches is exact. Whoever mends one deletes it here; a new one is mended, not listed.
"""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import commhooks

PACKAGE = Path(commhooks.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from lower levels, or from its own folder. A new module needs a place in this line.
LEVELS = [
    {"errors", "moved"},
    {"native"},
    {"transports"},
    {"gradient"},
    {"selection"},
    {"memory"},
    {"wire"},
    {"exchange"},
    {"schemes"},
    {"reduction"},
    {"planner"},
    {"ddp"},
    {"horovod", "averaging", "interop", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}
INITS = {"__init__"}


def unit_of(path):
    """``commhooks/exchange/gtopk.py`` is of the unit ``exchange``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path, tree):
    """The units of commhooks that a file imports, wherever in the file, by statement or by ``import_module`` of a string."""
    package = ("commhooks", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names = imported_by_string(node, package)
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "commhooks" and len(parts) > 1:
                yield parts[1], node.lineno


def imported_by_string(call, package):
    """What ``import_module("...")`` and ``__import__("...")`` name, as far as it is written out."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in ("import_module", "__import__") or not call.args:
        return []
    text = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
        return []
    dots = len(text.value) - len(text.value.lstrip("."))
    base = package[: len(package) - dots + 1] if dots else ()
    return [".".join((*base, text.value[dots:]))]


def edges(files, package=None):
    for path in files:
        unit = unit_of(path)
        for target, line in imported_units(path, ast.parse(path.read_text())):
            if target != unit and unit not in INITS:
                yield unit, target, f"{path.relative_to(PACKAGE.parent)}:{line}"


def test_every_module_has_its_place_in_the_line():
    units = {unit_of(path) for path in FILES} - INITS
    assert units <= set(LEVEL_OF), f"give these a level in {__name__}: {sorted(units - set(LEVEL_OF))}"


def test_imports_point_only_along_the_line():
    exported = set(commhooks.__all__) | {"__version__"}
    wrong = []
    for unit, target, where in edges(FILES):
        if target in exported and LEVEL_OF[unit] < LEVEL_OF["cli"]:
            wrong.append(f"{where}: imports {target} from the package's root, which imports everything")
        elif target not in exported and LEVEL_OF[target] >= LEVEL_OF[unit]:
            wrong.append(f"{where}: {unit} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_line_is_the_designs():
    """The rooms in the order of the data."""
    order = [
        "errors",
        "native",
        "transports",
        "gradient",
        "selection",
        "memory",
        "wire",
        "exchange",
        "reduction",
        "ddp",
    ]
    assert [LEVEL_OF[name] for name in order] == sorted({LEVEL_OF[name] for name in order})
    # Transports know nothing of gradients, the exchange nothing of memory, memory nothing of the network.
    reached = {}
    for unit, target, _ in edges(FILES):
        reached.setdefault(unit, set()).add(target)
    assert reached["transports"] <= {"errors"}
    assert not reached["exchange"] & {"memory", "selection"}
    assert not reached["memory"] & {"transports", "exchange"}
    assert not reached.get("native", set()) & set(LEVEL_OF) - {"native"}


def test_the_derivation_sees_a_wrong_import(tmp_path):
    tree = ast.parse(
        "from ..reduction import Reducer\nimport commhooks.ddp\ndef f():\n    from .. import averaging\n"
        "import_module('commhooks.planner.auto')\nimportlib.import_module('..memory', __package__)\n"
        "import_module(f'commhooks.horovod.{name}')\nimport_module(name)\nimport_module('torch.nn')\n"
    )
    found = {unit for unit, _ in imported_units(PACKAGE / "transports" / "base.py", tree)}
    assert found == {"reduction", "ddp", "averaging", "planner", "memory", "horovod"}


def length(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert length(node) < 60, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", commhooks.__all__)
def test_public_names_are_documented(name):
    thing = getattr(commhooks, name)
    assert inspect.getdoc(thing)
    own = [vars(thing)] if inspect.isclass(thing) else []
    for members in own:
        for member, value in members.items():
            if member.startswith("_") or not (
                inspect.isfunction(value) or isinstance(value, (property, classmethod))
            ):
                continue
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def public_classes():
    """Every class of the package whose name and modules' names are public, where its libraries can be imported."""
    for module in pkgutil.walk_packages(commhooks.__path__, "commhooks."):
        if "._" in module.name:
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:  # Horovod, Lightning and the like
            continue
        for name, thing in vars(loaded).items():
            if inspect.isclass(thing) and thing.__module__ == module.name and not name.startswith("_"):
                yield thing


def test_every_public_method_is_documented_or_overrides_one_that_is():
    classes = list(public_classes())
    assert len(classes) > 60
    undocumented = [
        f"{thing.__module__}.{thing.__name__}.{name}"
        for thing in classes
        for name, value in vars(thing).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod)))
        and not inspect.getdoc(getattr(thing, name))
    ]
    assert undocumented == []


def test_the_root_holds_the_public_names_and_nothing_else():
    assert commhooks.__all__ == sorted(commhooks.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported - {"moved"} == set(commhooks.__all__)


def test_the_library_logs_and_does_not_print():
    for path in FILES:
        if unit_of(path) in ("cli", "__main__"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printed, f"{path}: print at {printed}"


def test_hooks_keep_real_annotations():
    """register_comm_hook inspects them: deferred annotations make it raise."""
    tree = ast.parse((PACKAGE / "ddp" / "hook.py").read_text())
    futures = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert not futures
    assert list(inspect.signature(commhooks.sparse_hook).parameters)[:2] == ["state", "bucket"]


def test_mpi_and_horovod_are_not_imported_with_the_package():
    """Optional parts load on demand: nothing at a module's top level outside their own files needs them."""
    for path in FILES:
        if path.name == "mpi.py" or unit_of(path) == "horovod":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("mpi4py", "horovod")], path


def test_sources_are_ascii():
    for path in FILES:
        text = path.read_text()
        assert text.isascii(), path
        list(tokenize.generate_tokens(io.StringIO(text).readline))


CSRC = PACKAGE.parent / "csrc"
TREES = {path: ast.parse(path.read_text()) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def short(path):
    """``exchange/gtopk.py``"""
    return str(path.relative_to(PACKAGE))


# -- circles ------------------------------------------------------------------------------------------------------


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported_when_loaded(name, is_package, tree):
    """Modules of commhooks that are imported while this one is: not those inside functions or for type checkers."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join((*base, *([node.module] if node.module else [])))
            for alias in node.names:
                found = f"{module}.{alias.name}"
                yield from (m for m in (found if found in MODULES else module,) if m in MODULES)
        elif not isinstance(node, FUNCTIONS):
            pending += [
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, (ast.stmt, ast.ExceptHandler))
            ]


def circles(graph):
    """Modules that reach themselves."""
    reached = {}
    for start in graph:
        seen, pending = set(), list(graph[start])
        while pending:
            module = pending.pop()
            if module not in seen:
                seen.add(module)
                pending += graph.get(module, ())
        reached[start] = seen
    return {module for module, seen in reached.items() if module in seen}


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module_of(path): set(imported_when_loaded(module_of(path), path.name == "__init__.py", tree))
        - {module_of(path)}
        for path, tree in TREES.items()
    }
    assert not circles(graph)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}
    tree = ast.parse(
        "if TYPE_CHECKING:\n    from . import cli\ntry:\n    from .errors import CommHooksError\nfinally:\n    pass\n"
    )
    assert set(imported_when_loaded("commhooks", True, tree)) == {"commhooks.errors"}


# -- privacy ------------------------------------------------------------------------------------------------------

FOREIGN = {
    "_comm_hooks": "torch has no public way to the hooks that a copy of a DDP model lists and has lost",
    "_forward_pre_hooks": "torch has no public way to the hooks that a copy of a module has",
    "_world": "torch has no public list of process groups",
    "_exit": "the public name of the standard library's os._exit",
    "_get_backend": "torch has no public way to a group's backend",
    "_foreach_div_": "torch's operator on lists of tensors",
    "_handle_map": "Horovod: what lives from one init() to the next",
    "_get_default_store": "torch has no public way to the default group's store",
    "_new_process_group_helper": "torch has no public way to make a group under a name",
    "_is_view": "torch has no public way to tell a view",
    "_version": "torch has no public count of the changes of a tensor in place",
}
"""Private names of other libraries, with the reason."""

REACHED = {}
"""Known breaches: file and the private names of other modules that it reaches."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree):
    """Private names that a module makes itself: functions, classes, variables, attributes of its objects, fields."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node):
    """``self``, ``cls``, ``super()``: a class may use what its base class has."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def reached_into(tree):
    """Private names of other modules, imported or reached as attributes."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (a.name for a in node.names if is_private(a.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            if node.attr not in own:
                yield node.attr


def test_nobody_reaches_into_another_module():
    found = {short(path): set(reached_into(tree)) for path, tree in TREES.items()}
    assert {path: names - set(FOREIGN) for path, names in found.items() if names - set(FOREIGN)} == REACHED
    assert set(FOREIGN) <= set().union(*found.values()), "reached by nobody: delete it"


def test_reaching_in_is_found():
    text = "from .a import _b\nx = other._c\nclass A:\n    def f(self, o):\n        self._d = o._d\n        return self._e, super()._f\n"
    assert set(reached_into(ast.parse(text))) == {"_b", "_c"}


# -- fields -------------------------------------------------------------------------------------------------------

FOREIGN_FIELDS = {
    "grad": "torch.Tensor's. Buckets and gradients that are on their way have a field of this name too",
    "param_groups": "torch.optim.Optimizer's",
}
"""Fields of other libraries whose names stand in a class of ours too, with the reason."""


def fields(tree):
    """Names that a module's classes declare, or set on ``self`` and ``cls``."""
    for made in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in made.body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        for node in ast.walk(made):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                yield node.attr


def fields_set(tree):
    """``(name, line)`` of every field that a module sets or deletes on an object other than ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if not is_self(node.value):
                yield node.attr, node.lineno


def test_a_room_sets_no_fields_of_another():
    """An owner's method or argument does. The names tell whose field it is.

    A field is seen as another room's where no class of this room has one of its name: types are not followed.
    """
    rooms = defaultdict(set)
    for path, tree in TREES.items():
        for name in fields(tree):
            rooms[name].add(unit_of(path))
    found = {
        (name, f"{short(path)}:{line}")
        for path, tree in TREES.items()
        for name, line in fields_set(tree)
        if name in rooms and unit_of(path) not in rooms[name]
    }
    assert {where for name, where in found if name not in FOREIGN_FIELDS} == set()
    assert set(FOREIGN_FIELDS) == {name for name, _ in found}, "set by nobody: delete it"


def test_a_field_that_is_set_is_found():
    text = (
        "class A:\n    a: int\n    b = 1\n    def f(self, o):\n        self.c, o.d = o.e\n        o.g.h += 1\n"
        "        del o.i\n        o.j[0] = 1\n"
    )
    assert set(fields(ast.parse(text))) == {"a", "b", "c"}
    assert {name for name, _ in fields_set(ast.parse(text))} == {"d", "h", "i"}


# -- sizes --------------------------------------------------------------------------------------------------------

MOST_METHODS, MOST_PARAMETERS, MOST_LOOSE, MOST_COLUMNS = 15, 7, 6, 110

LARGE_CLASSES = set()
"""Known breaches: classes with more public methods."""

SETTINGS = {
    "ddp/state.py SparseState.__init__": "settings of SparseState",
    "ddp/state.py SparseState.auto": "settings of SparseState",
    "ddp/state.py SparseState.for_optimizer": "settings of SparseState",
    "horovod/compression.py Compression.for_optimizer": "SparseState.for_optimizer",
    "horovod/optimizer.py DistributedOptimizer": "horovod.torch.DistributedOptimizer",
    "reduction/reducer.py Reducer.__init__": "settings of Reducer",
}
"""Calls with more parameters, with the reason: settings, or a named foreign signature that they mirror."""

LONG_CALLS = set()
"""Known breaches: calls with more parameters."""

LONG_LINES = set()
"""Known breaches: files with longer lines."""


def public_methods(node):
    """Methods and properties that users call; constructors by ``classmethod`` and setters aside."""
    for child in node.body:
        if isinstance(child, FUNCTIONS) and not child.name.startswith("_"):
            decorators = {getattr(d, "id", getattr(d, "attr", "")) for d in child.decorator_list}
            if not decorators & {"classmethod", "setter"}:
                yield child.name


def calls(tree):
    """``(qualified name, number of parameters)`` of every function; ``self`` and ``cls`` do not count."""
    pending = [("", tree)]
    while pending:
        prefix, node = pending.pop()
        for child in ast.iter_child_nodes(node):
            inside = f"{prefix}{child.name}." if isinstance(child, (*FUNCTIONS, ast.ClassDef)) else prefix
            pending.append((inside, child))
            if isinstance(child, FUNCTIONS):
                given = child.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
                yield prefix + child.name, len([n for n in names if n not in ("self", "cls")])


def test_classes_are_small():
    found = {
        f"{short(path)} {node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and len(list(public_methods(node))) > MOST_METHODS
    }
    assert found == LARGE_CLASSES


def test_calls_are_short():
    found = {
        f"{short(path)} {name}"
        for path, tree in TREES.items()
        for name, n in calls(tree)
        if n > MOST_PARAMETERS
    }
    assert found - set(SETTINGS) == LONG_CALLS
    assert set(SETTINGS) <= found, "exempt and short enough: delete it"


def test_few_files_are_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_LOOSE


def test_lines_are_short():
    found = {short(path) for path in FILES if max(map(len, path.read_text().splitlines())) > MOST_COLUMNS}
    assert found == LONG_LINES


def test_counting_is_right():
    text = (
        "class A:\n    def a(self, x, *, y): ...\n    def _b(self): ...\n    @classmethod\n    def c(cls): ...\n"
        "    @property\n    def d(self): ...\n    @d.setter\n    def d(self, v): ...\n    def e(self, *f, **g): ...\n"
    )
    tree = ast.parse(text)
    assert list(public_methods(tree.body[0])) == ["a", "d", "e"]
    assert dict(calls(tree))["A.a"] == 2 and dict(calls(tree))["A.e"] == 2


# -- twins --------------------------------------------------------------------------------------------------------

RUN = 10
"""Equal lines in a row, blank ones aside, that make a pair of twins."""

MIRRORED: set[tuple[str, str]] = set()
"""Known breaches: nothing stands twice."""


def twins(texts):
    """Pairs of names whose texts share ``RUN`` lines in a row, blank lines and indentation aside."""
    places = defaultdict(set)
    for name, text in texts.items():
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines()) if line.strip()]
        for start in range(len(lines) - RUN + 1):
            window = tuple(line for _, line in lines[start : start + RUN])
            if len("".join(window)) > 4 * RUN:  # ten braces are no twin
                places[window].add((name, start))
    found = Counter()
    for where in places.values():
        ordered = sorted(where)
        for i, (one, _) in enumerate(ordered):
            for other, _ in ordered[i + 1 :]:
                found[one, other] += 1
    return set(found)


def test_nothing_stands_twice():
    texts = {short(path): path.read_text() for path in FILES}
    for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh"):
        for path in CSRC.rglob(pattern):
            if "tests" not in path.relative_to(CSRC).parts:
                texts[f"csrc/{path.relative_to(CSRC)}"] = path.read_text()
    assert twins(texts) == MIRRORED


def test_a_twin_is_found():
    block = "\n".join(f"value_{i} = compute({i})" for i in range(RUN))
    apart = block.replace("value_4", "value_x")
    indented = "\n\n".join("    " + line for line in block.splitlines())
    assert twins({"a": block, "b": "x = 1\n" + indented, "c": apart}) == {("a", "b")}
    assert twins({"a": block + "\n" + block}) == {("a", "a")}
    assert not twins({"a": "}\n" * 30, "b": "}\n" * 30})


def test_the_page_of_the_design_names_every_room_with_its_size():
    """Sizes may be a fifth off, so that not every change is a change of the page."""
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    rooms = {}
    for names, sizes in re.findall(r"^\| (`[^|]+`) \| [^|]+ \| ([\d, +]+) \|$", page, re.M):
        told = [int(size.replace(",", "")) for size in sizes.split(" + ")]
        rooms.update(zip(re.findall(r"`([^`]+)`", names), told, strict=True))
    inside = {
        path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.name[:2] not in ("__", "py")
    }
    assert set(rooms) == inside | {"csrc/"}
    suffixes = (".py", ".cpp", ".hpp", ".h", ".cu", ".cuh")
    for name, told in rooms.items():
        path = PACKAGE.parent / name if name == "csrc/" else PACKAGE / name
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in suffixes]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert 0.8 * lines <= told <= 1.25 * lines, f"docs/design.md: {name} has {lines} lines, not {told}"


def test_files_of_tests_have_names_of_their_own():
    """Two test files of one name cannot be collected in one run, unless their folder is a package."""
    folder = PACKAGE.parent / "tests"
    names = [p.name for p in folder.rglob("test_*.py") if not (p.parent / "__init__.py").exists()]
    assert sorted(names) == sorted(set(names))
