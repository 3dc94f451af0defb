"""Tensors that transformers reads one by one as it builds a model: a state dict for `from_pretrained(None, …)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any, Protocol

from safepatch_core.errors import SafepatchError


class Entry(Protocol):
    """What a file's header says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class LazyWeights(Mapping[str, "LazyTensor"]):
    """All tensors by the names in the files, read when transformers asks for them.

    Args:
        entries: the tensors as the files have them.
        dtype_of: the torch dtype in which `read` gives a tensor.
        read: a tensor of its own by its name; called by several threads.
    """

    def __init__(
        self, entries: Mapping[str, Entry], dtype_of: Callable[[str], Any], read: Callable[[str], Any]
    ) -> None:
        self.entries, self.dtype_of = entries, dtype_of
        self._read = read
        self._fault: SafepatchError | None = None
        self._lock = Lock()

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self.entries:
            raise KeyError(name)
        return LazyTensor(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, name: str) -> Any:
        try:
            return self._read(name)
        except SafepatchError as error:
            with self._lock:
                self._fault = self._fault or error
            raise

    def loaded_by(self, load: Callable[[], Any]) -> Any:
        """What `load` gives, which reads these. Raises what reading raised first.

        The loader collects failures of its threads under a message of its own, or goes on without a tensor.
        """
        try:
            found = load()
        except Exception:
            self._raise_fault()
            raise
        self._raise_fault()
        return found

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault from None


class LazyTensor:
    """What transformers asks of a tensor that it hasn't read: the calls of a safetensors slice, and its dtype."""

    def __init__(self, weights: LazyWeights, name: str) -> None:
        self._weights, self._name = weights, name
        self._entry = weights.entries[name]

    @property
    def dtype(self) -> Any:
        return self._weights.dtype_of(self._name)

    def is_floating_point(self) -> bool:
        return bool(self.dtype.is_floating_point)

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype

    def __getitem__(self, index: Any) -> Any:
        tensor = self._weights.read(self._name)
        part = tensor[index]
        # A slice on its own, so that the rest is freed; a whole tensor as it is.
        return part if part.shape == tensor.shape else part.clone()
