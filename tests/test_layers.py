"""The architecture, read from the imports: each module knows only what lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ssl_pipeline", "eval", "data_tools", "benchmarks")
FRONTS = ("eval", "data_tools", "pretrain", "finetune")  # the commands' thin front: a few lines over the package each

STARTS = {  # commands that compose rooms; the others are called as they are
    "pretrain": "ssl_pipeline.commands.start",
    "finetune": "ssl_pipeline.commands.finetune",
    "eval.compare": "ssl_pipeline.commands.compare",
    "eval.embed": "ssl_pipeline.commands.embed",
    "data_tools.make_shards": "ssl_pipeline.packing.make_shards",
    "data_tools.deduplicate": "ssl_pipeline.commands.deduplicate",
    "data_tools.curate": "ssl_pipeline.commands.curate",
    "eval.predict": "ssl_pipeline.commands.predict",
    "eval.self_training": "ssl_pipeline.commands.self_training",
    "eval.report": "ssl_pipeline.commands.report",
}
WITHOUT_FRONT = {"ssl_pipeline.commands.recipes", "ssl_pipeline.commands.check_install"}  # python -m ssl_pipeline NAME

# lowest row first; a module may import its own row and those below
ROWS = [
    "config files randomness batch",
    "schedule distributed sharded mixing augment backbones run",
    "machine modules losses optim",
    "data methods",
    "packing",
    "training eval",
    "data_tools",
    "commands",
    "__main__",
]
LOOSE_FILES = {"__main__", "batch", "schedule", "distributed", "sharded", "mixing", "files", "randomness", "machine"}
STRANGERS = [  # rooms of one row, or of a row below, that do not know each other
    ("data", "methods"),
    ("methods", "data"),
    ("methods", "augment"),
    ("methods", "run"),
    ("run", "augment"),
    ("run", "backbones"),
    ("training", "eval"),
    ("eval", "training"),
    ("eval", "methods"),
    ("eval", "optim"),
    ("training", "packing"),
    ("data_tools", "training"),
    ("data_tools", "methods"),
]
SHARED_BY_METHODS = {f"ssl_pipeline.methods.{name}" for name in ("base", "few_labels", "weak_to_strong")}
TRAINING_NEEDS = {"ssl_pipeline.methods.base"}  # training knows the contract, not a method
PACKAGE = "ssl_pipeline"  # offers what is below it, and imports it when it is asked for
GRAB_BAGS = {"util", "utils", "misc", "helper", "helpers", "common", "stuff"}


@cache
def sources() -> dict[str, Path]:
    """Every module of the checkout by its dotted name."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True)) | {name: ROOT / f"{name}.py" for name in ("pretrain", "finetune")}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


