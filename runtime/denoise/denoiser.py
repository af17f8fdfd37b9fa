"""The denoiser's predictions of one step: conditional and unconditional, in one batch or in two calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component
from t2v_rt.runtime.cancel import check_cancelled
from t2v_rt.runtime.denoise.guidance import Guidance
from t2v_rt.runtime.families import TextRule

Array = NDArray[np.float32]
# Tokens, of all videos together, up to which one batch was measured to be the faster way on the CPU: by 6 to 50 % up to
# 720 tokens, by nothing certain from 1280 on, where it takes more memory (benchmarks/results/guidance.json, of the
# demo's denoiser). On a card nothing was measured, and memory is what is short there: two calls.
ONE_BATCH_TOKENS = 720
CALL = "the denoiser call in progress"  # which a card takes up to 13 s for; what a cancelled run says of it


@dataclass(frozen=True)
class Prompts:
    """The prompt embeddings of a run.

    Args:
        embeds: float32 (B, L, D).
        negative_embeds: float32 (B, L, D), or None without guidance.
    """

    embeds: Array
    negative_embeds: Array | None


class Denoiser:
    """A run's way to the denoiser.

    Args:
        component: with the engine `model`.
        rule: how its family takes text.
        prompts: of the run; may be replaced between steps.
        together: whether the two predictions of a step are made in one batch.
        cancel: looked at before each call, or None.
    """

    def __init__(
        self,
        component: Component,
        rule: TextRule,
        prompts: Prompts,
        together: bool,
        cancel: threading.Event | None = None,
    ) -> None:
        self._engine = component["model"]
        self._rule = rule
        plan = self._engine.spec.plan
        self._most = None if plan is None else max(profile.sizes["batch"].max for profile in plan.profiles)
        self._together = together
        self._cancel = cancel
        self._take(prompts)

    @property
    def prompts(self) -> Prompts:
        """Of the run; what the engine takes of them is made once for all steps."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Prompts) -> None:
        if prompts is not self._prompts:
            self._take(prompts)

    def _take(self, prompts: Prompts) -> None:
        given = [array for array in (prompts.embeds, prompts.negative_embeds) if array is not None]
        rows = sum(map(len, given))
        self._prompts = prompts
        self._alone: dict[int, Sequence[Mapping[str, Array]]] = {}  # made where a step makes its predictions apart
        # several calls make no batch: each is of one prediction then, and there is one text to keep of each prompt
        batches = self._together and len(given) > 1 and rows <= (self._most or rows)
        self._both = self._texts(given) if batches else None

    def _texts(self, embeds: Sequence[Array]) -> Sequence[Mapping[str, Array]]:
        """What each call takes of a batch's prompts: read-only copies, which a device may keep from step to step."""
        inputs = self._rule.inputs(self._engine.inputs, embeds)
        rows = sum(map(len, embeds))
        most = self._most or rows
        calls = [{name: array[i : i + most].copy() for name, array in inputs.items()} for i in range(0, rows, most)]
        for array in (array for call in calls for array in call.values()):
            array.flags.writeable = False
        return calls

    def predict(self, sample: Array, t: float, passes: int) -> tuple[Array, ...]:
        """The predictions of one step for all videos of the batch.

        Args:
            sample: float32 (B, C, F, H, W).
            t: the timestep.
            passes: 1 for the conditional prediction, 2 for both.

        Returns:
            As many arrays float32 (B, C, F, H, W).

        Raises:
            CancelledError: the request was cancelled.
            EngineError: the engine failed.
        """
        if passes == 2 and self._both is not None:
            prediction = self._infer(np.concatenate([sample, sample]), t, self._both)
            return prediction[: len(sample)], prediction[len(sample) :]
        return tuple(self._infer(sample, t, self._text_alone(i)) for i in range(passes))

    def _text_alone(self, index: int) -> Sequence[Mapping[str, Array]]:
        """What the calls of one prediction take of its prompts: those of the conditional one, or of the other."""
        if index not in self._alone:
            embeds = (self._prompts.embeds, self._prompts.negative_embeds)[index]
            assert embeds is not None
            self._alone[index] = self._texts([embeds])
        return self._alone[index]

    def _infer(self, sample: Array, t: float, texts: Sequence[Mapping[str, Array]]) -> Array:
        """One call, or as many as an engine that was built for small batches needs."""
        most = self._most or len(sample)
        parts = [self._call(sample[i * most : (i + 1) * most], t, text) for i, text in enumerate(texts)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _call(self, sample: Array, t: float, text: Mapping[str, Array]) -> Array:
        check_cancelled(self._cancel, "denoise")
        feeds = {
            "hidden_states": np.ascontiguousarray(sample, np.float32),
            "timestep": np.full(len(sample), t, np.float32),
            **text,
        }
        prediction: Array = self._engine.infer(feeds)["noise_pred"]
        check_cancelled(self._cancel, "denoise", CALL)
        return prediction


def guidance_batches(guidance: Guidance, asked: bool | None, own_memory: bool, tokens: int) -> tuple[bool, ...]:
    """Whether both predictions of a step may be made in one batch, the better way first.

    Args:
        guidance: that needs them.
        asked: what the caller chose, or None.
        own_memory: whether the denoiser works in a card's memory.
        tokens: of one prediction.
    """
    if not guidance.needs_negative:
        return (False,)
    if asked is not None:
        return (asked,)
    return (True, False) if one_batch_is_faster(own_memory, tokens) else (False,)


def one_batch_is_faster(own_memory: bool, tokens: int) -> bool:
    """Whether two predictions of so many tokens are made sooner in one batch; the same answer whenever it is asked.

    Args:
        own_memory: whether engines work in a card's memory.
        tokens: of all videos together.
    """
    return not own_memory and tokens <= ONE_BATCH_TOKENS
