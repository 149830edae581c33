"""A setting is one dataclass field with default, help and bounds, of which its flag, check and documentation are made.

    @dataclass(frozen=True)
    class FedProx(Method):
        mu: float = setting(0.01, "weight of the proximal term", at_least=0)

A field may also be a part, a dataclass of settings itself, or a choice between several. A part may change the names of
its flags, so that one field has a flag in each phase: `local_lr`, `fine_tune_local_lr`. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING as MISSING
from dataclasses import dataclass
from typing import Any, TypeVar

MOST = 2**31 - 1
"""Upper bound of whole numbers without one of their own: torch takes no larger batch, and no run has more rounds."""
NO_FLAG = ""
NONE = "none"
"""The choice that leaves out the part that it belongs to."""
_KEY = "setting"

Settings = TypeVar("Settings")


class Kinds(dict[str, type]):
    """The dataclasses that a choice is between, by name."""

    def find(self, name: str) -> type | None:
        """The dataclass of that name, or None. Raises ValueError where it is a user's own that cannot be had."""
        return self.get(name)


@dataclass(frozen=True)
class Setting:
    """What a field says about its setting.

    help: what it does, with its unit; `{of}` stands for `Part.of`, `{choices}` for the names to choose from.
    flag: what it calls its flag, without dashes; None for the field's own name, NO_FLAG for a setting without one.
    aliases: older names of its flag, which go on to work and are not shown.
    at_least, at_most: inclusive bounds. A whole number has both; MOST is the upper one unless another is given.
    above, below: exclusive bounds.
    choices: the values that it can have.
    metavar: what stands for the value in --help.
    parse: text to value, raises ValueError; None for what the field's type says.
    refuse: what is wrong with a value, as `problem` says it, or None.
    title: the heading that its flag stands under, where it is not that of its class.
    absent: what None means, in words.
    unset: what its flag calls None.
    implied: the text that its flag stands for without a value; None where it needs one.
    environment: the variable that holds its default, as a text.
    positional: whether its value stands on the command line without a flag.
    many: whether it is a tuple of values.
    kinds: of a choice, the dataclasses that it is between, by name.
    only_with: name of another field of the same dataclass -> its values with which this setting has an effect; empty
        where it always has one.
    reported: when a report names its value: `differing`, where it differs from that of other runs; `always`, unless it
        is the default; `never`, because runs that differ in nothing else are one experiment.
    search: the range of interest, in which tune.py searches a good value unless told otherwise, as `--search` takes it:
        `0.001..1:log`, or `0.1x..10x:log` for multiples of the value that it has; empty for none.
    """

    help: str
    flag: str | None = None
    aliases: Sequence[str] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    refuse: Callable[[Any], str | None] | None = None
    title: str = ""
    absent: str = ""
    unset: str | None = None
    implied: str | None = None
    environment: str = ""
    positional: bool = False
    many: bool = False
    kinds: Kinds | None = None
    only_with: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    reported: str = "differing"
    search: str = ""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to be read behind the flag and the value; None where nothing is."""
        if self.refuse is not None:
            return self.refuse(value)
        if self.choices is not None and self.kinds is None:
            return None if value in self.choices else unknown(value, self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or self._is_allowed(value):
            return None
        return f"must be {self.allowed(type(value))}"

    def _is_allowed(self, value: float) -> bool:
        highest = self._highest(type(value))
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (highest is None or value <= highest)
        )

    def _highest(self, kind: type) -> float | None:
        return MOST if kind is int and self.at_most is None and self.below is None else self.at_most

    def allowed(self, kind: type) -> str:
        """The values that a number can have, in words."""
        highest = self._highest(kind)
        if kind is int:
            return f"a whole number from {self.at_least} to {highest}"
        limits = [f"{self.at_least:g} or more"] if self.at_least is not None else []
        limits += [f"above {self.above:g}"] if self.above is not None else []
        limits += [f"below {self.below:g}"] if self.below is not None else []
        limits += [f"at most {highest:g}"] if highest is not None else []
        return f"a number {' and '.join(limits)}".rstrip()


@dataclass(frozen=True)
class Part:
    """What a field says about the settings that it holds.

    kind: their dataclass.
    title: the heading of their flags; empty for that of the whole.
    prefix: what the names of their flags begin with.
    flags: names that do not follow the prefix, by what the settings call themselves; None for no flag.
    defaults: what takes the place of the settings' own defaults, by their fields, such as `server_optimizer.name`.
    searches: the same of their ranges of interest.
    of: whose they are, for the help texts.
    is_optional: whether it may be None, which its choice says by the name NONE.
    """

    kind: type
    title: str = ""
    prefix: str = ""
    flags: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    searches: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of: str = ""
    is_optional: bool = False


def setting(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a setting. default: `dataclasses.MISSING` for none. options: of `Setting`."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **options)})


def choice(kinds: Mapping[str, type], default: str, help: str, **options: Any) -> Any:
    """A dataclass field that holds one of several dataclasses, each with settings of its own and a `name`."""
    kinds = kinds if isinstance(kinds, Kinds) else Kinds(kinds)
    described = Setting(help, choices=tuple(kinds), kinds=kinds, **options)
    return dataclasses.field(default=kinds[default](), metadata={_KEY: described})


def part(kind: type, **options: Any) -> Any:
    """A dataclass field that holds settings; options: of `Part`."""
    described = Part(kind, **options)

    def with_defaults() -> Any:
        flags = _flags(kind, defaults=described.defaults)
        return _build(kind, {flag.path: flag.default for flag in flags if not flag.by_choice}, ())

    return dataclasses.field(default_factory=with_defaults, metadata={_KEY: described})


@dataclass(frozen=True)
class Flag:
    """A setting in its place.

    name: without dashes; None for a setting without a flag there.
    path: the fields that lead to it.
    kind: type of its values, besides None.
    default: MISSING where there is none.
    title: the heading that it stands under.
    choices: the texts that it can have, where these are known.
    aliases: older names, without dashes.
    by_choice: of a setting of what is chosen, such as a method: its default and its help by the names of those that
        have it. The default is then that of the one that is chosen.
    search: its range of interest in its place; that of a setting of what is chosen is `setting_in(..).search`.
    """

    name: str | None
    path: tuple[str, ...]
    kind: Any
    default: Any
    title: str
    help: str
    setting: Setting
    choices: Sequence[str] | None = None
    aliases: Sequence[str] = ()
    by_choice: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    search: str = ""

    @property
    def label(self) -> str:
        """What an error calls it."""
        if self.name is None:
            return ".".join(self.path)
        return self.setting.metavar or self.name if self.setting.positional else f"--{self.name}"

    def value_in(self, settings: Any) -> Any:
        """Its value in an instance of the whole; MISSING where the part that has it is left out, as a choice says."""
        value = settings
        for name in self.path:
            value = getattr(value, name, MISSING)
        if self.setting.kinds is None:
            return value
        return value.name if value is not MISSING else NONE if NONE in (self.choices or ()) else MISSING

    def setting_in(self, settings: Any) -> Setting:
        """What the field says that has its value in an instance of the whole."""
        for name in self.path[:-1]:
            settings = getattr(settings, name, None)
        field = getattr(settings, "__dataclass_fields__", {}).get(self.path[-1])
        return (field and setting_of(field)) or self.setting

    def ineffective_because(self, settings: Any) -> tuple[Flag, Sequence[Any]] | None:
        """The flag by whose value it has no effect in an instance of the whole, and the values with which it would.

        None where it has an effect.
        """
        kind: Any = type(settings)
        flags = flags_of(kind)
        if self.value_in(settings) is MISSING:
            choices = (flag for flag in flags.values() if flag.setting.kinds is not None)
            chosen = next(flag for flag in choices if flag.path[:-1] == self.path[: len(flag.path) - 1])
            return chosen, tuple(self.by_choice)
        for name, values in self.setting_in(settings).only_with.items():
            other = flags[(*self.path[:-1], name)]
            if other.value_in(settings) not in values:
                return other, values
        return None

    def beside(self, other: Flag) -> Flag:
        """The flag of a setting that several choices have. Raises ValueError where a text does not mean it in all."""
        if (self.kind, self.setting.choices) != (other.kind, other.setting.choices):
            (one, *_), (another, *_) = self.by_choice, other.by_choice
            raise ValueError(f"{another} has a setting {self.path[-1]} as {one} has, of another type; rename it")
        by_choice = {**self.by_choice, **other.by_choice}
        helps: dict[str, list[str]] = {}
        for name, (_, help) in by_choice.items():
            helps.setdefault(help, []).append(name)
        said = [help if len(helps) == 1 else f"{help} ({', '.join(names)})" for help, names in helps.items()]
        return dataclasses.replace(self, by_choice=by_choice, help="; ".join(said))

    @property
    def implied(self) -> str | None:
        return "true" if self.kind is bool else self.setting.implied

    def parse(self, text: str | Sequence[str]) -> Any:
        """The value that a text stands for. Raises ValueError, naming the flag, the text and what is allowed."""
        if not isinstance(text, str):
            return tuple(self.parse(one) for one in text)
        is_own = self.setting.kinds is not None and self.setting.kinds.find(text) is not None
        if self.choices is not None and text not in self.choices and not is_own:
            raise ValueError(f"{self.label} {text} {unknown(text, self.choices)}")
        if self.setting.unset is not None and text == self.setting.unset:
            return None
        try:
            if self.setting.parse is not None:
                return self.setting.parse(text)
            return _WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError) as error:
            numbers = self.setting.allowed(self.kind) if self.kind in (int, float) else "true or false"
            reason = f"must be {numbers}" if self.setting.parse is None else str(error)
            raise ValueError(f"{self.label} {text if text.isprintable() and text else repr(text)} {reason}") from error


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def unknown(name: str, known: Iterable[str]) -> str:
    """What is wrong with a name that is none of the known ones, to be read behind it; the most similar comes first."""
    from difflib import get_close_matches

    names = list(known)
    near = get_close_matches(name, names, 1)
    others = ", ".join(one for one in names if one not in near)
    return f"is unknown; use {near[0]}, or one of {others}" if near else f"is unknown; use one of {others}"


@functools.cache
def flags_of(kind: Any) -> dict[tuple[str, ...], Flag]:
    """All settings of a dataclass and of its parts, in their order, by the fields that lead to them."""
    flags: dict[tuple[str, ...], Flag] = {}
    for flag in _flags(kind):
        flags[flag.path] = flags[flag.path].beside(flag) if flag.path in flags else flag
    return flags


def flags_by_name(kind: type) -> dict[str, Flag]:
    """Those that have a flag."""
    return {flag.name: flag for flag in flags_of(kind).values() if flag.name is not None}


def by_any_name(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """The same flags by their names and their older names."""
    return {name: flag for own_name, flag in flags.items() for name in (own_name, *flag.aliases)}


def renamed(values: Mapping[str, Any], flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The same values by the present names of the flags. Raises ValueError where two names of one flag are given."""
    known, given = by_any_name(flags), dict[str, str]()
    for name in values:
        other = given.setdefault(known[name].name or "", name)
        if other != name:
            raise ValueError(f"--{other} and --{name} are names of the same flag; leave one of them out")
    return {name: values[spelled] for name, spelled in given.items()}


