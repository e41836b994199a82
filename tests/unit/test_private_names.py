"""Private names of other libraries that this package reads: which version has lost one, and who uses it here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import moetion_lightning

PACKAGE = Path(moetion_lightning.__file__).resolve().parent
RESULT = "lightning.pytorch.trainer.connectors.logger_connector.result"
CONNECTOR = "lightning.pytorch.trainer.connectors.logger_connector.logger_connector"
CHECKPOINTS = "lightning.pytorch.trainer.connectors.checkpoint_connector"
EPOCH = "lightning.pytorch.loops.training_epoch_loop"
DDP = "torch.nn.parallel.distributed"
FSDP = "torch.distributed.fsdp._fully_shard"
AGENT = "torch.distributed.elastic.agent.server"

#: Module of another library, and the words that must stand in its source.
WORDS = {
    "torch.nn.modules.batchnorm": "_BatchNorm",
    "torch.nn.modules.conv": "_ConvNd",
    "torch.nn.modules.module": "_buffers _parameters _modules _compiled_call_impl _forward_hooks "
    "_forward_hooks_with_kwargs _non_persistent_buffers_set _state_dict_hooks _state_dict_pre_hooks",
    "torch.nn.utils.clip_grad": "_get_total_norm",
    DDP: "_build_params_for_reducer _get_ddp_logging_data _set_ddp_runtime_logging_sample_rate "
    "_set_params_and_buffers_to_ignore_for_model",
    "torch.optim.optimizer": "_optimizer_step_pre_hooks _optimizer_step_post_hooks",
    "torch.amp.grad_scaler": "_per_optimizer_states",
    "torch._tensor": "_post_accumulate_grad_hooks",
    "torch._ops": "_schema",
    "torch.utils._python_dispatch": "TorchDispatchMode",
    "torch.utils._pytree": "TreeSpec tree_flatten tree_unflatten treespec_dumps treespec_loads",
    "torch.utils.data.dataloader": "_BaseDataLoaderIter _dataset_fetcher _index_sampler _next_index _num_yielded",
    "torch.distributed.device_mesh": "_dim_group_names",
    f"{FSDP}._fsdp_state": "_comm_ctx _is_root",
    f"{FSDP}._fsdp_param_group": "_all_gather_result",
    f"{FSDP}._fsdp_param": "_unsharded_param",
    f"{FSDP}._fully_shard": "_get_fsdp_state",
    "torch.distributed.distributed_c10d": "_get_default_group _get_default_store _set_pg_timeout _update_default_pg "
    "_world _unregister_all_process_groups",
    "torch.distributed.tensor._utils": "compute_local_shape_and_global_offset",
    "torch.testing._internal.distributed.fake_pg": "FakeStore",
    "torch.distributed.elastic.multiprocessing.tail_log": "_log_line_prefixes",
    f"{AGENT}.api": "_rendezvous _worker_group _restart_workers",
    f"{AGENT}.local_elastic_agent": "_pcontext _shutdown",
    "lightning.fabric.loggers.csv_logs": "_ExperimentWriter _get_next_version _rewrite_with_new_header",
    "lightning.fabric.loggers.tensorboard": "_kwargs",
    "lightning.fabric.strategies.registry": "_StrategyRegistry",
    "lightning.fabric.utilities.distributed": "_sampler",
    "lightning.fabric.utilities.optimizer": "_optimizers_to_device",
    "lightning.fabric.wrappers": "_dataloader _num_iter_calls",
    "lightning.pytorch.callbacks.lr_finder": "_early_exit",
    "lightning.pytorch.core.module": "_on_before_batch_transfer",
    "lightning.pytorch.loops.evaluation_loop": "_combined_loader _data_source _last_val_dl_reload_epoch",
    "lightning.pytorch.loops.fetchers": "_DataFetcher _DataLoaderIterDataFetcher _PrefetchDataFetcher",
    "lightning.pytorch.loops.fit_loop": "_data_fetcher _last_train_dl_reload_epoch _load_combined_loader_states",
    "lightning.pytorch.loops.loop": "_Loop _restarting _loaded_from_state_dict",
    "lightning.pytorch.loops.progress": "_BaseProgress",
    EPOCH: "_batches_that_stepped _num_ready_batches_reached _should_check_val_epoch _should_check_val_fx _results",
    "lightning.pytorch.strategies.ddp": "_layer_sync _register_ddp_hooks _setup_model _ddp_kwargs",
    "lightning.pytorch.trainer.call": "_call_callback_hooks _call_callbacks_load_state_dict _call_setup_hook "
    "_call_callbacks_on_load_checkpoint _call_lightning_module_hook",
    "lightning.pytorch.trainer.trainer": "_checkpoint_connector _logger_connector _signal_connector",
    CHECKPOINTS: "_get_loops_state_dict _loaded_checkpoint _ckpt_path",
    CONNECTOR: "_progress_bar_metrics _logged_metrics _callback_metrics _current_fx _first_loop_iter",
    RESULT: "_Metadata _ResultMetric _Sync _group _should _forward_cache",
    "lightning.pytorch.utilities.combined_loader": "_consumed _iterator _idx",
    "torchmetrics.metric": "_defaults _plot _computed _update_count",
    "torchmetrics.utilities.plot": "_AX_TYPE _PLOT_OUT_TYPE",
    "accelerate.accelerator": "_custom_objects _dataloaders _models _optimizers _schedulers",
    "accelerate.state": "_set_sync_gradients",
    "transformers.trainer": "_get_dataloader _get_output_dir _save_checkpoint _inner_training_loop",
    "torchdata.stateful_dataloader.stateful_dataloader": "_initial_iter_for_state_dict",
    "tqdm.std": "_instances",
}
#: Names that are written in C++, where they are looked up.
ATTRIBUTES = {
    "torch": "_C _foreach_copy_",
    "torch._C": "_current_graph_task_id _rebuild_buckets _get_backend _get_sequence_number_for_group _device_types",
}
#: Of the standard library, of NumPy's public protocol, of one release only (asked for with a default), or our own.
OTHERS = """
    _exit _getframe _fields _rand _bit_generator _experiment _metadata _optimizer _moetion _moetion_position
    _hparams_name _group_start _group_end _calls_early_callbacks _connection _torchdynamo_orig_callable _to_copy
    _coalesced_ _fsdp_param_groups _pg_registry _stage_meta _slurm_sigusr_handler_fn _val_check_time_interval
    _init_training_state _maybe_log_save_evaluate _globalstep_last_logged
    _eval_dataloaders PrefixStore _get_root_mesh _tail_logs _stdout_tail _stderr_tail
