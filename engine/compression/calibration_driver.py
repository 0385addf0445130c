"""Run by the environment of llmcompressor, and by nothing else: GPTQ or AWQ of a model, as a job says in JSON.

    python calibration_driver.py JOB

Imports nothing of ours: packages there are of other releases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(file: str) -> None:
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job["seed"])
    torch.set_num_threads(job["num_threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["computed_in"]))
    formats = {"config_groups": job["config_groups"], "ignore": job["ignore"]}
    recipe = [GPTQModifier(**formats)]
    if job["method"] == "awq":
        recipe = [AWQModifier(duo_scaling="both"), QuantizationModifier(**formats)]
    sequences = job["sequences"]
    data = Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(sequences),
        max_seq_length=max(map(len, sequences)),
    )
    model.to(getattr(torch, job["dtype"]))  # weights are multiples of scales in it: their integers stay what they are
    model.save_pretrained(job["output"], save_compressed=True)


if __name__ == "__main__":
    main(sys.argv[1])
