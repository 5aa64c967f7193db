"""Benchmark: how often a model trained by the demo draws the kind of object in the prompt, by a small classifier.

The classifier learns the twelve kinds from drawn pictures (90 s on two cores) and is tested on held-out ones.

    python tests/bench/kind_agreement.py --run demo/run --guidance 4
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.drawings.illustrations import COLOURS, compose
from pipeline.drawings.painting import draw, encode
from pipeline.drawings.shapes import SHAPES
from pipeline.pictures.crops import square_crop
from pipeline.pictures.decoder import Refused
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings

KINDS, SIDE = list(SHAPES), 64
PICTURES, CROPS_OF_EACH, HELD_OUT = 4000, 4, 400  # held out: number of pictures, the last ones
STEPS, BATCH = 1200, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="DIR", help="Run folder of trainer/run.py.")
    parser.add_argument("--guidance", type=float, default=4.0, help="Guidance scale. Default: 4.")
    parser.add_argument("--samples", type=int, default=192, help="Pictures to generate. Default: 192.")
    args = parser.parse_args()
    torch.manual_seed(0)

    pixels_NHW3, kind_N = drawn_crops(seed=1)
    held_out = HELD_OUT * CROPS_OF_EACH
    classifier = train_classifier(pixels_NHW3[:-held_out], kind_N[:-held_out])
    correct = predict(classifier, pixels_NHW3[-held_out:]) == kind_N[-held_out:]
    print(f"classifier: correct on {correct.float().mean():.1%} of {held_out} crops of held-out pictures")

    model = PictureModel.load(args.run, torch.device("cpu"))
    wanted = [(list(COLOURS)[(i * 5 + i // 12) % 8], i % 12) for i in range(args.samples)]
    settings = SamplingSettings(width=SIDE, height=SIDE, guidance=args.guidance)
    prompts = [f"{colour} {KINDS[kind]}" for colour, kind in wanted]
    pictures = model.draw(prompts, range(10_000, 10_000 + args.samples), settings)
    found_N = predict(classifier, torch.from_numpy(np.stack(pictures)))
    hits_N = found_N == torch.tensor([kind for _, kind in wanted])
    print(f"kind as prompted: {hits_N.sum()} of {args.samples} = {hits_N.float().mean():.0%} (chance {1 / 12:.1%})")
    for number, kind in enumerate(KINDS):
        hits_of_kind = hits_N[number::12]
        print(f"  {kind}: {hits_of_kind.sum()} of {len(hits_of_kind)}")


def drawn_crops(seed: int) -> tuple[Tensor, Tensor]:
    """Crops, uint8 (N, 64, 64, 3), and the kind of the main object (N,), ordered by picture."""
    pixels, kinds = [], []
    for index in range(PICTURES):
        scene = compose(seed, index)
        data = encode(draw(scene), scene)
        for offset in np.random.default_rng(index).random((CROPS_OF_EACH, 2)):
            crop = square_crop(data, SIDE, *offset)
            assert not isinstance(crop, Refused)
            pixels.append(crop.pixels_HWC)
            kinds.append(KINDS.index(scene.main.kind))
    return torch.from_numpy(np.stack(pixels)), torch.tensor(kinds)


def train_classifier(pixels_NHW3: Tensor, kind_N: Tensor) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 24), (24, 48), (48, 96), (96, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, len(KINDS)))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for step in range(STEPS):
        index = torch.randint(len(kind_N), (BATCH,))
        x = scaled(pixels_NHW3[index])
        x = x + 0.1 * (step % 2) * torch.randn_like(x)  # in every second batch, as generated pictures are speckled
        loss = F.cross_entropy(model(x), kind_N[index])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(classifier: nn.Module, pixels_NHW3: Tensor) -> Tensor:
    kind_N: Tensor = classifier(scaled(pixels_NHW3)).argmax(1)
    return kind_N


def scaled(pixels_NHW3: Tensor) -> Tensor:
    """float32 (N, 3, H, W) in [-1, 1]."""
    return pixels_NHW3.permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