def build(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings with these values, by the names of their flags; others have their defaults.

    Raises ValueError where a value is out of bounds, or one that has no default is missing.
    """
    described: Any = kind
    flags = flags_of(described)
    by_path = {
        flag.path: values.get(flag.name or "", flag.default)
        for flag in flags.values()
        if flag.name in values or not flag.by_choice
    }
    for path, value in by_path.items():
        if value is MISSING:
            variable = flags[path].setting.environment
            raise ValueError(
                f"{flags[path].label} must be given{f', or {variable} in the environment' * bool(variable)}"
            )
    built: Settings = _build(kind, by_path, ())
    return built


def values_of(settings: Any) -> dict[str, Any]:
    """The inverse of `build`, without ineffective settings, to which `build` gives their defaults."""
    flags = flags_by_name(type(settings))
    return {name: flag.value_in(settings) for name, flag in flags.items() if flag.ineffective_because(settings) is None}


def label(kind: Any, path: str) -> str:
    """What an error calls a setting of a dataclass or of its parts. path: its fields, such as `fedavg.method`."""
    return flags_of(kind)[tuple(path.split("."))].label


def to_plain(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass as JSON has them; `plain_values.from_plain` is the inverse."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value: Any = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            name = {"name": getattr(value, "name", "")} if kinds_of(field) else {}
            value = {**name, **to_plain(value)}
        plain[field.name] = value
    return plain


def setting_of(field: dataclasses.Field[Any]) -> Setting | None:
    """What a field says about its setting; None where it is none."""
    described = field.metadata.get(_KEY)
    return described if isinstance(described, Setting) else None


def kinds_of(field: dataclasses.Field[Any]) -> Kinds | None:
    """The dataclasses that a field is a choice between; None where it is none."""
    described = setting_of(field)
    return None if described is None else described.kinds


def check(settings: Any) -> None:
    """Raise ValueError, naming the flag, its value and what is allowed, where a setting is out of bounds.

    What is None is left open, and within bounds.
    """
    kind: Any = type(settings)
    for flag in flags_of(kind).values():
        value = flag.value_in(settings)
        problem = None if value is None or value is MISSING else flag.setting_in(settings).problem(value)
        if problem is not None:
            raise ValueError(f"{flag.label} {value} {problem}")


def _flags(
    kind: type,
    path: tuple[str, ...] = (),
    name_of: Callable[[str], str | None] = str,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    title: str = "",
    of: str = "",
    is_optional_part: bool = False,
    searches: Mapping[str, str] = types.MappingProxyType({}),
) -> Iterator[Flag]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        described, place = field.metadata.get(_KEY), (*path, field.name)
        heading = title or getattr(described, "title", "") or _heading(kind, field.name)
        if isinstance(described, Part):
            rename = functools.partial(_renamed, described, name_of)
            start = f"{field.name}."
            below = {name[len(start) :]: value for name, value in defaults.items() if name.startswith(start)}
            inner_title = described.title or title
            yield from _flags(
                described.kind,
                place,
                rename,
                {**described.defaults, **below},
                inner_title,
                described.of,
                described.is_optional,
                described.searches,
            )
        elif isinstance(described, Setting):
            default = defaults.get(field.name, field.default)
            choices = described.choices
            if described.kinds is not None:
                default = default if isinstance(default, str) else default.name
                choices = (*described.kinds, *((NONE,) if is_optional_part else ()))
            own_name = field.name if described.flag is None else described.flag
            name = None if own_name == NO_FLAG else name_of(own_name)
            aliases = [alias for alias in map(name_of, described.aliases) if alias is not None]
            help = described.help.replace("{of}", of).replace("{choices}", ", ".join(choices or ()))
            kind_of_value = str if described.kinds else _kind_of_value(hints[field.name])
            search = searches.get(field.name, described.search)
            yield Flag(name, place, kind_of_value, default, heading, help, described, choices, aliases, search=search)
            for chosen, kind_of_choice in (described.kinds or {}).items():
                for flag in _flags(kind_of_choice, place, name_of, {}, heading, of):
                    yield dataclasses.replace(flag, by_choice={chosen: (flag.default, flag.help)})


def _renamed(part: Part, name_of: Callable[[str], str | None], name: str) -> str | None:
    """The name of the flag, as the part and all that hold it make it of what a setting calls itself."""
    inner = part.flags.get(name, f"{part.prefix}{name}")
    return None if inner is None else name_of(inner)


def _heading(kind: type, name: str) -> str:
    """What the class that defines a field puts over its flags."""
    own = (vars(base) for base in kind.__mro__)
    return next((of["heading"] for of in own if "heading" in of and name in of["__annotations__"]), "")


def _kind_of_value(kind: Any) -> Any:
    """Of a value that may be None, and of the entries of a tuple."""
    others = [one for one in typing.get_args(kind) if one not in (types.NoneType, Ellipsis)]
    return _kind_of_value(others[0]) if others else kind


def _build(kind: type, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """None where its choice is NONE."""
    arguments = {}
    for field in dataclasses.fields(kind):
        described, place = field.metadata.get(_KEY), (*path, field.name)
        if isinstance(described, Part):
            arguments[field.name] = _build(described.kind, values, place)
        elif isinstance(described, Setting):
            value = values.get(place, field.default)
            if described.kinds is not None:
                if value == NONE:
                    return None
                kind_of_choice = described.kinds.find(value)
                if kind_of_choice is None:
                    raise ValueError(f"{value} is unknown; use one of {', '.join(described.kinds)}")
                value = _build(kind_of_choice, values, place)
            arguments[field.name] = value
    return kind(**arguments)
