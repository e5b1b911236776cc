"""The five lines of transfer learning that articles show, completed so that they run on a folder of images.

usage: python examples/article.py path/to/photos [epochs]

Plain PyTorch and torchvision, on purpose; docs/article.md goes through it line by line. The folder holds one folder of
images per class. ImageNet's weights are downloaded once (45 MB).
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models


def main(root: str, epochs: int = 5) -> float:
    """Trains on the folder, and gives the accuracy that such articles report."""
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    photos = datasets.ImageFolder(root, weights.transforms())
    loader = DataLoader(photos, batch_size=32, shuffle=True)

    model = models.resnet18(weights=weights)  # 1. load
    for parameter in model.parameters():  # 2. freeze
        parameter.requires_grad = False
    width = model.fc.in_features  # 3. the width of the features
    model.fc = nn.Linear(width, len(photos.classes))  # 4. a new last layer

    optimizer = torch.optim.Adam(model.fc.parameters(), lr=0.001)  # 5. train
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        right = 0
        for images, labels in loader:
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(dim=1) == labels).sum())
        accuracy = right / len(photos)
        print(f"epoch {epoch}: {accuracy:.3f} right")
    torch.save(model.state_dict(), "model.pth")
    return accuracy


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
