"""The module classes that the architectures share; imported when a network is built."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """A classifier on top of features, with the features on offer as ``embed``."""

    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (n, d) of normalised images (n, c, h, w)."""
        features: Tensor = self.features(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embed(images))
        return logits


class TimmNetwork(nn.Module):
    """A timm model, with what its classifier sees on offer as ``embed``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (n, d) of normalised images (n, c, h, w)."""
        # Declared as plain modules, timm's models hide these two methods from type checkers.
        forward_features: nn.Module = self.model.forward_features  # type: ignore[assignment]
        forward_head: nn.Module = self.model.forward_head  # type: ignore[assignment]
        features: Tensor = forward_head(forward_features(images), pre_logits=True)
        return features.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits
