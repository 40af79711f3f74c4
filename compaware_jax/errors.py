"""Errors of the library: each says what was found, what was expected and what to do."""


class CompawareError(ValueError):
    """Base class: catch it to catch everything this library refuses."""


class TraceError(CompawareError):
    """The function or its variables cannot be analysed."""


class UnknownPrimitiveError(CompawareError):
    """A primitive without a rule was met in strict mode."""


class PlanError(CompawareError):
    """A plan does not fit the tree or the function it is applied to."""


class RequestError(CompawareError):
    """An argument of a call is malformed: data, steps, keys, settings of a search."""


class BudgetError(CompawareError):
    """A budget is malformed or cannot be reached."""


class CriterionError(CompawareError):
    """A criterion is malformed, or the dense model already fails it."""


class DivergenceError(CompawareError):
    """Training ended in values that are not finite."""


class CheckpointError(CompawareError):
    """A checkpoint is corrupt or belongs to another job."""


def gist(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return f"{type(error).__name__}: {text}"


_LONGEST = 300
