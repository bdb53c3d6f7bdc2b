"""Parse the options of a command, and explain a mistake in the words that the user typed."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tyro

from fastmoco.cli.options import (
    REQUIRED,
    Described,
    Option,
    as_parsed,
    choices,
    describe,
    expected,
    fits,
)
from fastmoco.cli.options import typed as as_words
from fastmoco.cli.suggest import one_of, unknown_option
from fastmoco.errors import EXIT_REFUSED, WORDING, say
from fastmoco.errors import describe as describe_error
from fastmoco_pipelines.spec import FieldError
from fastmoco_pipelines.text import first_sentence, shown_word

T = TypeVar("T")


@dataclass
class Words:
    """A command line, sorted by options."""

    values: dict[str, list[str]] = field(default_factory=dict)
    """The words of each option that is given, by the option's dotted name."""
    places: list[str] = field(default_factory=list)
    """The words that are given by their place."""
    first_place: int | None = None
    """The number of the first of them on the command line."""
    faults: list[str] = field(default_factory=list)
    """What is wrong, in the order of the words."""


def parse(
    target: Callable[..., T],
    name: str,
    args: Sequence[str],
    *,
    default: Any = None,
    follows: Mapping[str, str] | None = None,
    origin: str = "the recipe",
) -> T:
    """What tyro makes of a command's words.

    Args:
        target: a dataclass, or a function whose arguments are the options.
        name: of the command, with its recipe.
        args: the words after it.
        default: instance of the dataclass with the defaults.
        follows: options that follow another one where that is given, as in `Wording`.
        origin: where values of a config come from that were not typed, as in `Wording`.

    Raises:
        SystemExit: with 2 for a mistake, after one line for each on standard error.
    """
    defaults = {} if default is None else {"default": default}
    if any(word.rpartition("=")[2] == "none" for word in args):
        args = as_parsed(args, describe(_inner(target), default))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result: T = tyro.cli(target, prog=f"fastmoco {name}", args=list(args), **defaults)
            return result
    except SystemExit as stop:
        described = describe(_inner(target), default)
        wording = Wording(described, args, follows or {}, origin)
        error = _field_error(stop)
        faults = [wording(error)] if error is not None else find_faults(args, described, name)
        for fault in faults:
            say(fault)
        if not faults:
            # A mistake that only the parser sees: its own text, which breaks lines anywhere.
            hides = [word for word in args if shown_word(word) != word]
            words = (
                f"fastmoco {name} --help lists the options" if hides else said.getvalue().strip()
            )
            say(words.replace("\n", "\n  "))
        raise SystemExit(EXIT_REFUSED) from stop
    except FieldError as error:
        # Of a rule across groups, which tyro passes on.
        say(Wording(describe(_inner(target), default), args, follows or {}, origin)(error))
        raise SystemExit(EXIT_REFUSED) from error
    except ValueError as error:
        say(str(error))
        raise SystemExit(EXIT_REFUSED) from error


def _inner(target: Callable[..., Any]) -> Callable[..., Any]:
    """The function that another one wraps."""
    inner: Callable[..., Any] = getattr(target, "__wrapped__", target)
    return inner


def _field_error(stop: BaseException) -> FieldError | None:
    """The error of a field that made the parser stop, with its whole path."""
    error: BaseException | None = stop
    path = ""
    while error is not None:
        # The parser's error, between these two, holds the path of the dataclass that refused.
        place = getattr(error, "arg", None)
        path = place if isinstance(place, str) else path
        if isinstance(error, FieldError):
            return error.under(path.removeprefix("config").removeprefix(".").replace("-", "_"))
        error = error.__context__
    return None


def find_faults(args: Sequence[str], described: Described, name: str) -> list[str]:
    """What is wrong with the words of a command; empty if nothing is found."""
    found = sort_words(args, described, f"fastmoco {name} --help-all")
    places = [option for option in described.options if option.positional]
    required = [option for option in places if option.default is REQUIRED]
    extra = found.places[len(places) :]
    if extra:
        found.faults.append(_too_many(extra, found, places))
    missing = required[len(found.places) :]
    missing += [
        option
        for option in described.options
        if not option.positional and option.default is REQUIRED and option.name not in found.values
    ]
    for option in missing:
        found.faults.append(f"{option.flag} is missing: {first_sentence(option.help)}")
    if missing:
        found.faults.append(f"fastmoco {name} --help lists the options")
    for option, word in zip(places, found.places, strict=False):
        if not fits(option.hint, word):
            found.faults.append(_wrong_value(option, word))
    return found.faults


