"""RoBERTa: a BERT whose positions start behind the padding id, with heads of its own."""

from dataclasses import replace

from . import linear
from .bert import ARCHITECTURE as BERT
from .bert import POOLER, masked_lm

ARCHITECTURE = replace(
    BERT,
    model_type="roberta",
    positions_after="pad_token_id",
    positions_count="ids",
    token_types=False,
    heads={
        "feature-extraction": POOLER,
        "fill-mask": masked_lm(
            dense="lm_head.dense", norm="lm_head.layer_norm", out="lm_head.decoder", bias="lm_head.bias"
        ),
        "text-classification": (
            *linear("classifier.dense", "hidden", "hidden"),
            *linear("classifier.out_proj", "labels", "hidden"),
        ),
        "token-classification": linear("classifier", "labels", "hidden"),
    },
)
