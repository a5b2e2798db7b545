#!/usr/bin/env bash
# A video that stands still for a moment comes back from `export_to_gif` and `load_video` with fewer frames.
#
# Versions: diffusers 0.42.1, pillow 13.0.0.
# Behaviour: diffusers' `export_to_gif` hands its frames to Pillow, which writes successive equal ones as one with the sum of
#   their durations. `load_video`, like every reader that counts frames, gives one of them back, without its duration.
#   Animated PNG and WebP without loss are written the same way. A clip that stands still throughout becomes one picture
#   without an animation. Nothing is raised or warned.
# One would have guessed: nine frames given are nine frames in the file, as with `export_to_video`. GIF and PNG store
#   frames one by one; that pixels are not changed is what people take them for.
# Who is hurt: whoever keeps generated videos in these formats and measures them later. Scores are a mean over frames, and
#   the frames that stand still are gone; measures of motion see a clip without its rests; two clips of one length no longer
#   pair up by frame. And whoever gives such a clip to a video-to-video pipeline, whose number of frames is then another.
# What helps: of an animated PNG or WebP the sum of durations tells how often to repeat a frame; for PNG, `blend` with
#   alternating values keeps all frames apart in the file. Or write a video file.
#
# Output seen (2026-11-29), frames given and read back:
#   gif, every frame another           : 9 given, 9 back by load_video
#   gif, 5 frames alike and 4 frames   : 9 given, 2 back by load_video
#   gif, all alike                     : 9 given, 1 back by load_video
#   png, 5 frames alike and 4 frames   : 9 given, 2 in the file, lasting [310.0, 248.0] ms
#   webp, 5 frames alike and 4 frames  : 9 given, 2 in the file, lasting [310, 248] ms
#   png with alternating blend         : 9 given, 9 in the file, lasting [62.0, 62.0, 62.0, 62.0, 62.0, 62.0, 62.0, 62.0, 62.0] ms
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q diffusers==0.42.1 pillow==13.0.0 numpy
cat > "$work/try.py" <<'PY'
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import numpy as np
from diffusers.utils import export_to_gif, load_video, logging
from PIL import Image, ImageSequence

logging.set_verbosity_error()
folder, numbers = Path(sys.argv[1]), np.random.default_rng(0)


def picture():
    return Image.fromarray(numbers.integers(0, 255, (64, 64, 3), dtype=np.uint8))


one, other = picture(), picture()
clips = {
    "every frame another": [picture() for _ in range(9)],
    "5 frames alike and 4 frames": [one] * 5 + [other] * 4,
    "all alike": [one] * 9,
}
found = []
for name, frames in clips.items():
    back = load_video(export_to_gif(frames, str(folder / "clip.gif")))
    found.append(len(back))
    print(f"gif, {name:<30}: {len(frames)} given, {len(back)} back by load_video")
frames = clips["5 frames alike and 4 frames"]
for kind, more in (("png", {}), ("webp", {"lossless": True}), ("png", {"blend": [n % 2 for n in range(9)]})):
    file = folder / f"clip.{kind}"
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=62, loop=0, **more)
    with Image.open(file) as image:
        lasting = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            lasting.append(frame.info["duration"])
    found.append(len(lasting))
    what = f"{kind} with alternating blend" if "blend" in more else f"{kind}, 5 frames alike and 4 frames"
    print(f"{what:<35}: 9 given, {len(lasting)} in the file, lasting {lasting} ms")
sys.exit(found != [9, 2, 1, 2, 2, 9])
PY
"$work/venv/bin/python" "$work/try.py" "$work"