@cache
def nodes_of(module: str) -> tuple[ast.Import | ast.ImportFrom | ast.Call, ...]:
    """The imports and calls of a module, anywhere in its file."""
    return tuple(node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call))


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of ours that a module imports."""
    found = set()
    for node in nodes_of(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & sources().keys()
            found |= below or {node.module}
    return frozenset(name for name in found if name.split(".")[0] in (*FOLDERS, "pretrain", "finetune"))


def inside(package: str) -> list[str]:
    return sorted(name for name in sources() if name == package or name.startswith(f"{package}."))


def unit(module: str) -> str:
    """`ssl_pipeline.data.shards.open` -> `data`."""
    return module.removeprefix("ssl_pipeline").removeprefix(".").split(".")[0]


def row_of(module: str) -> int:
    if module == PACKAGE:
        return len(ROWS)
    return next(number for number, row in enumerate(ROWS) if unit(module) in row.split())


def library_imports() -> Iterator[tuple[str, str]]:
    for module in inside("ssl_pipeline"):
        for imported in imports_of(module):
            yield module, imported


def test_imports_are_found():
    assert "ssl_pipeline.data.shards.open" in imports_of("ssl_pipeline.commands.pretrain")
    assert "ssl_pipeline.schedule" in imports_of("ssl_pipeline.optim.optimizer")


def test_every_module_has_its_row_and_every_name_a_module():
    units = {unit(module) for module in inside("ssl_pipeline")} - {""}
    assert units == set(" ".join(ROWS).split())


def test_no_file_is_loose_but_the_vocabulary():
    loose = {path.stem for path in (ROOT / "ssl_pipeline").glob("*.py")} - {"__init__"}
    assert loose <= LOOSE_FILES


def test_imports_go_downwards():
    upwards = [
        f"{module} imports {imported}"
        for module, imported in library_imports()
        if imported.startswith("ssl_pipeline.") and row_of(imported) > row_of(module)
    ]
    assert not upwards


def test_the_library_knows_no_front_and_no_benchmark():
    assert [pair for pair in library_imports() if not pair[1].startswith("ssl_pipeline")] == []


@pytest.mark.parametrize(("room", "stranger"), STRANGERS)
def test_rooms_do_not_know_their_strangers(room, stranger):
    pairs = [pair for pair in library_imports() if unit(pair[0]) == room]
    assert pairs
    assert [pair for pair in pairs if unit(pair[1]) == stranger] == []


def test_methods_do_not_know_each_other():
    methods = set(inside("ssl_pipeline.methods")) - {"ssl_pipeline.methods", *SHARED_BY_METHODS}
    assert [(method, other) for method in methods for other in imports_of(method) & (methods - {method})] == []


def test_training_knows_the_contract_and_no_method():
    pairs = [pair for pair in library_imports() if unit(pair[0]) == "training" and unit(pair[1]) == "methods"]
    assert {imported for _, imported in pairs} == TRAINING_NEEDS


def test_data_tools_know_evaluation_by_its_features_and_its_search_alone():
    pairs = [pair for pair in library_imports() if unit(pair[0]) == "data_tools" and unit(pair[1]) == "eval"]
    allowed = ("ssl_pipeline.eval.features", "ssl_pipeline.eval.search")
    assert [pair for pair in pairs if not pair[1].startswith(allowed)] == []


def test_only_the_commands_know_both_halves():
    both = [
        module
        for module in inside("ssl_pipeline")
        if {"training", "eval"} <= {unit(imported) for imported in imports_of(module)}
    ]
    assert {unit(module) for module in both} == {"commands"}


def test_the_front_holds_commands_and_nothing_else():
    for module in (name for name in sources() if name.split(".")[0] in FRONTS):
        lines = sources()[module].read_text(encoding="utf-8").splitlines()
        if module in FRONTS[:2]:
            assert imports_of(module) == {"ssl_pipeline.commands.interrupts"}
            assert len(lines) <= 7, module
            continue
        behind = STARTS.get(module, f"ssl_pipeline.{module}")
        assert len(lines) <= 10, module
        assert imports_of(module) == {behind}
        assert lines[-2:] == ['if __name__ == "__main__":', "    sys.exit(command())"], module


def test_every_command_has_its_front():
    commands = [module for module in inside("ssl_pipeline") if any(has_name(module, "command"))]
    behind = {STARTS.get(name, f"ssl_pipeline.{name}") for name in sources() if name.split(".")[0] in FRONTS}
    assert set(commands) - WITHOUT_FRONT <= behind


def has_name(module: str, name: str) -> Iterator[bool]:
    """Whether a module defines a function of this name at its top."""
    return (isinstance(node, ast.FunctionDef) and node.name == name for node in tree_of(module).body)


def test_benchmarks_know_the_library_and_nobody_knows_them():
    for module in inside("benchmarks"):
        for imported in imports_of(module):
            assert imported.split(".")[0] in ("benchmarks", "ssl_pipeline"), f"{module} imports {imported}"
    others = [module for module in sources() if not module.startswith("benchmarks")]
    assert [m for m in others if any(name.split(".")[0] == "benchmarks" for name in imports_of(m))] == []


def test_importing_the_package_imports_nothing_of_it_and_no_torch():
    at_its_top = [node for node in tree_of(PACKAGE).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node).split()[1] for node in at_its_top} == {"__future__", "importlib", "pathlib", "typing"}


def test_no_import_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done and module != PACKAGE:
            for imported in imports_of(module) & sources().keys():
                visit(imported, (*path, module))
            done.add(module)

    for module in sources():
        visit(module, ())


def test_imports_are_absolute():
    relative = [
        f"{module}:{node.lineno}"
        for module in sources()
        for node in nodes_of(module)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_no_grab_bag_module():
    parts = {part for module in sources() for name in module.split(".") for part in (name, *name.split("_"))}
    assert not parts & GRAB_BAGS


# what would run foreign code


@cache
def calls(module: str) -> tuple[tuple[str, ast.Call], ...]:
    return tuple((ast.unparse(node.func), node) for node in nodes_of(module) if isinstance(node, ast.Call))


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(item.value) for item in call.keywords if item.arg == name), None)


def unsafe_calls(module: str) -> list[str]:
    found = []
    for name, call in calls(module):
        unsafe = (
            (name == "torch.load" and keyword(call, "weights_only") != "True")
            or (name in ("np.load", "numpy.load", "np.save") and keyword(call, "allow_pickle") != "False")
            or keyword(call, "shell") not in (None, "False")
            or name in ("os.system", "os.popen", "eval", "exec", "yaml.unsafe_load", "yaml.full_load")
        )
        if unsafe:
            found.append(f"{module}:{call.lineno} {name}")
    return found


def test_nothing_loads_pickles_or_runs_a_shell():
    assert [call for module in sources() for call in unsafe_calls(module)] == []


@pytest.mark.parametrize("package", ["pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"])
def test_nothing_imports_a_pickler(package):
    importers = []
    for module in sources():
        for node in nodes_of(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importers += [module for name in names if name.split(".")[0] == package]
    assert importers == []


def test_yaml_is_read_with_a_safe_loader_alone():
    for module in sources():
        for name, call in calls(module):
            if name == "yaml.load":
                assert module == "ssl_pipeline.config.yaml_text"
                assert ast.unparse(call.args[1]) == "_YamlLoader"
    from ssl_pipeline.config.yaml_text import _YamlLoader

    assert "SafeLoader" in [base.__name__ for base in _YamlLoader.__mro__]
