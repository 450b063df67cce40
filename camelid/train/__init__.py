"""One loop; pre-training and fine-tuning differ in the batches it is given and in what it makes smaller."""

from __future__ import annotations

from camelid.train.pretrain import pretrain

__all__ = ["pretrain"]
