"""Trains on an nrrdd dataset with Lightning.

    python docs/examples/with_lightning.py digits-ipc10 --epochs 20 --checkpoints lightning-checkpoints

Stopped, the same command goes on after the last saved batch; finished, it trains no more. The loader has
`state_dict` and `load_state_dict`, so Lightning keeps its state among its own without being told.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from loaders import DBRBatch, DBRLoader, DBRLoss


def main() -> None:
    """Trains, saving a checkpoint every so many steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="the dataset's folder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes that load; 0: none")
    parser.add_argument("--checkpoints", type=Path, default=Path("lightning-checkpoints"), help="folder")
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps in all; -1: never")
    options = parser.parse_args()

    seed_everything(0)
    loader = DBRLoader(options.dataset, options.batch_size, num_workers=options.workers)
    checkpoint = ModelCheckpoint(options.checkpoints, save_last=True, every_n_train_steps=options.save_every)
    trainer = Trainer(
        max_epochs=options.epochs,
        max_steps=options.max_steps,
        accelerator="cpu",  # on a GPU: DBRLoader(..., device="cuda") too, so that images are mixed there
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = options.checkpoints / "last.ckpt"
    trainer.fit(Student(loader), loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(options.checkpoints / "final.ckpt", weights_only=False)
    if trainer.is_last_batch:  # the same command has nothing left to do; of an epoch cut short, last.ckpt has the rest
        trainer.save_checkpoint(last, weights_only=False)


class Student(LightningModule):
    """A small network trained on stored distances."""

    def __init__(self, loader: DBRLoader) -> None:
        super().__init__()
        self.loader = loader
        self.network = make_model(len(loader.dataset_info.class_names))
        self.loss_function = DBRLoss(temperature=loader.dataset_info.temperature)
        self.pairs = 0

    def on_train_epoch_start(self) -> None:
        """Lightning stops after an epoch's last batch without asking for one more, by which the loader would turn."""
        self.loader.set_epoch(self.current_epoch)
        self.pairs = 0

    def training_step(self, batch: DBRBatch) -> Tensor:
        """The loss of a batch."""
        loss: Tensor = self.loss_function(self.network(batch.images), batch)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        self.pairs += len(batch)
        return loss

    def on_train_epoch_end(self) -> None:
        """Prints the mean loss, of the rest where the epoch was resumed."""
        loss = self.trainer.callback_metrics["loss"]
        print(f"epoch {self.current_epoch}: loss {loss:.4f} over {self.pairs} pairs", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on everything."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


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


if __name__ == "__main__":
    main()
