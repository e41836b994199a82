"""What the launcher relies on inside torch's elastic agent. What fails here must be mended in torch_elastic.py."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from torch.distributed.elastic.agent.server import api, local_elastic_agent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest, PContext, SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler, get_subprocess_handler
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser

from moetion_lightning.distributed import torch_elastic
from moetion_lightning.distributed.rendezvous import BACKEND
from moetion_lightning.distributed.torch_elastic import SingleRankAgent
from moetion_lightning.entry_points import torchrun_rendezvous

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_methods_that_are_replaced_are_still_called() -> None:
    loop = inspect.getsource(api.SimpleElasticAgent._invoke_run)
    assert "self._monitor_workers(self._worker_group)" in loop
    assert "self._exit_barrier()" in loop
    assert "self._shutdown(" in inspect.getsource(api.SimpleElasticAgent.run)
    for name in ("_monitor_workers", "_exit_barrier", "_shutdown", "_start_workers"):
        assert name in vars(SingleRankAgent) or name == "_start_workers"
        assert callable(getattr(LocalElasticAgent, name))


def test_processes_are_found_by_local_rank(tmp_path: Path) -> None:
    envs = {0: {"A": "1"}, 1: {"A": "2"}}
    context = SubprocessContext(
        name="ranks",
        entrypoint="/bin/true",
        args={0: (), 1: ("x",)},
        envs=envs,
        logs_specs=DefaultLogsSpecs(str(tmp_path)),
    )
    assert context.subprocess_handlers == {}
    assert context.envs is envs, "variables that a LogsSpecs adds reach the ranks"
    assert context.args[1] == ("x",)
    assert context.entrypoint == "/bin/true"
    assert context.error_files[1].endswith("attempt_0/1/error.json")
    assert envs[1]["TORCHELASTIC_ERROR_FILE"] == context.error_files[1]
    assert [tail._log_line_prefixes for tail in torch_elastic._tails(context)] == [None, None]
    assert "get_subprocess_handler" in inspect.getsource(SubprocessContext._start)
    assert "self.subprocess_handlers.values()" in inspect.getsource(SubprocessContext._close)
    assert {"stdouts", "stderrs", "tee_stdouts", "tee_stderrs", "error_files"} <= {
        field.name for field in dataclasses.fields(LogsDest)
    }
    assert issubclass(SubprocessContext, PContext)


def test_handlers_of_processes() -> None:
    parameters = set(inspect.signature(get_subprocess_handler).parameters)
    assert parameters - {"numa_options"} == {"entrypoint", "args", "env", "stdout", "stderr", "local_rank_id"}
    assert list(inspect.signature(SubprocessHandler._popen).parameters) == ["self", "args", "env"]
    assert "self._popen(" in inspect.getsource(SubprocessHandler.__init__)


def test_ranks_follow_from_the_number_of_the_node() -> None:
    assert 'os.environ.get("TORCH_ELASTIC_WORKER_IDENTICAL", "0") == "1"' in inspect.getsource(
        api.SimpleElasticAgent._assign_worker_ranks
    )


def test_signals_are_taken_when_ranks_are_started() -> None:
    signals = "TORCHELASTIC_SIGNALS_TO_HANDLE" if hasattr(LaunchConfig, "signals_to_handle") else "signal.SIGTERM"
    assert signals in inspect.getsource(PContext.start)
    assert "_pcontext" in inspect.getsource(local_elastic_agent.LocalElasticAgent._start_workers)


def test_defaults_that_no_variable_gave_are_numbers() -> None:
    parser = get_args_parser()
    assert parser.get_default("max_restarts") == 0
    options = parser.parse_args(["--nproc-per-node", "3", "--rdzv-backend", BACKEND, "script.py", "-x"])
    del options.node_rank, options.master_addr
    config, _, _ = config_from_args(options)
    assert (config.nproc_per_node, config.max_restarts, config.run_id) == (3, 0, "none")


def test_torchrun_finds_the_rendezvous() -> None:
    value = f"moetion_lightning.entry_points:{torchrun_rendezvous.__name__}"
    assert f'[project.entry-points."torchrun.handlers"]\n{BACKEND} = "{value}"' in PYPROJECT.read_text()
    create = metadata.EntryPoint(BACKEND, value, "torchrun.handlers").load()()
    assert create(RendezvousParameters(BACKEND, "", "job", min_nodes=1, max_nodes=1)).get_backend() == BACKEND
    assert "get_handler()" in inspect.getsource(registry._register_out_of_tree_handlers)


def test_what_torch_asks_while_it_is_imported_imports_nothing() -> None:
    code = (
        "import sys; from moetion_lightning.entry_points import torchrun_rendezvous as ask; ask();"
        "print(sorted(name for name in sys.modules if name.startswith(('torch', 'moetion_lightning.distributed'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PYPROJECT.parent, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
