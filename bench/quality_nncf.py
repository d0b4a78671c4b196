"""Compress an OpenVINO folder's weights by NNCF, with a calibration text: run by NNCF's own Python.

    PYTHON bench/quality_nncf.py FP16_FOLDER OUT IDS.npy [--awq] [--scale-estimation] [--gptq]
        [--lora-correction] [--sym] [--group-size 128]

FP16_FOLDER comes from `optimum-cli export openvino --weight-format fp16`. optimum-cli itself takes
data sets by name from the hub only; this gives NNCF the text that ours gets: ids [texts, n].
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino

MAIN_FILE = "openvino_model.xml"


def list_inputs(ids: Any) -> list[dict[str, Any]]:
    """What the network takes for each text, from an empty cache."""
    length = ids.shape[1]
    return [
        {
            "input_ids": text[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        for text in ids.astype(np.int64)
    ]


def main() -> None:
    """Write OUT: the compressed network and everything that lies beside it."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("source", type=Path)
    add("out", type=Path)
    add("ids", type=Path)
    for flag in ("--awq", "--scale-estimation", "--gptq", "--lora-correction", "--sym"):
        add(flag, action="store_true")
    add("--group-size", type=int, default=128)
    options = parser.parse_args()
    inputs = list_inputs(np.load(options.ids))
    mode = nncf.CompressWeightsMode.INT4_SYM if options.sym else nncf.CompressWeightsMode.INT4_ASYM
    network = nncf.compress_weights(
        openvino.Core().read_model(options.source / MAIN_FILE),
        mode=mode,
        ratio=1.0,
        group_size=options.group_size,
        dataset=nncf.Dataset(inputs),
        subset_size=len(inputs),
        awq=options.awq or None,
        scale_estimation=options.scale_estimation or None,
        gptq=options.gptq or None,
        lora_correction=options.lora_correction or None,
    )
    beside = shutil.ignore_patterns("openvino_model.*")
    shutil.copytree(options.source, options.out, dirs_exist_ok=True, ignore=beside)
    openvino.save_model(network, options.out / MAIN_FILE, compress_to_fp16=False)


if __name__ == "__main__":
    main()
