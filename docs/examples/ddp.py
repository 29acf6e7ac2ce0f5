"""Trains on an nrrdd dataset with several processes, each on its own GPU or, without GPUs, on the CPU.

    torchrun --standalone --nproc-per-node 2 docs/examples/ddp.py digits-ipc10 --epochs 20 --checkpoint ddp.pt

Every process gets its part of each batch of all pairs. Stopped at any moment, the same command goes on after the last
saved batch. Another number of processes may go on too: the rest of the epoch is still covered exactly once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loaders import DBRLoader, DBRLoss


def main() -> None:
    """Trains and prints the mean loss of every epoch, over the pairs of all processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="the dataset's folder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=25, help="pairs of each process")
    parser.add_argument("--workers", type=int, default=0, help="processes that load, for each that trains; 0: none")
    parser.add_argument("--checkpoint", type=Path, default=Path("ddp.pt"))
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    options = parser.parse_args()

    device = start_process()
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


def start_process() -> torch.device:
    """Joins the other processes; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def train(options: argparse.Namespace, device: torch.device) -> None:
    """The part of the training that is this process's."""
    torch.manual_seed(0)
    # The loader asks torch.distributed which part of the pairs is its own.
    loader = DBRLoader(options.dataset, options.batch_size, num_workers=options.workers, device=device)
    info = loader.dataset_info
    model = make_model(len(info.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_function = DBRLoss(temperature=info.temperature)
    stateful = {"model": model, "optimizer": optimizer, "loader": loader}
    if options.checkpoint.exists():  # all processes read it; its loader state is the same for all
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        for name, part in stateful.items():
            part.load_state_dict(state[name])
    parallel = DistributedDataParallel(model)

    while loader.epoch < options.epochs:
        epoch = loader.epoch
        sums = torch.zeros(2, device=device)  # of the losses, and of the pairs
        for step, batch in enumerate(loader, start=1):
            loss = loss_function(parallel(batch.images), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack([len(batch) * loss.detach(), torch.tensor(float(len(batch)), device=device)])
            if step % options.save_every == 0:
                save(options.checkpoint, stateful)
        save(options.checkpoint, stateful)
        dist.all_reduce(sums)
        total, pairs = sums.tolist()
        if dist.get_rank() == 0 and pairs:  # none where the stop came after the last batch of an epoch
            print(f"epoch {epoch}: loss {total / pairs:.4f} over {pairs:.0f} pairs", flush=True)


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
    """The first process saves all states under a temporary name and renames the file."""
    if dist.get_rank() == 0:
        partial = path.with_name(path.name + ".partial")
        torch.save({name: part.state_dict() for name, part in stateful.items()}, partial)
        os.replace(partial, path)


if __name__ == "__main__":
    main()
