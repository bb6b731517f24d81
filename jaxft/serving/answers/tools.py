"""The tools that a model may call."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxft.serving.http.bodies import object_field, refuse_unknown, text_field
from jaxft.serving.http.errors import bad_request

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_TOOLS, SCHEMA_BYTES, DESCRIPTION_CHARACTERS = 128, 256 * 1024, 64 * 1024


def parse_tools(value: Any, choice: Any) -> tuple[dict[str, Any], ...]:
    """The tools as a chat template reads them; none where the choice is `none`. Raises ApiError 400."""
    if value is not None and (not isinstance(value, list) or len(value) > MOST_TOOLS):
        raise bad_request(f"tools must be a list of at most {MOST_TOOLS} functions.", "tools")
    tools = tuple(_tool(one, f"tools[{number}].") for number, one in enumerate(value or []))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise bad_request("Two tools have the same name: give each its own.", "tools")
    if choice == "required" or isinstance(choice, Mapping):
        raise bad_request(
            "A forced tool_choice is not served yet: auto and none are.", "tool_choice", "unsupported_parameter"
        )
    if choice not in (None, "auto", "none"):
        raise bad_request("tool_choice must be auto or none.", "tool_choice")
    if choice == "auto" and not tools:
        raise bad_request("tool_choice needs tools.", "tool_choice")
    return () if choice == "none" else tools


def _tool(given: Any, within: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or given.get("type") != "function":
        raise bad_request(f"{within[:-1]} must be an object of the type function: no other tool is served.", "tools")
    refuse_unknown(given, ("type", "function"), within)
    function, inner = object_field(given, "function", within), f"{within}function."
    refuse_unknown(function, ("name", "description", "parameters", "strict"), inner)
    name = text_field(function, "name", required=True, within=inner) or ""
    if NAME.fullmatch(name) is None:
        raise bad_request(f"{inner}name must be 1 to 64 of the characters A-Z, a-z, 0-9, _ . and -.", f"{inner}name")
    if function.get("strict"):
        raise bad_request(f"{inner}strict is not served yet: leave it out.", f"{inner}strict", "unsupported_parameter")
    text_field(function, "description", most=DESCRIPTION_CHARACTERS, within=inner)
    parameters = object_field(function, "parameters", inner)
    if len(json.dumps(parameters)) > SCHEMA_BYTES:
        raise bad_request(f"{inner}parameters is longer than {SCHEMA_BYTES:,} bytes.", f"{inner}parameters")
    # Templates print what is there in its order, as they did for the rows of training.
    told = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {key: told if key == "function" else given[key] for key in given}
