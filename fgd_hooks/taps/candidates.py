"""Lists of maps, seen in a forward pass, that may be the feature levels of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fgd_hooks.taps.canvas import covers
from fgd_hooks.taps.observation import Leaf, ModuleCall, Observation, Path, Tree, leaves

FEWEST = 2  # channels of a feature map
POSITIONAL = 3  # maps, each an argument of its own, that count as a list; two of them are a skip connection


@dataclass(frozen=True)
class Place:
    """A map and where it was seen."""

    call: ModuleCall
    io: str
    path: Path
    leaf: Leaf

    @property
    def number(self) -> int:
        """The tensor's number."""
        return self.leaf.number


@dataclass
class Candidate:
    """Maps that may be a model's levels.

    Args:
        kind: "given" to a module, "returned" by one, "calls": each given to a call of one module, or of modules of one
            kind, "branches": one map given to several modules, "own": what the model itself returns.
        places: the maps.
        strong: whether modules with parameters go on from them.
        call: the call that was given or returned them, for "given" and "returned".
        shared: for "calls", whether they are calls of one module.
    """

    kind: str
    places: list[Place]
    strong: bool = True
    call: ModuleCall | None = None
    calls: list[ModuleCall] = field(default_factory=list)
    shared: bool = False

    @property
    def numbers(self) -> set[int]:
        """The tensors' numbers."""
        return {place.number for place in self.places}

    @property
    def birth(self) -> int:
        """When the last of the maps was made."""
        return max(self.numbers)


