"""What people who know diffusers' pipelines try first: refused at once, in one line that says what to use here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.runtime.diffusers_habits import INSTEAD
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import DDIMScheduler
from tests.support.demo_bundle import build_demo


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(build_demo(tmp_path_factory.mktemp("habits")), prompt_cache=False)


def foreign(module: str, name: str) -> Any:
    """An object of a class of that name in that module, as far as anybody can tell without importing it."""
    return type(name, (), {"__module__": module})()


def refuse_engines(pipe: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where anything is loaded."""

    def load(name: str) -> None:
        pytest.fail(f"{name} was loaded")

    monkeypatch.setattr(pipe.stages.components, "get", load)


BAD_GENERATORS = [
    (
        foreign("torch._C", "Generator"),
        "generator is of type torch._C.Generator; expected t2v_rt.runtime.noise",
    ),
    ([foreign("torch._C", "Generator")], "generator is of type torch._C.Generator"),
    (np.random.default_rng(0), r"generator is of type numpy.random._generator.Generator"),
    (np.random.RandomState(0), r"generator is of type numpy.random.mtrand.RandomState"),
    (7, "generator is of type int"),
    (iter([Generator(0)]), "generator is of type list_iterator"),
    ([], "0 generators were given for 1 videos"),
    ((Generator(0), Generator(1)), "2 generators were given for 1 videos; give one, or one for each"),
]


@pytest.mark.parametrize(("generator", "message"), BAD_GENERATORS)
def test_a_wrong_generator_is_refused_before_anything_is_loaded(
    pipe: TextToVideoPipeline, generator: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_engines(pipe, monkeypatch)
    with pytest.raises(RequestError, match=message):
        pipe("a", generator=generator)
    with pytest.raises(RequestError, match=message):
        pipe.stream("a", generator=generator)


def test_the_generator_that_is_named_draws_the_numbers_that_are_meant(pipe: TextToVideoPipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 1, "num_frames": 1, "output_type": "latent"}
    found = pipe("a", generator=Generator(7), **settings)
    assert found.seed is None
    assert np.array_equal(found.frames, pipe("a", seed=7, **settings).frames)
    with pytest.raises(RequestError, match="seed and generator were both given; give one of them"):
        pipe("a", seed=7, generator=Generator(7))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            foreign("diffusers.schedulers.scheduling_ddim", "DDIMScheduler"),
            r"diffusers' DDIMScheduler; expected .*: get_scheduler\('DDIMScheduler', theirs.config\)",
        ),
        ("ddim", r"pipe.scheduler is 'ddim'; expected .* get_scheduler\(name, pipe.scheduler.config\)"),
        (None, "pipe.scheduler is of type NoneType"),
        (DDIMScheduler, r"is the class DDIMScheduler; expected an instance: its from_config\(pipe.scheduler.config\)"),
        ({"_class_name": "DDIMScheduler"}, "pipe.scheduler is of type dict"),
    ],
)
def test_a_foreign_scheduler_is_refused_at_assignment(pipe: TextToVideoPipeline, scheduler: Any, message: str) -> None:
    before = pipe.scheduler
    with pytest.raises(RequestError, match=message):
        pipe.scheduler = scheduler
    assert pipe.scheduler is before


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            foreign("torch", "Tensor"),
            r"{0} is of type torch.Tensor; expected .*: {0}.float\(\).cpu\(\).numpy",
        ),
        (foreign("PIL.Image", "Image"), "{0} is of type PIL.Image.Image; expected a floating-point NumPy array"),
        ([[1.0]], "{0} is of type list; expected a floating-point NumPy array"),
        (np.zeros((1, 2), np.int64), r"{0} is int64 \[1, 2\]; expected a floating-point NumPy array"),
    ],
)
def test_arrays_of_other_libraries_are_refused(
    pipe: TextToVideoPipeline, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_engines(pipe, monkeypatch)
    prompt = None if name == "prompt_embeds" else "a"
    with pytest.raises(RequestError, match=message.format(name)):
        pipe(prompt, **{name: value})


def test_latents_to_decode_and_texts_to_encode_are_checked_too(pipe: TextToVideoPipeline) -> None:
    with pytest.raises(RequestError, match=r"latents is of type torch\.Tensor"):
        pipe.decode(foreign("torch", "Tensor"))
    assert np.array_equal(pipe.encode_prompt("a red ball"), pipe.encode_prompt(["a red ball"]))


def test_a_callback_that_returns_what_numpy_cannot_take_is_told(pipe: TextToVideoPipeline) -> None:
    class Tensor:
        """As one in a GPU's memory."""

        __module__ = "torch"

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    with pytest.raises(RequestError, match=r"'latents' of type torch.*; expected a NumPy array: latents.float"):
        pipe("a", seed=1, num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": Tensor()})


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_what_is_done_in_another_way_here_is_answered_with_that_way(pipe: TextToVideoPipeline, name: str) -> None:
    with pytest.raises(AttributeError, match=f"pipe.{name} is diffusers' and not t2v-rt's: "):
        getattr(pipe, name)
    with pytest.raises(RequestError, match=INSTEAD[name][:20].partition("(")[0]):
        setattr(pipe, name, None)
    assert not hasattr(pipe, name)
    assert name not in dir(pipe)


def test_other_names_are_what_they_are_in_python(pipe: TextToVideoPipeline) -> None:
    with pytest.raises(AttributeError, match="'TextToVideoPipeline' object has no attribute 'nonsense'"):
        pipe.nonsense  # type: ignore[attr-defined]  # noqa: B018
    pipe.of_the_user = 3  # type: ignore[attr-defined]
    assert pipe.of_the_user == 3  # type: ignore[attr-defined]


def test_a_callback_that_interrupts_as_in_diffusers_is_told_of_cancel(pipe: TextToVideoPipeline) -> None:
    steps = []

    def interrupt(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        steps.append(step)
        pipe._interrupt = True  # type: ignore[attr-defined]

    with pytest.raises(RequestError, match=r"give the call cancel=threading.Event\(\), and set that event to end it"):
        pipe("a", seed=1, num_inference_steps=3, callback_on_step_end=interrupt)
    assert steps == [0]


def test_the_real_objects_are_known_for_what_they_are(pipe: TextToVideoPipeline) -> None:
    torch: ModuleType = pytest.importorskip("torch")
    with pytest.raises(RequestError, match=r"generator is of type torch\._C\.Generator"):
        pipe("a", generator=torch.Generator())
    with pytest.raises(RequestError, match=r"latents is of type torch.Tensor; .*: latents.float\(\).cpu\(\).numpy"):
        pipe("a", latents=torch.zeros(1, 8, 5, 8, 8))
    diffusers: ModuleType = pytest.importorskip("diffusers")
    with pytest.raises(RequestError, match="diffusers' UniPCMultistepScheduler"):
        pipe.scheduler = diffusers.UniPCMultistepScheduler()
