"""``python tests/versions.py lowest|middle|newest``: an environment of these versions, and the tests that need them.

uv makes the environments beside each other, as ``.venv-NAME``. They hold torch as the package index has it: on Linux
the CUDA build, some gigabytes each, unless ``UV_INDEX`` names an index of CPU builds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Python, and what is installed beside this package and the libraries of its tests.
ENVIRONMENTS = {
    "lowest": ("3.10", ["torch==2.8.*", "lightning==2.5.0", "transformers==4.57.0", "accelerate==1.1.*"]),
    "middle": ("3.12", ["torch==2.10.*", "lightning==2.5.5", "transformers==5.5.*", "accelerate==1.10.*"]),
    "newest": ("3.13", ["torch", "lightning", "transformers", "accelerate"]),
}
#: What these lack: FSDP2 that reduces gradients of experts without tokens (torch 2.13), and models whose layers return
#: their routers' logits (transformers 5.2).
NO_FSDP2 = ("lowest", "middle")
LEFT_OUT = {"lowest": {"tests/unit/test_pipeline_cut_families.py"}}
#: Where other libraries are called: hooks, loops, schedules, private names. What is only ours is left out.
TESTS = [
    *("tests/lightning", "tests/integrations/test_transformers_families.py", "tests/integrations/test_hf_trainer.py"),
    *("tests/integrations/test_loop_adapters.py", "tests/faults/test_kill_matrix.py"),
    *("tests/distributed/test_pipeline_equality.py", "tests/distributed/test_rank_kills.py"),
    *("tests/distributed/test_launch_training.py", "tests/unit/test_private_names.py"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/unit").glob("test_pipeline_*.py")),
    *("tests/unit/test_torch_elastic.py", "tests/unit/test_state.py", "tests/unit/test_operators.py"),
    "tests/unit/test_cli.py::test_strategy_of_ours_takes_its_arguments_from_the_command_line",
    *("tests/unit/test_loader_position.py", "tests/unit/test_meshes.py", "tests/unit/test_layouts.py"),
]


def main(name: str, *arguments: str) -> int:
    """Make the environment if it is not there, and run the tests in it."""
    python, requirements = ENVIRONMENTS[name]
    folder = ROOT / f".venv-{name}"
    uv = [sys.executable, "-m", "uv"]
    if not folder.exists():
        subprocess.run([*uv, "venv", "-q", "--python", python, str(folder)], check=True)
    interpreter = str(folder / "bin" / "python")
    install = [*uv, "pip", "install", "-q", "--upgrade", "--python", interpreter, "-e", "."]
    install += ["-r", "pyproject.toml", "--extra", "test"]  # named here, so that "lowest" is the lowest of each of them
    install += ["--resolution", "lowest-direct"] if name == "lowest" else []
    subprocess.run([*install, *requirements], check=True)
    shown = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in %r), sep=', ')"
    libraries = ("torch", "lightning", "transformers", "accelerate")
    subprocess.run([interpreter, "-c", shown % (libraries,)], check=True)
    command = [interpreter, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    # Not by --ignore: pytest runs a file that is named, whatever else it is told.
    command += [test for test in TESTS if test not in LEFT_OUT.get(name, ())]
    command += ["-k", "not fsdp2"] if name in NO_FSDP2 else []
    return subprocess.run([*command, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(*sys.argv[1:]))
