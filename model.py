"""The models: an embedding, an encoder and a decoder make a classifier.

From small to large: layers, embeddings, encoders, decoders, the classifier, and `build_model`, which makes one from
a config. Shapes are written B (sentences), T (positions, the batch's longest sentence), D (embedding size),
H (encoding size), C (labels). In every module `mask` [B, T] is True at real tokens; pad positions take part in no
maximum, sum, softmax or convolution, so that a sentence's logits do not depend on the sentences beside it.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import EncodedData, find_table, load_table
from pretrained.checks import check_padding, check_size, check_tokenizer, classification_token
from pretrained.layout import architecture
from pretrained.loading import build_from_config, keep_scores_in_fp32, load_pretrained
from pretrained.masking import Masking
from pretrained.surgery import checkpoint_activations, remove_layers
from sentence_classifier.tokenizers import SUBWORDS, WORDS
from util import Checkpoint


class MaxOverTimeConv(nn.Module):
    """Convolutions of several widths, each followed by ReLU and the maximum over positions (Kim 2014, 1408.5882).

    Convolutions are wide: a kernel of width k is placed wherever it touches at least one token, zeros beyond the
    sentence's ends. So every sentence has L + k - 1 windows, however short it is, and the first and last words are
    seen by as many windows as the others.
    """

    def __init__(self, input_size: int, num_filters: int, kernel_sizes: list[int]) -> None:
        super().__init__()
        self.kernel_sizes = kernel_sizes
        self.convolutions = nn.ModuleList(nn.Conv1d(input_size, num_filters, size, padding=size - 1)
                                          for size in kernel_sizes)
        self.output_size = num_filters * len(kernel_sizes)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], zero where mask [B, T] is False -> [B, num_filters * widths]."""
        x = x.transpose(1, 2)
        pooled = []
        for size, convolution in zip(self.kernel_sizes, self.convolutions, strict=True):
            # The window that ends at position i exists while its first position, i - k + 1, lies in the sentence.
            windows = F.pad(mask, (size - 1, 0), value=True).unsqueeze(1)
            # ReLU after the maximum: the same, for one number a filter.
            pooled.append(F.relu(convolution(x).masked_fill(~windows, float("-inf")).amax(-1)))
        return torch.cat(pooled, dim=1)


