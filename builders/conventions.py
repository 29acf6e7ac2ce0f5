"""What is known of each source dataset beforehand: its layout, image size, colours and RDED's factor."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[float, float, float]
"""One number for each of red, green and blue."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of a dataset beforehand; None: it depends on the folder."""

    layout: str
    size: int | None
    mean: Colour
    std: Colour
    beta: int | None
    flip: bool = True
    classes: int | None = None
    wnids: bool = False
    inner: str = ""
    """Pattern of the folder that the dataset's own archive unpacks to."""
    tests: tuple[str, ...] = ("val",)
    """Folders, beside `train`, that may hold the test split; ImageNet's own `test` has no labels."""


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "digits": Dataset(
        layout="", size=32, mean=(0.3055,) * 3, std=(0.3235,) * 3, beta=1, flip=False, classes=10, tests=()
    ),
    "cifar10": Dataset(
        layout="train/<class>/*.jpg and test/<class>/*.jpg, or torchvision's folder cifar-10-batches-py, "
        "which is downloaded if neither is there",
        size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        beta=1,
        classes=10,
        tests=("test",),
    ),
    "cifar100": Dataset(
        layout="train/<class>/*.jpg and test/<class>/*.jpg, or torchvision's folder cifar-100-python, "
        "which is downloaded if neither is there",
        size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        beta=1,
        classes=100,
        tests=("test",),
    ),
    "imagenette": Dataset(
        layout="train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, as in the archive imagenette2.tgz",
        size=128,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        beta=4,
        classes=10,
        wnids=True,
        inner="imagenette2*",
    ),
    "tiny-imagenet": Dataset(
        layout="train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt, as in the "
        "archive tiny-imagenet-200.zip, or train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
        size=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        beta=1,
        wnids=True,
        inner="tiny-imagenet*",
    ),
    "imagenet": Dataset(
        layout="train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
        size=224,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        beta=4,
        classes=1000,
        wnids=True,
    ),
    "imagefolder": Dataset(
        layout="train/<class>/ and, for a test split, test/<class>/ or val/<class>/; or only <class>/",
        size=None,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        beta=None,
        tests=("test", "val"),
    ),
    "webdataset": Dataset(
        layout="shards *.tar of samples such as 0.jpg and 0.cls (or 0.json), in folders train and test or in one, "
        "or a pattern such as path/{000..099}.tar",
        size=None,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        beta=None,
        tests=(),
    ),
    "hf": Dataset(
        layout="a dataset of Hugging Face: a folder by save_to_disk, a folder of Parquet files, or a name on the hub",
        size=None,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        beta=None,
        tests=(),
    ),
}


def default_model(size: int) -> str:
    """The network used where none is named: the paper's convD for small images, ResNet-18 above 128 px."""
    for depth, largest in ((3, 32), (4, 64), (5, 128)):
        if size <= largest:
            return f"conv{depth}"
    return "resnet18"
