"""Which of the maps seen in a forward pass are the feature levels of a model: those that its head works on."""

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


RANKS = ("own", "calls", "returned", "given")


class Chooser:
    """Finds the levels in what was observed.

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

    # What is there

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
            of = [
                any(one == each or self.seen.depends(one, each) for one in given for each in numbers)
                for numbers in results
            ]
            if not given or sum(of) > 1:
                return True
        return False

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

    # What is right

    def continues(self, later: Candidate, earlier: Candidate) -> bool:
        """Whether each map of a candidate is made of one map of another alone: a head, and no neck, lies between."""
        if not self.seen.traced or later.numbers & earlier.numbers:
            return False
        for place in later.places:
            sources = [each for each in earlier.places if self.seen.depends(place.number, each.number)]
            own = [each for each in sources if self.size(each.leaf) == self.size(place.leaf)]
            if not own or not any(
                all(each is one or self.seen.depends(one.number, each.number) for each in sources) for one in own
            ):
                return False
        return True

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

    def best(self) -> Candidate | None:
        """The maps that the head works on: of several sizes; of one where there is no other, or only one is used."""
        found = self.all()
        several = self._latest([each for each in found if len({self.size(p.leaf) for p in each.places}) > 1])
        single = self._latest([each for each in found if len({self.size(p.leaf) for p in each.places}) == 1])
        single = max(filter(None, (single, self.branching())), key=lambda each: each.birth, default=None)
        if several is None or single is None:
            return several or single
        later = single.birth > several.birth and len(single.places) == 1 and single.kind not in ("own", "calls")
        return single if later and single.strong and self.seen.traced and self.makes_all(single) else several

    def _latest(self, found: list[Candidate]) -> Candidate | None:
        strong = [each for each in found if each.strong]
        kept = [
            each for each in found if not self._is_of_a_head(each, [other for other in strong if other is not each])
        ]
        whole = [each for each in kept if self.makes_all(each)]
        if any(map(self._mixed, whole)) or not any(map(self._mixed, kept)):  # else a neck, and heads on the backbone
            kept = whole or kept
        if not kept:
            return None
        own = [each for each in kept if each.kind != "own"]
        if not self.seen.traced and own:
            kept = own  # what a model returns may be its predictions
        latest = max(each.birth for each in kept)
        kept = [each for each in kept if each.birth == latest]
        most = max(len(each.numbers) for each in kept)
        kept = [each for each in kept if len(each.numbers) == most]
        rank = max(RANKS.index(each.kind) for each in kept)
        kept = [each for each in kept if RANKS.index(each.kind) == rank]
        return self._outermost(kept)

    def _is_of_a_head(self, each: Candidate, others: Sequence[Candidate]) -> bool:
        """Whether maps look like what a head makes of levels, among which are ``others``, and not like levels."""
        sizes, widths = [self.size(p.leaf) for p in each.places], [self.width(p.leaf) for p in each.places]
        if each.kind == "own" and not each.strong and len(set(sizes)) == 1:
            alike = {(self.size(p.leaf), self.width(p.leaf)) for other in others for p in other.places}
            apart = bool(others) and not set(zip(sizes, widths, strict=True)) <= alike
            return apart or self.canvas in sizes or any(width % 16 for width in widths)
        if each.kind == "own":
            if others and (self._is_one_result_of_many(each) or (len(set(widths)) == 1 and widths[0] % 16)):
                return True
            return any(self.continues(each, other) and self._predicts(each, other) for other in others)
        if not each.strong:
            made = any(self.continues(each, other) for other in others)
            return made or not self.seen.traced or (bool(others) and self._is_one_result_of_many(each))
        if each.kind == "calls":
            shared = [other for other in others if other.shared]
            return any(
                self.continues(each, other)
                and (self._mixed(other) or self._inside(each, other) or self._head_begins(other, each, shared))
                for other in others
                if other.kind != "calls" or other.shared
            )
        return False

    def _is_one_result_of_many(self, each: Candidate) -> bool:
        """Whether other things are returned beside these maps, of which none of them is made."""
        beside = self.seen.outputs if each.call is None else [leaf.number for _, leaf in leaves(each.call.output)]
        beside = [number for number in beside if number in self.seen.flow.bits and number not in each.numbers]
        return any(not any(self.seen.depends(mine, number) for mine in each.numbers) for number in beside)

    def _outermost(self, kept: list[Candidate]) -> Candidate:
        """Of candidates with the same maps the last, or the call around it that has them, too."""
        last = kept[-1] if kept[-1].kind != "returned" else kept[0]
        if last.call is None:
            return last
        around = {call.start for call in self.seen.around(last.call)}
        outer = [each for each in kept if each.call is not None and each.call.start in around]
        return outer[0] if outer else last

    def _inside(self, calls: Candidate, given: Candidate) -> bool:
        """Whether calls were made inside the module that was given a list."""
        if given.kind != "given" or given.call is None:
            return False
        start = given.call.start
        return all(any(outer.start == start for outer in self.seen.around(call)) for call in calls.calls)

    def _head_begins(self, levels: Candidate, later: Candidate, shared: Sequence[Candidate]) -> bool:
        """Whether one module was called with each of these levels before: a head that all of them share."""
        return any(
            each is not later and each.numbers >= levels.numbers and self.continues(later, each) for each in shared
        )

    def _mixed(self, levels: Candidate) -> bool:
        """Whether the finest of a list of levels is made of coarser maps, too: a neck's, and what follows is a head."""
        if levels.kind == "calls":
            return False
        finest = max(levels.places, key=lambda place: self.size(place.leaf) or (0, 0))
        size = self.size(finest.leaf) or (0, 0)
        return any(each < size and self.seen.depends(finest.number, number) for number, each in self.maps.items())

    def _predicts(self, own: Candidate, levels: Candidate) -> bool:
        """Whether what a model returns, made of levels one by one, looks like predictions and not like features."""
        ours = [self.width(place.leaf) for place in own.places]
        if self._is_one_result_of_many(own):
            return True
        if len({self.size(place.leaf) for place in own.places}) < len(ours):
            return True
        same = {self.size(place.leaf): self.width(place.leaf) for place in levels.places}
        if all(same.get(self.size(place.leaf)) == self.width(place.leaf) for place in own.places):
            return False
        return len(set(ours)) == 1 and ours[0] % 16 != 0


def _numbered(name: str) -> list[str]:
    """The name with each of its numbers in turn replaced by a star."""
    return [f"{name[: found.start()]}*{name[found.end() :]}" for found in re.finditer(r"\d+", name)]
