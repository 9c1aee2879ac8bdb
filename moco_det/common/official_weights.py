"""What the authors of MoCo published: files, and the numbers that they give for them.

Apart from `weight_sources`, which fetches them, since the help of each flag names them.
"""

from typing import NamedTuple


class Official(NamedTuple):
    """Weights of facebookresearch/moco, with the numbers that its READMEs give for them."""

    url: str
    md5: str  # its first digits
    training: str
    top1: float  # of linear classification on ImageNet, in percent
    voc: tuple[float, float, float]  # AP50, AP, AP75 of VOC 07+12, R50-C4, 24k iterations

    def describe(self) -> str:
        ap50, ap, ap75 = self.voc
        return (
            f"{self.training}, ResNet-50; its authors report {self.top1} % top-1 (linear, ImageNet)"
            f" and AP50 {ap50}, AP {ap}, AP75 {ap75} (VOC 07+12, R50-C4, 24k iterations)"
        )


_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/{0}/{0}_pretrain.pth.tar"
OFFICIAL = {
    name: Official(_MOCO.format(name), *rest)
    for name, *rest in (
        ("moco_v1_200ep", "b251726a", "MoCo v1, 200 epochs", 60.6, (81.5, 55.9, 62.6)),
        ("moco_v2_200ep", "59fd9945", "MoCo v2, 200 epochs", 67.7, (82.4, 57.0, 63.6)),
        ("moco_v2_800ep", "a04e12f8", "MoCo v2, 800 epochs", 71.1, (82.5, 57.4, 64.0)),
    )
}
