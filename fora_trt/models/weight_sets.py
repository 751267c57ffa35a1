"""Which weights of a checkpoint are used: training scripts store averaged weights (EMA) beside the raw ones.

A set of weights is a state dict somewhere in the content of a file: in a nested dictionary, under a common prefix of
names, in a pickled module, or as a list of tensors in the order of the raw ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from torch import Tensor

from fora_trt.errors import ModelError
from fora_trt.models.checkpoint import Renamed, Tensors
from fora_trt.models.pickles import StandIn

Named: TypeAlias = Mapping[str, Tensor]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts that torch.compile, FSDP, activation checkpointing and Fabric insert anywhere in the names of parameters."""

Accepts: TypeAlias = Callable[[Named], bool]

AVERAGES = ("avg", "average", "averaged", "averages", "averager", "swa", "shadow", "polyak", "lawa")
RAW = ("raw", "online", "live")
NEGATIONS = ("non", "no", "not", "without", "exp")  # `exp_avg` is the momentum of Adam
"""Words in the name of a set that tell averaged weights from raw ones; also words that begin or end with `ema`."""

COUNT = "n_averaged"
"""Tensor beside the weights in the state dict of PyTorch's `AveragedModel`."""

EMA, RAW_WEIGHTS = "ema", "raw"
"""Values of the option `weights` besides the name of a set."""

DEEPEST = 6  # levels of nested dictionaries and of prefixes


@dataclass(frozen=True)
class WeightSet:
    """A set of weights; `key` is its path in the checkpoint, empty for a file that contains nothing else."""

    key: str
    averaged: bool
    tensors: Named


@dataclass(frozen=True)
class Choice:
    """The chosen set of weights, and a note for the user if there was a choice."""

    key: str
    note: str | None


def is_averaged(key: str) -> bool:
    """Whether a set with this path holds averaged weights; the last word that tells decides."""
    words = [word for word in re.split(r"[^a-z]+", key.lower()) if word]
    for before, word in reversed([*pairwise(["", *words])]):
        if word in AVERAGES or word.startswith(EMA) or word.endswith(EMA):
            return before not in NEGATIONS
        if word in RAW:
            return False
    return False


def sets_in(content: object, accepts: Accepts) -> tuple[list[WeightSet], list[str]]:
    """All sets of weights of a model in the content of a checkpoint, and the keys of averaged ones that are unreadable.

    `accepts` says whether tensors by name are the weights of a supported model.
    """
    found: list[WeightSet] = []
    others: list[tuple[str, Named | Sequence[Tensor]]] = []
    for path, held in _holders(content):
        if not isinstance(held, Mapping):
            others.append((".".join(path), held))
            continue
        accepted, rest = _split(held, path, accepts)
        found += [WeightSet(key, COUNT in held or is_averaged(key), tensors) for key, tensors in accepted]
        others += rest
    raw = [one for one in found if not one.averaged]
    unreadable = []
    averages = [(key, tensors) for key, tensors in others if is_averaged(key)]
    # other averages, as of a loss, are small; without any, no size is needed, for which a file would be read
    least = min((_elements(one.tensors) for one in raw), default=0) / 2 if averages else 0
    for key, tensors in averages:
        if _elements(tensors) < least:
            continue
        named = next(filter(None, (_named(tensors, one) for one in raw)), None)
        if named is not None and accepts(named):
            found.append(WeightSet(key, True, named))
        else:
            unreadable.append(key)
    return found, unreadable


def chosen(sets: Sequence[WeightSet], unreadable: Sequence[str], wanted: str | None, what: str) -> Choice:
    """The set that is used: averaged weights where there are some, or those that the option `weights` names.

    Raises `ModelError` if the choice is ambiguous, or if the wanted weights are missing or unreadable.
    """
    listed = ", ".join(repr(one.key) for one in sets)
    averaged, raw = ([one for one in sets if one.averaged is kind] for kind in (True, False))
    if wanted is None and not averaged and unreadable:
        raise ModelError(
            f"{what} keeps averaged weights at {unreadable[0]!r} in a form that cannot be read; save them as a state "
            "dict, or give --weights raw to take the weights that are not averaged"
        )
    pools = {None: averaged or raw, EMA: averaged, RAW_WEIGHTS: raw}
    pool = pools[wanted] if wanted in pools else [one for one in sets if f"{one.key}.".startswith(f"{wanted}.")]
    if not pool:
        kind = {EMA: "averaged weights", RAW_WEIGHTS: "weights that are not averaged"}.get(str(wanted), repr(wanted))
        raise ModelError(f"{what} contains no {kind}; it contains {listed or 'no weights'}; leave --weights out")
    if len(pool) > 1:
        raise ModelError(f"{what} contains several sets of weights: {listed}; choose one with --weights KEY")
    one, rest = pool[0], len(sets) > 1 or bool(unreadable)
    kind = "averaged" if one.averaged else "not averaged"
    where = f" ({one.key!r}; {kind})" if one.key else f" ({kind})"
    other = f"; --weights {RAW_WEIGHTS if one.averaged else EMA} takes the others" if wanted is None and rest else ""
    return Choice(one.key, f"weights of {what}{where}{other}" if one.key or one.averaged else None)


