"""One thread: the tests' tensors are tiny, and spinning threads slow down everything else on 2 cores."""

import torch

torch.set_num_threads(1)
