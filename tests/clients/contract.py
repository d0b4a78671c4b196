"""The server's contract as an OpenAPI document, for the fuzz: as strict as the server is.

Answers are short here (at most eight tokens), for there are to be many of them.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FULL_TEXT: Schema = {"type": "string", "minLength": 1}
# onnxruntime-genai's tokenizer would end a text at its first NUL.
PROMPT: Schema = {"type": "string", "pattern": "^[^\\u0000]*$"}
FULL_PROMPT: Schema = {"type": "string", "pattern": "^[^\\u0000]+$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FALSE: Schema = {"enum": [False, None]}
EMPTY_LIST: Schema = {"type": ["array", "null"], "maxItems": 0}
ANYTHING: Schema = {}
STOP: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
ROLE: Schema = {"enum": ["user", "assistant", "system", "developer"]}


def make_object(properties: Schema, required: list[str] | None = None) -> Schema:
    """An object without other properties; all are required unless said."""
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def make_list(items: Schema, most: int | None = None) -> Schema:
    made = {"type": "array", "minItems": 1, "items": items}
    return made if most is None else {**made, "maxItems": most}


def common(model: str) -> Schema:
    """What both kinds of requests take."""
    return {
        "model": {"enum": [model, None]},
        # What fits depends on the prompt; these always do, and a range would be tried at its end.
        "max_tokens": {"enum": [1, 2, 3, 5, 8, None]},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
        "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1},
        "stop": {"anyOf": [{"type": "null"}, STOP, {**make_list(STOP, 4), "minItems": 0}]},
        "stream": FALSE,
        "n": {"enum": [1, None]},
        "frequency_penalty": {"enum": [0, None]},
        "presence_penalty": {"enum": [0, None]},
        "logit_bias": {"type": ["object", "null"], "maxProperties": 0},
        "user": ANYTHING,
        "metadata": ANYTHING,
    }


def chat(model: str) -> Schema:
    part = make_object({"type": {"enum": ["text"]}, "text": PROMPT})
    message = make_object(
        {
            "role": ROLE,
            "content": {"anyOf": [PROMPT, make_list(part)]},
            "name": ANYTHING,
            "refusal": {"type": "null"},
            "tool_calls": EMPTY_LIST,
        },
        ["role", "content"],
    )
    own = {
        "messages": make_list(message),
        "response_format": {"enum": [{"type": "text"}, None]},
        "logprobs": FALSE,
        "tools": EMPTY_LIST,
        "tool_choice": {"enum": ["none", "auto", None]},
    }
    return make_object({**common(model), **own}, ["messages"])


def completion(model: str) -> Schema:
    prompt = {"anyOf": [FULL_PROMPT, make_list(FULL_PROMPT, 1)]}
    return make_object({**common(model), "prompt": prompt}, ["prompt"])


def answer(model: str, kind: str, content: Schema) -> Schema:
    ending = {"logprobs": {"type": "null"}, "finish_reason": {"enum": ["stop", "length"]}}
    choice = make_object({"index": {"enum": [0]}, **content, **ending})
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
    return make_object(
        {
            "id": TEXT,
            "object": {"enum": [kind]},
            "created": COUNT,
            "model": {"enum": [model]},
            "system_fingerprint": TEXT,
            "choices": make_list(choice, 1),
            "usage": make_object(usage),
        }
    )


def error() -> Schema:
    maybe = {"type": ["string", "null"]}
    kinds = {"enum": ["invalid_request_error", "rate_limit_error"]}
    inner = make_object({"message": FULL_TEXT, "type": kinds, "param": maybe, "code": maybe})
    return make_object({"error": inner})


def reply(schema: Schema, kind: str = "application/json") -> Schema:
    return {"description": "what comes back", "content": {kind: {"schema": schema}}}


def operation(answered: Schema, asked: Schema | None = None, *errors: str) -> Schema:
    """One method of one path."""
    responses = {"200": answered, **{status: reply(error()) for status in errors}}
    if asked is None:
        return {"responses": responses}
    body = {"required": True, "content": {"application/json": {"schema": asked}}}
    return {"requestBody": body, "responses": responses}


def describe(model: str) -> Schema:
    """Return the document of a server that has this model."""
    message = make_object({"role": {"enum": ["assistant"]}, "content": TEXT, "refusal": FALSE})
    chat_answer = answer(model, "chat.completion", {"message": message})
    text_answer = answer(model, "text_completion", {"text": TEXT})
    kinds = {"id": {"enum": [model]}, "object": {"enum": ["model"]}}
    entry = make_object({**kinds, "created": COUNT, "owned_by": TEXT, "context_length": COUNT})
    listed = make_object({"object": {"enum": ["list"]}, "data": make_list(entry, 1)})
    wrong = ("400", "404", "413", "415")
    page = "text/plain; version=0.0.4; charset=utf-8"
    paths: Schema = {
        "/v1/chat/completions": {"post": operation(reply(chat_answer), chat(model), *wrong)},
        "/v1/completions": {"post": operation(reply(text_answer), completion(model), *wrong)},
        "/v1/models": {"get": operation(reply(listed))},
        "/v1/models/{model}": {"get": operation(reply(entry), None, "404")},
        "/health": {"get": operation(reply(make_object({"status": {"enum": ["ok"]}})))},
        "/metrics": {"get": operation(reply(TEXT, page))},
    }
    name = {"name": "model", "in": "path", "required": True, "schema": TEXT}
    paths["/v1/models/{model}"]["parameters"] = [name]
    return {"openapi": "3.1.0", "info": {"title": "runner", "version": "1"}, "paths": paths}
