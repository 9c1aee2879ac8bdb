"""The C4 box head of the paper, in Detectron2's registry."""

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """res5 as box head, followed by a norm, as `roi_heads.res5.norm`.

    MoCo v1, Sec. 4.2 and appendix: with BN trained, the head's output must be normalised as well.
    The name and the parameter's name are those of facebookresearch/moco's detection code.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels
