"""Checks of one topic each, over facts and manifest alone."""

from toolkit.artifact import Manifest
from toolkit.console import format_bytes
from toolkit.device import Facts
from toolkit.preflight.finding import Finding

# Every runtime there is needs a 64-bit userland of one of these.
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
MOST_SKEW_S = 300
HOT_CELSIUS = 80.0
# No symbolic links there, of which every release is made. FAT has no file beyond 4 GiB either.
LINKLESS = ("vfat", "msdos", "exfat", "sdcardfs", "esdfs")
ANDROID_SHARED = ("/storage/", "/sdcard")
# Providers that are no CPU, with the kind of accelerator they need.
ACCELERATORS = {"cuda": "nvidia", "metal": "metal", "gpu": "intel_gpu", "npu": "intel_npu"}
NAMES = {
    "nvidia": "an NVIDIA GPU with its driver",
    "metal": "Apple silicon",
    "intel_gpu": "an Intel GPU (/dev/dri/renderD*)",
    "intel_npu": "an Intel NPU (/dev/accel/accel*)",
}


def check_machine(facts: Facts) -> Finding:
    """A 64-bit kernel with a 32-bit userland counts as 32 bits."""
    if facts.word_bits == 64 and facts.machine.lower() in MACHINES:
        return Finding("machine", "ok", f"{facts.machine}, 64 bits")
    return Finding(
        "machine",
        "refused",
        f"{facts.machine} with a {facts.word_bits}-bit userland; the runtimes need "
        f"64 bits and one of {', '.join(MACHINES)}",
        "install a 64-bit system on the device",
    )


def check_processor(facts: Facts, package: str) -> list[Finding]:
    """Instruction sets; a device that does not tell its own is not judged."""
    features = facts.cpu_features
    if not features:
        return []
    # "Intel Atom processor with Intel SSE4.2 support" is the least in OpenVINO's list:
    # https://docs.openvino.ai/systemrequirements
    if facts.arch == "x86_64" and package == "openvino-genai" and "sse4_2" not in features:
        text = "the processor has no SSE4.2; OpenVINO needs it"
        return [Finding("processor", "refused", text, "take an ONNX or a GGUF artifact")]
    if facts.arch == "x86_64" and "avx2" not in features:
        text = "the processor has no AVX2: answers will be slow"
        return [Finding("processor", "warning", text)]
    if facts.arch != "x86_64" and "asimddp" not in features:
        # Cortex-A72 (Raspberry Pi 4): everything runs, on slower kernels.
        return [Finding("processor", "ok", "no dot product instructions: slower kernels")]
    return [Finding("processor", "ok", ", ".join(features))]


def check_accelerator(facts: Facts, provider: str) -> list[Finding]:
    """The GPU or NPU of a provider, and CUDA for cuda; nothing for a CPU."""
    kind = ACCELERATORS.get(provider)
    if kind is None:
        return []
    found = [one for one in facts.accelerators if one.kind == kind]
    if not found:
        text = f"provider {provider} needs {NAMES[kind]}, and none was found"
        return [Finding("accelerator", "refused", text, "take an artifact for the CPU")]
    if not any(one.is_accessible for one in found):
        text = f"{found[0].name} is there, and this user may not open it"
        advice = "let it: sudo usermod -a -G render USER, then log in again"
        return [Finding("accelerator", "refused", text, advice)]
    if provider == "cuda" and facts.cuda is None:
        text = f"an NVIDIA GPU ({found[0].name}) is there, and no CUDA in /usr/local/cuda"
        advice = "install CUDA (on a Jetson: sudo apt install nvidia-jetpack)"
        return [Finding("accelerator", "refused", text, advice)]
    names = ", ".join(one.name for one in found) + (f", CUDA {facts.cuda}" if facts.cuda else "")
    return [Finding("accelerator", "ok", names)]


def check_memory(facts: Facts, manifest: Manifest) -> Finding:
    """Weights, cache and engine in what is available; a graphics card's own memory is not known."""
    free_bytes, need_bytes = facts.usable_memory_bytes, manifest.device_memory_bytes
    needs = f"{manifest.name} at context {manifest.context_length} needs {format_bytes(need_bytes)}"
    if manifest.runtime.provider == "cuda" and facts.jetson is None:
        text = f"the GPU's memory is not known; {needs} of it"
        return Finding("memory", "warning", text)
    if free_bytes is None:
        return Finding("memory", "warning", f"available memory is not known; {needs}")
    limit_bytes, available_bytes = facts.memory_limit_bytes, facts.memory_available_bytes
    is_limited = limit_bytes is not None and free_bytes == limit_bytes != available_bytes
    limit = " within its control group's limit" if is_limited else ""
    text = f"{format_bytes(free_bytes)} of memory are available{limit}; {needs}"
    if free_bytes >= need_bytes:
        return Finding("memory", "ok", text)
    advice = "raise the control group's limit" if is_limited else "stop other programs there"
    return Finding("memory", "refused", text, f"{advice}, or take fewer bits or a shorter context")


def check_storage(facts: Facts, manifest: Manifest) -> list[Finding]:
    """The root folder can be written, and can hold symbolic links and files of this size."""
    elsewhere = "choose a folder on another disk: `root:` in devices.yaml"
    if facts.disk_is_writable is False:
        text = f"{facts.root} cannot be written ({facts.disk_file_system or 'unknown file system'})"
        return [Finding("storage", "refused", text, f"mount it writable, or {elsewhere}")]
    if facts.disk_file_system in LINKLESS or facts.root.startswith(ANDROID_SHARED):
        kind = facts.disk_file_system or "shared storage"
        text = f"{facts.root} is on {kind}, which has no symbolic links"
        largest = max((file.size_bytes for file in manifest.files), default=0)
        if facts.disk_file_system in ("vfat", "msdos") and largest >= 1 << 32:
            text += f" and no files beyond 4 GiB; the largest here has {format_bytes(largest)}"
        return [Finding("storage", "refused", text, elsewhere)]
    return [Finding("storage", "ok", f"{facts.disk_file_system or 'unknown file system'}")]


def check_health(facts: Facts) -> list[Finding]:
    """Warnings only: a slow device answers right."""
    findings = []
    if facts.throttled:
        text = f"it is slowed down now: {', '.join(facts.throttled)}"
        advice = "check its power supply and cooling"
        findings.append(Finding("throttling", "warning", text, advice))
    if facts.temperature_celsius is not None and facts.temperature_celsius >= HOT_CELSIUS:
        text = f"it has {facts.temperature_celsius:.0f} degrees Celsius"
        findings.append(Finding("temperature", "warning", text, "check its cooling"))
    return findings


def check_clock(facts: Facts, now_s: float) -> list[Finding]:
    """A clock that is wrong confuses logs and certificates, and nothing of ours."""
    skew_s = 0.0 if facts.clock_s is None else facts.clock_s - now_s
    if abs(skew_s) <= MOST_SKEW_S:
        return []
    way = "ahead" if skew_s > 0 else "behind"
    text = f"its clock is {abs(skew_s) / 60:.0f} minutes {way}"
    return [Finding("clock", "warning", text, "set it: sudo timedatectl set-ntp true")]
