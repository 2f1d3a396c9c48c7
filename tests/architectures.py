"""Tiny random models of every architecture, with a tokenizer of its real kind trained on the spot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 3, 4, 48, 128


# ------------------------------------------------------------------------------------------------------ tokenizers


def wordpiece(sentences: Iterable[str]) -> Any:
    """As BERT's: lowercased, [CLS] sentence [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Frequent words and all characters: the library's trainer orders equal pairs by chance, and so does what learns
    # from its tokens.
    words = Counter(word for sentence in sentences for word in re.findall(r"\w+|[^\w\s]", sentence.lower()))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:300]
    characters = sorted({character for word in words for character in word})
    pieces = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters,
                            *(f"##{character}" for character in characters), *frequent])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                             special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")


def byte_level(sentences: Iterable[str], template: bool = True) -> Any:
    """As RoBERTa's: byte-level BPE, <s> sentence </s>; without template as GPT-2's, which has no special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if template else ["<|endoftext|>"]
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.decoder = decoders.ByteLevel()
    if not template:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                       unk_token="<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                             special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", cls_token="<s>", sep_token="</s>", mask_token="<mask>")


def unigram(sentences: Iterable[str], cls: bool = True) -> Any:
    """As ALBERT's and DeBERTa-v2's: SentencePiece unigram, [CLS] sentence [SEP]; without cls as T5's, sentence </s>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"] if cls else ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(sentences, trainers.UnigramTrainer(vocab_size=300, special_tokens=specials,
                                                                     unk_token="<unk>", show_progress=False))
    tokenizer.decoder = decoders.Metaspace()
    if cls:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                                 special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                       cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def gpt(sentences: Iterable[str]) -> Any:
    """byte_level as GPT-2 has it."""
    return byte_level(sentences, template=False)


def t5(sentences: Iterable[str]) -> Any:
    """unigram as T5 has it."""
    return unigram(sentences, cls=False)


# ---------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model of an architecture.

    Attributes:
        model_type: transformers' name of it.
        emb_class: the config family that serves it.
        make_tokenizer: one of the above.
        settings: over the usual sizes; a setting of None takes the usual one away.
    """

    model_type: str
    emb_class: str = "bert"
    make_tokenizer: Callable[[Iterable[str]], Any] = wordpiece
    settings: dict[str, Any] = field(default_factory=dict)


_BART = {"d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
         "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
         "decoder_start_token_id": 2}
_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "pad_token_id": None}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16,
            "position_biased_input": False}

# The names are those of the reference's tables.
ARCHITECTURES: dict[str, Architecture] = {
    "BERT": Architecture("bert"),
    "SpanBERT": Architecture("bert"),
    "TinyBERT": Architecture("bert", settings={"num_hidden_layers": 2, "hidden_size": 24}),
    "MiniLM": Architecture("bert", settings={"num_hidden_layers": 4}),
    "MobileBERT": Architecture("mobilebert", settings={
        "embedding_size": HIDDEN, "intra_bottleneck_size": HIDDEN, "true_hidden_size": HIDDEN,
        "num_feedforward_networks": 2}),
    "SqueezeBERT": Architecture("squeezebert", settings={
        "embedding_size": HIDDEN, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
        "intermediate_groups": 2, "output_groups": 2}),
    "DistilBERT": Architecture("distilbert", "distilbert", settings={
        "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER}),
    "mDistilBERT": Architecture("distilbert", "distilbert", settings={
        "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER}),
    "ALBERT": Architecture("albert", make_tokenizer=unigram, settings={"embedding_size": 16}),
    "RoBERTa": Architecture("roberta", "roberta", byte_level),
    "XLM-RoBERTa": Architecture("xlm-roberta", "roberta", unigram),
    "BART": Architecture("bart", "bart", byte_level, _BART),
    "KoBART": Architecture("bart", "bart", byte_level, _BART),
    "ELECTRA": Architecture("electra", settings={"embedding_size": 16}),
    "DeBERTa": Architecture("deberta", make_tokenizer=byte_level, settings=_DEBERTA),
    "DeBERTa-v2": Architecture("deberta-v2", make_tokenizer=unigram, settings={
        **_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu", "share_att_key": True, "position_buckets": 8,
        "norm_rel_ebd": "layer_norm"}),
    "DeBERTa-v3": Architecture("deberta-v2", make_tokenizer=unigram, settings={
        **_DEBERTA, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}),
    "BORT": Architecture("bert", "roberta", byte_level, {"num_hidden_layers": 2}),
    "ConvBERT": Architecture("convbert", settings={"embedding_size": 16, "conv_kernel_size": 5, "head_ratio": 2,
                                                   "num_groups": 1}),
    "GPT-2": Architecture("gpt2", "gpt", gpt, _GPT),
    "ModernBERT": Architecture("modernbert", make_tokenizer=byte_level, settings={
        "global_attn_every_n_layers": 2, "local_attention": 4}),
    "MPNet": Architecture("mpnet", "roberta", byte_level),
    "T5": Architecture("t5", make_tokenizer=t5, settings={
        "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS,
        "decoder_start_token_id": 0}),
    "GPT-Neo": Architecture("gpt_neo", "gpt", gpt, {
        "num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 4, "pad_token_id": None}),
    "GPT-J": Architecture("gptj", "gpt", gpt, {**_GPT, "rotary_dim": 4}),
    "Megatron-BERT": Architecture("megatron-bert"),
}
_USUAL = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
          "max_position_embeddings": POSITIONS}
_OWN_SIZES = ("distilbert", "bart", "t5", "gpt2", "gptj")  # with names of their own for the usual ones


def make_model(name: str, folder: Path, sentences: list[str], seed: int = 0) -> Path:
    """Write a tiny model of an architecture and its tokenizer, in the hub's layout, every parameter perturbed.

    Biases, norms and the pad token's row begin at zero or one, which hides faults that real weights show.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    architecture = ARCHITECTURES[name]
    tokenizer = architecture.make_tokenizer(sentences)
    usual = {} if architecture.model_type in _OWN_SIZES else _USUAL
    specials = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id")
                for kind in ("pad", "bos", "eos", "cls", "sep")}
    config = CONFIG_MAPPING[architecture.model_type](**{
        "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, **specials, **usual,
        **architecture.settings})
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if name == "SpanBERT":
        model.pooler = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
