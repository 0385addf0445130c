"""Writes a GGUF file again with its matrices in another type: `python -m loadtest.micro.requantize_gguf IN OUT TYPE`.

TYPE: one that the gguf package can write (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BF16, MXFP4, TQ1_0, TQ2_0). All else is copied;
tensors of one dimension stay as they are. For measurements of the same weights in many types.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Format


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("type", choices=[one.name for one in Format])
    options = parser.parse_args(arguments)
    requantize(options.source, options.output, Format[options.type])


def requantize(source: Path, output: Path, kind: Format) -> None:
    """NotImplementedError for a type that the gguf package cannot write."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quants.quantize(floats, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
