"""Data made worse on purpose: missing inputs and wrong labels, as in the paper's robustness experiment (Table 3).

The paper says how many percent, and little more. Guessed: values are missing one by one and independently (a pixel with all
its channels), in every split, the same ones in each epoch; a missing value is the mean of the training data, which is zero
after normalisation. Wrong labels are any other class with equal probability, in the training split alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.data_config import Corruptible
from training.dataset import Dataset, DataSpec, Split


def corrupt(data: Dataset, config: Corruptible, seed: int) -> Dataset:
    """Take away the share `config.missing` of all values and make the share `config.label_noise` of the training labels
    wrong. Each split has its own stream of random numbers, so it does not depend on the sizes of the others.
    """
    missing, label_noise = config.missing, config.label_noise
    if label_noise:
        labels = _wrong_labels(data.train.labels, label_noise, len(data.spec.labels), np.random.default_rng([seed, 1]))
        data = replace(data, train=Split(data.train.x, labels))
    if missing:

        def without(split: Split, stream: int) -> Split:
            x = _without(split.x, missing, data.spec, np.random.default_rng([seed, stream]))
            return Split(x, split.labels)

        data = replace(
            data,
            train=without(data.train, 2),
            validation=without(data.validation, 3),
            certification=without(data.certification, 4),
            test=without(data.test, 5),
        )
    data = replace(data, source=config)
    if not (missing or label_noise):
        return data
    made = f"{data.spec.description}, {missing:.0%} of values missing, {label_noise:.0%} of training labels wrong"
    return replace(data, spec=data.spec.model_copy(update={"description": made}))


def _wrong_labels(labels: Tensor, share: float, classes: int, rng: np.random.Generator) -> Tensor:
    rows = rng.choice(len(labels), size=round(share * len(labels)), replace=False)
    steps = rng.integers(1, max(2, classes), size=len(rows))  # never 0 or a whole turn: always another class
    wrong = labels.clone()
    wrong[torch.from_numpy(rows)] = (wrong[torch.from_numpy(rows)] + torch.from_numpy(steps)) % classes
    return wrong


def _without(x: Tensor, share: float, spec: DataSpec, rng: np.random.Generator) -> Tensor:
    colour = spec.image is not None and spec.image.channels > 1
    shape = (len(x), 1, *x.shape[2:]) if colour else tuple(x.shape)
    gone = torch.from_numpy(rng.random(shape, dtype=np.float32) < share)
    return torch.where(gone, spec.constants()[0], x)
