"""What a forked process does with what it inherits: nothing native is touched, everything is made anew.

A child of `fork` has the memory of its parent, and only one of its threads. The thread pools of an inference session,
and the GPU, are the parent's: closing a session in the child waits for ever for threads that are not there. So what
holds such things gives them up there, without freeing them, and makes its own at the next use.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from typing import Protocol

from t2v_rt.errors import BackendError


class AfterFork(Protocol):
    """Something that a forked child must put in order before it is used there."""

    def after_fork(self) -> None:
        """Gives up what belongs to the parent; called in the child's only thread."""


_watched: weakref.WeakSet[AfterFork] = weakref.WeakSet()
_gpu_process: dict[str, int] = {}
# Held while engines are made and freed, and modules imported, which take locks of their own: a child that inherited one
# of these taken would wait for it for ever.
loading = threading.RLock()


def watch(item: AfterFork) -> None:
    """Has an object told, for as long as it lives, when this process is a child that was forked."""
    _watched.add(item)


def abandon(*items: object) -> None:
    """Keeps objects for the rest of the process, its end included, so that what frees them never runs."""
    for item in items:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def claim_gpu() -> None:
    """Notes that this process uses a GPU.

    Raises:
        BackendError: a process that it was forked from does, and CUDA works in that one only.
    """
    if _gpu_process.setdefault("pid", os.getpid()) != os.getpid():
        raise BackendError(
            "this process was forked from one that uses the GPU, which CUDA does not allow; start it by "
            "multiprocessing's 'spawn', or open the pipeline in the child only"
        )


def _in_child() -> None:
    loading.release()  # this thread took it before the fork
    for item in list(_watched):
        item.after_fork()


if sys.platform != "win32":
    os.register_at_fork(before=loading.acquire, after_in_parent=loading.release, after_in_child=_in_child)
