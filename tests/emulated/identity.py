"""Who the emulated board says it is: a Raspberry Pi 5 with 8 GB."""

from pathlib import Path

MODEL = "Raspberry Pi 5 Model B Rev 1.0"
COMPATIBLE = ("raspberrypi,5-model-b", "brcm,bcm2712")
HOST_NAME = "raspberrypi"
# Of a userland's /proc; a whole machine has its own. onnxruntime crashes on x86's cpuinfo.
PROC_FILES = tuple(Path(__file__).parent / "board" / name for name in ("cpuinfo", "meminfo"))