""".split()  # noqa: SIM905


_BY_NAME = ("getattr", "setattr", "hasattr")


def _words(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(module, name) for module, names in table.items() for name in names.split()]


def _used() -> dict[str, set[str]]:
    """Private names that are defined nowhere in this package, and the files that read them."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    own: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for name in {name for node in ast.walk(tree) for name in _private(node)} - own:
            found.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    return found


def _private(node: ast.AST) -> list[str]:
    names: list[str] = []
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("moetion_lightning"):
        inside = any(part.startswith("_") for part in node.module.split("."))
        return [alias.name for alias in node.names if inside or alias.name.startswith("_")]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
        names = [str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
    return [name for name in names if name.startswith("_") and not name.startswith("__")]


USED = _used()


def test_every_private_name_is_in_the_table() -> None:
    known = {name for _, name in (*_words(WORDS), *_words(ATTRIBUTES))} | set(OTHERS) | {"annotations"}
    unknown = {name: sorted(files) for name, files in USED.items() if name not in known}
    assert not unknown, f"say in this table which module of which library has {unknown}"


@pytest.mark.parametrize(("module", "name"), _words(WORDS))
def test_library_has_the_name(module: str, name: str) -> None:
    library = module.partition(".")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin, f"{_version(library)} has no module {module}"  # noqa: PT018
    text = Path(spec.origin).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", text), f"{_version(library)} has no {name} in {module}: see {USED.get(name, ())}"


@pytest.mark.parametrize("name", ATTRIBUTES["torch"].split())
def test_torch_has_the_name(name: str) -> None:
    assert hasattr(torch, name), f"{_version('torch')} has no torch.{name}: see {USED.get(name, ())}"


@pytest.mark.parametrize("name", ATTRIBUTES["torch._C"].split())
def test_torch_has_the_name_in_cpp(name: str) -> None:
    from torch.distributed import ProcessGroup, Reducer

    places = (torch._C, ProcessGroup, Reducer)
    assert any(hasattr(place, name) for place in places), f"{_version('torch')} has no {name}: see {USED.get(name, ())}"


def _version(library: str) -> str:
    return f"{library} {importlib.metadata.version(library)}"
