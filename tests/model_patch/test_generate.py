"""Further turns and what generate() offers, on tiny models. Bits are in tests/e2e."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvkern import UnsupportedError
from tests.support.bits import differing

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def test_prepare__positions_are_given_only_where_rows_are_padded(prefix, model) -> None:
    uniform, ragged = prefix.prepare([[5, 6], [7, 8]]), prefix.prepare([[5, 6], [8]])
    assert "position_ids" not in uniform and ragged["position_ids"].tolist() == [[70, 71], [70, 70]]
    expected = model(**prefix.prepare([[5, 6], [7, 8]]), position_ids=torch.tensor([[70, 71]] * 2)).logits
    assert differing(model(**uniform).logits, expected) == 0
    model(**ragged)
    more = prefix.prepare([[9], [9]], cache=ragged["past_key_values"])
    assert more["position_ids"].tolist() == [[72], [71]]


@pytest.mark.parametrize("rows", [[[5, 6, 7], [9, 8, 7]], [[5, 6, 7], [8]]], ids=["uniform", "ragged"])
def test_tokens_turns__after_puts_the_last_token_in_front(prefix, model, rows) -> None:
    """Four turns with after= have the tokens of four turns that begin with the last token themselves."""
    new = {}
    for with_after in (False, True):
        cache, last, new[with_after] = None, None, []
        for _ in range(4):
            if with_after or cache is None:
                inputs = prefix.prepare(rows, cache=cache, after=last)
            else:
                begun = [[int(token), *row] for token, row in zip(last[:, -1], rows, strict=True)]
                inputs = prefix.prepare(begun, cache=cache)
            cache, last = inputs["past_key_values"], model.generate(**inputs, **GREEDY)
            new[with_after].append(last[:, -3:].tolist())
            rows = [row[::-1] for row in rows][::-1]
    assert new[True] == new[False]


def test_tokens_generate__a_prefill_in_chunks(prefix, model) -> None:
    """transformers counts chunks from the tokens of the cache since 5.21; before, from the first column."""
    expected = model.generate(**prefix.prepare([5, 6, 7, 8, 9]), **GREEDY)
    inputs = prefix.prepare([5, 6, 7, 8, 9])
    if TRANSFORMERS < (5, 21):
        with pytest.raises(UnsupportedError, match="attention_mask has 2 columns"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=2)
    else:
        assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=2), expected)
