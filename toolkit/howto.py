"""How an app takes a bundle: a page per platform and format, with the model's own texts in it.

Classes and methods are those of onnxruntime-genai (src/java, src/objectivec), of mlx-swift-lm
(MLXLMCommon) and of Qualcomm's Genie; the pages are not compiled here.
"""

import json

from toolkit.artifact import Manifest
from toolkit.quality.chat import render
from toolkit.quality.turns import FIRST

HEAD = """\
# {name} on {title}

Check what arrived, in this folder: `{check}`. `MEMORY.md` says what memory it takes.

{note}
A question becomes this text, and an answer ends at {stops}:

```
{prompt}
```
"""
CARRIED = """\
The model's chat template is more than text before and after a content. Chats of several turns, and
system messages, have to be rendered with it: it is `chat.template.text` in `model/manifest.json`,
in Jinja. What follows is right for one question.
"""
KOTLIN = """
## In the app

1. Build or get `onnxruntime-genai` for Android ({version} is what the artifact was made with) and
   `onnxruntime-android`; put both .aar files into `app/libs`, with arm64-v8a as ABI filter.
2. The model is too large for an APK's assets: download the folder `model` into the app's own files,
   compare with `SHA256SUMS`, and only then use it. While developing:
   `adb push model /data/local/tmp/{name}`, or `phiship deploy ARTIFACT adb`.
3. Ask it away from the main thread:

```kotlin
import ai.onnxruntime.genai.*

Model(folder.path).use {{ model ->
    Tokenizer(model).use {{ tokenizer ->
        GeneratorParams(model).use {{ params ->
            params.setSearchOption("max_length", {context}.0)   // the cache's size: MEMORY.md
            params.setSearchOption("do_sample", false)
            val before = {before}
            val after = {after}
            val stream = tokenizer.createStream()
            Generator(model, params).use {{ generator ->
                generator.appendTokenSequences(tokenizer.encode(before + question + after))
                while (!generator.isDone()) {{
                    generator.generateNextToken()
                    show(stream.decode(generator.getLastTokenInSequence(0)))
                }}
            }}
        }}
    }}
}}
```

Question and answer together must stay within {context} tokens.
"""
SWIFT_ONNX = """
## In the app

1. Build onnxruntime-genai for {title} from source (its own build script makes the frameworks), with
   the Objective-C classes of `src/objectivec`; {version} is what the artifact was made with.
2. Add the folder `model` to the app as a folder reference, or download it on the first start and
   compare with `SHA256SUMS`.
3. Ask it away from the main thread (Objective-C; Swift calls it through a bridging header):

```objc
NSError *error = nil;
OGAModel *model = [[OGAModel alloc] initWithPath:folder error:&error];
OGATokenizer *tokenizer = [[OGATokenizer alloc] initWithModel:model error:&error];
OGAGeneratorParams *params = [[OGAGeneratorParams alloc] initWithModel:model error:&error];
[params setSearchOption:@"max_length" doubleValue:{context} error:&error];  // the cache: MEMORY.md
NSString *before = @{before}, *after = @{after};
NSString *prompt = [NSString stringWithFormat:@"%@%@%@", before, question, after];
OGAGenerator *generator = [[OGAGenerator alloc] initWithModel:model params:params error:&error];
[generator appendTokenSequences:[tokenizer encode:prompt error:&error] error:&error];
OGATokenizerStream *stream = [[OGATokenizerStream alloc] initWithTokenizer:tokenizer error:&error];
while (![generator isDoneWithError:&error]) {{
    [generator generateNextTokenWithError:&error];
    size_t count = [generator sequenceCountAtIndex:0 error:&error];
    show([stream decode:[generator sequenceDataAtIndex:0 error:&error][count - 1] error:&error]);
}}
```

Question and answer together must stay within {context} tokens. A memory entitlement
(com.apple.developer.kernel.increased-memory-limit) is needed for models above about half of an
iPhone's memory.
"""
SWIFT_MLX = """
## In the app

1. Add the package mlx-swift-lm, with its products MLXLLM and MLXLMCommon and one of its tokenizer
   integrations. It needs macOS 14 or iOS 17, and a device: the simulator has no Metal for it.
2. Add the folder `model` to the app as a folder reference, or download it on the first start and
   compare with `SHA256SUMS`.
3. Load it from the folder; chat template and stop tokens are in its files:

```swift
import MLXLLM
import MLXLMCommon

let container = try await LLMModelFactory.shared.loadContainer(
    from: folder, using: tokenizerLoader)   // of the tokenizer integration
let session = ChatSession(
    container, generateParameters: GenerateParameters(maxTokens: 256, temperature: 0))
print(try await session.respond(to: question))
```

Question and answer together must stay within {context} tokens. On an iPhone limit MLX's cache of
buffers (`MLX.GPU.set(cacheLimit:)`), and ask for the entitlement
com.apple.developer.kernel.increased-memory-limit.
"""
GENIE = """
## On the device

The binaries run on the kind of Snapdragon chip that they were compiled for, with the libraries of
the Qualcomm AI Runtime SDK of the version that compiled them (libGenie, libQnnHtp and the Hexagon
library of the chip). Those belong to Qualcomm and are not in this bundle. With them beside the
model, in /data/local/tmp/{name} on the device:

```sh
export LD_LIBRARY_PATH=$PWD ADSP_LIBRARY_PATH=$PWD
./genie-t2t-run -c genie_config.json -p "$(cat prompt.txt)"     # prompt.txt: the text above
```
"""
TITLES = {"android": "Android", "ios": "iPhone and iPad", "macos": "Mac"}
CHECKS = {
    "android": "sha256sum -c SHA256SUMS",
    "ios": "shasum -a 256 -c SHA256SUMS",
    "macos": "shasum -a 256 -c SHA256SUMS",
}


def write_howto(manifest: Manifest, platform: str) -> str:
    """The page for a platform that runs the artifact's format."""
    if manifest.format == "genie":
        body = GENIE
    elif manifest.format == "mlx":
        body = SWIFT_MLX
    else:
        body = KOTLIN if platform == "android" else SWIFT_ONNX
    chat = manifest.chat
    before, _, after = render(chat, [("user", FIRST)]).partition(FIRST)
    note = (
        ""
        if manifest.quality.checked
        else "Sealed as unchecked: nobody compared it with its source.\n"
    )
    if chat.template is not None:
        note += CARRIED
    return (HEAD + body).format(
        name=manifest.name,
        title=TITLES[platform],
        check=CHECKS[platform],
        note=note,
        stops=", ".join(f"`{text}`" for text in chat.stop_texts),
        prompt=f"{before}QUESTION{after}",
        before=_quote(before, platform),
        after=_quote(after, platform),
        context=manifest.context_length,
        version=manifest.runtime.version or "the version",
    )


def _quote(text: str, platform: str) -> str:
    """A string literal of Kotlin, where a dollar is special, or of Objective-C."""
    literal = json.dumps(text, ensure_ascii=False)
    return literal.replace("$", "\\$") if platform == "android" else literal
