"""`peregrine completion SHELL`: a script with which a shell completes commands, flags, and values that are few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# bash: source <(peregrine completion bash)
_peregrine() {
  local word=${COMP_WORDS[COMP_CWORD]} words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "@commands" -- "$word"))
    return
  fi
  case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in
@values
  esac
  if [ -z "$words" ]; then
    case "$word" in
      -*) case "${COMP_WORDS[1]}" in
@flags
      esac ;;
      *) COMPREPLY=($(compgen -f -- "$word"))
         return ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o filenames -F _peregrine peregrine
"""
_ZSH = "# zsh: source <(peregrine completion zsh)\nautoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True, slots=True)
class Completed:
    """One command. flags: each with the values that it takes, where they are few."""

    help: str
    flags: Mapping[str, tuple[str, ...]]


def script(shell: str, commands: Mapping[str, Completed]) -> str:
    """The script for one of SHELLS."""
    if shell == "fish":
        return _fish(commands)
    values = [
        f'    "{name} {flag}") words="{" ".join(values)}" ;;'
        for name, command in commands.items()
        for flag, values in command.flags.items()
        if values
    ]
    flags = [f'        {name}) words="{" ".join(command.flags)}" ;;' for name, command in commands.items()]
    bash = _BASH.replace("@commands", " ".join(commands))
    bash = bash.replace("@values", "\n".join(values)).replace("@flags", "\n".join(flags))
    return _ZSH + bash if shell == "zsh" else bash


def _fish(commands: Mapping[str, Completed]) -> str:
    lines = ["# fish: peregrine completion fish | source"]
    for name, command in commands.items():
        lines.append(f"complete -c peregrine -n __fish_use_subcommand -f -a {name} -d '{_quoted(command.help)}'")
        for flag, values in command.flags.items():
            taken = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"complete -c peregrine -n '__fish_seen_subcommand_from {name}' -l {flag[2:]}{taken}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
