"""One torch thread for every test: two on busy cores can be a hundred times slower. None has a time to be done in."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
