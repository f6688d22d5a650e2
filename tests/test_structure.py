"""The package's shape: imports point along one line, public names are documented, functions and files stay short."""

import ast
import inspect
import io
import tokenize
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
    {"horovod", "averaging", "interop"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}
INITS = {"__init__"}


def unit_of(path):
    """``commhooks/exchange/gtopk.py`` is of the unit ``exchange``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path, tree):
    """The units of commhooks that a file imports, wherever in the file."""
    package = ("commhooks", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "commhooks" and len(parts) > 1:
                yield parts[1], node.lineno


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
    )
    found = [unit for unit, _ in imported_units(PACKAGE / "transports" / "base.py", tree)]
    assert found == ["reduction", "ddp", "averaging"]


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
