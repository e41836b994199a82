"""The `moetion` command."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moetion_lightning import __version__
from moetion_lightning.cli import _OWN, HELP, TRAINING, main
from moetion_lightning.commands.arguments import expand_recipes
from moetion_lightning.core.schedule import window_bytes
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import list_recipes, recipe_path
from tests.runs import program
from tests.runs.drill import Zygote

CONFIG = """\
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  logger: false
model:
  class_path: moetion_lightning.recipes.models.ByteMoE
  init_args: {d_model: 32, num_layers: 1, num_experts: 4, d_expert: 32, max_seq_len: 32}
data:
  class_path: moetion_lightning.recipes.data.StdlibText
  init_args: {seq_len: 32, batch_size: 2, max_bytes: 20000}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_fits_one_screen(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert capsys.readouterr().out == HELP
    lines = HELP.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110


def test_modules_of_the_users_own_folder_are_found(tmp_path: Path, zygote: Zygote) -> None:
    """Also by the installed command, whose own folder Python looks into first."""
    (tmp_path / "mine.py").write_text(
        "from moetion_lightning.recipes.models import ByteMoE\n\n\n"
        "class Mine(ByteMoE):\n"
        "    def __init__(self, extra: int = 1, **kwargs: float) -> None:\n"
        "        super().__init__()\n"
    )
    code = (
        "import sys; sys.path = [p for p in sys.path if p]; from moetion_lightning.cli import _OWN, TRAINING, main;"
        "sys.stdout = open('printed', 'w');"
        "sys.exit(main(['fit', '--config', 'recipe:tiny_moe_cpu', '--model', 'mine.Mine', '--model.extra', '3',"
        " '--print_config']))"
    )
    log = tmp_path / "log"
    assert zygote.run(program.spec(tmp_path, "-c", code), log) == 0, log.read_text()
    found = yaml.safe_load((tmp_path / "printed").read_text())["model"]
    assert (found["class_path"], found["init_args"]["extra"]) == ("mine.Mine", 3)


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """Of each shell."""
    made = {}
    for shell in ("bash", "zsh", "fish"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["completion", shell]) == 0
        made[shell] = out.getvalue()
    return made


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["exp"], ["explain", "export"]),
        (["fit", "--trainer.max_s"], ["--trainer.max_steps"]),
        (["fit", "--config", "recipe", ":", "tiny"], ["tiny_moe_cpu"]),
        (["launch", "--standb"], ["--standby"]),
        (["recipes", "mixtral"], ["mixtral_tiny"]),
        (["jobs", "--js"], ["--json"]),
    ],
)
def test_shell_completes(words: list[str], expected: list[str], scripts: dict[str, str]) -> None:
    line = f"COMP_WORDS=(moetion {' '.join(words)}); COMP_CWORD={len(words)}; _moetion; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", scripts["bash"] + line], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_completions_are_small_and_know_all_commands(scripts: dict[str, str]) -> None:
    for script in scripts.values():
        assert len(script) < 20_000
        assert set(re.findall(r"[a-z]+", script)) >= {*_OWN, *TRAINING, "completion"}


def test_help_names_every_command() -> None:
    looking = ("recipes", "explain", "inspect", "jobs", "clean", "demo", "drill", "diff")
    for command in ("fit", "validate", "test", "predict", *looking):
        assert f"  {command}  " in HELP
    for kind in ("ranks", "pipeline"):
        assert f"`demo {kind}`" in HELP


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moetion-lightning {__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explane"]) == 2
    assert "Did you mean `moetion explain`?" in capsys.readouterr().err


def test_recipes_are_listed_with_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for recipe in list_recipes():
        assert any(line.startswith(recipe.name) and line.endswith(recipe.title) for line in out.splitlines())


def test_a_recipe_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "tiny_moe_cpu"]) == 0
    assert capsys.readouterr().out == recipe_path("tiny_moe_cpu").read_text()


