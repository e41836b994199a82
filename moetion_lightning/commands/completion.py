"""``moetion completion SHELL``: a small script by which a shell completes commands, their options, and recipes."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from moetion_lightning.recipes import PREFIX, list_recipes

__all__ = ["completion"]

#: LightningCLI has thousands of options; these are what one types.
_TRAINING_OPTIONS = (
    *("--config", "--print_config", "--help", "--ckpt_path", "--model", "--data", "--seed_everything"),
    *("--trainer.max_steps", "--trainer.max_epochs", "--trainer.devices", "--trainer.accelerator"),
    *("--trainer.callbacks", "--trainer.precision", "--trainer.strategy", "--trainer.logger"),
)
_BASH = """\
_moetion() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = ":" ] || [ "$word" = ":" ]; then words="{recipes}"; word="${{word#:}}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _moetion moetion
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(args: Sequence[str], commands: Mapping[str, Callable[[Sequence[str]], int] | None]) -> int:
    """Print the script.

    Args:
        args: Arguments after ``moetion completion``.
        commands: All commands, and what runs them; None for those of LightningCLI.
    """
    parser = argparse.ArgumentParser(
        prog="moetion completion",
        description="Print a script that completes commands, options and recipes. For bash, into ~/.bashrc: "
        'eval "$(moetion completion bash)"; for zsh the same into ~/.zshrc; for fish: moetion completion fish > '
        "~/.config/fish/completions/moetion.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(args).shell
    words = {name: _TRAINING_OPTIONS if run is None else _options(run) for name, run in commands.items()}
    recipes = [recipe.name for recipe in list_recipes()]
    if shell == "fish":
        print(_fish(words, recipes), end="")
        return 0
    more = {"recipes": recipes, "explain": [PREFIX], "completion": ["bash", "zsh", "fish"]}
    cases = [f'      {name}) words="{" ".join([*options, *more.get(name, ())])}" ;;' for name, options in words.items()]
    script = _BASH.format(commands=" ".join(words), recipes=" ".join(recipes), cases="\n".join(cases))
    print((_ZSH if shell == "zsh" else "") + script, end="")
    return 0


def _options(run: Callable[[Sequence[str]], int]) -> list[str]:
    """The long options that a command's help names."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]+", shown.getvalue())))


def _fish(words: Mapping[str, Sequence[str]], recipes: Sequence[str]) -> str:
    lines = [f"complete -c moetion -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
    for name, options in words.items():
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        named = " ".join(f"-l {option.removeprefix('--')}" for option in options)
        lines.append(f"complete -c moetion {seen} {named}")
    named = " ".join(f"{PREFIX}{name}" for name in recipes)
    lines.append(f"complete -c moetion -n '__fish_seen_subcommand_from fit explain' -a '{named}'")
    lines.append(f"complete -c moetion -n '__fish_seen_subcommand_from recipes' -f -a '{' '.join(recipes)}'")
    return "\n".join(lines) + "\n"
