"""The error tree of t2v-rt.

    T2VError
    ├── InputError            what the caller gave cannot be used (exit code 2)
    │   ├── RequestError      a setting of a request: size, steps, guidance, scheduler, output …
    │   │   └── ForeignAttributeError  something of diffusers' pipelines that is done in another way here
    │   ├── CheckpointError   a diffusers folder that cannot be exported
    │   ├── BundleError       a bundle that cannot be opened: missing, edited, newer schema …
    │   └── BackendError      a backend that is unknown, not installed or not usable here
    ├── EngineError           an engine that failed, or gave values that are not finite (exit code 1)
    │   ├── OutOfMemoryError  the device, or the machine, had no room for what an engine works in
    │   ├── PreviewError      a look at a video on its way that failed; the video goes on
    │   └── VerificationError engines that do not give the answers of their reference
    └── CancelledError        a request that was stopped by the caller's own event (exit code 130)

Every message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def type_of(value: object) -> str:
    """The full name of a value's type, for a message."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


class T2VError(Exception):
    """Base of all errors that t2v-rt raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InputError(T2VError, ValueError):
    """What the caller gave cannot be used."""

    exit_code = 2


class RequestError(InputError):
    """A setting of a request is invalid."""


class ForeignAttributeError(RequestError, AttributeError):
    """An attribute or method of diffusers' pipelines that is done in another way here."""


class CheckpointError(InputError):
    """A checkpoint cannot be exported."""


class BundleError(InputError):
    """A bundle is missing, damaged, or not readable by this version."""


class BackendError(InputError):
    """A backend is unknown, not installed, or not usable on this machine."""


class EngineError(T2VError, RuntimeError):
    """An engine failed, or returned values that are not finite."""


class OutOfMemoryError(EngineError):
    """A device had no room for an engine, its state or what it works in."""


class PreviewError(EngineError):
    """A look at a video on its way failed; where a step callback leaves it uncaught, the video goes on."""


class VerificationError(EngineError):
    """Engines do not give the answers of their reference.

    Args:
        message: which bundle's.
        report: what each component answered, as plain JSON values.
    """

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class CancelledError(T2VError):
    """A request was stopped by its `cancel` event."""

    exit_code = 130