def test_a_recipe_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    assert main(["recipes", "tiny_moe_cpu", "--copy", str(folder)]) == 0
    assert (folder / "tiny_moe_cpu.yaml").read_text() == recipe_path("tiny_moe_cpu").read_text()
    assert main(["recipes", "tiny_moe_cpu", "--copy", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["recipes", "tiny_moe_cpu", "--copy", str(place)]) == 2
        assert f"--copy {place}: cannot write tiny_moe_cpu.yaml there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["fit", "--config", "recipe:tiny_moe"], ["recipes", "tiny_moe"], ["explain", "recipe:tiny_moe"]]
)
def test_unknown_recipe_is_told_without_traceback(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert "Did you mean recipe:tiny_moe_cpu?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["fit", "--config", "recipe:tiny_moe_cpu"], ["fit", "--config", "{path}"]),
        (["fit", "--config=recipe:tiny_moe_cpu"], ["fit", "--config={path}"]),
        (["fit", "-c", "recipe:tiny_moe_cpu", "--x", "recipe:y"], ["fit", "-c", "{path}", "--x", "recipe:y"]),
        (["fit", "--config", "mine.yaml"], ["fit", "--config", "mine.yaml"]),
    ],
)
def test_recipe_prefix_is_replaced_only_after_config(given: list[str], expected: list[str]) -> None:
    path = str(recipe_path("tiny_moe_cpu"))
    assert expand_recipes(given) == [arg.format(path=path) for arg in expected]


def test_unknown_recipe_in_arguments_is_an_error() -> None:
    with pytest.raises(ConfigurationError):
        expand_recipes(["fit", "--config", "recipe:nothing"])


def test_fit_runs_a_configuration_and_writes_nothing_beside_it(config: Path) -> None:
    assert main(["fit", "--config", str(config)]) == 0
    assert sorted(p.name for p in config.parent.iterdir()) == ["config.yaml"]
    assert config.read_text() == CONFIG


def test_print_config_shows_overrides_and_is_itself_a_configuration(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            [
                "fit",
                "--config",
                str(config),
                "--trainer.max_steps",
                "7",
                "--model.init_args.num_experts=6",
                "--print_config",
            ]
        )
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 7
    assert printed["model"]["init_args"]["num_experts"] == 6
    assert printed["model"]["init_args"]["d_model"] == 32


def test_users_own_module_is_taken_by_class_path(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config.parent / "my_project_models.py").write_text(
        "from moetion_lightning.recipes.models import ByteMoE\n"
        "class Mine(ByteMoE):\n"
        "    def on_train_end(self):\n"
        "        open('trained', 'w').write(str(self.trainer.global_step))\n"
    )
    monkeypatch.syspath_prepend(config.parent)
    text = CONFIG.replace("moetion_lightning.recipes.models.ByteMoE", "my_project_models.Mine")
    config.write_text(text)
    assert main(["fit", "--config", str(config), "--trainer.max_steps", "1"]) == 0
    assert (config.parent / "trained").read_text() == "1"


def test_wrong_argument_ends_with_status_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), "--model.init_args.num_expert", "4"])
    assert done.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "num_expert" in line
    assert line.endswith("See `moetion fit --help`.")


def test_error_of_a_run_is_told_in_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = "--trainer.callbacks=moetion_lightning.callbacks.SparseExpertCheckpoint"
    assert main(["fit", "--config", str(config), callback, "--trainer.callbacks.memory_dir", "/proc/none"]) == 2
    assert "moetion fit: error: /proc/none: cannot create the directory" in capsys.readouterr().err.splitlines()[-1]
    assert main(["fit", "--config", str(config), "--trainer.devices", "0"]) == 2
    assert "is not a valid input" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("program", [["nosuch.py"], ["-m", "nosuch"], ["-m", "nosuch.module"]])
def test_program_that_is_not_there_is_told_in_one_line(program: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *program]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moetion run: error: ")


