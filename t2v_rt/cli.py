"""The command line: `t2v-rt build-engines | encode | generate | inspect | plan | verify | doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from t2v_rt import console
from t2v_rt.commands import COMMANDS, command_of
from t2v_rt.errors import RequestError, T2VError, VerificationError

EXIT_USAGE, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130
EXAMPLE = 'example: t2v-rt generate "a red ball bouncing" --engines build/demo --output ball.mp4 --seed 7'


class Parser(argparse.ArgumentParser):
    """Argument errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 done, 2 bad usage or input, 1 anything else, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.prepare_streams()
    with console.ended_by_signals() as ending:
        try:
            parsed = make_parser(arguments).parse_args(arguments)
            if parsed.json:
                console.check_output_is_open()
            _run(parsed)
        except (KeyboardInterrupt, Exception) as exc:
            if ending.came or isinstance(exc, KeyboardInterrupt):
                console.tell(f"t2v-rt: interrupted{_notes(exc)}")
                return EXIT_INTERRUPTED
            if isinstance(exc, BrokenPipeError):
                return EXIT_FAILURE
            if isinstance(exc, T2VError):
                console.tell(f"t2v-rt: error: {exc}{_notes(exc)}")
                return exc.exit_code
            if "--verbose" in arguments:  # whatever else goes wrong is one line for the user, but for who wants more
                raise
            console.tell(f"t2v-rt: error: {type(exc).__name__}: {' '.join(str(exc).split())}{_notes(exc)}")
            return EXIT_FAILURE
    return 0


