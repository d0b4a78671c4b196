"""JSON as RFC 8259 has it: what two readers could understand in two ways is refused."""

from __future__ import annotations

import json
from typing import Any

from .refusal import refuse

MOST_DIGITS = 300  # what a float takes; reading more takes quadratic time


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request's body; Refusal for anything else."""
    try:
        data = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_make_object,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
        # JSON can spell half of a surrogate pair, which no text has.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise refuse("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise refuse("the body has a surrogate without its other half") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise refuse(f"the body is not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise refuse("the body is nested too deeply") from None
    if not isinstance(data, dict):
        raise refuse("the body has to be a JSON object")
    return data


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise refuse(f"the body has a key twice: {show(name)}")
        made[name] = value
    return made


def _refuse_constant(name: str) -> None:
    raise refuse(f"the body is not JSON: it has {name}")


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise refuse(f"the body has a number of {len(digits)} digits")
    return int(digits)


def show(name: str) -> str:
    """Return a client's word as it can be shown in a sentence."""
    return ascii(name if len(name) <= 60 else name[:60] + "...")
