"""ONNX Runtime, imported in this one place, so that its telemetry is off before it begins.

Its Linux and macOS builds (from 1.29 on) otherwise keep a device id and a database of events in the user's cache, and
send them to their maker, from the moment that they are imported: only the environment variable stops that. Those for
Windows write events to the system's tracing and know the call only. Who sets the variable to 0 gets both.
"""

from __future__ import annotations

import os

SWITCH = "ORT_DISABLE_TELEMETRY"
wanted = os.environ.setdefault(SWITCH, "1") == "0"  # processes that are started from here inherit it

import onnxruntime as ort  # noqa: E402

if not wanted:
    ort.disable_telemetry_events()

__all__ = ["ort"]
