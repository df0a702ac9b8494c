"""The architecture, read from the imports: each module knows only what lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ssl_pipeline", "eval", "data_tools", "benchmarks")

# lowest row first; a module may import its own row and those below
ROWS = [
    "config schedule distributed atomic interruption step_times profiling",
    "batch attention positions weights initialisation wide_resnet backbones heads teacher memory masking "
    "sync_batch_norm losses augment data",
    "methods",
    "optim lars saved_state checkpoint optimizer_state resume tracking run_directory verdicts bottleneck",
    "training",
    "launch",
    "training_step",
    "reporting",
    "engine",
]
EVAL_ROWS = ROWS[:2]  # eval knows backbones and data, no method and no training
DATA_TOOLS_NEED = {"config", "data"}
METHODS_AVOID = {"augment", "data"}  # a method gets batches and does not know where they come from
TRAINING_NEEDS = {"methods.base"}  # the rows above methods know the contract, not a method
GRAB_BAGS = {"util", "utils", "misc", "helper", "helpers", "common", "stuff"}


@cache
def sources() -> dict[str, Path]:
    """Every module of the checkout by its dotted name."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files, strict=True)) | {"pretrain": ROOT / "pretrain.py"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of ours that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & sources().keys()
            found |= below or {node.module}
    return frozenset(name for name in found if name.split(".")[0] in (*FOLDERS, "pretrain"))


def inside(package: str) -> list[str]:
    return sorted(name for name in sources() if name == package or name.startswith(f"{package}."))


def unit(module: str) -> str:
    """`ssl_pipeline.data.shards` -> `data`."""
    return module.removeprefix("ssl_pipeline").removeprefix(".").split(".")[0]


def row_of(module: str) -> int:
    return next(number for number, row in enumerate(ROWS) if unit(module) in row.split())


def library_imports() -> Iterator[tuple[str, str]]:
    for module in inside("ssl_pipeline"):
        for imported in imports_of(module):
            yield module, imported


def test_imports_are_found():
    assert "ssl_pipeline.data.shards" in imports_of("pretrain")
    assert "ssl_pipeline.schedule" in imports_of("ssl_pipeline.optim")


def test_every_module_has_its_row_and_every_name_a_module():
    units = {unit(module) for module in inside("ssl_pipeline")} - {""}
    assert units == set(" ".join(ROWS).split())


def test_imports_go_downwards():
    upwards = [
        f"{module} imports {imported}"
        for module, imported in library_imports()
        if imported.startswith("ssl_pipeline.") and row_of(imported) > row_of(module)
    ]
    assert not upwards


def test_the_library_knows_no_command():
    assert [pair for pair in library_imports() if not pair[1].startswith("ssl_pipeline")] == []


def test_methods_know_neither_data_nor_augmentation():
    pairs = [pair for pair in library_imports() if unit(pair[0]) == "methods"]
    assert pairs
    assert [pair for pair in pairs if unit(pair[1]) in METHODS_AVOID] == []


def test_methods_do_not_know_each_other():
    shared = {"ssl_pipeline.methods", "ssl_pipeline.methods.base"}
    methods = set(inside("ssl_pipeline.methods")) - shared
    assert [(method, other) for method in methods for other in imports_of(method) & (methods - {method})] == []


def test_training_knows_the_contract_and_no_method():
    allowed = {f"ssl_pipeline.{name}" for name in TRAINING_NEEDS}
    above = [pair for pair in library_imports() if row_of(pair[0]) > 2]
    assert [pair for pair in above if unit(pair[1]) == "methods" and pair[1] not in allowed] == []


def test_eval_knows_neither_methods_nor_training():
    allowed = set(" ".join(EVAL_ROWS).split())
    for module in inside("eval"):
        for imported in imports_of(module):
            assert imported.startswith("eval") or unit(imported) in allowed, f"{module} imports {imported}"


def test_data_tools_know_data_and_config_alone():
    for module in inside("data_tools"):
        for imported in imports_of(module):
            assert imported.startswith("data_tools") or unit(imported) in DATA_TOOLS_NEED, (
                f"{module} imports {imported}"
            )


def test_only_the_composition_root_knows_both_halves():
    assert any(imported.startswith("eval") for imported in imports_of("pretrain"))
    assert "ssl_pipeline.engine" in imports_of("pretrain")
    assert [module for module in sources() if "pretrain" in imports_of(module)] == []


def test_benchmarks_know_the_library_and_eval_and_nobody_knows_them():
    for module in inside("benchmarks"):
        for imported in imports_of(module):
            assert imported.split(".")[0] in ("benchmarks", "ssl_pipeline", "eval"), f"{module} imports {imported}"
    others = [module for module in sources() if not module.startswith("benchmarks")]
    assert [m for m in others if any(name.split(".")[0] == "benchmarks" for name in imports_of(m))] == []


def test_no_import_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in imports_of(module) & sources().keys():
                visit(imported, (*path, module))
            done.add(module)

    for module in sources():
        visit(module, ())


def test_imports_are_absolute():
    relative = [
        f"{module}:{node.lineno}"
        for module in sources()
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_no_grab_bag_module():
    parts = {part for module in sources() for name in module.split(".") for part in (name, *name.split("_"))}
    assert not parts & GRAB_BAGS


# what would run foreign code


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


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
        for node in ast.walk(tree_of(module)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importers += [module for name in names if name.split(".")[0] == package]
    assert importers == []


def test_yaml_is_read_with_a_safe_loader_alone():
    for module in sources():
        for name, call in calls(module):
            if name == "yaml.load":
                assert module == "ssl_pipeline.config.arguments"
                assert ast.unparse(call.args[1]) == "_YamlLoader"
    from ssl_pipeline.config.arguments import _YamlLoader

    assert "SafeLoader" in [base.__name__ for base in _YamlLoader.__mro__]
