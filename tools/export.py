"""A checkpoint as a Hugging Face folder: python tools/export.py CKPT DIR

AutoModelForCausalLM and AutoTokenizer load it without code of ours: LlamaForCausalLM without QK-Norm,
Qwen3ForCausalLM with it. The padded rows of the vocabulary stay, as ids that no text encodes to: the softmax
was trained over them, so logits and losses would change without them.
"""
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import fail  # noqa: E402
from evaluate import get_encoding, load_checkpoint  # noqa: E402
from model import NORM_EPS, ROPE_THETA  # noqa: E402
from tokens import bpe_folder, cache_name  # noqa: E402

EOT = "<|endoftext|>"
NAMES = {  # ours to theirs; q_norm and k_norm are Qwen3's own names
    "wte": "embed_tokens", "h": "layers", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attn": "self_attn"}


def hf_weights(model):
    """Our weights under Hugging Face's names. The head is the embedding (tie_word_embeddings), so it is not
    stored."""
    rename = lambda name: ".".join(NAMES.get(part, part) for part in name.split("."))
    return {f"model.{rename(name)}": weight.contiguous() for name, weight in model.state_dict().items()}


def hf_config(config, eot):
    """config.json: all that model.py fixes is written out, as defaults differ between versions of
    transformers."""
    qk = config["qk_norm"]
    rope = dict(rope_type="default", rope_theta=ROPE_THETA)  # for version 5; version 4 reads the other two
    return dict(
        architectures=["Qwen3ForCausalLM" if qk else "LlamaForCausalLM"],
        model_type="qwen3" if qk else "llama",
        vocab_size=config["vocab_size"], hidden_size=config["n_embd"], intermediate_size=config["ffn_dim"],
        num_hidden_layers=config["n_layer"], num_attention_heads=config["n_head"],
        num_key_value_heads=config["n_head"], head_dim=config["n_embd"] // config["n_head"],
        max_position_embeddings=config["block_size"], hidden_act="silu", rms_norm_eps=NORM_EPS,
        rope_parameters=rope, rope_theta=ROPE_THETA, rope_scaling=None, tie_word_embeddings=True,
        attention_bias=False, attention_dropout=0.0, initializer_range=0.02, use_cache=True,
        bos_token_id=eot, eos_token_id=eot, pad_token_id=None, dtype="float32", torch_dtype="float32",
        **(dict(use_sliding_window=False, sliding_window=None) if qk else
           dict(mlp_bias=False, pretraining_tp=1)))


def tokenizer_json(encoding):
    """tokenizer.json, the format of Hugging Face's tokenizers, of GPT-2's BPE (Radford et al. 2019) or of its
    first ids: its own two files hold the ids, in their byte-level letters, and the merges in order."""
    read = lambda file: (bpe_folder() / cache_name(file)).read_text(encoding="utf-8")
    vocab = {text: i for text, i in json.loads(read("encoder.json")).items() if i < encoding.eot_token}
    merges = read("vocab.bpe").split("\n")[1:encoding.eot_token - 256 + 1]  # one for each id but the 256 bytes
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    special = dict(id=encoding.eot_token, content=EOT, single_word=False, lstrip=False, rstrip=False,
                   normalized=False, special=True)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                 end_of_word_suffix="", fuse_unk=False, byte_fallback=False, ignore_merges=False,
                 merges=merges, vocab=vocab | {EOT: encoding.eot_token})
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None,
                pre_tokenizer=byte_level, post_processor=None, decoder=byte_level, model=model)


def export(checkpoint, folder):
    """Write the folder, whole or not at all. ValueError where the checkpoint is none or the folder exists."""
    folder = Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} is there already: give another name or delete it")
    model, config = load_checkpoint(checkpoint)
    encoding = get_encoding(config["data"]["tokenizer"])
    files = {
        "config.json": hf_config(config, encoding.eot_token),
        "generation_config.json": {f"{kind}_token_id": encoding.eot_token for kind in ("bos", "eos", "pad")},
        "tokenizer.json": tokenizer_json(encoding),
        "tokenizer_config.json": dict(
            {f"{kind}_token": EOT for kind in ("bos", "eos", "unk", "pad")},
            padding_side="left",  # what is generated follows the text
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config["block_size"],
            clean_up_tokenization_spaces=False, add_prefix_space=False)}
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    try:
        aside.mkdir(parents=True)
        for name, content in files.items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (aside / name).write_text(text, encoding="utf-8")
        (aside / "model.safetensors").write_bytes(save(hf_weights(model), metadata=dict(format="pt")))
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{folder}: {files['config.json']['architectures'][0]}, {model.num_params():,} parameters, "
          f"{encoding.name} tokenizer")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        fail("usage: python tools/export.py CKPT DIR")
    try:
        export(*sys.argv[1:])
    except (ValueError, OSError) as e:
        fail(e)
