"""The end-to-end mechanism: the mini-batch is the dictionary (arXiv:1911.05722, Fig. 2a).

Shape legend:
    N: queries of this process      B: queries of all processes (the global batch)
    C: feature dimension            H, W: height and width of a view
"""

import torch

from moco_det.common.processes import rank
from pretrain.moco.instance_discrimination import InstanceDiscrimination


class EndToEnd(InstanceDiscrimination):
    """Queries against all keys of the global batch, with gradients to both.

    What the paper leaves between the lines, and how it is read here:
    - The dictionary is the current mini-batch, "the number of negatives [...] is K-1 in end-to-end
      (offset by one because the positive key is in the same mini-batch)" (Fig. 3). The mini-batch
      is the global one: its K of 1024 is that of 8 GPUs together. So a query's negatives are the
      B-1 other keys, on whatever process they were encoded, and no queries: SimCLR's loss also has
      the other queries among the negatives and is averaged over both directions, Eqn. (1) is not.
    - f_k is f_q. "The two encoders can be different" (Fig. 2), but the keys are to be "encoded by
      the same set of encoder parameters" (Sec. 3.2), the pretext task is that of a method with one
      encoder ([63] in Sec. 3.1), and so is SimCLR, which "is based on this mechanism" (MoCo v2,
      Sec. 2).
    - Keys are normalised under shuffled BN as in MoCo (Sec. 3.3, A.9). The running statistics see
      both passes.

    SimCLR's setting, in MoCo v2's sense, is this mechanism with the MLP head, the cosine schedule
    and views of stronger colour distortion. configs/pretrain/simclr_r50.yaml has the rest of it,
    and says what differs.
    """

    def forward(
        self, im_q: torch.Tensor, im_k: torch.Tensor, order: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step up to the logits, N x B.

        Args:
            im_q, im_k: two views of the same images, uint8 RGB, N x H x W x 3.
            order: permutation of range(B), the same on every process: the shuffle of the keys.
        """
        q = self.encode(self.encoder_q, im_q)  # N x C
        keys = self.encode_shuffled(self.encoder_q, im_k, order)  # B x C
        mine = rank() * len(q) + torch.arange(len(q), device=q.device)  # N: the positives
        positive_first = mine[:, None] + torch.arange(len(keys), device=q.device)  # N x B

        with torch.autocast(q.device.type, enabled=False):  # fp32: 1/tau magnifies rounding errors
            similarity = q @ keys.T  # N x B
            logits = similarity.gather(1, positive_first % len(keys)) / self.temperature
        return logits, keys, q
