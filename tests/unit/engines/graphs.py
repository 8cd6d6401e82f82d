"""A small decoder graph built by hand, with the interface of ``blipstream.contract``, and its NumPy reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from blipstream.contract import DECODER_IO as IO
from blipstream.decoding.request import Prompt
from blipstream.manifest import DecoderSection

SIZES = DecoderSection(
    family="opt",
    num_layers=2,
    num_key_value_heads=3,
    head_dim=8,
    hidden_size=24,
    vocab_size=37,
    max_sequences=4,
    max_tokens=20,
)


@dataclass
class TinyDecoder:
    """Two layers of nothing but causal attention: enough for every token's history to reach its logits."""

    sizes: DecoderSection
    weights: dict[str, npt.NDArray[np.float32]]

    @classmethod
    def random(cls, sizes: DecoderSection = SIZES, seed: int = 0) -> TinyDecoder:
        rng = np.random.default_rng(seed)
        width = sizes.hidden_size
        shapes = {"embed": (sizes.vocab_size, width), "positions": (sizes.max_tokens, width)}
        for layer in range(sizes.num_layers):
            shapes |= {f"{part}.{layer}": (width, width) for part in ("q", "k", "v", "o")}
        weights = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
        return cls(sizes, weights)

    def reference(self, prompt: Prompt, generated: list[int]) -> npt.NDArray[np.float32]:
        """Logits (V,) after the prompt and the generated tokens, computed from nothing each time."""
        sizes, w = self.sizes, self.weights
        tokens = [*prompt.token_ids, *generated]
        x = np.concatenate([prompt.soft_tokens, w["embed"][tokens]])  # (T, D)
        x = x + w["positions"][: len(x)]
        mask = np.triu(np.full((len(x), len(x)), -np.inf, np.float32), 1)
        for layer in range(sizes.num_layers):
            q, k, v = (
                (x @ w[f"{part}.{layer}"]).reshape(len(x), sizes.num_key_value_heads, sizes.head_dim).swapaxes(0, 1)
                for part in ("q", "k", "v")
            )  # (H, T, D_head)
            scores = q @ k.swapaxes(1, 2) / np.sqrt(sizes.head_dim) + mask
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            x = x + (probs @ v).swapaxes(0, 1).reshape(len(x), -1) @ w[f"o.{layer}"]
        return x[-1] @ w["embed"].T

    def save(self, path: Path) -> Path:
        """Write the graph as an ONNX file."""
        onnx.save(self._model(), path)
        return path

    def _model(self) -> onnx.ModelProto:
        sizes = self.sizes
        cache = ["B", sizes.num_key_value_heads, "T", sizes.head_dim]
        inputs = [
            helper.make_tensor_value_info(IO.input_ids, TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info(IO.soft_tokens, TensorProto.FLOAT, ["N", sizes.hidden_size]),
            helper.make_tensor_value_info(IO.position_ids, TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info(IO.last_index, TensorProto.INT64, ["B"]),
            helper.make_tensor_value_info(IO.seqlens_k, TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info(IO.total_sequence_length, TensorProto.INT32, []),
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in IO.cache_inputs(sizes.num_layers)),
        ]
        outputs = [
            helper.make_tensor_value_info(IO.logits, TensorProto.FLOAT, ["B", sizes.vocab_size]),
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in IO.cache_outputs(sizes.num_layers)),
        ]
        constants = {
            **self.weights,
            "zero": np.array(0, np.int64),
            "minus_one": np.array(-1, np.int64),
            "last_axis": np.array([-1], np.int64),
            "middle_axis": np.array([1], np.int64),
            "embed_t": self.weights["embed"].T.copy(),
        }
        graph = helper.make_graph(
            [*self._embedding(), *self._layers(), *self._head()],
            "tiny_decoder",
            inputs,
            outputs,
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    @staticmethod
    def _embedding() -> list[onnx.NodeProto]:
        node = helper.make_node
        return [
            node("Less", [IO.input_ids, "zero"], ["is_soft"]),
            node("Unsqueeze", ["is_soft", "last_axis"], ["is_soft_column"]),
            node("Max", [IO.input_ids, "zero"], ["word"]),
            node("Sub", ["minus_one", IO.input_ids], ["minus_one_minus_id"]),
            node("Max", ["minus_one_minus_id", "zero"], ["soft_row"]),
            node("Gather", ["embed", "word"], ["word_embeds"]),
            node("Gather", [IO.soft_tokens, "soft_row"], ["soft_embeds"]),
            node("Where", ["is_soft_column", "soft_embeds", "word_embeds"], ["token_embeds"]),
            node("Gather", ["positions", IO.position_ids], ["position_embeds"]),
            node("Add", ["token_embeds", "position_embeds"], ["x.0"]),
        ]

    def _layers(self) -> list[onnx.NodeProto]:
        node, nodes = helper.make_node, []
        for i in range(self.sizes.num_layers):
            nodes += [node("MatMul", [f"x.{i}", f"{part}.{i}"], [f"{part}_out.{i}"]) for part in ("q", "k", "v")]
            nodes += [
                node(
                    "GroupQueryAttention",
                    [
                        *(f"{part}_out.{i}" for part in ("q", "k", "v")),
                        *IO.cache_inputs(i + 1)[-2:],
                        IO.seqlens_k,
                        IO.total_sequence_length,
                    ],
                    [f"attention.{i}", *IO.cache_outputs(i + 1)[-2:]],
                    domain="com.microsoft",
                    num_heads=self.sizes.num_key_value_heads,
                    kv_num_heads=self.sizes.num_key_value_heads,
                ),
                node("MatMul", [f"attention.{i}", f"o.{i}"], [f"residual.{i}"]),
                node("Add", [f"x.{i}", f"residual.{i}"], [f"x.{i + 1}"]),
            ]
        return nodes

    def _head(self) -> list[onnx.NodeProto]:
        node = helper.make_node
        return [
            node("Unsqueeze", [IO.last_index, "middle_axis"], ["last_column"]),
            node("GatherND", [f"x.{self.sizes.num_layers}", "last_column"], ["last"], batch_dims=1),
            node("MatMul", ["last", "embed_t"], [IO.logits]),
        ]


def random_prompt(sizes: DecoderSection, num_soft: int, num_text: int, seed: int) -> Prompt:
    """A prompt of random soft tokens and token ids."""
    rng = np.random.default_rng(seed)
    soft = rng.normal(0, 1, (num_soft, sizes.hidden_size)).astype(np.float32)
    return Prompt(soft, tuple(int(token) for token in rng.integers(0, sizes.vocab_size, num_text)))
