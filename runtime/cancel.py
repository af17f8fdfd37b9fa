"""Cancellation: a request looks at an event on its way, and stops where it is set."""

from __future__ import annotations

import threading

from t2v_rt.errors import CancelledError, RequestError


def check_event(cancel: threading.Event | None) -> threading.Event | None:
    """Returns the event; raises RequestError for anything but an event or None."""
    if cancel is not None and not isinstance(cancel, threading.Event):
        raise RequestError(f"cancel is a {type(cancel).__name__}; expected a threading.Event, or None")
    return cancel


def check_cancelled(cancel: threading.Event | None, stage: str, finished: str = "") -> None:
    """Stops a request whose event is set.

    Args:
        cancel: the request's event, or None.
        stage: that the request is in.
        finished: what could not be broken off and was finished first, such as a call of an engine; nothing where the
            event was looked at right before.

    Raises:
        CancelledError: the event is set.
    """
    if cancel is not None and cancel.is_set():
        when = f"; {finished}, which cannot be broken off, was finished first" if finished else ""
        raise CancelledError(f"the request was cancelled in stage {stage}{when}; the pipeline can be called again")
