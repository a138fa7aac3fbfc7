"""What can be merged, how, and what cannot: segments, candidates and refusals, as values that name graph nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from fxmerge.core.expression import Expression
from fxmerge.core.geometry import Geometry
from fxmerge.errors import PlanError

Kind = Literal["composed", "fitted", "identity"]


class Reason(str, Enum):
    """Why something cannot be merged. The values are what ``explain`` prints."""

    OPAQUE = "opaque node"
    BATCH_STATISTICS = "norm without running statistics, or that depends on its input"
    SHARED = "module or parameter used more than once"
    USED_OUTSIDE = "tensor used outside"
    STRIDES = "paths with different strides meet"
    CHANNELS = "paths with different channels meet"
    PADDING_MODE = "padding mode other than zeros"
    SHAPE = "shape is not known or not that of an image"
    SOLE = "nothing to merge with"
    TOO_LARGE = "kernel larger than allowed"
    COMPUTED_WEIGHT = "weight computed from other tensors"
    UPSAMPLING = "the image becomes larger"
    HOOKED = "module with forward hooks"
    LAYOUT = "channels are the last dimension here, or not of all operands"
    REGION = "within a region that runs by rules of its own"


#: What would help, for each reason, where nothing better is known of the node.
ADVICE: Mapping[Reason, str] = {
    Reason.OPAQUE: "if it is affine or pointwise, give an operator for it: default_operators().extended()",
    Reason.BATCH_STATISTICS: "a batch norm with running statistics in its place can be merged",
    Reason.SHARED: "give each call a module of its own, if they need not share weights",
    Reason.USED_OUTSIDE: "whatever else reads this tensor keeps it; let that read what enters or leaves the stretch",
    Reason.STRIDES: "give all paths that meet here the same stride in all",
    Reason.CHANNELS: "give all paths that meet here the same channels",
    Reason.PADDING_MODE: "pad with zeros, if the network can be trained again",
    Reason.SHAPE: "only tensors (batch, channels, one to three dimensions) of known size are merged",
    Reason.SOLE: "nothing; what is before and behind it cannot be merged",
    Reason.TOO_LARGE: "a larger max_extent of find_segments() allows it",
    Reason.COMPUTED_WEIGHT: "compute the weight from parameters alone",
    Reason.UPSAMPLING: "enlarge by whole factors, by nearest neighbours or transposed convolutions, not what was just made smaller",
    Reason.HOOKED: "remove the hooks before tracing",
    Reason.LAYOUT: "bring all operands to one layout, channels first or last, before it",
    Reason.REGION: "cast the network and its inputs in place of autocast within it, or use autocast around the whole network",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node, or a stretch up to a node, that cannot be merged, and why.

    Args:
        node: name of the graph node.
        reason: one of a documented list.
        detail: what was found there.
        advice: what would help; where none is given, what helps with this reason in general.
        target: the qualified module name or function, as a user would find it in the model.
        source: file and line of the user's code, where known.
    """

    node: str
    reason: Reason
    detail: str = ""
    advice: str = ""
    target: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.advice:
            object.__setattr__(self, "advice", ADVICE[self.reason])

    def __str__(self) -> str:
        text = f"{self.node}: {self.reason.value}"
        return f"{text} ({self.detail})" if self.detail else text


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch between two cuts that holds only affine nodes and activations.

    Args:
        entry: the tensor (name of its node) that enters.
        exit: the last affine tensor, before the activation that is kept, if there is one.
        end: the cut that closes the segment: ``exit``, or the kept activation behind it.
        nodes: every node after the entry up to ``end``, in graph order.
        activations: the activations inside, which a merge removes; the kept one is not among them.
        expression: what the stretch computes once the activations inside are gone, and a fixed scale and shift of every channel
            stands for each norm that depends on its input.
        norms: those norms.
    """

    entry: str
    exit: str
    end: str
    nodes: tuple[str, ...]
    activations: tuple[str, ...]
    expression: Expression
    norms: tuple[str, ...] = ()

    @property
    def convolutions(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.expression.convolutions)

    def __str__(self) -> str:
        return f"{self.entry} -> {self.end}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to merge a segment into one convolution.

    Args:
        entry, exit, end: as in :class:`Segment`.
        kind: ``composed`` (the remaining maps, multiplied out), ``fitted`` (one convolution whose weights are fitted to data)
            or ``identity`` (the exit becomes the entry).
        geometry: of the one convolution.
        activations: names of the activations removed.
        removed: names of the pruned convolutions and their norms (composed only).
        exact: whether the function of the original is kept, borders included.
        norms: names of the norms inside that depend on their input. In a composed candidate a scale and a shift of every channel,
            fitted to data, stand for each that is not removed with its convolution; in the others they are gone.
        moved: the one of these that stands behind the convolution, its scale and shift fitted anew (fitted only); or empty.
        sides: names of the side inputs whose matrices are fitted with the convolution (fitted only).
        added: the one of ``activations`` that stands behind the exit, where the original has none; or empty.
    """

    entry: str
    exit: str
    end: str
    kind: Kind
    geometry: Geometry
    activations: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    exact: bool = False
    norms: tuple[str, ...] = ()
    moved: str = ""
    sides: tuple[str, ...] = ()
    added: str = ""

    @property
    def id(self) -> str:
        """A name for this candidate, the same in every run and unique in its network; the key of tables.

        >>> from fxmerge.core.geometry import Geometry
        >>> Candidate("x", "add", "relu", "identity", Geometry.identity(8, 2)).id
        'x->relu identity'
        >>> Candidate("x", "add", "relu", "fitted", Geometry.identity(8, 2), norms=("norm",), moved="norm").id
        'x->relu fitted 8->8 1x1 dw, 1 norm out, then norm'
        """
        text = f"{self.entry}->{self.end} {self.kind}" + (f" {self.geometry}" if self.kind != "identity" else "")
        text += " pruned" if self.removed else ""
        text += f", {len(self.norms)} norm{'s' if len(self.norms) > 1 else ''} out" if self.norms else ""
        behind = [name for name in (self.moved, self.added) if name]
        return ", then ".join((text, *behind))

    @property
    def fixed(self) -> tuple[str, ...]:
        """The norms that a scale and a shift stand for."""
        return tuple(name for name in self.norms if name not in self.removed) if self.kind == "composed" else ()

    def part(self, name: str) -> str:
        """The name under which weights hold the map that stands for a norm, or that a side input goes through."""
        return f"{self.id} @ {name}"

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        choices = {"norms": list(self.norms), "moved": self.moved, "sides": list(self.sides), "added": self.added}
        return {
            "entry": self.entry,
            "exit": self.exit,
            "end": self.end,
            "kind": self.kind,
            "geometry": self.geometry.to_json(),
            "activations": list(self.activations),
            "removed": list(self.removed),
            "exact": self.exact,
            **{key: value for key, value in choices.items() if value},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value.
        """
        try:
            names = [data["entry"], data["exit"], data["end"], *data["activations"], *data["removed"]]
            choices = tuple(data.get("norms", ())), data.get("moved", ""), tuple(data.get("sides", ())), data.get("added", "")
            names += [*choices[0], choices[1], *choices[2], choices[3]]
            if data["kind"] not in get_args(Kind) or not all(isinstance(name, str) for name in names):
                raise ValueError("unknown kind, or a name that is no string")
            return cls(
                data["entry"],
                data["exit"],
                data["end"],
                data["kind"],
                Geometry.from_json(data["geometry"]),
                tuple(data["activations"]),
                tuple(data["removed"]),
                bool(data["exact"]),
                *choices,
            )
        except (KeyError, TypeError, ValueError) as fault:
            raise PlanError(f"not a candidate: {fault!r} in {data!r:.200}") from fault


def narrowed(proposals: Iterable[Proposal], wanted: Callable[[Candidate], bool]) -> tuple[Proposal, ...]:
    """The proposals with the candidates that are wanted; those that have none are gone."""
    kept = (Proposal(p.segment, tuple(filter(wanted, p.candidates))) for p in proposals)
    return tuple(proposal for proposal in kept if proposal.candidates)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A segment with the ways to merge it."""

    segment: Segment
    candidates: tuple[Candidate, ...] = field(default=())