class Candidates:
    """All lists of maps in what was observed that may be a model's levels.

    Args:
        seen: one forward pass.
    """

    def __init__(self, seen: Observation) -> None:
        self.seen = seen
        self.canvas = seen.canvas
        self.entered: dict[int, list[ModuleCall]] = {}
        self.maps: dict[int, tuple[int, int]] = {}  # the sizes of all maps by number
        for call in seen.calls:
            given = [leaf for _, _, tree in call.inputs for _, leaf in leaves(tree)]
            for leaf in given:
                self.entered.setdefault(leaf.number, []).append(call)
            for leaf in [*given, *(leaf for _, leaf in leaves(call.output))]:
                if leaf.number not in self.maps and (size := self.size(leaf)) is not None:
                    self.maps[leaf.number] = size

    def size(self, leaf: Leaf) -> tuple[int, int] | None:
        """The (h, w) in cells of a tensor that may be a feature map; None for one that is none."""
        if len(leaf.shape) != 4 or leaf.shape[0] != self.seen.count or not self.seen.of_images(leaf.number):
            return None
        for size, channels in ((leaf.shape[2:], leaf.shape[1]), (leaf.shape[1:3], leaf.shape[3])):
            if channels >= FEWEST and covers(size, self.canvas):
                is_image = tuple(size) == self.canvas and channels == self.seen.channels
                return None if is_image or leaf.number in self.seen.images else (size[0], size[1])
        return None

    def width(self, leaf: Leaf) -> int:
        """The channels of a feature map."""
        return leaf.shape[1] if covers(leaf.shape[2:], self.canvas) else leaf.shape[3]

    def lists(self, tree: Tree | None, path: Path = (), *, join: bool = True) -> list[list[tuple[Path, Leaf]]]:
        """The maps in a container, as lists; a container inside that holds maps of several sizes is one of its own.

        Args:
            tree: what a module was given or returned.
            path: where it is.
            join: whether a single such container and maps of other sizes beside it are one list.
        """
        if not isinstance(tree, list):
            return []
        inner = [self.lists(item, (*path, key), join=join) for key, item in tree]
        apart = [each for lists in inner for each in lists if self.sizes(each) > 1]
        beside = {self.size(item) for _, item in tree if isinstance(item, Leaf)} - {None}
        if apart and (not join or len(apart) > 1 or not beside or beside & {self.size(leaf) for _, leaf in apart[0]}):
            return apart
        maps = {leaf.number: (where, leaf) for where, leaf in leaves(tree, path) if self.size(leaf)}
        return [list(maps.values())] if maps else []

    def sizes(self, maps: Iterable[tuple[Path, Leaf]]) -> int:
        """How many different sizes maps have."""
        return len({self.size(leaf) for _, leaf in maps})

    def given(self, call: ModuleCall) -> Candidate | None:
        """The list that a module was called with: the first such argument; or three and more maps as arguments."""
        for io, prefix, tree in call.inputs:
            for maps in self.lists(tree):
                used = [(path, leaf) for path, leaf in maps if self.seen.used_after(leaf.number, call.start)]
                if used:
                    places = [Place(call, io, (*prefix, *path), leaf) for path, leaf in used]
                    return Candidate("given", places, call.weighted, call)
        maps = [((), leaf) for _, _, leaf in call.direct if self.size(leaf)]
        if len({leaf.number for _, leaf in maps}) < POSITIONAL or self.sizes(maps) < 2:
            return None
        places = [Place(call, io, path, leaf) for io, path, leaf in call.direct if self.size(leaf)]
        return Candidate("given", places, call.weighted, call)

    def returned(self, call: ModuleCall) -> Iterator[Candidate]:
        """The lists that a module returned, of the maps that are used later; strong if they enter modules."""
        for maps in self.lists(call.output):
            places, strong = [], True
            for path, leaf in maps:
                if not self.seen.used_after(leaf.number, call.end):
                    continue
                later = [
                    each
                    for each in self.entered.get(leaf.number, [])
                    if each.start > call.end and self.seen.used_after(leaf.number, each.start)
                ]
                if later or self.seen.traced:
                    places.append(Place(call, "output", path, leaf))
                    strong &= any(each.weighted for each in later)
            if places:
                yield Candidate("returned", places, strong, call)

    def per_level(self) -> Iterator[Candidate]:
        """Calls of one module, or of modules that differ in one number, that take one map each and not each other's."""
        groups: dict[str, list[Place]] = {}
        for call in self.seen.calls:
            if call.weighted and call.inputs and isinstance(call.inputs[0][2], Leaf) and self.size(call.inputs[0][2]):
                if not self._goes_on(call):
                    continue
                place = Place(call, "input", (), call.inputs[0][2])
                for name in {call.module, *_numbered(call.module)}:
                    groups.setdefault(name, []).append(place)
        found: list[Candidate] = []
        names: list[str] = []
        for name, places in groups.items():
            unique = list({place.number: place for place in places}.values())
            if len({self.size(place.leaf) for place in unique}) < 2 or self._chained(unique):
                continue
            names.append(name)
            found.append(Candidate("calls", unique, calls=[p.call for p in unique], shared="*" not in name))
        members = {name: [place.call.start for place in places] for name, places in groups.items()}
        starts = {start for name in names for start in members[name]}
        for each in found:  # what is inside a call of another group belongs to that
            if not all(any(outer.start in starts for outer in self.seen.around(call)) for call in each.calls):
                yield each

    def branching(self) -> Candidate | None:
        """The last map that all is made of and that several modules take (classes, boxes) whose results stay apart."""
        for number in sorted(self.maps, reverse=True) if self.seen.traced else ():
            calls = [each for each in self.entered.get(number, []) if each.weighted]
            apart = [each for each in calls if not set(map(id, self.seen.around(each))) & set(map(id, calls))]
            if len({each.module for each in apart}) < 2 or self._merged(apart):
                continue
            found = [(io, path, tree) for io, path, tree in apart[0].inputs if isinstance(tree, Leaf)]
            places = [Place(apart[0], *each) for each in found if each[2].number == number]
            candidate = Candidate("branches", places)
            if places and self.makes_all(candidate):
                return candidate
        return None

    def _merged(self, branches: Sequence[ModuleCall]) -> bool:
        """Whether a module takes what was made of the results of several calls, or may do so."""
        results = [[leaf.number for _, leaf in leaves(each.output)] for each in branches]
        for call in self.seen.calls:
            within = any(call is each or each in self.seen.around(call) for each in branches)
            if not call.weighted or within or call.start < branches[0].start or call.end == -1:
                continue
            given = [leaf.number for _, _, tree in call.inputs for _, leaf in leaves(tree)]
            if not given or sum(self._any_of(given, numbers) for numbers in results) > 1:
                return True
        return False

    def _any_of(self, later: Iterable[int], earlier: Sequence[int]) -> bool:
        """Whether some tensors are, or are made of, some others."""
        return any(one == each or self.seen.depends(one, each) for one in later for each in earlier)

    def last_calls(self) -> Candidate | None:
        """What the last modules take, each a map of its own: heads that have no more in common than that."""
        if not self.seen.traced:
            return None
        weighted = [each for each in self.seen.calls if each.module and each.weighted]
        last: list[ModuleCall] = []
        for call in weighted:
            results = [leaf.number for _, leaf in leaves(call.output)]
            if len(call.direct) != 1 or len(call.inputs) != 1 or not self.size(call.direct[0][2]) or not results:
                continue
            later = [each for each in weighted if each.start > call.end]
            given = [leaf.number for each in later for _, _, tree in each.inputs for _, leaf in leaves(tree)]
            within = any(each in last for each in self.seen.around(call))
            if not within and not self._any_of(given, results):
                last.append(call)
        places = list({place.number: place for place in (Place(each, *each.direct[0]) for each in last)}.values())
        found = Candidate("calls", places, calls=[place.call for place in places])
        several = len({self.size(place.leaf) for place in places}) > 1
        return found if several and not self._chained(places) and self.makes_all(found) else None

    def _is_narrow(self, each: Candidate) -> bool:
        """Whether all maps have one width that predictions have, and features seldom."""
        widths = {self.width(place.leaf) for place in each.places}
        return len(widths) == 1 and bool(min(widths) % 16)

    def _goes_on(self, call: ModuleCall) -> bool:
        """Whether something is made of what a call returned, or the model returns it."""
        returned = [leaf.number for _, leaf in leaves(call.output)]
        used = any(self.seen.used_after(number, call.end) for number in returned)
        return used or not returned or bool(set(returned) & set(self.seen.outputs))

    def _chained(self, places: Sequence[Place]) -> bool:
        """Whether a call works on what another one returned (the stages of a backbone)."""
        if not self.seen.traced:
            return True
        results = [(place.call.start, leaf.number) for place in places for _, leaf in leaves(place.call.output)]
        return any(
            place.number == result or self.seen.depends(place.number, result)
            for place in places
            for start, result in results
            if start != place.call.start
        )

    def makes_all(self, candidate: Candidate) -> bool:
        """Whether all that the model returns is made of these maps, or these of it."""
        flow, numbers = self.seen.flow, candidate.numbers
        if not self.seen.traced:
            return True
        bits = sum(flow.bits.get(number, 0) for number in numbers)
        before = bits
        for number in numbers:
            before |= flow.sources.get(number, 0)
        return all(
            flow.bits[output] & before or flow.sources.get(output, 0) & bits
            for output in self.seen.outputs
            if output in flow.bits
        )

    def all(self) -> list[Candidate]:
        """Every candidate, one module call after the other."""
        found: list[Candidate] = []
        for call in self.seen.calls:
            if call.module:
                given = self.given(call)
                found += [given] if given else []
                found += self.returned(call)
            if call.parent is None:  # the model, or a part of it that a wrapper calls
                for maps in self.lists(call.output, join=False):
                    if not {leaf.number for _, leaf in maps} <= set(self.seen.outputs):
                        continue
                    used = all(self.seen.used_after(leaf.number, leaf.number) for _, leaf in maps)
                    places = [Place(call, "output", path, leaf) for path, leaf in maps]
                    found.append(Candidate("own", places, used and self.seen.traced))
        return found + list(self.per_level())


def _numbered(name: str) -> list[str]:
    """The name with each of its numbers in turn replaced by a star."""
    return [f"{name[: found.start()]}*{name[found.end() :]}" for found in re.finditer(r"\d+", name)]