class DenseNet(nn.Module):
    """Densely connected convolutions over positions (after arXiv 1808.07383).

    `kernels` is depth by width: row i holds the kernel sizes of layer i in each column. In a column, the first layer
    reads the embedding, each later layer the concatenation of the column's earlier outputs. The embedding and the
    columns' last outputs are concatenated and mixed by a convolution of width 1.
    """

    def __init__(self, input_size: int, kernels: list[list[int]], first_filters: int, filters: int,
                 last_filters: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList()
        for sizes in zip(*kernels, strict=True):
            column = nn.ModuleList([nn.Conv1d(input_size, first_filters, sizes[0], padding=sizes[0] // 2)])
            for depth, size in enumerate(sizes[1:]):
                column.append(nn.Conv1d(first_filters + depth * filters, filters, size, padding=size // 2))
            self.columns.append(column)
        last = filters if len(kernels) > 1 else first_filters
        self.mix = nn.Conv1d(input_size + last * len(self.columns), last_filters, 1)
        self.output_size = last_filters

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], zero where mask [B, T] is False -> [B, T, last_filters], zero there too."""
        pad = ~mask.unsqueeze(1)
        x = x.transpose(1, 2)
        outputs = [x]
        for column in self.columns:
            layer_input = x
            for depth, convolution in enumerate(cast(nn.ModuleList, column)):
                out = F.relu(convolution(layer_input).masked_fill(pad, 0.0))
                layer_input = out if depth == 0 else torch.cat((layer_input, out), dim=1)
            outputs.append(out)
        mixed = F.relu(self.mix(torch.cat(outputs, dim=1)).masked_fill(pad, 0.0))
        return mixed.transpose(1, 2)


class DynamicSelfAttention(nn.Module):
    """Attention whose query is computed from the sentence itself, `iterations` times (arXiv 1808.07383, section 3).

    Each head projects the tokens, x = LeakyReLU(W t), and from q = 0 repeats:
    a = softmax(q), s = sum_i a_i x_i, z = tanh(s), q_i = q_i + x_i . z. The last z of all heads are concatenated.
    """

    def __init__(self, input_size: int, num_heads: int, head_size: int, iterations: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_size, num_heads * head_size)
        self.num_heads = num_heads
        self.iterations = iterations
        self.output_size = num_heads * head_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, num_heads * head_size]."""
        batch, length, _ = x.shape
        tokens = F.leaky_relu(self.projection(x)).view(batch, length, self.num_heads, -1).transpose(1, 2)
        bias = torch.zeros(mask.shape, dtype=torch.float32, device=x.device).masked_fill(~mask, float("-inf"))
        query = torch.zeros(batch, self.num_heads, length, device=x.device)
        for _ in range(self.iterations):
            weights = F.softmax(query + bias.unsqueeze(1), dim=-1).to(tokens.dtype)
            summary = torch.tanh((weights.unsqueeze(2) @ tokens).squeeze(2))  # [B, heads, size]
            query = query + (tokens @ summary.unsqueeze(-1)).squeeze(-1)
        return summary.flatten(1)


# ------------------------------------------------------------------------------------------------------ embeddings


class WordEmbedding(nn.Module):
    """A table of word vectors whose first rows are trained and whose others are frozen.

    preprocess.py puts <pad>, <unk> and the training data's words first, so that gradients and optimizer state exist
    for these alone, however large the table is. A checkpoint leaves the frozen rows out.

    Args:
        table: [V, D] float32; may be a read-only memory map.
        num_trainable: how many rows are trained, at least 2 (<pad> and <unk>).
        word_dropout: for each word of the training data, the probability that training reads <unk> instead (the last
            entry is that of all later rows); see word_dropout_probabilities.
        dropout: on the word vectors' elements.
    """

    def __init__(self, table: Tensor, num_trainable: int, word_dropout: Tensor | None = None,
                 dropout: float = 0.0) -> None:
        super().__init__()
        self.trainable = nn.Parameter(table[:num_trainable].clone())
        self.frozen = nn.Buffer(table[num_trainable:], persistent=False)
        self.word_dropout: Tensor | None
        self.register_buffer("word_dropout", word_dropout, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.output_size = table.shape[1]

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T] -> [B, T, D], zero where mask [B, T] is False."""
        if self.training and self.word_dropout is not None:
            probability = F.embedding(input_ids.clamp(max=len(self.word_dropout) - 1), self.word_dropout.unsqueeze(1))
            dropped = torch.rand(input_ids.shape, device=input_ids.device) < probability.squeeze(-1)
            input_ids = input_ids.masked_fill(dropped, 1)
        count = self.trainable.shape[0]
        x = F.embedding(input_ids.clamp(max=count - 1), self.trainable)
        if self.frozen.shape[0]:
            frozen = F.embedding((input_ids - count).clamp(min=0), self.frozen)
            x = torch.where((input_ids < count).unsqueeze(-1), x, frozen)
        return self.dropout(x).masked_fill(~mask.unsqueeze(-1), 0.0)

    @classmethod
    def for_training(cls, data: EncodedData, *, embedding_filename: str, embedding_trainable: bool = False,
                     word_dropout: float = 0.0, embedding_dropout: float = 0.0, **others: Any) -> Self:
        """The embedding that training begins with, by train.py's flags."""
        table = load_table(data.path.parent / embedding_filename, str(data.encoding.table))
        dropped = word_dropout_probabilities(data.word_counts(), word_dropout) if word_dropout else None
        trainable = data.encoding.seen_rows if embedding_trainable else data.encoding.own_rows
        return cls(table, trainable, dropped, embedding_dropout)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, folders: list[str]) -> Self:
        """The embedding that load_state_dict fills; its frozen rows come from a data folder."""
        table, run = checkpoint.model["embedding.trainable"], checkpoint.run
        if len(table) < run.vocabulary.count("\n"):
            paths = [Path(folder) / run.flags["embedding_filename"] for folder in folders]
            table = find_table(paths, str(run.encoding.table))
        return cls(table, run.embedding["num_trainable"])

    def metadata(self) -> dict[str, Any]:
        """What from_checkpoint needs to know beside the weights."""
        return {"num_trainable": self.trainable.shape[0]}

    def identity(self) -> dict[str, Any]:
        """What decides about the model's identity: nothing, since the data's encoding names the table."""
        return {}


def word_dropout_probabilities(counts: Tensor, alpha: float) -> Tensor:
    """Rare words are dropped most: alpha / (alpha + count), so that <unk> learns what unknown words are like.

    From Kiperwasser and Goldberg 2016 (arXiv 1603.04351, section 4), who took alpha = 0.25.

    counts [N]: how often the training data have each row of the table -> [N + 1], the last one for all later rows.
    """
    probabilities = alpha / (alpha + counts.float())
    probabilities[counts == 0] = 0.0  # <pad>, and words that training does not meet
    return F.pad(probabilities, (0, 1))


class TransformerEmbedding(nn.Module):
    """A model of the transformers library, whose last hidden states are the token vectors.

    Args:
        classify_by: see pretrained.checks.classification_token.
        frozen: its weights are not trained, and it has no dropout.
        token_cutoff: the proportion of tokens whose vectors training reads as zeros, drawn anew in each pass (Shen et
            al. 2020, arXiv 2009.13818, section 3.1). Positions stay, and so do a sentence's first and last token, which
            are special in most tokenizers.

    Attributes:
        reads: the tokens whose vectors the encoder reads; of the "first" alone, the last layer computes no other.
        output: all that the last pass computed, see keep_output.
    """

    def __init__(self, transformer: Any, classify_by: str, frozen: bool = False, token_cutoff: float = 0.0) -> None:
        super().__init__()
        self.transformer = transformer
        self.classify_by = classify_by
        self.frozen = frozen
        self.token_cutoff = token_cutoff
        self.reads: Literal["all", "first"] = "all"
        self.output: Any = None
        self.output_size: int = transformer.config.hidden_size
        self.masking = Masking(transformer)
        keep_scores_in_fp32(transformer)
        self._options = {"use_cache": False} if "use_cache" in signature(transformer.forward).parameters else {}
        if frozen:
            transformer.requires_grad_(False)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, T], 0 where mask [B, T] is False -> [B, T, D], zero there; [B, 1, D] if it reads the first."""
        self.masking.begin(mask, self.token_cutoff if self.training else 0.0, first_only=self.reads == "first")
        if pad_id := self.transformer.config.pad_token_id:  # mBART finds a sentence's end by it
            input_ids = input_ids.masked_fill(~mask, pad_id)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.transformer(input_ids=input_ids, attention_mask=mask.long(), **self._options)
        if not torch.is_grad_enabled():  # else gradient checkpointing needs it once more
            self.masking.end()
        x = output.last_hidden_state
        return x.masked_fill(~mask[:, : x.shape[1]].unsqueeze(-1), 0.0)

    def keep_output(self, attentions: bool) -> None:
        """From now on keep in `output` what each pass computes: all hidden states and, if asked for, attentions."""
        self.reads = "all"
        self._options["output_hidden_states"] = True
        if attentions:
            self.transformer.set_attn_implementation("eager")  # the others compute none
            self._options["output_attentions"] = True
        self.transformer.register_forward_hook(lambda module, inputs, output: setattr(self, "output", output))

    def train(self, mode: bool = True) -> Self:
        """Training mode; a frozen transformer stays without dropout."""
        super().train(mode)
        self.transformer.train(mode and not self.frozen)
        return self

    @classmethod
    def for_training(cls, data: EncodedData, *, bert_model_name_or_path: str, bert_remove_layers: Sequence[int] = (),
                     bert_use_feature_based: bool = False, token_cutoff: float = 0.0,
                     gradient_checkpointing: bool = False, transformer: Any = None, **others: Any) -> Self:
        """The embedding that training begins with, by train.py's flags; of `transformer`, if given."""
        path, encoding = bert_model_name_or_path, data.encoding
        check_tokenizer(path, encoding, str(data.path))
        transformer = transformer or load_pretrained(path)
        if bert_remove_layers:
            remove_layers(transformer, bert_remove_layers)
        check_size(transformer, int(data.token_ids.max()), encoding.n_ctx, path)
        embedding = cls(transformer, classification_token(transformer, encoding.leading_special),
                        bert_use_feature_based, token_cutoff)
        check_padding(embedding, path)
        if gradient_checkpointing:
            checkpoint_activations(transformer)
        return embedding

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, folders: list[str]) -> Self:
        """The embedding that load_state_dict fills."""
        held = checkpoint.run.embedding
        return cls(build_from_config(json.loads(held["config"])), held["classify_by"])

    def metadata(self) -> dict[str, Any]:
        """What from_checkpoint needs to know beside the weights."""
        return {"config": self.transformer.config.to_json_string(use_diff=False), "classify_by": self.classify_by}

    def identity(self) -> dict[str, Any]:
        """What decides about the model's identity: its architecture, not where it came from."""
        return {"frozen": self.frozen, **architecture(self.transformer.config)}


Embedding = WordEmbedding | TransformerEmbedding

# -------------------------------------------------------------------------------------------------------- encoders


class MeanEncoder(nn.Module):
    """The mean of the real tokens' vectors."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        self.output_size = embedding.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, D]."""
        weights = mask.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class CLSEncoder(nn.Module):
    """The vector of the position that a transformer classifies by: its first or its last real token."""

    def __init__(self, config: dict[str, Any], embedding: TransformerEmbedding) -> None:
        super().__init__()
        self.position = embedding.classify_by
        self.output_size = embedding.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D] ([B, 1, D] will do for the first token), mask [B, T] -> [B, D]."""
        if self.position == "first":
            return x[:, 0]
        places = mask.sum(1).sub(1).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
        return x.gather(1, places).squeeze(1)


class StackedEncoder(nn.Module):
    """A densenet if the config has one, and on top a CNN (Kim 2014, arXiv 1408.5882) or dynamic self-attention."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        size = embedding.output_size
        if "densenet_kernels" in config:
            self.densenet = DenseNet(size, config["densenet_kernels"], config["densenet_first_num_filters"],
                                     config["densenet_num_filters"], config["densenet_last_num_filters"])
            size = self.densenet.output_size
        if "dsa_dim" in config:
            self.attention = DynamicSelfAttention(size, config["dsa_num_attentions"], config["dsa_dim"],
                                                  config["dsa_r"])
        else:
            self.cnn = MaxOverTimeConv(size, config["num_filters"], config["kernel_sizes"])
        *_, last = self.children()
        self.output_size: int = cast(Any, last).output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, H]."""
        for layer in self.children():
            x = layer(x, mask)
        return x


# -------------------------------------------------------------------------------------------------------- decoders


class SoftmaxDecoder(nn.Sequential):
    """Layer norm, dropout, a hidden layer where the config has fc_hidden_size, and the output layer of a softmax.

    encoding [B, H] -> logits [B, C].
    """

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        hidden = config.get("fc_hidden_size")
        super().__init__(OrderedDict(
            norm=nn.LayerNorm(input_size),
            dropout=nn.Dropout(config["dropout"]),
            hidden=nn.Sequential(nn.Linear(input_size, hidden), nn.ReLU(), nn.LayerNorm(hidden),
                                 nn.Dropout(config["dropout"])) if hidden else nn.Identity(),
            output=nn.Linear(hidden or input_size, num_labels)))


class LinearDecoder(nn.Sequential):
    """Dropout and the output layer of a softmax: encoding [B, H] -> logits [B, C]."""

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        super().__init__(OrderedDict(dropout=nn.Dropout(config["dropout"]), output=nn.Linear(input_size, num_labels)))


class GaussianDecoder(nn.Module):
    """Gaussian naive Bayes: logit_c = log prior_c + sum_f log N(x_f; mean_cf, variance_cf).

    `fit` sets it in closed form; from there it trains like any other layer. A term common to all classes,
    -H/2 log(2 pi), is left out: the softmax does not see it.

    With several labels a sentence, each label has two Gaussians, of the sentences with and without it, and its logit is
    the difference: first come those of all labels with it, then those without [2 C, H].
    """

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        super().__init__()
        self.pairs = config.get("multi_label", False)
        num_labels = num_labels * 2 if self.pairs else num_labels
        self.dropout = nn.Dropout(config["dropout"])
        self.log_prior = nn.Parameter(torch.full((num_labels,), -math.log(num_labels)))
        self.mean = nn.Parameter(torch.zeros(num_labels, input_size))
        self.log_variance = nn.Parameter(torch.zeros(num_labels, input_size))

    def forward(self, encoding: Tensor) -> Tensor:
        """encoding [B, H] -> logits [B, C]."""
        # A sum over hundreds of features of differences of squares: too much for bfloat16.
        with torch.autocast(encoding.device.type, enabled=False):
            x = self.dropout(encoding.float()).unsqueeze(1)
            log_density = -0.5 * ((x - self.mean).square() * torch.exp(-self.log_variance) + self.log_variance)
            logits = self.log_prior + log_density.sum(-1)
        if not self.pairs:
            return logits
        having, lacking = logits.chunk(2, -1)
        return having - lacking

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]], smoothing: float = 1e-3) -> None:
        """Set priors, means and variances from data by their maximum likelihood estimates.

        A class that the data lack gets what the most frequent one has, and its own lower prior: it never wins.

        Args:
            batches: encodings [B, H] and the probability of each Gaussian [B, C or 2 C] (one-hot for hard labels).
            smoothing: part of the largest feature variance that is added to all, for features that hardly vary.
        """
        count = self.log_prior.new_zeros(len(self.log_prior), dtype=torch.float64)
        total = self.mean.new_zeros(self.mean.shape, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for encoding, probability in batches:
            x, weight = encoding.double(), probability.double().t()
            count += weight.sum(1)
            total += weight @ x
            squares += weight @ x.square()
        size = count.clamp(min=1e-12).unsqueeze(1)
        mean = total / size
        variance = (squares / size - mean.square()).clamp(min=0.0)
        overall = squares.sum(0) / count.sum() - (total.sum(0) / count.sum()).square()
        variance = variance + smoothing * overall.max().clamp(min=1e-9)
        source = torch.where(count > 1e-12, torch.arange(len(count), device=count.device), count.argmax())
        self.log_prior.copy_(((count + 1.0) / (count + 1.0).sum()).log())
        self.mean.copy_(mean[source])
        self.log_variance.copy_(variance[source].log())


# By a config's enc_class: what makes the encoder, and the decoder.
ENCODERS: dict[str, tuple[Callable[..., nn.Module], type[nn.Module]]] = {
    "gnb": (MeanEncoder, GaussianDecoder),
    "cls": (CLSEncoder, LinearDecoder),
    "cnn": (StackedEncoder, SoftmaxDecoder),
    "densenet-cnn": (StackedEncoder, SoftmaxDecoder),
    "densenet-dsa": (StackedEncoder, SoftmaxDecoder),
}

# By the kind of encoded data.
EMBEDDINGS: dict[str, type[Embedding]] = {WORDS: WordEmbedding, SUBWORDS: TransformerEmbedding}


class Classifier(nn.Module):
    """An embedding, an encoder and a decoder, one after another: token ids in, logits out."""

    def __init__(self, embedding: Embedding, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.embedding, self.encoder, self.decoder = embedding, encoder, decoder

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] -> [B, H]."""
        return self.encoder(self.embedding(input_ids, attention_mask), attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids [B, T], attention_mask [B, T] bool -> logits [B, C]."""
        return self.decoder(self.encode(input_ids, attention_mask))


def build_model(config: dict[str, Any], num_labels: int, embedding: Embedding) -> Classifier:
    """Put the encoder and the decoder that a checked config describes on top of an embedding."""
    make_encoder, decoder_class = ENCODERS[config["enc_class"]]
    encoder: Any = make_encoder(config, embedding)
    if isinstance(encoder, CLSEncoder) and isinstance(embedding, TransformerEmbedding):
        embedding.reads = "first" if encoder.position == "first" else "all"
    return Classifier(embedding, encoder, decoder_class(config, encoder.output_size, num_labels))


def load_classifier(checkpoint: Checkpoint, folders: Iterable[str | None]) -> Classifier:
    """Build the classifier of a checkpoint again, on the CPU.

    Raises:
        InputError: none of these data folders has the table of its frozen word vectors.
    """
    run = checkpoint.run
    embedding = EMBEDDINGS[run.encoding.kind].from_checkpoint(checkpoint, [f for f in folders if f])
    model = build_model(run.config, len(run.labels), embedding)
    model.load_state_dict(checkpoint.model)
    return model
