"""Optimization profiles: whatever may be served is within one, and a step comes before a prefill."""

from __future__ import annotations

import pytest
from blipstream_export.plans.profiles import Profile, ServedShapes, shapes
from hypothesis import given
from hypothesis import strategies as st

from blipstream.manifest import DecoderSection, EncoderSection, InstructionSection

INSTRUCTION = InstructionSection(vocab_size=50, max_tokens=9, pad_token_id=0)


def serve(
    max_batch: int, max_sequences: int, max_tokens: int, frames: int = 1, *, encoder: bool = False
) -> ServedShapes:
    section = EncoderSection(num_heads=2, head_dim=4, max_tokens=max_tokens, decoder_start_token_id=0)
    sizes = DecoderSection(
        family="opt",
        num_layers=1,
        num_key_value_heads=2,
        head_dim=4,
        hidden_size=8,
        vocab_size=50,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        encoder=section if encoder else None,
    )
    return ServedShapes(max_batch, 4, frames, INSTRUCTION, sizes)


def first(profiles: list[Profile], **sizes: int) -> int | None:
    """Index of the first profile that takes the sizes."""
    for index, profile in enumerate(profiles):
        if all(profile[name][0] <= size <= profile[name][2] for name, size in sizes.items()):
            return index
    return None


@given(st.data())
def test_whatever_is_served_is_within_a_profile(data: st.DataObject) -> None:
    max_batch, max_sequences = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    max_tokens, frames = data.draw(st.integers(20, 300)), data.draw(st.integers(1, 4))
    served = serve(max_batch, max_sequences, max_tokens, frames)
    images, rows = data.draw(st.integers(1, max_batch)), data.draw(st.integers(1, max_sequences))
    length = data.draw(st.integers(4 * frames, served.sizes.max_prompt_tokens))
    assert first(served.vision_encoder(), batch=images) is not None
    assert first(served.qformer(), batch=images, sequence=data.draw(st.integers(1, INSTRUCTION.max_tokens))) is not None
    assert first(served.decoder(), batch=rows, sequence=1, num_soft_tokens=1) in (0, 1)
    prefill = {"batch": rows, "sequence": length, "num_soft_tokens": 4 * frames * rows}
    assert first(served.decoder(), **prefill) is not None
    assert first(served.encoder(), **prefill) is not None


@given(st.integers(1, 9), st.integers(20, 300))
def test_an_optimum_is_within_its_range(max_sequences: int, max_tokens: int) -> None:
    served = serve(2, max_sequences, max_tokens)
    for profile in (*served.vision_encoder(), *served.qformer(), *served.decoder()):
        assert all(smallest <= optimum <= largest for smallest, optimum, largest in profile.values())


def test_more_than_was_asked_for_is_in_none() -> None:
    served = serve(2, 3, 40)
    assert first(served.vision_encoder(), batch=3) is None
    assert first(served.decoder(), batch=4, sequence=1, num_soft_tokens=1) is None
    assert first(served.decoder(), batch=1, sequence=40, num_soft_tokens=4) is None


def test_a_decoder_behind_an_encoder_only_steps() -> None:
    served = serve(2, 3, 40, encoder=True)
    assert [profile["sequence"] for profile in served.decoder()] == [(1, 1, 1)] * 2


def test_a_dimension_that_no_profile_has() -> None:
    (profile,) = serve(1, 1, 40).vision_encoder()
    assert shapes(profile, ["batch", 3]) == ((1, 3), (1, 3), (1, 3))
    with pytest.raises(KeyError, match="width"):
        shapes(profile, ["batch", "width"])
