"""One loop; pre-training and fine-tuning differ in the batches it is given."""

from __future__ import annotations

from camelid.train.pretrain import pretrain
from camelid.train.sft import finetune

__all__ = ["finetune", "pretrain"]