def sort_words(args: Sequence[str], described: Described, whole_list: str = "") -> Words:
    """Sort the words of a command by options.

    Args:
        args: the words.
        described: the options.
        whole_list: the command that lists all options.
    """
    flags = described.by_flag()
    found = Words()
    words = list(args)
    while words:
        word = words.pop(0)
        if word == "--":
            found.places += words
            break
        if not _is_flag(word):
            if found.first_place is None:
                found.first_place = len(args) - len(words) - 1
            found.places.append(word)
            continue
        flag, given, inline = word.partition("=")
        option = flags.get(flag.replace("_", "-"))
        if option is None:
            found.faults.append(_unknown(word, described, whole_list))
            if not given and words and not _is_flag(words[0]):
                words.pop(0)
            continue
        values = [inline] if given else []
        most = option.count
        while words and not _is_flag(words[0]) and (most is None or len(values) < most):
            values.append(words.pop(0))
        found.values[option.name] = values if option.count != 0 else [str(flag == option.flag)]
        if most == 0 and given:
            found.faults.append(_no_value(option, inline))
        elif most == 0 and words and words[0].lower() in _SWITCHES:
            found.faults.append(_no_value(option, words.pop(0)))
        elif most and len(values) < most:
            found.faults.append(f"{option.flag} needs {expected(option)}")
        elif most != 0:
            wrong = [value for value in values if not _one_fits(option, value)]
            found.faults += [_wrong_value(option, value) for value in wrong[:1]]
    return found


_FIELD = re.compile(
    r"(?P<name>[a-z]\w*(?:\.\w+)*)=(?P<value>'(?:[^'\\]|\\.)*'|[^\s:]+): (?P<rule>.*)", re.DOTALL
)
"""The error of a field as text."""
_NOTHING = "''"
"""How an empty value is shown."""
_SWITCHES = ("true", "false", "yes", "no", "on", "off", "0", "1")


def _is_flag(word: str) -> bool:
    """Whether a word begins an option; a negative number is a value."""
    return len(word) > 1 and word[0] == "-" and not re.fullmatch(r"-\.?\d.*|-inf|-nan", word)


def _one_fits(option: Option, word: str) -> bool:
    """Whether a word can be one of an option's values."""
    return fits(option.hint, word)


def _no_value(option: Option, word: str) -> str:
    return f"{option.flag} {shown_word(word)}: it takes no value; give {option.flag} or {option.negative}"


