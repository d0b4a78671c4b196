"""Read a checkpoint and write as many bytes as an artifact has, with nothing between.

    python bench/read_write.py CHECKPOINT OUT BYTES WORKERS

What converting takes when computing costs nothing: each worker process reads its share of the
weight files in pieces of 4 MiB and writes its share of BYTES to OUT, in the same order.
"""

import multiprocessing
import os
import sys
from pathlib import Path

PIECE_BYTES = 1 << 22


def main() -> None:
    checkpoint, out, size, workers = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    out.mkdir(parents=True)
    target = out / "copy"
    with target.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    sources = sorted(checkpoint.glob("*.safetensors"))
    ratio = size / sum(path.stat().st_size for path in sources)
    context = multiprocessing.get_context("spawn")
    shares = [(sources, target, ratio, number, workers) for number in range(workers)]
    processes = [context.Process(target=copy_share, args=share) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


def copy_share(sources: list[Path], target: Path, ratio: float, number: int, workers: int) -> None:
    """Every `workers`-th piece."""
    buffer = bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    written = os.open(target, os.O_WRONLY)
    done = 0  # bytes before the current file
    for path in sources:
        descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
        for offset in range(number * PIECE_BYTES, size, workers * PIECE_BYTES):
            count = os.preadv(descriptor, [buffer], offset)
            os.pwrite(written, view[: int(count * ratio)], int((done + offset) * ratio))
        done += size
        os.close(descriptor)
    os.close(written)


if __name__ == "__main__":
    main()
