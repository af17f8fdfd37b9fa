"""Three stages on three machines, or at three times: encode a prompt, sample latents, decode them into a video.

python examples/split_work.py encode BUNDLE "a red ball bouncing on a blue background" prompt.npz
python examples/split_work.py sample BUNDLE prompt.npz latents.npz --seed 7
python examples/split_work.py decode BUNDLE latents.npz ball.mp4
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from t2v_rt import TextToVideoPipeline
from t2v_rt.runtime.video import open_writer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=("encode", "sample", "decode"))
    parser.add_argument("bundle", help="of one checkpoint in all stages; only encode needs its text encoder")
    parser.add_argument("source", help="the prompt, or the file that the stage before wrote")
    parser.add_argument("output", help="prompt.npz, latents.npz, or a video")
    parser.add_argument("--seed", type=int, default=0, help="of sample")
    options = parser.parse_args()

    with TextToVideoPipeline.from_pretrained(options.bundle) as pipe:
        if options.stage == "encode":
            texts = [options.source, pipe.manifest.defaults.negative_prompt]
            positive, negative = pipe.encode_prompt(texts)[:, None]  # each (1, positions, width)
            np.savez(options.output, prompt_embeds=positive, negative_prompt_embeds=negative)
        elif options.stage == "sample":
            with np.load(options.source) as embeds:
                out = pipe(**embeds, seed=options.seed, output_type="latent")
            np.savez(options.output, latents=out.frames, settings=json.dumps(dict(out.settings)))
        else:
            with np.load(options.source) as kept:
                latents, settings = kept["latents"], json.loads(str(kept["settings"]))
            size = {name: settings[name] for name in ("width", "height", "num_frames")}
            with open_writer(options.output, fps=pipe.manifest.defaults.fps, **size, metadata=settings) as writer:
                for chunk in pipe.decode(latents):  # a few frames (height, width, 3) in [0, 1] at a time
                    for frame in np.rint(chunk * 255).astype(np.uint8):
                        writer.write(frame)


if __name__ == "__main__":
    main()
