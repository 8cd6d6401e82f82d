"""What is wrong with a checkpoint is said in one sentence, and nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from blipstream_export.build import build

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from tests.export.damage import (
    Fault,
    append,
    both,
    copy,
    cut,
    edit,
    link,
    other_tokenizer,
    processor,
    put,
    remove,
    rename,
    shard,
    shards,
    weights,
    write,
)

FAULTS: dict[str, tuple[Fault, type[CheckpointError], str]] = {
    # --- of a kind that is not served
    "another model": (
        put(model_type="llava", architectures=["LlavaForConditionalGeneration"]),
        UnsupportedCheckpointError,
        r"a kind that Blipstream does not serve \(model_type 'llava', architecture LlavaForConditionalGeneration.*"
        r"it serves Blip2ForConditionalGeneration, .* with a language model of type 'opt', 'llama', 't5'",
    ),
    "another architecture": (
        put(architectures=["Blip2ForImageTextRetrieval"]),
        UnsupportedCheckpointError,
        "architecture Blip2ForImageTextRetrieval",
    ),
    **{
        f"quantized by {method}": (
            put(**{field: {"quant_method": method}}),
            UnsupportedCheckpointError,
            rf"is quantized \({method}\), and Blipstream builds from weights in floating point",
        )
        for method, field in {"bitsandbytes": "quantization_config", "gptq": "text_config__quantization_config"}.items()
    },
    "a section that is none": (
        put(text_config=[1]),
        UnsupportedCheckpointError,
        r"text_config of .* must be a JSON object, but it is \[1\]",
    ),
    "images that are no squares": (
        put(vision_config__image_size=[28, 28]),
        UnsupportedCheckpointError,
        r"image_size must be one number, the side of a square, but it is \[28, 28\]",
    ),
    "another language model": (
        put(text_config__model_type="gpt2"),
        UnsupportedCheckpointError,
        "language model 'gpt2'",
    ),
    "nothing to begin with": (
        both(
            put(text_config__bos_token_id=None),
            edit("tokenizer.json", lambda contents: contents.update(post_processor=None)),
        ),
        UnsupportedCheckpointError,
        "has no bos_token_id and its tokenizer makes nothing of an empty text: a caption without a prompt has nothing",
    ),
    "embeddings wider than the hidden state": (
        put(text_config__word_embed_proj_dim=60),
        UnsupportedCheckpointError,
        "embeddings of width 60, wider than its hidden state of 48",
    ),
    "images cropped": (processor(do_center_crop=True), UnsupportedCheckpointError, "do_center_crop = true"),
    "images not normalised": (processor(do_normalize=False), UnsupportedCheckpointError, "do_normalize = false"),
    "an unknown filter": (processor(resample=5), UnsupportedCheckpointError, "resamples by filter 5"),
    # --- files missing or damaged
    "no configuration": (remove("config.json"), CheckpointError, "holds no config.json"),
    "configuration cut short": (cut("config.json", lambda size: size // 2), CheckpointError, "is not valid JSON"),
    "configuration a list": (write("config.json", b"[]"), CheckpointError, "must hold a JSON object, but it holds a l"),
    "impossible configuration": (put(vision_config__patch_size="x"), CheckpointError, "config.json cannot be loaded"),
    "no weights": (
        remove("model.safetensors"),
        CheckpointError,
        "holds no weights: expected model.safetensors or model.safetensors.index.json",
    ),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        CheckpointError,
        "holds its weights as pytorch_model.bin, and Blipstream reads safetensors",
    ),
    "weights truncated": (
        cut("model.safetensors", lambda size: size - 1),
        CheckpointError,
        r"model.safetensors is truncated: it holds \d+ bytes, and its header declares \d+",
    ),
    "weights truncated in the header": (
        cut("model.safetensors", lambda _: 100),
        CheckpointError,
        "truncated: it ends within its header, after 100 bytes",
    ),
    "weights empty": (cut("model.safetensors", lambda _: 0), CheckpointError, "truncated: it holds 0 bytes"),
    "weights with a tail": (
        append("model.safetensors", b"x"),
        CheckpointError,
        "is damaged: it holds",
    ),
    "weights of another format": (
        write("model.safetensors", b"PK\x03\x04 a pickle of torch"),
        CheckpointError,
        r"is not a safetensors file: it begins with b'PK",
    ),
    "weights with a broken header": (
        write("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        CheckpointError,
        "is not a safetensors file: its header cannot be read",
    ),
    "a shard missing": (
        shards(lambda folder: shard(folder, 1).unlink()),
        CheckpointError,
        r"lacks the shard model-00002-of-\d+.safetensors, one of \d+ that its index names",
    ),
    "a shard truncated": (
        shards(lambda folder: cut(shard(folder, -1).name, lambda size: size - 4000)(folder)),
        CheckpointError,
        r"model-\d+-of-\d+.safetensors is truncated",
    ),
    "a shard of another model": (
        shards(lambda folder: shutil.copy(shard(folder, 0), shard(folder, 1)) and None),
        CheckpointError,
        r"the shard .* lacks the tensor .*, which the index places there",
    ),
    "an empty index": (
        shards(write("model.safetensors.index.json", b"{}")),
        CheckpointError,
        "has no weight_map",
    ),
    "a shard missing, and the index": (
        shards(both(remove("model.safetensors.index.json"), lambda folder: shard(folder, 1).unlink())),
        CheckpointError,
        r"lacks the shard model-00002-of-\d+.safetensors, and the index",
    ),
    "shards of two models": (
        shards(both(remove("model.safetensors.index.json"), copy("config.json", "model-00001-of-00099.safetensors"))),
        CheckpointError,
        r"holds several series of shards \(model-\*-of-\d+, model-\*-of-00099\) and no model.safetensors.index.json",
    ),
    "shards of which two hold a tensor": (
        shards(
            both(remove("model.safetensors.index.json"), lambda folder: shutil.copy(shard(folder, 0), shard(folder, 1)))
        ),
        CheckpointError,
        "both hold the tensor .*, and no model.safetensors.index.json says which one counts",
    ),
    "several files of unknown names": (
        both(copy("model.safetensors", "b.safetensors"), rename("model.safetensors", "a.safetensors")),
        CheckpointError,
        r"holds several weight files \(a.safetensors, b.safetensors\): expected model.safetensors",
    ),
    "an index of numbers": (
        shards(write("model.safetensors.index.json", b'{"weight_map": {"query_tokens": 3}}')),
        CheckpointError,
        "has no weight_map",
    ),
    "weights that a training leaves": (
        both(remove("model.safetensors"), write("training_args.bin", b"x")),
        CheckpointError,
        "holds no weights: expected",
    ),
    "weights of llama.cpp": (
        both(remove("model.safetensors"), write("blip2-q4.gguf", b"x")),
        CheckpointError,
        "holds its weights as blip2-q4.gguf, and Blipstream reads safetensors",
    ),
    "a download that was not finished": (
        lambda folder: both(remove("model.safetensors"), link("../blobs/3f", "model.safetensors"))(folder),
        CheckpointError,
        "model.safetensors is a link to a file that is not there: its download was not finished",
    ),
    **{
        f"a Git LFS pointer in place of {name}": (
            write(name, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
            CheckpointError,
            f"{name} is a Git LFS pointer and not the file itself: run `git lfs pull`",
        )
        for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json")
    },
    **{
        f"a byte order mark in {name}": (
            lambda folder, name=name: write(name, b"\xef\xbb\xbf" + (folder / name).read_bytes())(folder),
            CheckpointError,
            f"{name} begins with a byte order mark: save it as UTF-8 without one",
        )
        for name in ("config.json", "tokenizer.json", "processor_config.json")
    },
    "a comment in the configuration": (
        write("config.json", b'// of BLIP-2\n{"model_type": "blip-2"}'),
        CheckpointError,
        "config.json is not valid JSON: Expecting value: line 1 column 1",
    ),
    "an adapter": (
        both(
            remove("config.json"),
            rename("model.safetensors", "adapter_model.safetensors"),
            write("adapter_config.json", b"{}"),
        ),
        CheckpointError,
        r"holds an adapter \(adapter_config.json\), and a whole checkpoint was expected: merge it into its base",
    ),
    "an adapter beside a configuration": (
        both(rename("model.safetensors", "adapter_model.safetensors"), write("adapter_config.json", b"{}")),
        CheckpointError,
        "holds an adapter",
    ),
    # --- contents that do not fit together
    "names with a prefix": (
        weights(lambda tensors: [tensors.update({f"module.{name}": tensors.pop(name)}) for name in list(tensors)]),
        CheckpointError,
        "lacks the tensor query_tokens .*: its tensors' names begin with 'module.', which has to be cut off",
    ),
    **{
        f"weights of type {name}": (
            weights(lambda tensors, dtype=dtype: tensors.update(query_tokens=tensors["query_tokens"].to(dtype))),
            CheckpointError,
            f"the tensor query_tokens in .* is of type {name}: expected one of F64, F32, F16, BF16",
        )
        for name, dtype in {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}.items()
    },
    "weights that are no numbers": (
        weights(lambda tensors: tensors["language_projection.bias"].fill_(float("nan"))),
        CheckpointError,
        "computes infinite values or NaN in fp32: its tensor language_projection.bias holds such values",
    ),
    "a tensor missing": (
        weights(lambda tensors: tensors.pop("language_projection.weight")),
        CheckpointError,
        "lacks the tensor language_projection.weight that its configuration asks for",
    ),
    "tensors missing": (
        put(text_config__num_hidden_layers=3),
        CheckpointError,
        r"lacks 16 tensors \(language_model.model.decoder.layers.2.fc1.bias, .*, ...\)",
    ),
    "a tensor of another shape": (
        put(text_config__ffn_dim=81),
        CheckpointError,
        r"the tensor language_model.model.decoder.layers.0.fc1.bias of .* has shape \(80,\), and its configuration "
        r"asks for \(81,\) \(and \d+ more\)",
    ),
    "no query tokens": (
        weights(lambda tensors: tensors.pop("query_tokens")),
        CheckpointError,
        "lacks the tensor query_tokens",
    ),
    "another number of query tokens": (
        put(num_query_tokens=32),
        CheckpointError,
        "declares num_query_tokens = 32, but the tensor query_tokens holds 6",
    ),
    "another number of placeholders": (
        edit("processor_config.json", lambda config: config.update(num_query_tokens=7)),
        CheckpointError,
        "the processor of .* declares num_query_tokens = 7, but the tensor query_tokens holds 6",
    ),
    "images of another size": (
        processor(size={"height": 32, "width": 32}),
        CheckpointError,
        "and the vision encoder reads 28 x 28",
    ),
    # --- a wrong tokenizer
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        CheckpointError,
        "holds no tokenizer: expected one of tokenizer.json, vocab.json",
    ),
    "a damaged tokenizer": (
        cut("tokenizer.json", lambda size: size // 2),
        CheckpointError,
        "the tokenizer and image processor of .* cannot be loaded",
    ),
    "no image processor": (
        remove("processor_config.json"),
        CheckpointError,
        "holds no image processor: expected one of processor_config.json, preprocessor_config.json",
    ),
    "a processor of placeholders only": (
        edit("processor_config.json", lambda config: config.pop("image_processor")),
        CheckpointError,
        "holds no image processor",
    ),
    "a tokenizer that needs conversion": (
        both(remove("tokenizer.json"), write("spiece.model", b"x")),
        CheckpointError,
        r"\(it has no tokenizer.json: making one needs sentencepiece or tiktoken\) cannot be loaded",
    ),
    "a larger tokenizer": (
        other_tokenizer(vocab_size=330),
        CheckpointError,
        r"is not that of its language model: token '<image>' has id 329, and the language model's vocab_size is 320",
    ),
    "a tokenizer with another placeholder": (
        put(image_token_index=317),
        CheckpointError,
        "<image> has id 319, and the configuration has image_token_index = 317",
    ),
    "an end token outside the vocabulary": (
        put(text_config__eos_token_id=[2, 320]),
        CheckpointError,
        r"eos_token_id = \[2, 320\] is outside the language model's vocabulary of 320 tokens",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_sentence_and_leaves_nothing(name: str, checkpoint: Path, tmp_path: Path) -> None:
    fault, error, message = FAULTS[name]
    fault(checkpoint)
    with pytest.raises(error, match=message) as raised:
        build(str(checkpoint), tmp_path / "bundle")
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert not str(raised.value).endswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
