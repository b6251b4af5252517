"""``python -m nmforge``, which is also what torchrun starts: ``torchrun --nproc-per-node 2 -m nmforge train --config ...``."""

import os

from nmforge.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from algo.distributed import leave

            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
