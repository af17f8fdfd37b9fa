"""The denoiser's predictions of one step: conditional and unconditional, in one batch or in two calls."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component
from t2v_rt.runtime import wan
from t2v_rt.runtime.cancel import check_cancelled

Array = NDArray[np.float32]
# Provider -> tokens, of all videos together, up to which one batch was measured to be the faster way: by 6 to 50 % up
# to 720 tokens, by nothing certain from 1280 on, where it takes more memory (benchmarks/results/guidance.json, of the
# demo's denoiser). On a GPU nothing was measured, and memory is what is short there: two calls.
ONE_BATCH_TOKENS: Mapping[str, int] = {"cpu": 720}


class Prompts:
    """The prompt embeddings of a run, and once for all steps what the denoiser takes of them.

    Args:
        embeds: float32 (B, L, D).
        negative_embeds: likewise, or None without guidance.
    """

    def __init__(self, embeds: Array, negative_embeds: Array | None) -> None:
        self.embeds = embeds
        self.negative_embeds = negative_embeds
        self.given = tuple(_fixed(item) for item in (embeds, negative_embeds) if item is not None)
        self.contexts = tuple(wan.text_context(item) for item in self.given)
        self.both = joined(self.contexts)


class Denoiser:
    """A run's way to the denoiser.

    Args:
        component: with the engine `model`.
        prompts: of the run; may be replaced between steps.
        together: whether the two predictions of a step are made in one batch.
        cancel: looked at before each call, or None.
    """

    def __init__(
        self, component: Component, prompts: Prompts, together: bool, cancel: threading.Event | None = None
    ) -> None:
        self.prompts = prompts
        self._engine = component["model"]
        self._padded = all(spec.name != "encoder_attention_bias" for spec in self._engine.inputs)
        plan = self._engine.spec.plan
        self._most = None if plan is None else max(profile.sizes["batch"].max for profile in plan.profiles)
        self._together = together
        self._cancel = cancel

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
        if passes == 2 and self._together:
            text = self._text(self.prompts.both, self.prompts.given)
            prediction = self._infer(np.concatenate([sample, sample]), t, text)
            return prediction[: len(sample)], prediction[len(sample) :]
        pairs = zip(self.prompts.contexts[:passes], self.prompts.given, strict=False)
        return tuple(self._infer(sample, t, self._text(context, [embeds])) for context, embeds in pairs)

    def _text(self, context: wan.TextContext, given: Sequence[Array]) -> dict[str, Array]:
        """What the engine takes of prompts: an engine of fixed shapes all padded positions, and no bias."""
        if self._padded:
            return {"encoder_hidden_states": given[0] if len(given) == 1 else np.concatenate(given)}
        return {"encoder_hidden_states": context.embeds, "encoder_attention_bias": context.bias}

    def _infer(self, sample: Array, t: float, text: Mapping[str, Array]) -> Array:
        """One call, or as many as an engine that was built for small batches needs."""
        most = self._most or len(sample)
        if len(sample) > most:
            rows = [slice(i, i + most) for i in range(0, len(sample), most)]
            parts = [{name: array[part] for name, array in text.items()} for part in rows]
            return np.concatenate([self._infer(sample[part], t, of) for part, of in zip(rows, parts, strict=True)])
        check_cancelled(self._cancel, "denoise")
        feeds = {
            "hidden_states": np.ascontiguousarray(sample, np.float32),
            "timestep": np.full(len(sample), t, np.float32),
            **text,
        }
        prediction: Array = self._engine.infer(feeds)["noise_pred"]
        return prediction


def _fixed(array: Array) -> Array:
    """A read-only copy, which a device may keep from step to step."""
    result = array.copy()
    result.flags.writeable = False
    return result


def one_batch_is_faster(provider: str, tokens: int) -> bool:
    """Whether two predictions of so many tokens are made sooner in one batch; the same answer whenever it is asked."""
    return tokens <= ONE_BATCH_TOKENS.get(provider, 0)


def joined(contexts: Sequence[wan.TextContext]) -> wan.TextContext:
    """Contexts of different lengths as one batch; the rows that the shorter ones lack are hidden from attention."""
    rows = max(context.embeds.shape[1] for context in contexts)
    lacking = [rows - context.embeds.shape[1] for context in contexts]
    return wan.TextContext(
        np.concatenate([np.pad(c.embeds, ((0, 0), (0, n), (0, 0))) for c, n in zip(contexts, lacking, strict=True)]),
        np.concatenate(
            [np.pad(c.bias, ((0, 0), (0, n)), constant_values=-np.inf) for c, n in zip(contexts, lacking, strict=True)]
        ),
    )