def _holders(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Named | list[Tensor]]]:
    """Every dictionary or list of tensors in the content, with its path."""
    if isinstance(content, Tensors):
        yield path, content
        return
    if isinstance(content, StandIn):
        state = content.state
        if isinstance(state, Mapping) and "_modules" in state and "_parameters" in state:
            yield path, dict(_of_module(state))
            return
        content = state
    if len(path) > DEEPEST:
        return
    if isinstance(content, Mapping):
        named = {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, Tensor)}
        if named:
            yield path, named
        for name, one in content.items():
            if isinstance(one, (Mapping, StandIn, list, tuple)):
                yield from _holders(one, (*path, str(name)))
    elif isinstance(content, (list, tuple)) and content:
        if all(isinstance(one, Tensor) for one in content):
            yield path, list(content)
        else:
            for k, one in enumerate(content):
                if isinstance(one, (Mapping, StandIn)):
                    yield from _holders(one, (*path, str(k)))


def _of_module(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a pickled module by name, as its `state_dict` has them."""
    for kind in ("_parameters", "_buffers"):
        for name, one in dict(state.get(kind) or {}).items():
            if isinstance(one, Tensor):
                yield f"{prefix}{name}", one
    for name, part in dict(state.get("_modules") or {}).items():
        inner = part.state if isinstance(part, StandIn) else None
        if isinstance(inner, Mapping):
            yield from _of_module(inner, f"{prefix}{name}.")


def _split(
    tensors: Named, path: tuple[str, ...], accepts: Accepts
) -> tuple[list[tuple[str, Named]], list[tuple[str, Named]]]:
    """The sets in tensors by name, each under a prefix or none, and those tensors that belong to no set; with keys."""
    plain: Named = Renamed({_unwrapped(name): name for name in tensors}, tensors)
    accepted: list[tuple[str, Named]] = []
    others: list[tuple[str, Named]] = []
    taken: set[str] = set()
    for head, names in _by_prefix(plain).items() if len(path) < DEEPEST else ():
        inner, rest = _split(Renamed(names, plain), (*path, head), accepts)
        accepted += inner
        others += rest
        taken.update(names.values() if inner else ())
    own = Renamed({name: name for name in plain if name not in taken}, plain)
    if accepts(own):
        return [(".".join(path), own), *accepted], []
    return (accepted, others) if accepted else ([], [(".".join(path), own)])


def _by_prefix(tensors: Named) -> dict[str, dict[str, str]]:
    """For each first part of the names, the full name of each rest; without groups too small for a set."""
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        head, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = name
    return {head: names for head, names in groups.items() if len(names) > 2}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _named(tensors: Named | Sequence[Tensor], raw: WeightSet) -> Named | None:
    """Averaged tensors under the names of the raw ones; None if they do not correspond.

    A list has the order of the raw parameters. A dictionary may have the names of the raw ones without dots, as the
    averages of latent diffusion have, also with a part of the raw set's own prefix.
    """
    if not isinstance(tensors, Mapping):
        return _in_order(tensors, raw.tensors)
    heads = raw.key.split(".") if raw.key else []
    for k in range(len(heads) + 1):
        prefix = "".join(heads[k:])
        names = {name: (prefix + name).replace(".", "") for name in raw.tensors}
        if found := {name: flat for name, flat in names.items() if flat in tensors}:
            return Renamed(found, tensors)
    return None


def _in_order(tensors: Sequence[Tensor], raw: Named) -> Named | None:
    """Tensors in the order of the raw parameters by name; raw buffers, which have no average, are skipped."""
    remaining, named = list(tensors), {}
    for name, one in raw.items():
        if remaining and remaining[0].shape == one.shape:
            named[name] = remaining.pop(0)
        elif name.endswith((".weight", ".bias")):
            return None
    return None if remaining else named


def _elements(tensors: Named | Sequence[Tensor]) -> int:
    return sum(one.numel() for one in (tensors.values() if isinstance(tensors, Mapping) else tensors))
