"""JSON records that are read strictly: what is missing, unknown, repeated or of another type is an error."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ebft_mega.errors import BrokenCheckpointError, InputError, Problem
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading

# More than any count, size or offset of a run, and what every reader of JSON holds exactly enough.
LARGEST_COUNT = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # hexadecimal
NEWER = "written by a newer version of ebft_mega"
MAX_PROBLEMS = 20  # a record that is wrong throughout needs no more to be recognised as such


class Record(BaseModel):
    """Base of what stands in JSON files: checkpoints, datasets, the state of a run's data. Strict about every field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=Record)


def parse_record(kind: type[R], text: str | bytes, where: str) -> R:
    """Read one record from JSON text.

    Args:
        kind: what it should be.
        text: the whole file; UTF-8 if it is bytes.
        where: the file that it comes from, for messages.
    Raises:
        BrokenCheckpointError: it is no such record; each problem with its place, at most `MAX_PROBLEMS`.
        InputError: a newer version of this program has written it: not broken, so not to be skipped as such.
    """
    with reading(where, "(text)", f"a whole {kind.__name__} as JSON", BrokenCheckpointError):
        text = text.decode() if isinstance(text, bytes) else text
        parse_json(text)
        try:
            return kind.model_validate_json(text, by_alias=True, by_name=False)
        except ValidationError as error:
            raise BrokenCheckpointError(_problems_of_fields(error, where)) from None


def _problems_of_fields(error: ValidationError, where: str) -> list[Problem]:
    """One problem per field, at most `MAX_PROBLEMS`.

    Raises:
        InputError: the version is a newer one.
    """
    problems = []
    for item in error.errors(include_url=False):
        key = ".".join(map(str, item["loc"])) or "(text)"
        found = repr(item["input"])[:200]
        if item["type"] == "literal_error" and item["loc"][-1] == "version":
            known = item["ctx"]["expected"].split()[-1]  # "1", or "1 or 2"
            if isinstance(item["input"], int) and item["input"] > int(known):
                raise InputError([Problem(where, key, f"{found}, {NEWER}", known)]) from None
        problems.append(Problem(where, key, found, item["msg"]))
    return problems[:MAX_PROBLEMS]


def _inner_path(name: str) -> str:
    """Refuse everything that could lie outside a folder, or mean another file elsewhere."""
    is_plain = name.isprintable() and "\\" not in name
    if not is_plain or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("a file's path relative to the checkpoint folder, such as weights/rank-00000.safetensors")
    return name


InnerPath = Annotated[str, AfterValidator(_inner_path)]
