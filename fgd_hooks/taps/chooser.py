"""Which of the candidates are the feature levels of a model: the last that its head works on."""

from __future__ import annotations

from collections.abc import Sequence

from fgd_hooks.taps.candidates import Candidate, Candidates
from fgd_hooks.taps.observation import leaves

RANKS = ("own", "calls", "returned", "given")
"""Kinds of candidates; of several with the same maps the last kind is taken."""


class Chooser(Candidates):
    """Finds the levels in what was observed; see :class:`~fgd_hooks.taps.candidates.Candidates`."""

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

    def best(self) -> Candidate | None:
        """The maps that the head works on: of several sizes; of one where there is no other, or only one is used."""
        found = self.all()
        several = self._latest([each for each in found if len({self.size(p.leaf) for p in each.places}) > 1])
        single = self._latest([each for each in found if len({self.size(p.leaf) for p in each.places}) == 1])
        heads = self.last_calls()
        if heads and (several is None or self._is_neck_between(several, heads)):
            several = heads
        single = max(filter(None, (single, self.branching())), key=lambda each: each.birth, default=None)
        if several is None or single is None:
            return several or single
        later = single.birth > several.birth and len(single.places) == 1 and single.kind not in ("own", "calls")
        return single if later and single.strong and self.seen.traced and self.makes_all(single) else several

    def _is_neck_between(self, levels: Candidate, heads: Candidate) -> bool:
        """Whether what the last modules take is made of levels, and not of each alone; or weak ones are predictions."""
        if heads.numbers & levels.numbers:
            return False
        later = heads.birth > levels.birth
        if not levels.strong:
            return later or self._is_narrow(levels)
        one_each = len({self.size(place.leaf) for place in heads.places}) == len(heads.places)
        return later and one_each and not self.continues(heads, levels)

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
            if others and (self._is_one_result_of_many(each) or (self._is_narrow(each))):
                return True
            return any(self.continues(each, other) and self._predicts(each, other) for other in others)
        if not each.strong:
            made = any(self.continues(each, other) for other in others)
            return made or not self.seen.traced or (bool(others) and self._is_one_result_of_many(each))
        shared = [other for other in others if other.shared]
        narrow = each.kind == "calls" or self._is_narrow(each)
        return any(
            self.continues(each, other)
            and ((narrow and self._mixed(other)) or self._inside(each, other) or self._head_begins(other, each, shared))
            for other in others
            if other.kind != "calls" or other.shared
        )

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
        if given.kind != "given" or given.call is None or not calls.calls:
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
