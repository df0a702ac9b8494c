"""What every test has in common."""

import torch

torch.set_num_threads(1)  # the machines that run the tests have few cores, and the tests small tensors