def test_ports_that_do_not_exist_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch takes them modulo 65536."""
    assert main(["rendezvous", "--port", "99999"]) == 2
    assert "ports are 0 to 65535" in capsys.readouterr().err


def test_explain_observes_tokens_and_bytes_of_a_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(config), "--window", "3", "--trainer.precision", "bf16-mixed"]) == 0
    out = capsys.readouterr().out
    experts = [line.split() for line in out.splitlines() if "/expert/" in line]
    assert len(experts) == 4
    assert sum(int(words[-1].replace(",", "")) for words in experts) == 2 * 32 * 2  # top-2 of every token
    assert "window of 3" in out
    assert "note:" not in out


@pytest.mark.parametrize(
    ("settings", "args", "window"),
    [("window: 2", [], 2), ("window: 2", ["--window", "3"], 3), ("window: auto, max_window: 1", [], 1)],
)
def test_explain_shows_the_window_of_the_callback_unless_another_one_is_asked_for(
    config: Path, settings: str, args: list[str], window: int, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = f"{{class_path: moetion_lightning.callbacks.SparseExpertCheckpoint, init_args: {{{settings}}}}}"
    config.write_text(CONFIG.replace("trainer:\n", f"trainer:\n  callbacks: [{callback}]\n"))
    assert main(["explain", str(config), *args]) == 0
    assert f"window of {window}: " in capsys.readouterr().out


def test_explain_says_what_auto_takes_and_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(config), "--mtbf", "3600"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"auto: captures cost \d+\.\d+% of an iteration of \d+\.\d m?s, .* a failure every 1\.0 h", out)


def test_auto_of_an_importable_class_needs_the_time_of_an_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    target = ["explain", "torch.nn:Linear", "--init", '{"in_features": 64, "out_features": 64}', "--window", "auto"]
    assert main([*target, "--iteration-seconds", "0.02"]) == 0
    assert "of an iteration of 20.0 ms" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(target)
    assert "--window auto needs --iteration-seconds" in capsys.readouterr().err


def test_explain_shows_how_much_host_memory_windows_take(capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred million elements with two moments: 1.2 GB in full, 0.4 GB as compute weights."""
    sizes = '{"in_features": 100000, "out_features": 1000}'
    assert main(["explain", "torch.nn:Linear", "--init", sizes, "--meta", "--window", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(
        i
        for i, line in enumerate(lines)
        if line.split() == ["window", "no", "replicas", "1", "replica", "2", "replicas"]
    )
    table = [line.split() for line in lines[begin + 1 :][:6]]
    full, compute = 12 * 100_001_000, 4 * 100_001_000
    window_sizes = {w: window_bytes(full, compute, w) / 2**30 for w in (1, 2, 3, 4, 8, 16)}
    assert window_sizes[1] == full / 2**30
    for words in table:
        window = int(words[0])
        for replicas, word in enumerate(words[1:]):
            assert float(word) == pytest.approx((2 + 3 * replicas) * window_sizes[window], rel=0.005)
    assert [words[0] for words in table] == ["1", "2", "3", "4", "8", "16"]


def test_explain_takes_an_importable_class(capsys: pytest.CaptureFixture[str]) -> None:
    target = "moetion_lightning.recipes.models:ByteMoE"
    assert main(["explain", target, "--init", '{"num_layers": 1}', "--meta", "--all"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0.moe/gate" in out
    assert "8 experts" in out
    assert "no optimizer given" in out
    assert main(["explain", target, "--init", '{"num_layers": 1}', "--meta", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"] == [{"name": "blocks.0.moe", "num_experts": 8}]
    assert sum(told["slot_bytes"]) >= told["dense_bytes"] == sum(row["full_bytes"] for row in told["rows"])


def test_explain_takes_a_dense_module_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "torch.nn:Linear", "--init", '{"in_features": 8, "out_features": 64}']) == 0
    assert "no MoE layer found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "expected recipe:NAME"),
        (["no_such_package:Model"], "cannot import"),
        (["torch.nn:Nothing"], "cannot import"),
        (["torch.nn:Linear"], "give --init"),
        (["torch.nn:Linear", "--init", "{"], "no JSON"),
        (["torch.nn:Linear", "--init", "[1]"], "JSON object"),
        (["math:pi"], "expected a module or a factory"),
        (["builtins:dict"], "expected a torch.nn.Module"),
        (["no_such.yaml"], "no such file"),
    ],
)
def test_explain_says_what_it_expected(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"model: [a", b"\xff\xfe"])
def test_explain_of_a_broken_file_is_told(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert main(["explain", str(path)]) == 2
    assert f"{path} cannot be read as YAML" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--init", "{bad"], ["--meta"], ["--iteration-seconds", "1"]])
def test_explain_refuses_what_a_recipe_does_not_take(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", "recipe:tiny_moe_cpu", *option])
    assert ended.value.code == 2
    assert "are for an importable class or factory" in capsys.readouterr().err


PIPELINE = """\
  strategy:
    class_path: moetion_lightning.strategies.MoEtionStrategy
    init_args: {pipeline_parallel_size: 2, %s}
"""


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ("num_microbatches: 2", ["blocks.0 .. blocks.1, embed, position", "blocks.2 .. blocks.3, norm, head"]),
        ("balance: [0, 1]", ["blocks.0, embed, position", "blocks.1 .. blocks.3, norm, head"]),
        ("balance: time", ["blocks.0 .. blocks.1, embed, position", "blocks.2 .. blocks.3, norm, head"]),
        (
            "schedule: zbv_zero_bubble, chunks_per_rank: 2",
            ["blocks.0, embed, position", "blocks.1", "blocks.2", "blocks.3, norm, head"],
        ),
    ],
)
def test_explain_shows_the_stages_of_a_pipeline(
    settings: str, layers: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.replace("num_layers: 1", "num_layers: 4").replace("model:\n", PIPELINE % settings + "model:\n")
    config.write_text(text)
    assert main(["explain", str(config)]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if re.match(r" +\d +\d  blocks", line)]
    assert [" ".join(row[2:-4]) for row in table] == layers
    assert [row[1] for row in table] == (["0", "1"] if len(layers) == 2 else ["0", "1", "1", "0"])
    total = re.search(r"(\d+) operators, .* ([\d,]+) trainable elements", out)
    assert total is not None
    assert sum(int(row[-4]) for row in table) == int(total[1])
    assert sum(int(row[-3].replace(",", "")) for row in table) == int(total[2].replace(",", ""))
    assert ("balance is 'time'" in out) == ("time" in settings)


def test_explain_of_an_impossible_pipeline_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = CONFIG.replace("num_layers: 1", "num_layers: 4").replace(
        "model:\n", PIPELINE % "balance: [0, 4]" + "model:\n"
    )
    config.write_text(text)
    assert main(["explain", str(config)]) == 2
    assert "expected the first layer of each of 2 stages" in capsys.readouterr().err


def test_strategy_of_ours_takes_its_arguments_from_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(CONFIG.replace("model:\n", PIPELINE % "num_microbatches: 4" + "model:\n"))
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(config), "--trainer.strategy.init_args.schedule", "gpipe", "--print_config"])
    assert done.value.code == 0
    given = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert (given["pipeline_parallel_size"], given["num_microbatches"], given["schedule"]) == (2, 4, "gpipe")
    assert (given["expert_parallel_size"], given["balance"]) == (1, "parameters")


def test_jobs_of_an_empty_machine(memory_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--memory-dir", str(memory_dir)]) == 0
    assert "no jobs" in capsys.readouterr().out
    assert main(["jobs", "--memory-dir", str(memory_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["jobs", "--memory-dir", str(memory_dir / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_clean_refuses_a_wrong_duration(memory_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clean", "--memory-dir", str(memory_dir), "--older-than", "soon"]) == 2
    assert "for example 12h" in capsys.readouterr().err


def test_inspect_of_a_missing_path_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "moetion_lightning", "--version"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"moetion-lightning {__version__}\n")