def _notes(error: BaseException) -> str:
    """What was added to an error on its way up."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """All commands, and the options of the one that is asked for.

    Args:
        arguments: that will be parsed.
    """
    from t2v_rt import __version__

    parser = Parser(prog="t2v-rt", description="Text-to-video on 8 GB cards, or on the CPU.", epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=f"t2v-rt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=name)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument("--verbose", action="store_true", help="show where an unexpected error came from")
        if name == asked:
            command_of(name).declare(command)
    return parser


def _run(parsed: argparse.Namespace) -> None:
    """Runs the command and prints its report: one JSON object, in ASCII for any stream, or lines for a person."""
    command = command_of(parsed.command)

    def show(report: Mapping[str, Any]) -> None:
        console.answer(json.dumps(report) if parsed.json else "\n".join(command.describe(report)))

<<<<<<< HEAD
def _add_build(commands: Any) -> None:
    text = "Export a checkpoint (safetensors) and build its engines; an ended build goes on where it was."
    add = _command(commands, "build-engines", run_build, text, BUILD_EXAMPLE).add_argument
    add(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="folder in diffusers layout, owner/name on the Hugging Face hub, or folder with a file per network",
    )
    add("--output", metavar="BUNDLE", help="folder to write")
    add("--dry-run", action="store_true", help="only tell what the build would take, and the bundle on a card")
    add("--revision", metavar="NAME", help="branch, tag or commit of a checkpoint on the hub")
    for network in ("transformer", "vae", "text-encoder"):
        add(f"--{network}", metavar="FILE", help=f"single safetensors file instead of the checkpoint's {network}")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, or its folder, likewise")
    add("--backend", default="onnxruntime", help="onnxruntime (default), tensorrt-rtx or tensorrt")
    add("--precision", help="fp32 (default of onnxruntime) or fp16 (of the others); bf16 for plans")
    add("--text-encoder-weights", metavar="KIND", help="int8 or int4: smaller, the error is measured and told")
    add("--without-text-encoder", action="store_true", help="leave it out: prompts come as files of t2v-rt encode")
    add("--height", metavar="SIZE", help="of videos, in pixels; for plans also a range or several: 480:720, 480,832")
    add("--width", metavar="SIZE", help="likewise")
    add("--num-frames", metavar="SIZE", help="likewise, in frames")
    add("--gpu", metavar="NAMES", help="that tensorrt-rtx builds for: sm75,sm80,sm86,sm89,sm120; all but sm75")
    add(
        "--vram-budget",
        metavar="SIZE",
        help="of the smallest card it is for: the text encoder's engines fit one by one",
    )
    add("--force", action="store_true", help="build even where the bundle there could be reused")


def _add_encode(commands: Any) -> None:
    text = "Encode a prompt into a file, for machines that have no room for the text encoder."
    add = _command(commands, "encode", run_encode, text, ENCODE_EXAMPLE).add_argument
    add("prompt", metavar="PROMPT", help="what to show, in English or Chinese")
    add("--engines", required=True, metavar="BUNDLE", help="folder that build-engines wrote")
    add("--output", required=True, metavar="FILE", help=".npz, for generate --prompt-embeds")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from; the bundle's own where it is left out")
    _add_engines(add)
    add("--vram-budget", metavar="SIZE", help="memory the engines may take, such as 8GiB")


def _add_engines(add: Any) -> None:
    """Where engines run."""
    add("--backend", help="must be the one that the bundle was built for")
    add("--provider", help="of ONNX Runtime: cpu (default) or cuda")
    add(
        "--threads",
        type=int,
        help="of ONNX Runtime, per engine; all cores where it is left out, and never more than this process may use",
    )
    add("--trust", action="store_true", help="run plans that were not built here by you: they are native code")


def _add_generate(commands: Any) -> None:
    text = "Make a video from a prompt; what is left out takes the bundle's default."
    add = _command(commands, "generate", run_generate, text, GENERATE_EXAMPLE).add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to show, in English or Chinese")
    add("--engines", required=True, metavar="BUNDLE", help="folder that build-engines wrote")
    add("--output", metavar="FILE", help=".mp4, .webm, .gif, .npy, or a name without extension for a folder of png")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--seed", type=int, help="of the noise; drawn and told where it is left out or -1")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add("--num-frames", type=int, help="frames of the video")
    add("--fps", type=float, help="frames per second of the file")
    add("--num-inference-steps", type=int, help="denoising steps")
    add("--guidance-scale", type=float, help="1 turns guidance off")
    add("--guidance-rescale", type=float, default=0.0, help="0 to 1, against over-exposure by high guidance")
    add("--guidance-interval", type=numbers, metavar="START,STOP", help="fractions of the steps that are guided")
    add("--cfg-zero-star", action="store_true", help="CFG-Zero* guidance")
    add("--zero-init-steps", type=int, help="first steps that predict zero under --cfg-zero-star (1)")
    add("--guidance-batch", choices=("auto", "on", "off"), default="auto", help="both predictions in one batch, or not")
    add("--step-cache", type=float, metavar="THRESHOLD", help="reuse predictions; 0 is off, 0.05 a start")
    add("--timesteps", type=numbers, metavar="T,T,…", help="the schedule itself, such as 1000,750,500,250")
    add("--sigmas", type=numbers, metavar="S,S,…", help="likewise, as noise levels")
    add("--scheduler", metavar="NAME", help="unipc, euler …; the checkpoint's own where it is left out")
    add("--flow-shift", type=float, help="shift of the noise schedule")
    _add_engines(add)
    add(
        "--prompt-embeds",
        metavar="FILE",
        help="prompt and negative prompt as t2v-rt encode wrote them, instead of PROMPT",
    )
    add("--no-prompt-cache", action="store_true", help="neither look up nor keep embeddings in the user's cache")
    add("--vram-budget", metavar="SIZE", help="memory the engines may take, such as 8GiB")
    add("--vae-tiles", metavar="RxC", help="decode in so many tiles, such as 2x3; as few as fit where it is left out")
    add("--contact-sheet", metavar="FILE", help="also write all frames side by side as a png")
    add("--preview", metavar="FILE", help="a png that is written anew after each step")
    add("--save-latents", metavar="FILE", help="keep what was sampled (.npz); without --output, stop there")
    add("--from-latents", metavar="FILE", help="decode what --save-latents kept, instead of a prompt")


def numbers(text: str) -> list[float]:
    """Reads `1000,750,500` for argparse."""
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1000,750,500") from None


def _add_inspect(commands: Any) -> None:
    text = "Check a bundle and tell what is in it."
    add = _command(commands, "inspect", run_inspect, text, INSPECT_EXAMPLE).add_argument
    add("bundle", metavar="BUNDLE", help="folder that build-engines wrote")


def _add_plan(commands: Any) -> None:
    text = "Tell what a request needs in memory, stage by stage, and whether it fits; nothing is loaded."
    add = _command(commands, "plan", run_plan, text, PLAN_EXAMPLE).add_argument
    add("bundle", metavar="BUNDLE", help="folder that build-engines wrote")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add("--num-frames", type=int, help="frames of the video")
    add("--vram-budget", metavar="SIZE", help="memory of the card, such as 8GiB")
    add("--vae-tiles", metavar="RxC", help="tiles of the VAE decoder, such as 2x3; as few as fit where it is left out")
    add("--provider", help="of ONNX Runtime: cpu (default) or cuda, which works in the card's memory")
    add("--picture", metavar="FILE", help="also draw it, as an svg")


def _add_verify(commands: Any) -> None:
    text = "Hold a bundle's engines, on this machine, against the answers of their float32 reference."
    add = _command(commands, "verify", run_verify, text, VERIFY_EXAMPLE).add_argument
    add("bundle", metavar="BUNDLE", help="folder that build-engines wrote")
    _add_engines(add)


def run_build(options: argparse.Namespace) -> None:
    """`build-engines`."""
    if options.dry_run:
        _dry_run(options)
        return
    if options.output is None:
        raise RequestError("--output is missing; expected the folder to write")
    from t2v_rt.build import build_engines
    from t2v_rt.progress import Bars

    with Bars() as bars:
        bundle = build_engines(
            options.checkpoint,
            options.output,
            files=_files(options),
            revision=options.revision,
            backend=options.backend,
            precision=options.precision,
            height=options.height,
            width=options.width,
            num_frames=options.num_frames,
            gpus=options.gpu,
            vram_budget=options.vram_budget,
            with_text_encoder=not options.without_text_encoder,
            text_encoder_weights=options.text_encoder_weights,
            force=options.force,
            progress=lambda step, done, total: bars.update("build", done, total, detail=step),
        )
    manifest = bundle.manifest
    weights = sum(spec.weights_bytes for spec in manifest.components.values())
    report = {
        "output": str(bundle.folder),
        "bundle_id": manifest.bundle_id,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "weights_bytes": weights,
        "weights_errors": {name: spec.weights_error for name, spec in manifest.components.items() if spec.weights},
    }
    lines = [f"bundle   {bundle.folder} ({manifest.bundle_id})", f"engines  {manifest.backend}, {manifest.precision}"]
    lines.append(f"weights  {weights / 1e6:.1f} MB")
    for name, spec in manifest.components.items():
        if spec.weights:
            told = "not measured" if spec.weights_error is None else f"{spec.weights_error:.2g}"
            lines.append(f"{name}  {spec.weights} weights, error {told}")
    show(options, report, lines)


def _dry_run(options: argparse.Namespace) -> None:
    from t2v_rt.build import BuildRequest
    from t2v_rt.build.dry_run import describe, dry_run

    request = BuildRequest(
        options.checkpoint,
        _files(options),
        options.revision,
        options.backend,
        options.precision,
        (options.height, options.width, options.num_frames),
        options.gpu,
        options.vram_budget,
        not options.without_text_encoder,
        options.text_encoder_weights,
    )
    report = dry_run(request, options.output)
    show(options, report, describe(report))


def _files(options: argparse.Namespace) -> dict[str, str]:
    names = ("transformer", "vae", "text_encoder", "tokenizer")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def run_generate(options: argparse.Namespace) -> None:
    """`generate`."""
    from t2v_rt.commands.generate import generate
    from t2v_rt.progress import Bars

    with Bars() as bars:
        report = generate(options, bars.update)
    seconds = report["stage_seconds"]
    lines = [
        f"output   {report['output']}",
        f"seed     {report['seed']}",
        "seconds  " + "  ".join(f"{stage} {value:.2f}" for stage, value in seconds.items()),
        f"memory   {report['peak_rss_bytes'] / 1e6:.0f} MB at most",
    ]
    show(options, report, lines)


def run_inspect(options: argparse.Namespace) -> None:
    """`inspect`."""
    from t2v_rt.commands.inspect import describe, inspect_bundle

    report = inspect_bundle(options.bundle)
    show(options, report, describe(report))


def run_encode(options: argparse.Namespace) -> None:
    """`encode`."""
    from t2v_rt.commands.encode import encode

    report = encode(
        options.prompt,
        options.output,
        options.engines,
        negative_prompt=options.negative_prompt,
        backend=options.backend,
        provider=options.provider,
        threads=options.threads,
        vram_budget=options.vram_budget,
        trust=options.trust,
    )
    tokens = " and ".join(map(str, report["tokens"]))
    lines = [f"output   {report['output']}", f"encoder  {report['encoder_id']}", f"tokens   {tokens}"]
    show(options, report, [*lines, f"seconds  {report['seconds']:.2f}"])


def run_plan(options: argparse.Namespace) -> None:
    """`plan`."""
    from t2v_rt.commands.plan import check_picture, describe, plan, write_picture
    from t2v_rt.system.outputs import check_apart

    if options.picture is not None:
        check_apart({"--picture": check_picture(options.picture)}, {"BUNDLE": options.bundle})
    report = plan(
        options.bundle,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        vram_budget=options.vram_budget,
        vae_tiles=options.vae_tiles,
        provider=options.provider,
    )
    if options.picture is not None:
        write_picture(report, options.picture)
    show(options, report, describe(report))


def run_verify(options: argparse.Namespace) -> None:
    """`verify`; fails where a component does."""
    from t2v_rt.commands.verify import verify

    report = verify(
        options.bundle,
        options.backend,
        provider=options.provider,
        threads=options.threads,
        trust=options.trust,
    )
    lines = [
        f"{name:13}{'passed' if item['passed'] else 'FAILED'}  error {item['error']:.1e}, allowed {item['tolerance']:g}"
        for name, item in report["components"].items()
    ]
    show(options, report, lines)
    if not report["passed"]:
        raise EngineError(f"{options.bundle} does not give the answers of its reference; do not use it on this machine")


def run_doctor(options: argparse.Namespace) -> None:
    """`doctor`."""
    from t2v_rt.commands.doctor import describe, examine

    report = examine()
    show(options, report, describe(report))


def show(options: argparse.Namespace, report: dict[str, Any], lines: list[str]) -> None:
    """Prints a result: one JSON object, in ASCII so that any stream can take it, or lines for a person."""
    console.answer(json.dumps(report) if options.json else "\n".join(lines))
=======
    try:
        report = command.run(parsed)
    except VerificationError as exc:
        show(exc.report)
        raise
    show(report)
>>>>>>> int
