"""Settings that change only speed: options of a run, variables of its process, and a command that
starts it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from fastmoco.config import Config

Value = str | int | float | bool
FLAGS = ("batch.cuda_graphs",)
"""Options without a value."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a run beside its config; none of them: the defaults."""

    options: tuple[tuple[str, Value], ...] = ()
    """Dotted names of fields of the config, and values."""
    variables: tuple[tuple[str, str], ...] = ()
    """Variables of the environment."""
    prefix: tuple[str, ...] = ()
    """Words of a command before that of the run, e.g. `taskset -c 0,1`."""

    def __or__(self, other: Settings) -> Settings:
        """Both; where they set the same thing, the other's."""
        return Settings(
            tuple({**dict(self.options), **dict(other.options)}.items()),
            tuple({**dict(self.variables), **dict(other.variables)}.items()),
            other.prefix or self.prefix,
        )

    def applied(self, config: Config) -> Config:
        """A config with these options.

        Raises:
            ValueError: if an option does not fit the config.
        """
        for name, value in self.options:
            config = _with(config, name, value)
        return config

    def words(self) -> list[tuple[str, ...]]:
        """The options as they are typed, the words of each together."""
        return [_words(name, value) for name, value in self.options]

    def __str__(self) -> str:
        parts = [" ".join(words) for words in self.words()]
        parts += [f"{name}={shlex.quote(value)}" for name, value in self.variables]
        parts += [shlex.join(self.prefix)] if self.prefix else []
        return " ".join(parts) or "defaults"


def _words(name: str, value: Value) -> tuple[str, ...]:
    """An option as it is typed."""
    flag = name.replace("_", "-")
    if name not in FLAGS:
        return (f"--{flag}", str(value))
    group, _, last = flag.rpartition(".")
    return (f"--{flag}" if value else f"--{group}.no-{last}",)


def _with(config: Config, name: str, value: Value) -> Config:
    """A config with another value of a field, at most one group deep."""
    group, _, field = name.rpartition(".")
    changes: dict[str, object] = {field: value}
    if not group:
        return replace(config, **changes)  # type: ignore[arg-type]
    part = replace(getattr(config, group), **changes)
    return replace(config, **{group: part})
