"""Which layers of a decoder stand for all of it: a few of each kind of layer, and how many layers each stands for.

Layers are of one kind where maveriq's own description of the decoder says so (`maveriq.domain.decoder.LayerKind`, by
which the physics estimator counts), and `transformers` builds them alike. Where maveriq does not read the decoder, the
second alone decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maveriq.domain.attention import DeltaNet, LatentAttention, StateSpace
from maveriq.domain.decoder import Decoder, LayerKind
from maveriq.domain.feed_forward import ExpertFeedForward
from maveriq.errors import InputError
from maveriq.profiling.transformers_decoder import LayerSignature

_SHOWN_DIFFERENCES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKinds:
    """The kinds of a decoder's layers.

    Args:
        names: what each kind is, in words.
        pattern: for each layer in order, the index of its kind.
    """

    names: tuple[str, ...]
    pattern: tuple[int, ...]

    def counts(self, layers: Sequence[int] | None = None) -> list[int]:
        """Return how many layers of each kind there are, among all or among these."""
        pattern = self.pattern if layers is None else [self.pattern[layer] for layer in layers]
        return [list(pattern).count(kind) for kind in range(len(self.names))]


def layer_kinds(signatures: Sequence[LayerSignature], decoder: Decoder | None) -> LayerKinds:
    """Return the kinds of layers.

    Args:
        signatures: how `transformers` builds each layer.
        decoder: maveriq's description of the decoder, None where it has none.
    """
    described = [decoder.layer_kinds[kind] for kind in decoder.layer_pattern] if decoder else [None] * len(signatures)
    pairs = list(zip(described, signatures, strict=True))
    distinct = list(dict.fromkeys(pairs))
    common = frozenset.intersection(*signatures)
    names = [_name(kind) if kind else "" for kind, _ in distinct]
    full_names = [
        f"{name} ({difference})" if name and difference else name or difference or _class(common)
        for name, difference in (
            (name, _difference(signature, common) if names.count(name) > 1 else "")
            for name, (_, signature) in zip(names, distinct, strict=True)
        )
    ]
    return LayerKinds(names=tuple(full_names), pattern=tuple(distinct.index(pair) for pair in pairs))


def _class(common: LayerSignature) -> str:
    """Return the class of the layers, all of one."""
    return next((text.removeprefix("0: is ") for text in sorted(common) if text.startswith("0: is ")), "layer")


def _name(kind: LayerKind) -> str:
    """Return what a layer consists of, in words."""
    parts = []
    if kind.attention is not None:
        window = kind.attention.window
        named = {LatentAttention: "latent attention", DeltaNet: "delta net", StateSpace: "state space"}
        plain = f"attention over {window:,} tokens" if window else "full attention"
        parts.append(named.get(type(kind.attention), plain))
    if isinstance(kind.feed_forward, ExpertFeedForward):
        parts.append(f"{kind.feed_forward.experts} experts")
    elif kind.feed_forward is not None:
        parts.append("dense feed-forward part")
    return " and ".join(parts)


def _difference(signature: LayerSignature, common: LayerSignature) -> str:
    """Return in brief what of a layer is not so in all: modules first, then settings, the outer ones first."""
    differences = sorted(signature - common, key=lambda text: (" is " not in text, text.count("."), text))
    return ", ".join(text.partition(":")[2].strip() for text in differences[:_SHOWN_DIFFERENCES])


def check_layer_count(kinds: LayerKinds, layers: int, where: str) -> None:
    """Check that so many layers can stand for all.

    Raises:
        InputError: there are fewer than kinds, or more than the model has.
    """
    if layers > len(kinds.pattern):
        raise InputError(f"{where} has {len(kinds.pattern)} layers; --layers must be at most that, not {layers}")
    if layers < len(kinds.names):
        listed = ", ".join(f"{number} with {name}" for name, number in zip(kinds.names, kinds.counts(), strict=True))
        shown = listed if len(listed) <= 600 else f"{listed[:600]}..."
        raise InputError(
            f"{where} has {len(kinds.names)} kinds of layers ({shown}); --layers must be at least {len(kinds.names)}, "
            f"one for each, not {layers}"
        )


def selections(kinds: LayerKinds, layers: int) -> Iterator[tuple[int, ...]]:
    """Yield choices of layers that have every kind, the best first.

    The first has the kinds in the proportion of the whole, and of each kind the first layers. The others are runs of
    neighbouring layers: a configuration may have no words for the first choice.
    """
    wanted = _proportional(kinds.counts(), layers)
    first = [
        layer
        for kind, number in enumerate(wanted)
        for layer in [at for at, of in enumerate(kinds.pattern) if of == kind][:number]
    ]
    yield tuple(sorted(first))
    for start in range(len(kinds.pattern) - layers + 1):
        run = tuple(range(start, start + layers))
        if all(kinds.counts(run)) and run != tuple(sorted(first)):
            yield run


def _proportional(counts: Sequence[int], total: int) -> list[int]:
    """Return whole numbers of sum `total` in the proportion of `counts`, each at least 1 and at most its count."""
    found = [1] * len(counts)
    while sum(found) < total:
        # The kind whose layers stand for most (D'Hondt's rule); on a tie, the first.
        kind = max(range(len(counts)), key=lambda kind: (counts[kind] > found[kind], counts[kind] / (found[kind] + 1)))
        found[kind] += 1
    return found


def stands_for(kinds: LayerKinds, chosen: Sequence[int]) -> tuple[int, ...]:
    """Return for each chosen layer how many layers of its kind it stands for, itself included.

    The sum over the chosen layers of a kind is the number of layers of that kind.
    """
    totals, numbers = kinds.counts(), kinds.counts(chosen)
    found, seen = [], [0] * len(totals)
    for layer in chosen:
        kind = kinds.pattern[layer]
        share, rest = divmod(totals[kind], numbers[kind])
        found.append(share + (seen[kind] < rest))
        seen[kind] += 1
    return tuple(found)
