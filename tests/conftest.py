"""One torch thread for every test: two on busy cores can be a hundred times slower."""

import torch

torch.set_num_threads(1)
