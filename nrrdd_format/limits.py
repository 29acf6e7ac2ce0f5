"""Bounds of SPEC.md section 2. Readers check them before allocating anything; writers never exceed them."""

from __future__ import annotations

MAX_MANIFEST_BYTES = 32 * 2**20
MAX_SHARDS = 65536
MAX_CLASSES = 2**17
MAX_TEXT = 4096  # characters in one string of the manifest
MAX_VALUES = 1_500_000  # values in the manifest, about: commas and brackets
MAX_DEPTH = 64  # objects and lists inside each other in the manifest
MAX_IMAGE_SIDE = 4096  # pixels
MAX_VIEWS = 65536
MAX_MIXES = 4096
MAX_LEVELS = 256

MAX_SHARD_BYTES = 2**42
MAX_HEADER_BYTES = 8 * 2**20  # the msgpack of a shard header or of a record member's head
MAX_IMAGES = 2**18  # a shard; also its pairs
MAX_DRAWN_IMAGES = 2**14  # a shard with explicit or derived records, whose order codes take n² steps to read
MAX_IMAGE_BYTES = 16 * 2**20  # one image member
MAX_MEMBER_BYTES = 8**11 - 1  # the largest size a USTAR header can state
MAX_EPOCHS = 65536
MAX_INDEX = 10**9  # an image's number in the whole dataset
MAX_PRIORS = 2**18  # classes in the priors of a shard's images, all together
MAX_FURTHER = 16  # further classes of a pair
MAX_BLOCK_CONTENT = 16 * 2**20  # a record block, decompressed
