"""Copying batches from the host to the device."""

from __future__ import annotations

import torch

from ssl_pipeline.data.batches import StreamBatch


class Copies:
    """Moves batches to the device; with `own_stream`, on a GPU, in a stream of their own.

    The host runs ahead of a GPU. In the stream of the computation a copy begins when the step before has been computed;
    in its own it runs at the same time. The computation waits for the copy, so nothing else changes.
    """

    def __init__(self, device: torch.device, *, own_stream: bool) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if own_stream and device.type == "cuda" else None

    def __call__(self, images: StreamBatch) -> StreamBatch:
        if self.stream is None:
            return images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = images.to(self.device, non_blocking=True)
        computing.wait_stream(self.stream)
        for tensor in moved.tensors():
            tensor.record_stream(computing)  # its memory is free again once the computation is done with it
        return moved
