"""What is read from a plan's text, on short plans in its form, and what is made of it."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import EngineError
from t2v_rt.engines.bundle.profiles import AttentionSpec
from t2v_rt.engines.tensorrt import plan_text
from t2v_rt.engines.tensorrt.attention import GraphAttention, check_attention, read_attention
from t2v_rt.engines.tensorrt.plan_text import FusedAttention, PlanText, read_plan

REGIONS = (
    "name=devmem size=4096 alignment=128 instance=0 type=user place=accelerator unified=false",
    "name=more size=512 alignment=128 instance=0 type=user place=accelerator unified=false",
    "name=sizes size=64 alignment=128 instance=0 type=user place=host unified=false",
    "name=consts size=900 alignment=128 instance=0 type=system place=accelerator unified=false constant=true",
)
TENSORS = (
    'tensor={ alignment=128 dims={ 12 768 128 } mem_prop=0 name="q" offset=0 type=half }',
    'tensor={ alignment=128 dims={ 12 128 768 } mem_prop=0 name="k" offset=0 type=half }',
    'sub_tensor={ base="x" const_offset=0 dims={ 12 128 512 } mem_prop=0 name="text^deref" offset=0 type=half }',
    'tensor={ alignment=128 dims={ 12 "tokens.1" 128 } mem_prop=0 name="any_q" offset=0 type=half }',
    'tensor={ alignment=128 dims={ 12 "tokens.1" 128 } mem_prop=0 name="any_k" offset=0 type=half }',
)


def function(name: str, arguments: Sequence[str], layer: str = "", hash_: str = "0x1") -> str:
    given = " ".join(f'"{argument}"' for argument in arguments)
    layers = f"[ONNX Layer: {layer}]\x1e[ONNX Layer: Add_1]" if layer else ""
    return (
        f"function={{ name={name} fqn={name}_{hash_} args={{ {given} }} input_args={{ {given} }} binary = 0 "
        f'grid = {{ 1 1 1 }} stream=0 layers="{layers}" swap_ab=false }}'
    )


def fused(layer: str, query: str = "q", key: str = "k", hash_: str = "0x1") -> str:
    return function("_gemm_mha_v2", (query, key, "v"), layer, hash_)


def product(layer: str) -> str:
    return (
        f'fully_connected={{ name="__fc1" output={{"o" }} input={{"a" "b" }} stream=0 layers="[ONNX Layer: {layer}]" }}'
    )


def source(scores: str, values: str, hash_: str = "0x1") -> bytes:
    """The source of a fused attention as a plan carries it, after a few bytes of its own."""
    return (
        f"#define A 1\nusing Kernel_traits = fmha::Kernel_traits_v2_flash_attention<\n\tfmha::{scores}_traits,\n"
        f"\tfmha::{values}_traits,\n\tfalse, // layout\n\t128 // head size\n>;\n"
        f'extern "C" __global__ void _gemm_mha_v2_{hash_}(\n  const half* a) {{\n}}\n'
    ).encode()


def program(
    instructions: Sequence[str], *sources: bytes, targets: str = "sm80 sm89", regions: Sequence[str] = REGIONS
) -> bytes:
    """A program, with the source of its kernels after it."""
    lines = ["header {", "  version = 5", "  n_streams = 2", *(f"  region = {{ {region} }}" for region in regions)]
    lines += ["  stream_capturable=1", f"  accelerators={{{targets} }}", "}", "descriptors {"]
    lines += [f"  {tensor}" for tensor in TENSORS]
    lines += ["}", "main {", " label bb1: ", *(f"  {line}" for line in instructions), "}", "shape_main {", "}"]
    return (
        b"\x00NLYM\x01\x02" + "\n".join(lines).encode() + b"\n" + b"".join(b"\x00\x10/\x00" + text for text in sources)
    )


def weights(nbytes: int) -> bytes:
    block = np.random.default_rng(0).normal(size=1 << 15).astype(np.float16).tobytes()
    return block * (nbytes // len(block))


def read(*parts: bytes) -> PlanText:
    return read_plan(io.BytesIO(b"ptrt\x01\x00" + b"".join(parts) + weights(1 << 18)))


def test_a_program_is_read_in_all_its_parts() -> None:
    calls = [
        'signal={ name="s" stream=0 event=1 layers="" }',
        function("__myl_Add", ("a", "b"), hash_="0xa"),
        function("__myl_Add", ("c", "d"), hash_="0xa"),
        fused("Attention_1"),
        fused("Attention_2", key="text^deref", hash_="0x2"),
        product("MatMul_7"),
        'wait={ name="w" stream=0 event=1 layers="" }',
    ]
    sources = source("Ampere_hmma_fp32", "Ampere_hmma_fp32"), source("Ampere_hmma_fp32", "Ampere_hmma_fp16", "0x2")
    (found,) = read(program(calls, *sources)).programs
    assert found.targets == ("sm80", "sm89")
    assert [(region.name, region.bytes) for region in found.regions or ()] == [
        *(("devmem", 4096), ("more", 512)),
        *(("sizes", 64), ("consts", 900)),
    ]
    assert found.context_bytes == 4096 + 512
    assert (found.launches, found.sources) == (5, 3)
    assert found.fused == (
        FusedAttention("_gemm_mha_v2_0x1", "Attention_1", 768, 768, True, "fp32", "fp32"),
        FusedAttention("_gemm_mha_v2_0x2", "Attention_2", 768, 512, False, "fp32", "fp16"),
    )
    assert found.unfused == ()
    assert found.accumulation == "fp16"  # one half is enough


@pytest.mark.parametrize(
    ("traits", "sums"),
    [
        (("Ampere_hmma_fp32", "Ampere_hmma_fp32"), "fp32"),
        (("Ampere_hmma_fp16", "Ampere_hmma_fp16"), "fp16"),
        (("Turing_hmma_fp32", "Turing_hmma_fp16"), "fp16"),
        (("Ampere_hmma_bf16", "Ampere_hmma_bf16"), "fp32"),
        (("Ada_qmma_e4m3_fp32", "Ada_qmma_e4m3_fp32"), "fp32"),
        (("Later_wgmma_tf19", "Later_wgmma_tf19"), None),
        (("Later_wgmma_tf19", "Ampere_hmma_fp16"), "fp16"),
    ],
)
def test_what_is_added_up_in_is_in_the_traits(traits: tuple[str, str], sums: str | None) -> None:
    (found,) = read(program([fused("Attention_1")], source(*traits))).programs
    assert found.accumulation == sums


def test_lengths_that_vary_are_compared_by_their_names() -> None:
    calls = [
        fused("Attention_1", "any_q", "any_k"),
        fused("Attention_2", "any_q", "text^deref"),
        fused("Attention_3", "?"),
    ]
    (found,) = read(program(calls)).programs
    assert [(item.queries, item.keys, item.alike) for item in found.fused or ()] == [
        (None, None, True),
        (None, 512, False),
        (None, None, None),  # what it takes is not described
    ]


def test_an_attention_in_several_kernels_is_named() -> None:
    calls = [fused("Attention_1"), function("__myl_Move", ("q", "k"), "Attention_1"), product("Attention_2")]
    calls += [function("__myl_Max", ("q", "k"), "Attention_2"), product("Attention_2"), product("MatMul_3")]
    (found,) = read(program(calls)).programs
    assert found.unfused == ("Attention_2",)


def test_a_plan_of_several_profiles_has_a_program_for_each() -> None:
    part = program(["add={ name=x }"], targets="*", regions=())  # chosen on the card, and belongs to the one before it
    small = [REGIONS[1]]
    found = read(program([fused("Attention_1")], source("Ampere_hmma_fp32", "Ampere_hmma_fp32")), part, part).programs
    both = read(program([], regions=REGIONS), part, program([], regions=small), part).programs
    assert len(found) == 1
    assert [item.context_bytes for item in both] == [4608, 512]


def test_what_a_plan_does_not_say_is_none() -> None:
    assert read().programs == ()
    (found,) = read(b"header {\n  version = 9\n}\nkernels {\n}\n").programs
    assert set(vars(found).values()) == {None}
    assert (found.context_bytes, found.accumulation) == (None, None)
    (found,) = read(program([fused("Attention_1")])).programs  # its source is not there
    assert found.fused is not None
    assert (found.fused[0].scores, found.accumulation) == (None, None)


def test_a_text_is_found_wherever_pieces_of_the_file_end(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [program([fused("Attention_1")], source("Ampere_hmma_fp32", "Ampere_hmma_fp32")), program([])]
    whole = read(*parts)
    assert len(whole.programs) == 2
    for piece in (5, 11, *range(40, 60)):
        monkeypatch.setattr(plan_text, "PIECE", piece)
        monkeypatch.setattr(plan_text, "BLOCK", 20 * piece)
        assert read(*parts) == whole


def test_weights_are_passed_over_and_not_held(tmp_path: Path) -> None:
    plan, large = tmp_path / "x.plan", weights(1 << 26)
    plan.write_bytes(program([]) + large + program([fused("Attention_1")]) + large)
    del large
    tracemalloc.start()
    with plan.open("rb") as stream:
        assert len(read_plan(stream).programs) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * plan_text.PIECE


# -- what is made of it ----------------------------------------------------------------------------------------------

SELF, CROSS = GraphAttention("Attention_1", 12, 128), GraphAttention("Attention_2", 12, 128)
HALF = source("Ampere_hmma_fp16", "Ampere_hmma_fp16")
FULL = source("Ampere_hmma_fp32", "Ampere_hmma_fp32")
BOTH = (fused("Attention_1"), fused("Attention_2", key="text^deref"))


def test_a_plan_as_it_was_wanted_is_taken() -> None:
    plan = read(program(BOTH, FULL))
    assert check_attention("x.onnx", "fp32", [SELF, CROSS], plan) == AttentionSpec(2, 2, "fp32")


def test_half_sums_are_refused_unless_they_were_asked_for() -> None:
    plan = read(program(BOTH, FULL), program(BOTH, HALF))
    with pytest.raises(EngineError, match=r"x\.onnx: attention adds up in half precision.*expected float32"):
        check_attention("x.onnx", "fp32", [SELF, CROSS], plan)
    for wanted in ("fp16", None):
        assert check_attention("x.onnx", wanted, [SELF, CROSS], plan) == AttentionSpec(2, 2, "fp16")


@pytest.mark.parametrize(
    ("heads", "size", "must"), [(12, 128, True), (2, 16, True), (8, 256, True), (2, 8, False), (2, 264, False)]
)
def test_an_attention_with_a_kernel_must_be_fused(heads: int, size: int, must: bool) -> None:
    plan = read(program([fused("Attention_1"), product("Attention_2")], FULL))
    attentions = [SELF, GraphAttention("Attention_2", heads, size)]
    if must:
        with pytest.raises(EngineError, match=r"1 of 2 attentions were not fused \(Attention_2 is the first\)"):
            check_attention("x.onnx", "fp32", attentions, plan)
    else:
        assert check_attention("x.onnx", "fp32", attentions, plan) == AttentionSpec(2, 1, "fp32")


def test_a_single_head_need_not_be_fused() -> None:
    plan = read(program([product("Attention_1")]))
    found = check_attention("x.onnx", "fp32", [GraphAttention("Attention_1", 1, 128)], plan)
    assert found == AttentionSpec(1, 0, None)
    assert found.told
    assert str(found) == "1 not fused, scores are in memory"


@pytest.mark.parametrize(
    ("plan", "found", "text"),
    [
        (b"", AttentionSpec(2, None, None), "2, whether they are fused is not told by this plan"),
        (
            program([fused("Attention_1")], FULL),
            AttentionSpec(2, None, "fp32"),
            "2, whether they are fused is not told",
        ),
        (program(BOTH), AttentionSpec(2, 2, None), "2 of 2 fused, what they add up in is not told by this plan"),
    ],
)
def test_a_plan_that_does_not_tell_is_taken_and_told_of(plan: bytes, found: AttentionSpec, text: str) -> None:
    told = check_attention("x.onnx", "fp32", [SELF, CROSS], read(plan))
    assert told == found
    assert not told.told
    assert str(told).startswith(text)


def test_of_several_programs_the_worst_counts() -> None:
    plan = read(program(BOTH, FULL), program([BOTH[0], product("Attention_2")], FULL))
    assert read_attention(plan, 2) == AttentionSpec(2, 1, "fp32")
