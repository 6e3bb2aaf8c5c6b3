"""The house rules, as tests. Each rule is a function of source text, so each has a planted fault that it catches."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "funnelrec"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODELS = sorted(
    path
    for stage in ("match", "rank", "rerank")
    for path in (PACKAGE / stage).glob("*.py")
    if not path.name.startswith("_")
)
FORBIDDEN_ARGUMENTS = {"device", "lr", "learning_rate", "seed", "path", "optimizer", "optimiser"}
MAX_ARGUMENTS, MAX_LINES, MAX_FUNCTION = 10, 400, 60


def names_page() -> set[str]:
    """The hyper-parameter names that docs/names.md allows: the first cell of each table row."""
    text = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def model_class(tree: ast.Module) -> ast.ClassDef | None:
    exported = exported_names(tree)
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in exported]
    return found[0] if found else None


def exported_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def model_faults(source: str, allowed: set[str]) -> list[str]:
    """Everything in which a model file departs from the order and the constructor rules of CONTRIBUTING.md."""
    tree = ast.parse(source)
    faults = []
    head = ast.get_docstring(tree) or ""
    faults += [f"docstring lacks '{part}'" for part in ("Idea:", "Differs:") if part not in head]
    if not re.search(r"^(Paper|Source):", head, flags=re.MULTILINE):
        faults.append("docstring lacks 'Paper:' (or 'Source:' where there is no paper)")
    if "Eq." not in head:
        faults.append("docstring has no equation ('Eq. (n)')")
    if len(exported_names(tree)) != 1:
        faults.append(f"__all__ must hold exactly the model, it holds {exported_names(tree)}")
        return faults
    model = model_class(tree)
    if model is None or model is not [n for n in tree.body if isinstance(n, ast.ClassDef)][-1]:
        return [*faults, "the model must be the last class of its file"]
    if not any(isinstance(d, ast.Name) and d.id == "keeps_config" for d in model.decorator_list):
        faults.append("the model lacks @keeps_config, so an artifact could not build it again")
    init = next((n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return faults
    positional = [a.arg for a in init.args.args[1:]]
    if positional not in (["spec"], []):
        faults.append(f"the constructor takes 'spec' first and the rest by keyword, not {positional}")
    if init.args.kwarg or init.args.vararg:
        faults.append("the constructor takes *args or **kwargs")
    keywords = [a.arg for a in init.args.kwonlyargs]
    if len(keywords) > MAX_ARGUMENTS:
        faults.append(f"the constructor has {len(keywords)} arguments, at most {MAX_ARGUMENTS}")
    faults += [f"the constructor takes '{a}'" for a in keywords if a in FORBIDDEN_ARGUMENTS]
    faults += [f"'{a}' is not a name of docs/names.md" for a in keywords if a not in allowed | FORBIDDEN_ARGUMENTS]
    return faults


def long_functions(source: str) -> list[str]:
    """Functions of more than 60 lines, docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > MAX_FUNCTION:
                found.append(f"{node.name}: {lines} lines")
    return found


def unsafe_calls(source: str) -> list[str]:
    """Calls that a recommender of strangers' data must not make: pickle, eval, global seeds, network at import."""
    faults = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults += [
                f"imports {n}" for n in names if n.split(".")[0] in {"pickle", "dill", "joblib", "marshal", "shelve"}
            ]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in {"eval", "exec", "torch.save", "torch.load", "np.random.seed", "random.seed"}:
                faults.append(f"calls {name}")
            if name == "np.load" and any(
                k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords
            ):
                faults.append("np.load with pickle")
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            faults += [
                f"imports {n} at the top" for n in names if n.split(".")[0] in {"urllib", "socket", "http", "requests"}
            ]
    return faults


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize(
    "path", [p for p in MODELS if p.name != "__init__.py" and p.name != "retriever.py"], ids=relative
)
def test_model_file(path: Path) -> None:
    assert model_faults(path.read_text(encoding="utf-8"), names_page()) == []
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    test = ROOT / "tests" / path.parent.name / f"test_{path.name}"
    assert test.is_file(), f"{relative(path)} has no test {test.relative_to(ROOT)}"


GOOD_MODEL = '''"""X.

Paper: A. B. 2020.
Idea: one line.
Eq. (1)  y = x   forward
Differs: nothing
"""
__all__ = ["X"]
@keeps_config
class X:
    def __init__(self, spec, *, dropout=0.1): ...
'''


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Paper:", "Papier:", "lacks 'Paper:'"),
        ("Idea:", "Ideal", "lacks 'Idea:'"),
        ("Eq. (1)", "", "no equation"),
        ("Differs:", "Same", "lacks 'Differs:'"),
        ('["X"]', '["X", "Y"]', "exactly the model"),
        ("dropout=0.1", "lr=0.1", "takes 'lr'"),
        ("dropout=0.1", "drop_rate=0.1", "not a name of docs/names.md"),
        ("dropout=0.1", "dropout=0.1, **kwargs", "kwargs"),
        ("spec, *,", "schema, *,", "'spec' first"),
        ("dropout=0.1", ", ".join(f"dropout{i}=0" for i in range(11)), "at most 10"),
        ("class X:", "class X: ...\nclass Helper:", "last class"),
        ("@keeps_config\n", "", "lacks @keeps_config"),
    ],
)
def test_the_model_rules_catch_a_planted_fault(old: str, new: str, fault: str) -> None:
    assert model_faults(GOOD_MODEL, {"dropout"}) == []
    assert any(fault in found for found in model_faults(GOOD_MODEL.replace(old, new), {"dropout"}))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert long_functions(source) == []
    assert unsafe_calls(source) == []
    assert ast.get_docstring(ast.parse(source)) or path.name == "__init__.py", f"{relative(path)} has no docstring"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "eval('1')",
        "torch.load(x)",
        "np.random.seed(0)",
        "np.load(f, allow_pickle=True)",
        "import urllib.request",
    ],
)
def test_the_safety_rules_catch_a_planted_fault(source: str) -> None:
    assert unsafe_calls(source)


def test_the_length_rule_catches_a_planted_fault() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 61)
    assert not long_functions("def f():\n" + "    x = 1\n" * 60)


def test_models_of_a_stage_do_not_import_one_another() -> None:
    for path in MODELS:
        if path.name == "__init__.py":
            continue
        siblings = {p.stem for p in path.parent.glob("*.py")} - {"__init__", "index"}
        imports = re.findall(rf"funnelrec\.{path.parent.name}\.(\w+)", path.read_text(encoding="utf-8"))
        assert not siblings & set(imports), f"{relative(path)} imports {sorted(siblings & set(imports))}"


def test_no_path_of_a_machine_and_no_pickle_file_is_kept() -> None:
    kept = [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", ".git"} & set(p.parts)]
    assert not [p for p in kept if p.suffix in {".pkl", ".pickle", ".pt", ".pth", ".joblib"}]
