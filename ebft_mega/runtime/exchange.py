"""Values that ranks exchange as JSON in tensors of bytes.

torch's own functions for objects unpickle what a peer sends, and a pickle runs code.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.errors import ForeignMessageError
from ebft_mega.runtime.message_text import from_message, to_message

MAX_MESSAGE_BYTES = 2**30


def all_gather_values(own: Any, group: dist.ProcessGroup | None = None, kinds: tuple[type, ...] = ()) -> list[Any]:
    """Give every rank the values of all ranks.

    Args:
        own: this rank's value, as for `to_message`.
        group: whose ranks they are; None: the world.
        kinds: classes of which values may be; see `to_message`.
    Returns:
        By rank within the group.
    Raises:
        ForeignMessageError: what a peer sent is no such value, or longer than `MAX_MESSAGE_BYTES`.
    Communication: two all-gathers over the group, of the lengths and of as many bytes as the longest value has.
    """
    content, lengths = _with_lengths(own, group, kinds)
    received = [torch.empty_like(content) for _ in lengths]
    dist.all_gather(received, content, group=group)
    return [from_message(_bytes(part, length), kinds) for part, length in zip(received, lengths, strict=True)]


def gather_values(own: Any, group: dist.ProcessGroup | None = None, kinds: tuple[type, ...] = ()) -> list[Any] | None:
    """Give a group's first rank the values of all ranks; None on the others.

    Args, Raises: as for `all_gather_values`.
    Communication: over the group one all-gather of the lengths, and one gathering of as many bytes as the longest
        value has.
    """
    content, lengths = _with_lengths(own, group, kinds)
    is_first = dist.get_rank(group) == 0
    received = [torch.empty_like(content) for _ in lengths] if is_first else None
    dist.gather(content, received, group=group, group_dst=0)
    if received is None:
        return None
    return [from_message(_bytes(part, length), kinds) for part, length in zip(received, lengths, strict=True)]


def broadcast_value(
    own: Any, group: dist.ProcessGroup | None = None, source: int = 0, kinds: tuple[type, ...] = ()
) -> Any:
    """Give every rank the value of one rank.

    Args:
        own: the value, on that rank; not looked at on the others.
        source: the rank within the group.
        group, kinds: as for `all_gather_values`.
    Returns:
        The value; that rank gets its own back.
    Raises:
        ForeignMessageError: as for `all_gather_values`.
    Communication: two broadcasts over the group, of the length and of the bytes.
    """
    if dist.get_rank(group) == source:
        broadcast_message(to_message(own, kinds), group, source)
        return own
    return from_message(broadcast_message(None, group, source), kinds)


def broadcast_message(content: bytes | None, group: dist.ProcessGroup | None = None, source: int = 0) -> bytes:
    """Give every rank the bytes of one rank.

    Args:
        content: on the source, what is sent; None on the others.
        group, source: as for `broadcast_value`.
    Raises:
        ForeignMessageError: they are more than `MAX_MESSAGE_BYTES`.
    Communication: two broadcasts over the group.
    """
    device = _device_of(group)
    length = torch.tensor([0 if content is None else len(content)], device=device)
    dist.broadcast(length, group=group, group_src=source)
    num_bytes = _checked(int(length))
    sent = torch.empty(num_bytes, dtype=torch.uint8, device=device) if content is None else _tensor(content, device)
    dist.broadcast(sent, group=group, group_src=source)
    return _bytes(sent, num_bytes)


def _with_lengths(own: Any, group: dist.ProcessGroup | None, kinds: tuple[type, ...]) -> tuple[Tensor, list[int]]:
    """This rank's bytes, filled up to the longest of all ranks, and the lengths of all.

    Communication: one all-gather of an int64.
    """
    content, device = to_message(own, kinds), _device_of(group)
    length = torch.tensor([len(content)], device=device)
    gathered = [torch.empty_like(length) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, length, group=group)
    lengths = [_checked(int(other)) for other in gathered]
    return _tensor(content.ljust(max(lengths)), device), lengths


def _checked(num_bytes: int) -> int:
    if not 0 < num_bytes <= MAX_MESSAGE_BYTES:
        raise ForeignMessageError(f"a rank announces a message of {num_bytes} bytes; at most {MAX_MESSAGE_BYTES}")
    return num_bytes


def _tensor(content: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def _bytes(tensor: Tensor, length: int) -> bytes:
    return tensor[:length].cpu().numpy().tobytes()


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where the tensors of a group's collectives lie."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