def _wrong_value(option: Option, word: str) -> str:
    near = difflib.get_close_matches(word, choices(option.hint), n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{option.flag} {shown_word(word)}: must be {expected(option)}{hint}"


def _same(one: str, other: str) -> bool:
    """Whether two texts are one value: 1e2 is 100.0."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _unknown(word: str, described: Described, whole_list: str) -> str:
    if re.fullmatch(r"-[A-Za-z_][\w.-]+(=.*)?", word, re.DOTALL):
        option = described.by_flag().get("-" + word.partition("=")[0].replace("_", "-"))
        if option is not None:
            return f"{word.partition('=')[0]}: long options have two dashes, {option.flag}"
    return unknown_option(word, described, whole_list)


def _too_many(extra: Sequence[str], found: Words, places: Sequence[Option]) -> str:
    """What to say about words that belong to no option."""
    some = " ".join(map(shown_word, extra[:2])) + (" ..." if len(extra) > 2 else "")
    if extra[0].endswith(".tar"):
        return f"{some}: the shell has expanded a pattern; put it in quotes, e.g. 'data/*.tar'"
    takes = one_of(option.flag for option in places) if places else "no argument without an option"
    del found
    return f"{some}: belongs to no option; the command takes {takes}"


@dataclass(frozen=True)
class Wording:
    """Says which option an error is about, as the user types it."""

    described: Described
    args: Sequence[str]
    follows: Mapping[str, str] = field(default_factory=dict)
    """Options that follow another one unless they are given: dotted name -> dotted name."""
    origin: str = "the recipe"
    """Where values of a config come from that were not typed."""

    def __call__(self, error: Exception) -> str:
        """The text of an error, with its fields named as options."""
        if isinstance(error, FieldError):
            return self._field(error.name, error.value, error.rule) or describe_error(error)
        # Most other errors of values have the same form, as text.
        match = _FIELD.fullmatch(str(error))
        named = match and self._field(match["name"], match["value"].strip("'"), match["rule"])
        return named or describe_error(error)

    def _field(self, name: str, value: object, rule: str) -> str | None:
        """What to say about a field; None if the command has no such option."""
        given = sort_words(self.args, self.described)
        option = self._owner(name, as_words(value), given)
        if option is None:
            return None
        rule = self._with_flags(rule, option.group, given.values)
        if option.positional:
            return f"{shown_word(as_words(value))}: {rule}"
        if option.name not in given.values and value in ("", None):
            return f"{option.flag} is missing: {rule.removeprefix('must ')}"
        words = " ".join(map(shown_word, given.values.get(option.name, ()))) or shown_word(
            as_words(value)
        )
        switch = option.flag if value else option.negative
        head = switch if option.count == 0 else f"{option.flag} {words or _NOTHING}"
        return f"{head}{self._origin(option, given.values)}: {rule}"

    def _owner(self, name: str, value: str, given: Words) -> Option | None:
        """The option that a field belongs to: of its whole name, else of its last part, if only one
        has that or was given that value."""
        option = self.described.named(name)
        if option is not None:
            return option
        options = [o for o in self.described.options if o.name.endswith(f".{name}")]
        if name == "shards":  # the library's name for what `--train` and `--test` hold too
            options = [
                o
                for o in self.described.options
                if (" ".join(given.values.get(o.name, ())) or as_words(o.default)) == value
            ]
        typed = [o for o in options if " ".join(given.values.get(o.name, ())) == value]
        for found in (typed, options):
            if len(found) == 1:
                return found[0]
        return None

    def _origin(self, option: Option, given: Mapping[str, Sequence[str]]) -> str:
        """Where a value comes from that was not typed."""
        if option.name in given or option.positional:
            return ""
        leader = self.described.named(self.follows.get(option.name, ""))
        if leader is not None and leader.name in given:
            return f" (follows {leader.flag})"
        return f" (of {self.origin})" if option.group or self.described.named("epochs") else ""

    def _option(self, name: str, group: str) -> Option | None:
        """The option of a name in a rule: of the same group, or of one that contains it."""
        while group:
            near = self.described.named(f"{group}.{name}")
            if near is not None:
                return near
            group = group.rpartition(".")[0]
        return self.described.named(name)

    def _with_flags(self, rule: str, group: str, given: Mapping[str, Sequence[str]]) -> str:
        """A rule in which names of fields are options."""

        def flag(match: re.Match[str]) -> str:
            option = self._option(match["name"], group)
            if option is None:
                return match[0]
            words = " ".join(given.get(option.name, ()))
            # Advice names another value than the one in use.
            own = words or as_words(option.default)
            if not _same(own, match["value"].strip("'")):
                return f"{option.flag} {match['value']}"
            return f"{option.flag} {words or match['value']}{self._origin(option, given)}"

        start = r"(?<![\w.'/-])"
        with_value = start + r"(?P<name>[a-z]\w*(?:\.\w+)*)=(?P<value>[\w.+-]*\w|'[^']*')"
        rule = re.sub(with_value, flag, rule)

        # Without a value only what can be no English word: with a dot or an underscore.
        alone = start + r"(?P<name>[a-z]+(?:[._][a-z0-9]+)+)(?![\w=.-])"

        def flag_alone(match: re.Match[str]) -> str:
            option = self._option(match["name"], group)
            return option.flag if option is not None else match[0]

        return re.sub(alone, flag_alone, rule)


@contextlib.contextmanager
def worded(wording: Callable[[Exception], str]) -> Iterator[None]:
    """Errors of fields inside are shown in these words."""
    token = WORDING.set(wording)
    try:
        yield
    finally:
        WORDING.reset(token)
