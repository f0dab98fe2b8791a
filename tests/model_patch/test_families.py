"""docs/FAMILIES.md holds: 45 families run and are equal or refused, and all types are classified."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kvkern.model_patch.witness import Witness, plain_form
from tests.support import families
from tests.support.bits import differing
from tests.support.families import NAMED, PAGE, TESTED_WITH, Finding
from tests.support.stock import needs_stock_order

NAMED_ROWS = families.rows(PAGE.read_text(), f"{len(NAMED)} families, run")
ALL_ROWS = families.rows(PAGE.read_text(), "All types of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
needs_tested_version = pytest.mark.skipif(
    transformers.__version__ != TESTED_WITH, reason=f"the table of all types is that of transformers {TESTED_WITH}"
)


def _twin(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Attention that rounds its scores once instead of twice."""
    return plain_form(Witness(query, key, value, attention_mask, scaling, 0.0), float_scores=True), None


@needs_stock_order
@pytest.mark.parametrize("family", sorted(NAMED))
def test_bits_family__is_equal_or_refused_as_its_row_says(family: str) -> None:
    """Equal on inputs on which scores that are rounded once, the twin, are not."""
    model = families.build(family)
    found = Finding(families.form_of(model), families.verdict_of(model, family))
    assert found == NAMED_ROWS[family]
    if found.verdict == "equal":
        length = families.length_of(family)
        own = families.logits(model, length)
        AttentionInterface.register("kvkern_twin", _twin)
        AttentionMaskInterface.register("kvkern_twin", eager_mask)
        model.set_attn_implementation("kvkern_twin")
        assert differing(families.logits(model, length), own) > 0


def test_families__the_page_counts_what_its_table_holds() -> None:
    equal = sum(row.verdict == "equal" for row in NAMED_ROWS.values())
    refused = sum(row.verdict.startswith("refused: ") for row in NAMED_ROWS.values())
    assert sorted(NAMED_ROWS) == sorted(NAMED) and len(NAMED) == 45 and equal + refused == 45
    assert f"{equal} equal, {refused} refused, none different" in PAGE.read_text()


@needs_tested_version
def test_families__no_type_is_missing_from_the_page() -> None:
    assert sorted(ALL_ROWS) == families.model_types()


@needs_tested_version
@pytest.mark.long
@pytest.mark.parametrize("family", families.model_types())
def test_families__every_type_is_classified_as_its_row_says(family: str) -> None:
    assert families.classify(family) == ALL_ROWS[family]
    torch.manual_seed(0)
