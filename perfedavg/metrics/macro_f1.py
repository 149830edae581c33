"""Macro-averaged F1: classes count equally, however many examples of each a client has.

The mean over classes of F1 = 2 TP / (2 TP + FP + FN), the first of the two definitions that Opitz and Burst 2019
(arXiv 1911.03347) tell apart, over the classes that occur among the client's labels or predictions. A class that is
predicted and does not occur counts as 0, one that does neither is left out: as scikit-learn's `f1_score` with
`average="macro"`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from perfedavg.metrics.base import Metric

if TYPE_CHECKING:
    from torch import Tensor


def macro_f1(outputs: Tensor, labels: Tensor) -> float:
    """In 0..1. outputs: (num_examples, num_classes, ...); the prediction is the largest. NaN in a regression.

    Where an example has a class at each of several places, every place counts.
    """
    import torch

    if labels.is_floating_point():
        return math.nan
    predicted = outputs.argmax(dim=1)
    true_positives, predictions, occurrences = (
        torch.bincount(classes.flatten(), minlength=outputs.shape[1]).double()
        for classes in (labels[predicted == labels], predicted, labels)
    )
    both = predictions + occurrences  # 2 TP + FP + FN
    return float((2 * true_positives / both)[both > 0].mean())


MACRO_F1 = Metric(macro_f1)
