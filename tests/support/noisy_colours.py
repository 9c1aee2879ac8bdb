"""Two classes of noisy images that are not quite separable, and a slow way to their features."""

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models import resnet18

from pretrain.moco.encoders import build_encoder


def write_images(root):
    """50 images in train/ and 41 in val/: noise around a colour that is itself uncertain."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (25, 25)), ("val", (20, 21))):
        for label, count, colour in zip(
            "ab", counts, ((90, 120, 150), (150, 120, 90)), strict=True
        ):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(rng.normal(colour, 30), 60, (40, 48, 3)).clip(0, 255)
                cv2.imwrite(str(folder / f"{i:02d}.png"), noise.astype(np.uint8))
    return root


def write_checkpoint(path, arch="resnet18"):
    """A random encoder in the official layout; its BN statistics are not the initial ones."""
    torch.manual_seed(3)
    encoder = build_encoder(arch, dim=8)
    encoder.train()(torch.randn(8, 3, 32, 32))
    state = {f"module.encoder_q.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "optimizer": {}}, path)
    return path


def slow_features(checkpoint, folder):
    """Features (M, 512) and labels (M,) of centre crops of 32 pixels, in torchvision's words."""
    encoder = resnet18(num_classes=8)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    encoder.load_state_dict({k.removeprefix("module.encoder_q."): v for k, v in weights.items()})
    encoder.fc = torch.nn.Identity()
    encoder.eval()
    view = transforms.Compose(
        [
            transforms.Resize(37),  # 32 * 256 / 224
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    paths = [path for name in "ab" for path in sorted((folder / name).glob("*.png"))]
    pixels = torch.stack([view(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        features = encoder(pixels)
    return features.double().numpy(), np.array(["ab".index(path.parent.name) for path in paths])
