"""`python -m builders` is `build-distilled`; `torchrun -m builders` is the same on many processes."""

from builders.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
