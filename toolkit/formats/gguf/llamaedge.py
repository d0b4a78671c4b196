"""A start script for LlamaEdge beside the GGUF file: `sh llamaedge.sh` serves it on loopback.

LlamaEdge renders chats by a template of its own, chosen by name (chat-prompts/src/lib.rs there).
"""

import shlex

from toolkit.formats.gguf.layout import DATA_FILE

SCRIPT = "llamaedge.sh"
PROMPT_TEMPLATE = "phi-3-chat"
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


def write_script(name: str, context_length: int) -> str:
    """The script's text; `name` is what the API calls the model."""
    return TEXT.format(
        data_file=DATA_FILE,
        script=SCRIPT,
        template=PROMPT_TEMPLATE,
        context_length=context_length,
        name=shlex.quote(name),
    )
