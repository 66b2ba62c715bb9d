"""The small image classifier whose features measure generations on Fashion-MNIST."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class FashionClassifier(nn.Module):
    """Six convolutions with batch normalisation on the grey 32 x 32 image, then a linear layer.

    Attributes:
        feature_dim: length of the feature vector that Fréchet distance, precision and recall are measured in.
    """

    feature_dim = 128

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = [1, 32, 32, 64, 64, 128, 128]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            if i in (1, 3):
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.feature_dim, classes)

    def features(self, image_B3HW: Tensor) -> Tensor:
        """Features [B, 128] of images [B, 3, H, W] in [0, 1]."""
        out: Tensor = self.body(image_B3HW.mean(1, keepdim=True) * 2 - 1).mean((2, 3))
        return out

    def classify(self, features_BF: Tensor, dropout: float = 0.0) -> Tensor:
        """Logits [B, classes] of features [B, 128]."""
        out: Tensor = self.head(F.dropout(features_BF, dropout, self.training))
        return out

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W] in [0, 1]."""
        return self.classify(self.features(image_B3HW))
