"""CTranslate2, the language model alone: python -m benchmarks.compare.programs.language CHECKPOINT THREADS WORK TYPE

A checkpoint's language model is written as a checkpoint of its own (OPT), and converted once. A job's requests have
``ids`` in place of an image and a prompt.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ctranslate2
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import Blip2Config, PreTrainedTokenizerFast

from benchmarks.compare.programs.protocol import Job, Output, serve

PREFIX = "language_model."
_TIED = "lm_head.weight"
_SPECIAL = {"bos_token": "t2", "eos_token": "t2", "pad_token": "t1", "unk_token": "t0"}


def extract(checkpoint: Path, folder: Path) -> None:
    """Write the language model of a BLIP-2 checkpoint, with a tokenizer that has a word ``t{id}`` for each id."""
    folder.mkdir(parents=True, exist_ok=True)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for file in sorted(set(index.values())):
        with safe_open(checkpoint / file, "pt") as shard:
            names = [name for name in shard.keys() if name.startswith(PREFIX)]  # noqa: SIM118  # it is no mapping
            weights |= {name.removeprefix(PREFIX): shard.get_tensor(name) for name in names}
    weights.pop(_TIED, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = Blip2Config.from_pretrained(checkpoint).text_config
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, **_SPECIAL).save_pretrained(folder)


def convert(checkpoint: Path, work: Path, compute_type: str) -> Path:
    """The converted model, made in a process of its own: what conversion takes in memory is not the model's."""
    converted, source = work / f"ctranslate2-{compute_type}", work / "language-model"
    if not converted.exists():
        extract(checkpoint, source)
        program = Path(sys.executable).with_name("ct2-transformers-converter")
        options = ["--quantization", compute_type, "--output_dir", converted]
        subprocess.run([program, "--model", source, *options], check=True)
        shutil.rmtree(source)
    return converted


class Language:
    """The converted model, greedy."""

    def __init__(self, folder: Path, compute_type: str, threads: int) -> None:
        self._generator = ctranslate2.Generator(str(folder), compute_type=compute_type, intra_threads=threads)

    def answer(self, job: Job) -> Output:
        """Continue all prompts of a job as one batch."""
        requests = job["requests"]
        tokens = requests[0]["tokens"]
        results = self._generator.generate_batch(
            [[f"t{i}" for i in request["ids"]] for request in requests],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]


def main(checkpoint: str, threads: str, work: str, compute_type: str) -> None:
    """Convert if need be, and serve."""
    folder = convert(Path(checkpoint), Path(work), compute_type)
    serve(lambda: Language(folder, compute_type, int(threads)).answer, ("ctranslate2",))


if __name__ == "__main__":
    main(*sys.argv[1:])
