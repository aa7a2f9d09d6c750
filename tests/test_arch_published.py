"""Configs as their authors published them: read without refusal, and counted to the parameter.

The texts are config.json files of well-known checkpoints; the counts are those of their weights, each storage once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from tersor.compress.arch import names
from tersor.compress.errors import RecipeError
from tersor.compress.layout import model_class
from tersor.compress.pretrained import quiet, read_config
from tersor.compress.smoke import shrink_config


@dataclass(frozen=True)
class Published:
    """A published config, the parameters of its checkpoint, and the task of its class where it is another."""

    model_type: str
    parameters: int
    config: str
    task: str | None = None


LLAMA_3_2_1B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
 "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
 "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
 "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
 "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
 "vocab_size": 128256}"""
TINYLLAMA = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
 "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
 "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
 "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000}"""
QWEN2_5_05B = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
 "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
 "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
 "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
 "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3_06B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
 "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
 "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
 "vocab_size": 151936}"""
MIXTRAL_8X7B = """{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
 "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
 "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
 "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
 "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32000}"""
QWEN1_5_MOE = """{"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
 "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
 "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
 "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16,
 "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
 "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
 "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3_30B_A3B = """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
 "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
 "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
 "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
 "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
 "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false,
 "vocab_size": 151936}"""
PHI_3_MINI = """{"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
 "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
 "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
 "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
 "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
 "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 32064}"""
PHI_2 = """{"architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0,
 "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02,
 "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
 "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4,
 "qk_layernorm": false, "resid_pdrop": 0.1, "rope_scaling": null, "rope_theta": 10000.0,
 "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true, "vocab_size": 51200}"""
GEMMA_2B = """{"architectures": ["GemmaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": null,
 "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192,
 "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
 "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
 "use_cache": true, "vocab_size": 256000}"""
GEMMA_2_2B = """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
 "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
 "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
 "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
 "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
 "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "use_cache": true,
 "vocab_size": 256000}"""
GRANITE_3_2B = """{"architectures": ["GraniteForCausalLM"], "attention_bias": false, "attention_dropout": 0.1,
 "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
 "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
 "logits_scaling": 8.0, "max_position_embeddings": 4096, "mlp_bias": false, "model_type": "granite",
 "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
 "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49155}"""
GPT2 = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
 "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
 "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
 "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
 "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
 "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
OPT_125M = """{"_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": false, "activation_dropout": 0.0,
 "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
 "do_layer_norm_before": true, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
 "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
 "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
 "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": true, "vocab_size": 50272,
 "word_embed_proj_dim": 768}"""
BERT_BASE = """{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
 "gradient_checkpointing": false, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
 "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
 "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
 "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2,
 "use_cache": true, "vocab_size": 30522}"""
ROBERTA_BASE = """{"architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
 "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
 "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
 "model_type": "roberta", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
 "type_vocab_size": 1, "vocab_size": 50265}"""
DISTILBERT_SST2 = """{"activation": "gelu", "architectures": ["DistilBertForSequenceClassification"],
 "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "finetuning_task": "sst-2", "hidden_dim": 3072,
 "id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "initializer_range": 0.02,
 "label2id": {"NEGATIVE": 0, "POSITIVE": 1}, "max_position_embeddings": 512, "model_type": "distilbert",
 "n_heads": 12, "n_layers": 6, "output_past": true, "pad_token_id": 0, "qa_dropout": 0.1,
 "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false, "tie_weights_": true, "vocab_size": 30522}"""
MODERNBERT_BASE = """{"architectures": ["ModernBertForMaskedLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": false, "classifier_dropout": 0.0,
 "classifier_pooling": "mean", "cls_token_id": 50281, "decoder_bias": true, "deterministic_flash_attn": false,
 "embedding_dropout": 0.0, "eos_token_id": 50282, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
 "gradient_checkpointing": false, "hidden_activation": "gelu", "hidden_size": 768,
 "initializer_cutoff_factor": 2.0, "initializer_range": 0.02, "intermediate_size": 1152, "layer_norm_eps": 1e-05,
 "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": false,
 "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": false, "norm_eps": 1e-05,
 "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute",
 "sep_token_id": 50282, "tie_word_embeddings": true, "torch_dtype": "float32", "vocab_size": 50368}"""
VIT_BASE = """{"architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0,
 "encoder_stride": 16, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768, "image_size": 224,
 "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "vit",
 "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "num_labels": 1000, "patch_size": 16,
 "qkv_bias": true}"""
RESNET_50 = """{"architectures": ["ResNetForImageClassification"], "depths": [3, 4, 6, 3],
 "downsample_in_first_stage": false, "embedding_size": 64, "hidden_act": "relu",
 "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck", "model_type": "resnet", "num_channels": 3,
 "num_labels": 1000, "torch_dtype": "float32", "transformers_version": "4.18.0.dev0"}"""

PUBLISHED = {
    "Llama-3.2-1B": Published("llama", 1_235_814_400, LLAMA_3_2_1B),
    "TinyLlama-1.1B": Published("llama", 1_100_048_384, TINYLLAMA),
    "Mistral-7B-v0.1": Published("mistral", 7_241_732_096, MISTRAL_7B),
    "Qwen2.5-0.5B": Published("qwen2", 494_032_768, QWEN2_5_05B),
    "Qwen3-0.6B": Published("qwen3", 596_049_920, QWEN3_06B),
    "Mixtral-8x7B-v0.1": Published("mixtral", 46_702_792_704, MIXTRAL_8X7B),
    "Qwen1.5-MoE-A2.7B": Published("qwen2_moe", 14_315_784_192, QWEN1_5_MOE),
    "Qwen3-30B-A3B": Published("qwen3_moe", 30_532_122_624, QWEN3_30B_A3B),
    "Phi-3-mini-4k": Published("phi3", 3_821_079_552, PHI_3_MINI),
    "phi-2": Published("phi", 2_779_683_840, PHI_2),
    "gemma-2b": Published("gemma", 2_506_172_416, GEMMA_2B),
    "gemma-2-2b": Published("gemma2", 2_614_341_888, GEMMA_2_2B),
    "granite-3.0-2b-instruct": Published("granite", 2_533_531_648, GRANITE_3_2B),
    "gpt2": Published("gpt2", 124_439_808, GPT2),
    "opt-125m": Published("opt", 125_239_296, OPT_125M),
    "bert-base-uncased": Published("bert", 109_482_240, BERT_BASE, "feature-extraction"),
    "bert-base-uncased with its head": Published("bert", 109_514_298, BERT_BASE),
    "roberta-base": Published("roberta", 124_645_632, ROBERTA_BASE, "feature-extraction"),
    "roberta-base with its head": Published("roberta", 124_697_433, ROBERTA_BASE),
    "distilbert-sst-2": Published("distilbert", 66_955_010, DISTILBERT_SST2),
    "distilbert-base": Published("distilbert", 66_362_880, DISTILBERT_SST2, "feature-extraction"),
    "ModernBERT-base": Published("modernbert", 149_014_272, MODERNBERT_BASE, "feature-extraction"),
    "resnet-50": Published("resnet", 25_557_032, RESNET_50),
    "vit-base-patch16-224": Published("vit", 86_567_656, VIT_BASE),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_and_counted(name, tmp_path):
    published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(published.config, "utf-8")
    layout = read_config(tmp_path, published.task)
    assert layout.arch.model_type == published.model_type
    assert layout.parameters == published.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_shrink_to_a_model_that_runs_in_seconds(name, tmp_path):
    (tmp_path / "config.json").write_text(PUBLISHED[name].config, "utf-8")
    small = shrink_config(read_config(tmp_path, PUBLISHED[name].task))
    with torch.random.fork_rng(devices=[]), quiet():
        model = model_class(small.config, small.task)._from_config(small.config)
    assert small.shapes() == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert small.parameters < 30_000_000


def test_every_architecture_has_a_published_config():
    only_written = {"glm4_moe", "granitemoeshared"}  # by `moe`: GLM's own checkpoints have dense blocks in front
    assert {p.model_type for p in PUBLISHED.values()} == set(names()) - only_written


def test_opt_350m_is_refused_by_its_norms(tmp_path):
    config = {**json.loads(OPT_125M), "do_layer_norm_before": False, "hidden_size": 1024, "word_embed_proj_dim": 512}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(RecipeError, match=r"do_layer_norm_before: found False, expected True"):
        read_config(tmp_path)
