"""A start script for LlamaEdge beside the GGUF file: `sh llamaedge.sh` serves it on loopback.

LlamaEdge renders chats by a template of its own, chosen by name (chat-prompts/src/lib.rs there).
"""

import shlex

from toolkit.artifact import Chat
from toolkit.formats.gguf.layout import DATA_FILE
from toolkit.formats.gguf.nearest import find_pairs
from toolkit.formats.gguf.ollama import has_phi3_turns

SCRIPT = "llamaedge.sh"
PROMPT_TEMPLATE = "phi-3-chat"
# What a chat holds that one of LlamaEdge's templates is for, the most telling first; else ChatML.
MARKS = {
    "<|start_header_id|>": "llama-3-chat",
    "<start_of_turn>": "gemma-instruct",
    "<|im_start|>": "chatml",
    "GPT4 Correct ": "openchat",
    "<<SYS>>": "llama-2-chat",
    "[INST]": "mistral-instruct",
    "USER:": "vicuna-1.1-chat",
    "Human:": "human-assistant",
    "User:": "deepseek-chat",
}
OTHERWISE = "chatml"
# LlamaEdge penalizes repetitions by default, which the source does not.
TEXT = """\
#!/bin/sh
# Serves {data_file} in LlamaEdge, with an OpenAI-compatible API on http://127.0.0.1:8080/v1.
#   LLAMAEDGE_ADDRESS  another address and port to listen on
#   LLAMAEDGE_SERVER   llama-api-server.wasm, when it does not lie beside this script
# Further options go to the server, such as: sh {script} --threads 4
set -eu
server=${{LLAMAEDGE_SERVER:-}}
case $server in
    '' | /*) ;;
    *) server=$PWD/$server ;;
esac
cd -- "$(dirname -- "$0")"
server=${{server:-$PWD/llama-api-server.wasm}}
command -v wasmedge >/dev/null || {{
    echo "{script}: wasmedge is not installed; it needs its plugin wasi_nn-ggml too" >&2
    exit 127
}}
[ -f "$server" ] || {{
    echo "{script}: $server is not there; set LLAMAEDGE_SERVER to llama-api-server.wasm" >&2
    exit 66
}}
exec wasmedge --dir .:. --nn-preload default:GGML:AUTO:{data_file} "$server" \\
    --prompt-template {template} --ctx-size {context_length} --model-name {name} \\
    --repeat-penalty 1 \\
    --socket-addr "${{LLAMAEDGE_ADDRESS:-127.0.0.1:8080}}" "$@"
"""


def choose_template(chat: Chat) -> str:
    """The one of LlamaEdge's templates that is nearest to a chat's."""
    if has_phi3_turns(chat):
        return PROMPT_TEMPLATE
    texts = chat.turns.values() if chat.template is None else find_pairs(chat).between.values()
    text = "".join("".join(one) for one in texts)
    if "<|user|>" in text:
        return PROMPT_TEMPLATE if "<|end|>" in text else "zephyr"
    return next((name for mark, name in MARKS.items() if mark in text), OTHERWISE)


def write_script(name: str, context_length: int, template: str = PROMPT_TEMPLATE) -> str:
    """The script's text; `name` is what the API calls the model."""
    return TEXT.format(
        data_file=DATA_FILE,
        script=SCRIPT,
        template=template,
        context_length=context_length,
        name=shlex.quote(name),
    )
