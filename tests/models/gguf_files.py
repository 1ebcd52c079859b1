"""A tiny Llama, and GGUF files of it as llama.cpp's converter would write them."""

from __future__ import annotations

import json
import pathlib
import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from healing.models.model_files import EMBEDDED_DIR

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def give_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Put nano's tokenizer into a folder, made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(EMBEDDED_DIR / "nano" / name, folder)
    return folder


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""transformers' Llama → llama.cpp's names."""


def small_llama() -> LlamaForCausalLM:
    """Two blocks, rows of 64 numbers (a multiple of the 32 of a quantized block)."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _rows_for_llama_cpp(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp turns pairs of neighbours, transformers halves of a head: rows are reordered."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: pathlib.Path, model: LlamaForCausalLM, kind: str = "Q4_1") -> None:
    """The model with nano's tokenizer; matrices quantized, norms in float32."""
    import gguf

    config, quantized = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((EMBEDDED_DIR / "nano" / "tokenizer.json").read_text())["model"]
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([control if i == 0 else normal for i in range(len(words))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    for name, value in model.state_dict().items():
        short = name.split(".", 3)[-1] if ".layers." in name else name
        target = NAMES[short]
        if ".layers." in name:
            target = f"blk.{name.split('.')[2]}.{target}"
        for part, heads in (("q_proj", config.num_attention_heads),
                            ("k_proj", config.num_key_value_heads)):  # fmt: skip
            if part in name:
                value = _rows_for_llama_cpp(value, heads)
        numbers = value.detach().float().numpy()
        if value.ndim == 2 and kind != "F32":
            data = gguf.quants.quantize(numbers, quantized)
            writer.add_tensor(target, data, raw_dtype=quantized)
        else:
            writer.add_tensor(target, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
