"""What an entry did against its contract while a run was running, as far as the entry itself can be named."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ebft_mega.extension.entry import Entry, place_of_entry

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class EntryFaultError(Exception):
    """An entry raised, read what it did not declare, or returned what its contract does not allow.

    Args:
        entry: the entry.
        found, expected: in words.
        line: of the entry's file where it happened; None: no line of it says more than the place of its class.
    """

    def __init__(self, entry: Entry, found: str, expected: str, line: int | None = None):
        super().__init__(f"{entry.name}: found {found}; expected {expected}")
        self.entry, self.found, self.expected, self.line = entry, found, expected, line

    @property
    def place(self) -> str:
        """`file:line` of where it happened, or of the entry's class."""
        of_class = place_of_entry(type(self.entry))
        return of_class if self.line is None else f"{of_class.rpartition(':')[0]}:{self.line}"


def answer_of(entry: Entry, compute: Callable[[], T], expected: str) -> T:
    """Call an entry; whatever it raises becomes a fault of it, unless it is one of the package's own.

    Args:
        expected: what it should return, in words.
    Raises:
        EntryFaultError: with the line of the entry's file at which it raised. Running out of memory is no fault.
    """
    try:
        return compute()
    except EntryFaultError as fault:
        fault.line = fault.line or line_within(type(entry), fault)
        raise
    except (Exception, SystemExit) as error:
        if entry.is_built_in() or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        line = line_within(type(entry), error)
        raise EntryFaultError(entry, f"{type(error).__name__}: {error}", expected, line) from error


def line_within(entry: type[Entry], error: BaseException) -> int | None:
    """The last line of the entry's file that an error went through; None: it went through none."""
    file = inspect.getsourcefile(entry)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def require_tensor(entry: Entry, found: object, shapes: dict[str, tuple[int, ...]], like: "Tensor") -> None:
    """Refuse what is not a float64 tensor of one of these shapes on the device of another tensor.

    Args:
        shapes: allowed ones, by their letters.
        like: a tensor of the run.
    Raises:
        EntryFaultError: with what was found.
    Communication: none, and nothing waits for the device.
    """
    import torch

    wanted = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes.items())
    expected = f"a float64 tensor {wanted} on {like.device}"
    if not isinstance(found, torch.Tensor):
        raise EntryFaultError(entry, f"a {type(found).__name__}", expected)
    if found.dtype != torch.float64 or tuple(found.shape) not in shapes.values() or found.device != like.device:
        words = f"a {str(found.dtype).removeprefix('torch.')} tensor {list(found.shape)} on {found.device}"
        raise EntryFaultError(entry, words, expected)


@contextmanager
def unchanged(entry: Entry, given: "Iterable[Tensor]") -> "Iterator[None]":
    """Refuse an entry that changes what it is given inside the block: the step uses it afterwards.

    Args:
        given: everything that it can reach; views count as what they are views of.
    Raises:
        EntryFaultError: on leaving the block, unless the entry is one of the package's own.
    Communication: none, and nothing waits for the device: torch counts changes on the host.
    """
    if entry.is_built_in():
        yield
        return
    before = [(tensor, tensor._version) for tensor in given]
    yield
    if any(tensor._version != version for tensor, version in before):
        raise EntryFaultError(entry, "that it changes what it is given", "inputs as they were: clone() makes a copy")


def require_finite(entry: Entry, values: "Tensor", required: "Tensor") -> None:
    """Refuse values that are not finite where they must be.

    Args:
        values: [B, n, K] or [B, n, K, G].
        required: bool, where a value must be finite; broadcast from the left to the values.
    Raises:
        EntryFaultError: with the first such value and its place.
    Communication: none, but the host waits for the device.
    """
    wrong = ~values.isfinite() & required.reshape(required.shape + (1,) * (values.dim() - required.dim()))
    places = wrong.nonzero().tolist()
    if places:
        letters = ", ".join(
            f"{word} {i}" for word, i in zip(("row", "sample", "block", "token"), places[0], strict=False)
        )
        found = f"{values[tuple(places[0])].item()} at {letters} of a micro-batch, {len(places)} values in all"
        raise EntryFaultError(entry, found, "finite values where all inner products are finite")
