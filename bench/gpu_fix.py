"""The kernel for fixes on a device, timed: a tensor and what a fix says of it lie there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from safepatch_core.backends.device import Device
from safepatch_core.fixes.reference import NEW, OLD, Run
from safepatch_core.kernels.fix import fix
from safepatch_core.kernels.launch import Launch

from .fixes import SHARES, changed, encoded
from .lab import Lab
from .measure import Red


def tiled(run: Run, times: int) -> Run:
    """What a fix says of the same entries again and again; `run` holds whole blocks."""
    codes, changes = int(run.rows[-1, 0]), run.changes
    step = np.array([codes, changes], dtype=np.uint64)
    rows = [run.rows[:-1] + step * np.uint64(i) for i in range(times)]
    bits = np.unpackbits(run.side, bitorder="little", count=changes)
    return Run(
        entries=run.entries * times,
        rows=np.concatenate([*rows, (step * np.uint64(times))[None]]),
        gap=np.tile(run.gap[:codes], times),
        side=np.packbits(np.tile(bits, times), bitorder="little"),
        planes=tuple(None if plane is None else np.tile(plane[:changes], times) for plane in run.planes),
    )


class Resident:
    """A bfloat16 tensor on a device, and a fix of a share of its entries beside it."""

    def __init__(self, device: Device, share: float, windows: int, scratch: Path) -> None:
        old, self.new = changed(share)
        run = tiled(encoded(old, self.new, scratch), windows)
        self._device, self.old, self.changes = device, old, run.changes
        stream = device.stream()

        def sent(array: Any) -> torch.Tensor:
            flat = np.ascontiguousarray(array).reshape(-1)
            signed = flat if flat.itemsize == 1 else flat.view(f"i{flat.itemsize}")
            room = device.allocate(flat.nbytes)
            device.upload(stream, room.view(torch.uint8), signed.view(np.uint8))
            return room.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])

        self.entries = sent(np.tile(old, windows))
        planes = tuple(None if plane is None else sent(plane) for plane in run.planes)
        self._given = (sent(run.gap), sent(run.rows).view(-1, 2), sent(run.side), planes)
        self._olds = device.allocate(2 * run.changes).view(torch.int16)
        self.told = device.allocate(8 * (len(run.rows) - 1)).view(torch.int32).view(-1, 2)
        device.synchronize()
        arrays = (run.gap, run.side, run.rows, *run.planes)
        self.fix_bytes = sum(array.nbytes for array in arrays if array is not None)

    def launch(self, goal: int) -> Launch:
        gap, rows, side, planes = self._given
        return fix(self.entries, gap, rows, side, planes, self._olds, self.told, 0, goal)

    def check(self, expected: Any) -> None:
        """Raises Red unless every window is `expected` and no block was found broken."""
        self._device.synchronize()
        found = self.entries.cpu().numpy().view(np.uint16).reshape(-1, len(expected))
        if self.told[:, 0].any() or not (found == expected).all():
            raise Red("the fix kernel leaves other entries than the reference")


def rates(lab: Lab, windows: int, scratch: Path) -> list[dict[str, Any]]:
    """Per share of changed entries: seconds of an apply and of a check, which changes nothing."""
    found = []
    for share in SHARES:
        resident = Resident(lab.device, share, windows, scratch)
        for goal, expected in ((NEW, resident.new), (OLD, resident.old)):
            lab.device.launch(lab.stream, resident.launch(goal))
            resident.check(expected)
        took = lab.time(resident.launch(NEW))
        resident.check(resident.new)
        nbytes = resident.entries.nbytes
        found.append(
            {
                "share": share,
                "entries": resident.entries.numel(),
                "changes": resident.changes,
                "fix_bytes": resident.fix_bytes,
                "seconds": list(took),
                "model_bytes_per_s": nbytes / took.median,
            }
        )
    return found
