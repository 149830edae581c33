"""What a model consists of, and where that stands in its vector."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from perfedavg.settings import ExperimentConfig, flag

NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""`_NormBase` is that of BatchNorm and InstanceNorm."""
NONE = "none"
"""The pattern that stands for no parameter."""


@dataclass(frozen=True)
class Columns:
    """Some columns of models' rows, (clients, num_parameters), in their order; neighbours are one slice."""

    slices: tuple[slice, ...]

    def take(self, rows: Tensor) -> Tensor:
        """A copy, (clients, num_columns)."""
        return torch.cat([rows[:, :0], *(rows[:, part] for part in self.slices)], dim=1)

    def put(self, row: Tensor, values: Tensor) -> None:
        """Write what `take` gave of a row, (num_columns,), into another, (num_parameters,), of any device."""
        position = 0
        for part in self.slices:
            size = part.stop - part.start
            row[part] = values[position : position + size]
            position += size

    def clear(self, rows: Tensor) -> Tensor:
        """The rows, which are changed, with zeros there."""
        for part in self.slices:
            rows[:, part] = 0
        return rows

    @property
    def span(self) -> slice:
        """From the first to the last, with what lies between. There must be one."""
        return slice(self.slices[0].start, self.slices[-1].stop)


@dataclass(frozen=True)
class Layout:
    """Where what a model consists of (`entries_of`) stands in its vector, or in a row of models side by side.

    places: columns, by name.
    head: the names of the model's last layer: what the model calls `head` (a layer, or patterns as `names` takes them),
        else the last module that has parameters of its own.
    normalization: the names of normalization layers' weights, biases and statistics.
    """

    places: Mapping[str, slice]
    head: tuple[str, ...]
    normalization: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        places, position = {}, 0
        for name, entry in entries_of(model).items():
            places[name] = slice(position, position + entry.numel())
            position += entry.numel()
        layers = list(model.modules())
        normalization = _names(model, [layer for layer in layers if isinstance(layer, NORMALIZATIONS)])
        described = getattr(model, "head", None)
        if isinstance(described, str):
            head = cls(places, (), ()).names(described)
        elif isinstance(described, nn.Module) and next(described.parameters(), None) is not None:
            head = _names(model, list(described.modules()))
        else:
            head = _names(
                model, [layer for layer in layers if next(layer.parameters(recurse=False), None) is not None][-1:]
            )
        return cls(places, head, normalization)

    def names(self, patterns: str) -> tuple[str, ...]:
        """What matches one of the patterns, with commas between; nothing for `none`.

        Raises ValueError where a pattern matches none.
        """
        if patterns == NONE:
            return ()
        found: set[str] = set()
        for pattern in patterns.split(","):
            matching = [name for name in self.places if fnmatchcase(name, pattern.strip())]
            if not matching:
                raise ValueError(f"none of its parameters is called {pattern!r}; they are {', '.join(self.places)}")
            found.update(matching)
        return tuple(name for name in self.places if name in found)

    def others(self, names: Collection[str]) -> tuple[str, ...]:
        """All but these."""
        return tuple(name for name in self.places if name not in names)

    def columns(self, names: Collection[str]) -> Columns:
        merged: list[slice] = []
        for place in (place for name, place in self.places.items() if name in names):
            if merged and merged[-1].stop == place.start:
                place = slice(merged.pop().start, place.stop)
            merged.append(place)
        return Columns(tuple(merged))


def moving_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may move and that a model's vector has room for, by name, each once.

    They are those of floating-point numbers that the model saves, such as BatchNorm's running statistics.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, layer in model.named_modules():
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in layer._non_persistent_buffers_set:
                found.setdefault(id(buffer), (f"{prefix}.{name}" if prefix else name, buffer))
    return dict(found.values())


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up a model's vector, by name and in its order: its parameters, then `moving_buffers`."""
    return {**dict(model.named_parameters()), **moving_buffers(model)}


def count_buffer_entries(model: nn.Module) -> int:
    """How many entries of a model's vector, the last ones, are buffers'; 0 for most models."""
    return sum(buffer.numel() for buffer in moving_buffers(model).values())


def check_methods(config: ExperimentConfig, model: nn.Module) -> None:
    """Raises ValueError where a phase's method does not go with the model."""
    layout = Layout.of(model)
    for phase, settings in config.phases.items():
        problem = settings.method.problem_with_model(layout)
        if problem is not None:
            chosen = f"{flag(f'{phase.field}.method')} {settings.method.name}"
            raise ValueError(f"{chosen} does not go with the model: {problem}")


def _names(model: nn.Module, layers: Collection[nn.Module]) -> tuple[str, ...]:
    """What layers have of their own, as the model calls it."""
    own = {id(entry) for layer in layers for entry in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    return tuple(name for name, entry in entries_of(model).items() if id(entry) in own)
