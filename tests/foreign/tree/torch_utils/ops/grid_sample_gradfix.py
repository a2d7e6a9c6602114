import torch


def grid_sample(input, grid):
    return torch.nn.functional.grid_sample(
        input, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
