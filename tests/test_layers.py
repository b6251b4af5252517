"""Imports run one way (docs/architecture.md), and each module has a test of its name or is named here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "algo": {"algo"},
    "models": {"models"},
    "hw": {"hw"},
    "compiler": {"compiler", "algo", "hw"},
    "sim": {"sim", "hw", "compiler", "algo"},
    "nmforge": {"nmforge", "sim", "hw", "compiler", "algo", "models"},
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in names:
                top = name.split(".")[0]
                assert top not in ALLOWED or top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_is_pickled():
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "import pickle" not in text and "torch.save(" not in text, path
            # other people's checkpoints may be read, but nothing of them but tensors
            assert text.count("torch.load(") == text.count("weights_only=True"), path
