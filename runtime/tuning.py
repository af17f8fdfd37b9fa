"""Settings of engines for the least latency, chosen by measurement on the user's machine and kept in the user's cache.

Only settings that leave every byte of a video as it is are tried: the number of threads of an engine, and whether those
that wait keep their processors busy. How guidance makes its two predictions changes last bits, and is not among them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.backends import Backend
from t2v_rt.engines.bundle.manifest import from_plain
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import BackendError
from t2v_rt.system.resources import usable_processors
from t2v_rt.system.user_cache import UserCache

if TYPE_CHECKING:
    from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend

logger = logging.getLogger(__name__)
KIND = "tuning"  # of entries in the user's cache
GAIN = 0.03  # a setting must be so much faster than the default ones to be chosen: less is within the noise


@dataclass(frozen=True)
class EngineSettings:
    """Settings of engines.

    Args:
        threads: of one engine; None for as many as there are processors.
        spinning: whether threads that wait for work keep their processors busy.
    """

    threads: int | None = None
    spinning: bool = True

    def applied(self, backend: Backend) -> OnnxRuntimeBackend:
        """The same backend with these settings."""
        from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend

        assert isinstance(backend, OnnxRuntimeBackend)  # the only one that has them
        return replace(backend, threads=self.threads, spinning=self.spinning)


def candidates() -> list[EngineSettings]:
    """What is tried here, the default first: all processors, half of them, one; with spinning and without."""
    counts = dict.fromkeys((None, max(1, usable_processors() // 2), 1))
    return [EngineSettings(count, spinning) for count in counts for spinning in (True, False)]


def check_tunable(name: str, backend: Backend | None = None) -> None:
    """Refuses to tune what has no such settings.

    Args:
        name: of the bundle's backend.
        backend: that was made of it, or None.

    Raises:
        BackendError: its engines run on a GPU.
    """
    if "threads" not in backend_info(name).options or (backend is not None and backend.own_memory):
        raise BackendError(f"engines of {name} run on a GPU here and have no threads to tune; leave tuning out")


def choose(bundle: Bundle, backend: Backend, seconds: Callable[[EngineSettings], float]) -> EngineSettings:
    """Measures all candidates, and keeps the fastest in the user's cache.

    Args:
        bundle: whose engines are measured.
        backend: that runs them.
        seconds: of a call with given settings.

    Returns:
        The fastest; the default settings where none is faster by more than noise.
    """
    times = {settings: seconds(settings) for settings in candidates()}
    default, best = EngineSettings(), min(times, key=times.__getitem__)
    chosen = best if times[best] < times[default] * (1 - GAIN) else default
    for settings, time in times.items():
        logger.info("%s: %.3f s%s", settings, time, ", chosen" if settings == chosen else "")
    UserCache(KIND).put(_entry(bundle, backend), json.dumps(asdict(chosen)).encode())
    return chosen


def kept(bundle: Bundle, backend: Backend) -> EngineSettings | None:
    """What was chosen for a bundle on this machine with this version of the backend; None where nothing was."""
    content = UserCache(KIND).get(_entry(bundle, backend))
    try:
        return None if content is None else from_plain(json.loads(content), EngineSettings)
    except ValueError:
        return None  # an entry that cannot be read counts as none


def tuned_backend(bundle: Bundle, backend: Backend, threads: int | None) -> Backend:
    """A backend with the settings that were chosen for a bundle; with a warning, the same where none were.

    Args:
        bundle: that was opened.
        backend: made for it.
        threads: that were asked for.

    Raises:
        BackendError: its engines run on a GPU, or threads were asked for as well.
    """
    check_tunable(bundle.manifest.backend, backend)
    if threads is not None:
        raise BackendError(f"threads {threads} and tuned were both given; give one of them")
    settings = kept(bundle, backend)
    if settings is None:
        logger.warning("%s was not tuned on this machine; pipe.tune() does it, going on without", bundle.folder)
        return backend
    return settings.applied(backend)


def _entry(bundle: Bundle, backend: Backend) -> str:
    key = "\n".join((bundle.manifest.bundle_id, backend.identity, str(usable_processors())))
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
