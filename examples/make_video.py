"""Makes a video from a prompt and writes it, with the settings that made it, as `t2v-rt generate` does.

python examples/make_video.py BUNDLE "a red ball bouncing on a blue background" ball.mp4 --seed 7
"""

from __future__ import annotations

import argparse

from t2v_rt import TextToVideoPipeline
from t2v_rt.runtime.video import check_output, open_writer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", help="folder that build-engines wrote")
    parser.add_argument("prompt", help="what to show, in English or Chinese")
    parser.add_argument("output", help=".mp4, .webm, .gif, .npy, or a name without extension for a folder of png")
    parser.add_argument("--seed", type=int, help="of the noise; drawn and told where it is left out")
    options = parser.parse_args()

    check_output(options.output)  # before any work: a bad name is not found out after minutes
    with TextToVideoPipeline.from_pretrained(options.bundle) as pipe:
        out = pipe(options.prompt, seed=options.seed, output_type="uint8")
        fps, bundle_id = pipe.manifest.defaults.fps, pipe.manifest.bundle_id
    video = out.frames[0]  # (frames, height, width, 3)
    metadata = {**out.settings, "fps": fps, "bundle_id": bundle_id}
    height, width = video.shape[1:3]
    with open_writer(
        options.output, fps=fps, width=width, height=height, num_frames=len(video), metadata=metadata
    ) as writer:
        for frame in video:
            writer.write(frame)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in out.stage_seconds.items())
    print(f"{options.output}: seed {out.seed}, {seconds}")


if __name__ == "__main__":
    main()
