"""Everything fxmerge raises, as one small tree under :class:`FxMergeError`.

Refusing to merge is not an error: it is a :class:`fxmerge.core.segment.Refusal`, a value. An error means that a contract was
broken: the input cannot be used, a file is damaged, a budget cannot be met. Every error also subclasses the builtin a caller
would catch, and carries its facts as attributes.
"""

from __future__ import annotations

from typing import Any


class FxMergeError(Exception):
    """Base of all errors that fxmerge raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # As Exception has it, errors with keyword-only facts would not come back from a worker process.
        return _raised_elsewhere, (type(self), self.args, self.__dict__)


def _raised_elsewhere(kind: type[FxMergeError], arguments: tuple[Any, ...], facts: dict[str, Any]) -> FxMergeError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(facts)
    return error


class TraceError(FxMergeError, TypeError):
    """The model cannot be turned into a graph (not a module, control flow on values, inputs it rejects)."""


class InputError(FxMergeError, ValueError):
    """A value given by the caller cannot be used: a budget, a calibration set, an option."""


class CalibrationError(InputError):
    """The calibration data is empty, has the wrong shape, or is not finite."""


class NotFiniteError(FxMergeError, ArithmeticError):
    """A weight, an input or a result is NaN or infinite.

    Attributes:
        where: the qualified name of the tensor.
    """

    def __init__(self, message: str, *, where: str) -> None:
        super().__init__(message)
        self.where = where


class MeasurementError(FxMergeError, RuntimeError):
    """A module that was to be timed could not be prepared or run; the message names it and the cause.

    Attributes:
        index: its position among the modules given to the timer.
    """

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class WorkerError(FxMergeError, RuntimeError):
    """Workers of an executor keep dying, or cannot be had; what they had finished is kept.

    Attributes:
        done, left: how many tasks were finished, and how many were not.
    """

    def __init__(self, message: str, *, done: int, left: int) -> None:
        super().__init__(message)
        self.done = done
        self.left = left


class NothingToMergeError(FxMergeError, LookupError):
    """The network holds nothing that could be merged, for the reasons that its refusals give."""


class BudgetError(FxMergeError, ValueError):
    """No plan meets the budget.

    Attributes:
        asked_ns: the latency asked for, in nanoseconds.
        fastest_ns: the latency of the fastest plan there is, in nanoseconds.
        resource: the name of the second resource that no plan keeps to, or empty.
        asked_amount: what was asked for of it.
        least_amount: the least that a plan (within the latency asked for, if there is one) takes of it.
    """

    def __init__(
        self,
        message: str,
        *,
        asked_ns: int,
        fastest_ns: int,
        resource: str = "",
        asked_amount: int | None = None,
        least_amount: int | None = None,
    ) -> None:
        super().__init__(message)
        self.asked_ns = asked_ns
        self.fastest_ns = fastest_ns
        self.resource = resource
        self.asked_amount = asked_amount
        self.least_amount = least_amount


class PlanError(FxMergeError, ValueError):
    """A plan (or another of our files) is damaged, or of a format that this version does not read."""


class StoreError(FxMergeError, OSError):
    """A store cannot be opened, read or written: no such folder, read-only, a full disk, a damaged or foreign file.

    Attributes:
        path: of the file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class TableError(PlanError):
    """A table of somebody else's format is damaged, or holds what cannot be used.

    Attributes:
        path: of the file.
        line: in it, from 1; 0 where no line is at fault.
        column: the name of the column, or empty.
    """

    def __init__(self, message: str, *, path: str, line: int, column: str) -> None:
        super().__init__(message)
        self.path = path
        self.line = line
        self.column = column


class PlanMismatchError(PlanError):
    """A plan does not belong to this graph.

    Attributes:
        node: the name of the first node that does not fit, or None where the whole graph differs.
    """

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class PassError(FxMergeError, RuntimeError):
    """A pass found its precondition unmet, or did not keep its promise; the message names the pass and the node."""


class NotEquivalentError(FxMergeError, AssertionError):
    """Two modules that must agree do not.

    Attributes:
        error: the largest absolute difference over the largest absolute value of the reference.
        tolerance: what was allowed.
    """

    def __init__(self, message: str, *, error: float, tolerance: float) -> None:
        super().__init__(message)
        self.error = error
        self.tolerance = tolerance
