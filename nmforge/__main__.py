"""``python -m nmforge``, which is also what torchrun starts: ``torchrun --nproc-per-node 2 -m nmforge train --config ...``."""

from nmforge.cli import main

if __name__ == "__main__":
    main()
