"""Trains a small network on an nrrdd dataset in a plain PyTorch loop.

    python docs/examples/plain.py digits-ipc10 --epochs 20 --checkpoint plain.pt

Stopped at any moment, the same command goes on after the last saved batch, with the same result as without the stop.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn

from loaders import DBRLoader, DBRLoss


def main() -> None:
    """Trains and prints the mean loss of every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="the dataset's folder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes that load; 0: none")
    parser.add_argument("--checkpoint", type=Path, default=Path("plain.pt"))
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DBRLoader(options.dataset, options.batch_size, num_workers=options.workers, device=device)
    info = loader.dataset_info
    model = make_model(len(info.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_function = DBRLoss(temperature=info.temperature)
    stateful = {"model": model, "optimizer": optimizer, "loader": loader}
    if options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        for name, part in stateful.items():
            part.load_state_dict(state[name])

    while loader.epoch < options.epochs:
        epoch = loader.epoch
        total = torch.zeros((), device=device)
        pairs = 0
        for step, batch in enumerate(loader, start=1):
            loss = loss_function(model(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += len(batch) * loss.detach()
            pairs += len(batch)
            if step % options.save_every == 0:
                save(options.checkpoint, stateful)
        save(options.checkpoint, stateful)
        if pairs:  # none where the stop came after the last batch of an epoch
            print(f"epoch {epoch}: loss {total.item() / pairs:.4f} over {pairs} pairs", flush=True)


def make_model(classes: int) -> nn.Module:
    """A network of three convolutions for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def save(path: Path, stateful: dict[str, nn.Module | torch.optim.Optimizer | DBRLoader]) -> None:
    """Saves all states under a temporary name and renames the file, so that a stop never leaves half of one."""
    partial = path.with_name(path.name + ".partial")
    torch.save({name: part.state_dict() for name, part in stateful.items()}, partial)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
