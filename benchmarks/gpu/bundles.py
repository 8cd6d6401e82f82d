"""Blipstream's engines without a server: ``build`` a bundle, ``measure`` its stages and its captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.fullsize.measure import build
from benchmarks.gpu.huggingface import BATCHES as CAPTION_BATCHES
from benchmarks.gpu.huggingface import TOKENS, pixels
from benchmarks.gpu.job import Job, parse
from benchmarks.gpu.rows import BUILD, CAPTION, FILE, PREFILL, QFORMER, STEP, VISION, single
from benchmarks.gpu.timing import measure
from benchmarks.sizes import model_sizes
from blipstream.planning.engines import Bundle

ROW_COUNTS = (1, 2, 4, 8, 16)
"""Sequences of a prefill and of a decode step."""
MAX_TOKENS = 128
"""Of a row of the cache: captions are short."""


def system_of(engine: str) -> str:
    """Its name in the rows."""
    return f"blipstream-{engine}"


def build_bundle(job: Job, engine: str, bundle: Path) -> None:
    """Build it as a user would; keep what it took."""
    options = () if engine == "onnxruntime" else ("--engine", engine)
    sizes = ("--max-sequences", str(max(ROW_COUNTS)), "--max-tokens", str(MAX_TOKENS))
    built = build(job.checkpoint, bundle, job.dtype, *options, *sizes)
    print(built.printed)
    system = system_of(engine)
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file() and path.stat().st_size >= 1 << 20]
    job.keep([single(system, BUILD, "s", round(built.seconds, 1))])
    job.keep([single(system, f"{FILE} {path.relative_to(bundle)}", "MiB", path.stat().st_size >> 20) for path in files])


def measure_bundle(job: Job, engine: str, bundle: Path) -> None:
    """Time every stage and the whole; what is measured first matters most."""
    system = system_of(engine)
    note_sizes(job)
    with Bundle(bundle) as model:
        side = model.manifest.image.size
        images = pixels(max(CAPTION_BATCHES), side)
        soft_tokens = model.read(model.see(images)).copy()
        for count in ROW_COUNTS:
            prompts = model.prompts(soft_tokens[np.arange(count) % len(soft_tokens)])
            prefill = measure(
                system, PREFILL, count, lambda p=prompts: model.decoder.prefill(0, p), seconds=job.seconds
            )
            lengths = model.lengths(prompts)
            tokens = np.full(count, model.manifest.generation.empty_prompt_ids[0], np.int64)
            step = measure(
                system, STEP, count, lambda t=tokens, n=lengths: model.decoder.decode(t, n), seconds=job.seconds
            )
            job.note(step_length=int(lengths[0]) + 1, prompt_length=prompts[0].num_tokens)
            job.keep([step, prefill])
        for batch in CAPTION_BATCHES:
            part = images[:batch]
            embeds = model.see(part).copy()
            job.keep(
                [
                    measure(system, CAPTION, batch, lambda x=part: model.caption(x, TOKENS), seconds=job.seconds),
                    measure(system, VISION, batch, lambda x=part: model.see(x), seconds=job.seconds),
                    measure(system, QFORMER, batch, lambda x=embeds: model.read(x), seconds=job.seconds),
                ]
            )
        job.note(tokens=model.caption(images, TOKENS))


def note_sizes(job: Job) -> None:
    """Leave the sizes of the checkpoint for the roofline."""
    import torch
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(job.checkpoint))
    job.note(sizes=model_sizes(model).to_json(), dtype=job.dtype)


def main() -> None:
    """Build, or measure what was built."""
    job, (task, engine) = parse(None, "task", "engine")
    bundle = job.work / f"bundle-{engine}"
    if task == "build":
        build_bundle(job, engine, bundle)
    else:
        measure_bundle(job, engine, bundle)


if __name__ == "__main__":
    main()
