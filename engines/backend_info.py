"""What is known of each backend, whether its library is installed or not; nothing is imported for it.

Nobody else asks for a backend's name to learn what it can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from t2v_rt.errors import BackendError


@dataclass(frozen=True)
class BackendInfo:
    """What is known of a backend, whether its library is installed or not.

    Args:
        module: of its library.
        extra: of t2v-rt that installs it; empty where t2v-rt itself does.
        precisions: of matmul and convolution operands, its default first.
        why_precisions: why it takes no others.
        ahead_of_time: whether its engines are plans, built for certain shapes and GPUs; otherwise they are ONNX graphs.
        own_memory: whether engines work in a card's memory, whatever the provider; otherwise `providers` says it.
        native_code: whether its engines are native code, which runs only where its origin is trusted.
        parks_states: whether states of engines can wait in host memory for their turn.
        options: names in `OPTIONS` that it has; others are refused.
        providers: that it can run on, the default first, and whether engines work in a card's memory there.
        least_compute: compute capability that a GPU must have; None where it needs none.
        least_version: of its library.
        for_cuda_12: package that takes the library's place beside a driver too old for CUDA 13; empty where none does.
    """

    module: str
    extra: str
    precisions: tuple[str, ...]
    why_precisions: str
    ahead_of_time: bool = False
    own_memory: bool = False
    native_code: bool = False
    parks_states: bool = False
    options: frozenset[str] = frozenset()
    providers: Mapping[str, bool] = field(default_factory=dict)
    least_compute: float | None = None
    least_version: str = ""
    for_cuda_12: str = ""

    @property
    def default_provider(self) -> str | None:
        """The provider where none is asked for; None where there is none to choose."""
        return next(iter(self.providers), None)

    def has_own_memory(self, provider: str | None = None) -> bool:
        """Whether engines work in a card's memory.

        Args:
            provider: that was asked for, or None.

        Raises:
            BackendError: an unknown provider.
        """
        if provider is not None and provider not in self.providers:
            raise BackendError(f"unknown provider {provider!r}; expected one of {', '.join(self.providers)}")
        chosen = self.default_provider if provider is None else provider
        return self.own_memory if chosen is None else self.providers[chosen]


RTX = BackendInfo(
    "tensorrt_rtx",
    "tensorrt-rtx",
    ("fp16", "bf16"),
    "it has fused attention for these only",
    ahead_of_time=True,
    own_memory=True,
    native_code=True,
    parks_states=True,
    options=frozenset({"attention_accumulation", "device", "gpus", "trust"}),
    least_compute=7.5,
    least_version="1.7",  # before it each convolution of a context took tens of MB of the host's memory
    for_cuda_12="tensorrt-rtx-cu12",
)
BACKENDS: Mapping[str, BackendInfo] = {
    "onnxruntime": BackendInfo(
        "onnxruntime",
        "",
        ("fp32", "fp16"),
        "its processors lack it",
        options=frozenset({"device", "provider", "threads"}),
        providers={"cpu": False, "cuda": True},
        least_version="1.22",
    ),
    "tensorrt-rtx": RTX,
    "tensorrt": replace(
        RTX,
        module="tensorrt",
        extra="tensorrt",
        options=RTX.options - {"gpus"},
        least_version="10.15",  # the first that reads Attention and RMSNormalization of a graph
        for_cuda_12="tensorrt-cu12",
    ),
}
# options that not every backend has: how the commands spell them, and what a backend without them is like
OPTIONS: Mapping[str, tuple[str, str]] = {
    "device": ("--device", "has no GPUs to choose from"),
    "provider": ("--provider", "has no providers to choose from, its plans run on a GPU"),
    "threads": ("--threads", "has no threads to set, its plans run on a GPU"),
    "trust": ("--trust", "runs no native code of a bundle"),
    "gpus": ("--gpu", "does not build for named GPUs"),
    "attention_accumulation": ("--attention-accumulation", "chooses the sums of its attention by itself"),
}


def check_backend(name: str) -> str:
    """Returns a known backend's name; raises BackendError, with the known ones, for any other."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def backend_info(name: str) -> BackendInfo:
    """What is known of a backend; raises BackendError, with the known ones, for an unknown name."""
    return BACKENDS[check_backend(name)]


def check_options(name: str, given: Mapping[str, object]) -> None:
    """Refuses options that a backend does not have, which it would pass over.

    Args:
        name: of the backend.
        given: option -> value, None where it was left out; options that every backend has are not among them.

    Raises:
        BackendError: an unknown backend, or an option that it does not have.
    """
    info = backend_info(name)
    for option, value in given.items():
        if value is not None and option not in info.options:
            flag, reason = OPTIONS[option]
            others = " and ".join(other for other, known in BACKENDS.items() if option in known.options)
            raise BackendError(f"backend {name} {reason}; leave {flag} ({option}=) out, which is for {others}")
