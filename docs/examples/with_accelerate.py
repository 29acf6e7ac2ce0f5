"""Trains on an nrrdd dataset with Accelerate.

    accelerate launch docs/examples/with_accelerate.py digits-ipc10 --epochs 20 --checkpoints accelerate-checkpoints

Stopped at any moment, the same command goes on after the last saved batch. The loader shares the pairs among processes
itself, so it is registered for checkpointing, not prepared.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from loaders import DBRLoader, DBRLoss


def main() -> None:
    """Trains and prints the mean loss of every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="the dataset's folder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50, help="pairs of each process")
    parser.add_argument("--workers", type=int, default=0, help="processes that load, for each that trains; 0: none")
    parser.add_argument("--checkpoints", type=Path, default=Path("accelerate-checkpoints"), help="folder")
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    options = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator()
    loader = DBRLoader(options.dataset, options.batch_size, num_workers=options.workers, device=accelerator.device)
    info = loader.dataset_info
    network = make_model(len(info.class_names))
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    accelerator.register_for_checkpointing(loader)
    loss_function = DBRLoss(temperature=info.temperature)
    if saved := find_checkpoints(options.checkpoints):
        accelerator.load_state(str(saved[-1]))

    while loader.epoch < options.epochs:
        epoch = loader.epoch
        sums = torch.zeros(2, device=accelerator.device)  # of the losses, and of the pairs
        for step, batch in enumerate(loader, start=1):
            loss = loss_function(model(batch.images), batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            sums += torch.tensor([len(batch) * loss.item(), float(len(batch))], device=accelerator.device)
            if step % options.save_every == 0:
                save(accelerator, loader, options.checkpoints)
        save(accelerator, loader, options.checkpoints)
        total, pairs = accelerator.reduce(sums).tolist()
        if pairs:  # none where the stop came after the last batch of an epoch
            accelerator.print(f"epoch {epoch}: loss {total / pairs:.4f} over {pairs:.0f} pairs", flush=True)
    accelerator.end_training()


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


def find_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, the newest last."""
    return sorted(folder.glob("epoch-*"))


def save(accelerator: Accelerator, loader: DBRLoader, folder: Path) -> None:
    """Saves all states into a new folder that gets its name when it is complete; then removes the older ones."""
    state = loader.state_dict()
    finished = folder / f"epoch-{state['epoch']:06d}-pairs-{state['pairs']:09d}"
    partial = folder / "partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not finished.exists():
        older = find_checkpoints(folder)
        partial.rename(finished)
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
