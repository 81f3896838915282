"""Who may import whom: every file imports from its own floor's package or from floors below."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import TINY

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speechllm"
MAX_LINES = 350

GROUND, FIRST, SECOND, THIRD, ROOF = range(5)
FLOORS = {  # unit of the package (a file or a sub-package) -> floor
    "__init__": GROUND,
    "config": GROUND,
    "errors": GROUND,
    "garbage": GROUND,
    "launcher": GROUND,
    "lease": GROUND,
    "log": GROUND,
    "run_lock": GROUND,
    "types": GROUND,
    "world": GROUND,
    "data": FIRST,
    "model": FIRST,
    "optim": FIRST,
    "text": FIRST,
    "wer": FIRST,
    "checkpoint": SECOND,
    "failure": SECOND,
    "features": SECOND,
    "generate": SECOND,
    "identity": SECOND,
    "prepare": SECOND,
    "snapshot": SECOND,
    "strategy": SECOND,
    "training_data": SECOND,
    "caching": THIRD,
    "check": THIRD,
    "cluster": THIRD,
    "decode": THIRD,
    "evaluate": THIRD,
    "export": THIRD,
    "planner": THIRD,
    "preview": THIRD,
    "report": THIRD,
    "run": THIRD,
    "settle": THIRD,
    "step": THIRD,
    "stop": THIRD,
    "train": THIRD,
    "transfer": SECOND,
    "transcribe": THIRD,
    "__main__": ROOF,
    "cli": ROOF,
}
# On the first floor the units stand apart; only these may see each other.
FIRST_FLOOR_DOORS = {("wer", "text")}
# The ground floor in order: config and errors start without torch, so they see nothing that has it.
GROUND_DOORS = {"config": {"errors"}, "errors": set()}
HEAVY = {"torch", "transformers", "numpy", "deepspeed", "datasets", "pyarrow"}
TORCH_FREE = {"__init__", "config", "errors"}

FILES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("**/*.py")) + sorted((ROOT / "cluster").glob("**/*.py"))


def test_the_floors_are_those_of_the_document() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("    roof ")[1].split("\n\n")[0]
    floors = re.split(r"3rd|2nd|1st|ground", table)
    for floor, text in zip((ROOF, THIRD, SECOND, FIRST, GROUND), floors, strict=True):
        units = {unit for unit, one in FLOORS.items() if one == floor} - {"__init__"}
        assert {name.rstrip("/") for name in text.split()} == units


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def unit_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports_in(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                below = name in MODULES or base == "torch"
                yield node.lineno, name if below else base


def imports_of(file: Path) -> list[tuple[int, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return list(imports_in(tree, module_of(file), file.name == "__init__.py"))


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None where it may."""
    if module == imported:
        return None
    here, there = unit_of(module), unit_of(imported)
    if here == there:
        return None
    if here not in FLOORS or there not in FLOORS:
        return "one of them has no floor yet"
    if FLOORS[there] > FLOORS[here]:
        return f"{there} stands on a higher floor than {here}"
    if here in GROUND_DOORS and there not in GROUND_DOORS[here] | {"__init__"}:
        return f"{here} starts without torch and may import only {sorted(GROUND_DOORS[here])}"
    if FLOORS[here] == FLOORS[there] == FIRST and (here, there) not in FIRST_FLOOR_DOORS:
        return f"{here} and {there} stand side by side on the first floor and may not meet"
    return None


def own(name: str) -> bool:
    return name.split(".")[0] == "speechllm"


def test_every_unit_has_a_floor():
    unknown = {unit_of(module) for module in MODULES} - set(FLOORS)
    assert not unknown, f"give {sorted(unknown)} a floor in FLOORS of tests/test_layers.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}: {reason}"
        for line, name in imports_of(MODULES[module])
        if own(name) and (reason := forbidden(module, name))
    ]
    assert not wrong, "\n".join(wrong)


