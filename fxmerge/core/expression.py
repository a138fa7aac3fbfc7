"""An affine stretch of a network as a value: which maps are applied, where paths are added, where they are concatenated.

An expression is a straight-line program, not a tree, because tensors are shared (a residual block uses its input twice): step 0
is the entry, every later step reads earlier ones, the last is the exit. Every question about a segment is one fold over it:
its geometry here, its kernel in :mod:`fxmerge.algebra.affine`, its text in :meth:`Expression.__str__`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, TypeAlias, TypeVar

from fxmerge.core.geometry import Geometry

T = TypeVar("T")

#: Extra pixels of a tensor, (before, after) on every axis.
Halo: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an expression.

    Args:
        name: the graph node that computes it.
        kind: ``entry`` (no operand), ``apply`` (one map on one operand), ``sum``, ``difference`` or ``concat`` (several operands).
        operands: indices of earlier steps.
        geometry: the map that is applied, or for the entry the identity on its channels; None for the others.
        role: what is applied: a ``convolution`` may be pruned, a ``norm`` goes with the convolution before it, a ``side`` adds a
            tensor that is constant over space (a time embedding) and comes from elsewhere.
        side: the name of the node that gives that tensor.
    """

    name: str
    kind: Literal["entry", "apply", "sum", "difference", "concat"]
    operands: tuple[int, ...] = ()
    geometry: Geometry | None = None
    role: Literal["convolution", "norm", "side", "other"] = "other"
    side: str = ""


@dataclass(frozen=True, slots=True)
class Expression:
    """A straight-line affine program from its entry to its exit (see the module's text)."""

    steps: tuple[Step, ...]

    def fold(
        self,
        *,
        entry: Callable[[Step], T],
        apply: Callable[[Step, T], T],
        add: Callable[[T, T], T],
        concat: Callable[[T, T], T],
        subtract: Callable[[T, T], T] | None = None,
    ) -> tuple[T, ...]:
        """The value of every step, given what each kind of step does with the values of its operands.

        Without ``subtract``, a difference is taken for a sum.
        """
        joins = {"sum": add, "difference": subtract or add, "concat": concat}
        values: list[T] = []
        for step in self.steps:
            operands = [values[i] for i in step.operands]
            if step.kind == "entry":
                values.append(entry(step))
            elif step.kind == "apply":
                values.append(apply(step, operands[0]))
            else:
                values.append(reduce(joins[step.kind], operands))
        return tuple(values)

    def geometries(self) -> tuple[Geometry, ...]:
        """The geometry of the map from the entry to each step.

        Raises:
            ValueError: paths of different strides or channels meet.
        """
        return self.fold(
            entry=_own_geometry,
            apply=lambda step, before: before.then(_own_geometry(step)),
            add=Geometry.plus,
            concat=Geometry.concat,
        )

    @property
    def geometry(self) -> Geometry:
        """The geometry of the one convolution that computes the exit from the entry."""
        return self.geometries()[-1]

    @property
    def convolutions(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.role == "convolution")

    @property
    def sides(self) -> tuple[str, ...]:
        """The nodes whose tensors, constant over space, are added inside; each once."""
        return tuple(dict.fromkeys(step.side for step in self.steps if step.side))

    def halos(self) -> tuple[Halo, ...]:
        """Extra pixels that each step must deliver, (before, after) on every axis, so that nothing inside needs padding.

        Walks back from the exit: a map of stride s and padding (lo, hi) that owes (before, after) asks its operand for
        (s*before + lo, s*after + hi), or, where it makes the image larger, for the pixels that so many positions take
        (:meth:`Axis.halo`); a tensor with several readers owes the most that any asks for. Never negative.
        """
        owed = [((0, 0),) * len(_own_geometry(self.steps[0]).axes)] * len(self.steps)
        for index in range(len(self.steps) - 1, 0, -1):
            step = self.steps[index]
            asked = asked_of_operand(step, owed[index])
            for i in step.operands:
                owed[i] = tuple((max(a, c), max(b, d)) for (a, b), (c, d) in zip(owed[i], asked, strict=True))
        return tuple(owed)

    def keeps_borders(self, vanishing: Sequence[bool] | None = None) -> bool:
        """Whether moving all padding to the entry leaves the function as it is, borders included.

        It does where every tensor that is padded inside is zero outside the image anyway: it was computed from the entry by
        maps without bias that read nothing inside for what is outside: one tap, nearest upsampling. (RepVGG's parallel branches,
        anything after a 1x1 without bias.)

        Args:
            vanishing: for every step, whether its tensor is zero outside the image; None for what sizes alone tell.
        """
        zero_outside = vanishing or self._vanishing()
        padded = {i for step in self.steps if step.geometry is not None and _pads(step.geometry) for i in step.operands}
        return all(zero_outside[i] for i in padded)

    def _vanishing(self) -> tuple[bool, ...]:
        found: tuple[bool, ...] = self.fold(
            entry=lambda step: True,
            apply=lambda step, before: before and _own_geometry(step).keeps_zeros,
            add=lambda a, b: a and b,
            concat=lambda a, b: a and b,
        )
        return found

    def without(self, names: Collection[str]) -> Expression:
        """This expression with the named maps replaced by identities."""
        position: dict[int, int] = {}
        kept: list[Step] = []
        for index, step in enumerate(self.steps):
            operands = tuple(position[i] for i in step.operands)
            if step.name in names and step.kind == "apply":
                position[index] = operands[0]
            else:
                position[index] = len(kept)
                kept.append(replace(step, operands=operands))
        # Dropping the last step can leave the exit in the middle; nothing behind it is read any more.
        return Expression(tuple(kept[: position[len(self.steps) - 1] + 1]))

    def __str__(self) -> str:
        return self.fold(
            entry=lambda step: "x",
            apply=lambda step, before: step.name if before == "x" else f"{before} > {step.name}",
            add=lambda a, b: f"({a} + {b})",
            concat=lambda a, b: f"[{a} | {b}]",
            subtract=lambda a, b: f"({a} - {b})",
        )[-1]


def asked_of_operand(step: Step, halo: Halo) -> Halo:
    """The halo that a step needs on its operands to deliver its own, (before, after) on every axis.

    Negative where the step reads less than the operand: a slice that starts at 1 does not want pixel 0.
    """
    if step.kind != "apply":
        return halo
    return tuple(axis.halo(*wanted) for axis, wanted in zip(_own_geometry(step).axes, halo, strict=True))


def surplus_of(step: Step, halo: Halo) -> Halo:
    """What a step, run without padding on what it has asked for, gives more than its halo; to be cropped."""
    if step.kind != "apply":
        return ((0, 0),) * len(halo)
    return tuple(axis.surplus(*wanted) for axis, wanted in zip(_own_geometry(step).axes, halo, strict=True))


def _pads(geometry: Geometry) -> bool:
    return any(amount > 0 for pair in geometry.padding for amount in pair)


def _own_geometry(step: Step) -> Geometry:
    assert step.geometry is not None, f"step {step.name} of kind {step.kind} has no geometry"
    return step.geometry