def find_cycle(graph: dict[str, list[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for below in graph.get(node, []):
            if found := visit(below, [*path, node]):
                return found
        done.add(node)
        return None

    for node in graph:
        if found := visit(node, []):
            return found
    return None


def test_no_cycles():
    graph = {
        module: sorted({name for _, name in imports_of(file) if name in MODULES and name != module})
        for module, file in MODULES.items()
    }
    cycle = find_cycle(graph)
    assert cycle is None, f"import cycle: {' -> '.join(cycle)}"


@pytest.mark.parametrize("module", [m for m in MODULES if unit_of(m) in TORCH_FREE])
def test_configuration_starts_without_torch(module):
    heavy = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(MODULES[module])
        if name.split(".")[0] in HEAVY
    ]
    assert not heavy, "\n".join(heavy)


STARTS = """
import sys

def without(*packages):
    found = [name for name in packages if name in sys.modules]
    assert not found, f"{found} imported"

import speechllm.cli, speechllm.cluster.node, speechllm.cluster.rank, speechllm.cluster.submit
import speechllm.report.summary, speechllm.wer
without("torch", "numpy", "transformers", "pyarrow", "pandas")
import speechllm.train
unused = ["pandas", "datasets", "peft", "torch._inductor.compile_fx", "torch.utils.cpp_extension"]
without("deepspeed", *unused)
assert speechllm.cli.main(sys.argv[1:]) == 0
without(*unused)
"""


@pytest.mark.distributed
def test_processes_start_without_what_they_do_not_use(tmp_path, shards):
    """Each of these takes seconds of CPU at every start: commands that look at files do without
    torch, a run without other strategies' libraries, and none needs pandas or torch's compiler."""
    run = ["train", TINY, f"data.train={shards}", f"run_dir={tmp_path}", "train.steps=1"]
    run += ["strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/zero1.json"]
    done = subprocess.run(
        [sys.executable, "-c", STARTS, *run, "data.num_workers=0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def distributed_in(tree: ast.AST, module: str = "speechllm.model.x") -> list[int]:
    lines = [
        line for line, name in imports_in(tree, module, False) if "torch.distributed" in f"{name}."
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("module", [m for m in MODULES if unit_of(m) in ("model", "data")])
def test_model_and_data_know_no_ranks(module):
    file = MODULES[module]
    lines = distributed_in(ast.parse(file.read_text(encoding="utf-8")), module)
    assert not lines, f"{file.relative_to(ROOT)}:{lines} uses torch.distributed"


def swallowed(tree: ast.AST) -> list[int]:
    """Lines of `except:` and of handlers that catch everything and do nothing."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            idle = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            if node.type is None or (catches_all and idle):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("file", [*FILES, *TOOLS], ids=lambda f: str(f.relative_to(ROOT)))
def test_house_rules(file):
    text = file.read_text(encoding="utf-8")
    name = file.relative_to(ROOT)
    assert file.name != "utils.py", f"{name}: name the file after its subject"
    lines = text.count("\n")
    assert lines <= MAX_LINES, f"{name} has {lines} lines; more than {MAX_LINES} is two subjects"
    caught = swallowed(ast.parse(text))
    assert not caught, f"{name}:{caught}: name the exceptions, and do something about them"


# The rules themselves, tried on made-up code.


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("speechllm.data.plan", "speechllm.data.index", True),
        ("speechllm.data.plan", "speechllm.types", True),
        ("speechllm.data.plan", "speechllm.model.build", False),
        ("speechllm.model.build", "speechllm.data.plan", False),
        ("speechllm.model.build", "speechllm.optim", False),
        ("speechllm.wer", "speechllm.text", True),
        ("speechllm.text", "speechllm.wer", False),
        ("speechllm.strategy.ddp", "speechllm.optim", True),
        ("speechllm.strategy.ddp", "speechllm.train", False),
        ("speechllm.train", "speechllm.strategy", True),
        ("speechllm.train", "speechllm.step", True),
        ("speechllm.config.load", "speechllm.errors", True),
        ("speechllm.config.load", "speechllm.types", False),
        ("speechllm.errors", "speechllm.config.load", False),
        ("speechllm.world", "speechllm.config.schema", True),
        ("speechllm.cli", "speechllm.train", True),
        ("speechllm.train", "speechllm.cli", False),
    ],
)
def test_the_floors_mean_what_they_say(module, imported, allowed):
    assert (forbidden(module, imported) is None) == allowed


def test_imports_are_found_in_every_form():
    code = (
        "import torch.nn as nn\nfrom speechllm import wer\nfrom . import index\n"
        "from .plan import x\nfrom ..types import y\ndef f():\n    from torch import distributed\n"
    )
    found = dict(imports_in(ast.parse(code), "speechllm.data.store", False))
    assert found == {
        1: "torch.nn",
        2: "speechllm.wer",
        3: "speechllm.data.index" if "speechllm.data.index" in MODULES else "speechllm.data",
        4: "speechllm.data.plan",
        5: "speechllm.types",
        7: "torch.distributed",
    }


def test_bad_code_is_recognised():
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
    assert distributed_in(ast.parse("import torch\ntorch.distributed.barrier()")) == [2]
    assert distributed_in(ast.parse("from torch.distributed import barrier")) == [1]
    assert distributed_in(ast.parse("import torch.distributed as dist")) == [1]
    code = "try:\n    x\n{}\n    {}\n"
    assert swallowed(ast.parse(code.format("except:", "raise"))) == [3]
    assert swallowed(ast.parse(code.format("except Exception:", "pass"))) == [3]
    assert swallowed(ast.parse(code.format("except Exception:", "log()"))) == []
    assert swallowed(ast.parse(code.format("except OSError:", "pass"))) == []
