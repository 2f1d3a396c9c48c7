"""The models: an embedding, an encoder and a decoder make a classifier.

From small to large: layers, embeddings, encoders, decoders, the classifier, and `build_model`, which makes one from
a config. Shapes are written B (sentences), T (positions, the batch's longest sentence), D (embedding size),
H (encoding size), C (labels). In every module `mask` [B, T] is True at real tokens; pad positions take part in no
maximum, sum, softmax or convolution, so that a sentence's logits do not depend on the sentences beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import EncodedData, load_table
from pretrained.layout import layers_above
from pretrained.loading import TransformerEmbedding
from sentence_classifier.errors import InputError
from sentence_classifier.tokenizers import SUBWORDS, WORDS
from util import Checkpoint

# ---------------------------------------------------------------------------------------------------------- layers


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over real positions: x [B, T, D], mask [B, T] -> [B, D]."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class MaxOverTimeConv(nn.Module):
    """Convolutions of several widths, each followed by ReLU and the maximum over positions (Kim 2014, 1408.5882).

    Convolutions are wide: a kernel of width k is placed wherever it touches at least one token, zeros beyond the
    sentence's ends. So every sentence has L + k - 1 windows, however short it is, and the first and last words are
    seen by as many windows as the others.
    """

    def __init__(self, input_size: int, num_filters: int, kernel_sizes: list[int]) -> None:
        super().__init__()
        self.kernel_sizes = kernel_sizes
        self.convolutions = nn.ModuleList(
            nn.Conv1d(input_size, num_filters, size, padding=size - 1) for size in kernel_sizes
        )
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
    """A table of word vectors of which the first rows are trained and the others are frozen.

    preprocess.py puts <pad>, <unk> and the training data's words first, so that gradients and optimizer state exist
    for these alone, however large the table is. The frozen rows are not part of a checkpoint.

    Args:
        table: [V, D] float32; may be a read-only memory map.
        num_trainable: how many rows are trained, at least 2 (<pad> and <unk>).
        word_dropout: for each word of the training data, the probability with which training reads <unk> in its place
            (the last entry stands for all later rows); see word_dropout_probabilities.
        dropout: on the word vectors' elements.
    """

    def __init__(self, table: Tensor, num_trainable: int, word_dropout: Tensor | None = None,
                 dropout: float = 0.0) -> None:
        super().__init__()
        self.trainable = nn.Parameter(table[:num_trainable].clone())
        self.frozen: Tensor
        self.register_buffer("frozen", table[num_trainable:], persistent=False)
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
    def for_training(cls, data: EncodedData, args: argparse.Namespace) -> WordEmbedding:
        """The embedding that train.py begins with."""
        table = load_table(data.path.parent / args.embedding_filename, str(data.encoding.table))
        dropped = word_dropout_probabilities(data.word_counts(), args.word_dropout) if args.word_dropout else None
        trainable = data.encoding.seen_rows if args.embedding_trainable else data.encoding.own_rows
        return cls(table, trainable, dropped, args.embedding_dropout)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, folders: list[str]) -> WordEmbedding:
        """The embedding that load_state_dict fills; its frozen rows come from a data folder."""
        table, run = checkpoint.model["embedding.trainable"], checkpoint.run
        if len(table) < run.vocabulary.count("\n"):
            paths = [Path(folder) / run.flags["embedding_filename"] for folder in folders]
            table = _find_table(paths, str(run.encoding.table))
        return cls(table, run.embedding["num_trainable"])

    def metadata(self) -> dict[str, Any]:
        """What from_checkpoint needs to know beside the weights."""
        return {"num_trainable": self.trainable.shape[0]}

    def identity(self) -> dict[str, Any]:
        """Nothing beside the data: their encoding names the table."""
        return {}


def _find_table(paths: list[Path], expected: str) -> Tensor:
    for path in paths[:-1]:
        with contextlib.suppress(InputError):
            return load_table(path, expected)
    return load_table(paths[-1], expected)


def word_dropout_probabilities(counts: Tensor, alpha: float) -> Tensor:
    """Rare words are dropped most: alpha / (alpha + count), so that <unk> learns what unknown words are like.

    From Kiperwasser and Goldberg 2016 (arXiv 1603.04351, section 4), who took alpha = 0.25.

    Args:
        counts: how often each row of the table occurs in the training data, [N].

    Returns:
        The probability of each row, and 0 for all later ones, [N + 1].
    """
    probabilities = alpha / (alpha + counts.float())
    probabilities[counts == 0] = 0.0  # <pad>, and words that training does not meet
    return F.pad(probabilities, (0, 1))


Embedding = WordEmbedding | TransformerEmbedding

# -------------------------------------------------------------------------------------------------------- encoders


class MeanEncoder(nn.Module):
    """The mean of the token vectors, for the Gaussian decoder."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        self.output_size = embedding.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, D]."""
        return masked_mean(x, mask)


class CLSEncoder(nn.Module):
    """The vector of the position that a transformer classifies by: its first or its last real token."""

    def __init__(self, config: dict[str, Any], embedding: TransformerEmbedding) -> None:
        super().__init__()
        self.last = embedding.classify_by == "last"
        self.output_size = embedding.output_size
        if not self.last:
            embedding.read_first_only()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, D]."""
        if not self.last:
            return x[:, 0]
        places = mask.sum(1).sub(1).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
        return x.gather(1, places).squeeze(1)


class CNNEncoder(nn.Module):
    """Convolutions over positions, as Kim 2014 (arXiv 1408.5882) has them."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        self.cnn = MaxOverTimeConv(embedding.output_size, config["num_filters"], config["kernel_sizes"])
        self.output_size = self.cnn.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, H]."""
        return self.cnn(x, mask)


def _densenet(config: dict[str, Any], input_size: int) -> DenseNet:
    return DenseNet(input_size, config["densenet_kernels"], config["densenet_first_num_filters"],
                    config["densenet_num_filters"], config["densenet_last_num_filters"])


class DenseNetCNNEncoder(nn.Module):
    """Densely connected convolutions, then those of the CNN."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        self.densenet = _densenet(config, embedding.output_size)
        self.cnn = MaxOverTimeConv(self.densenet.output_size, config["num_filters"], config["kernel_sizes"])
        self.output_size = self.cnn.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, H]."""
        return self.cnn(self.densenet(x, mask), mask)


class DenseNetDSAEncoder(nn.Module):
    """Densely connected convolutions, then dynamic self-attention."""

    def __init__(self, config: dict[str, Any], embedding: Embedding) -> None:
        super().__init__()
        self.densenet = _densenet(config, embedding.output_size)
        self.attention = DynamicSelfAttention(self.densenet.output_size, config["dsa_num_attentions"],
                                              config["dsa_dim"], config["dsa_r"])
        self.output_size = self.attention.output_size

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, T] -> [B, H]."""
        return self.attention(self.densenet(x, mask), mask)


# -------------------------------------------------------------------------------------------------------- decoders


class SoftmaxDecoder(nn.Module):
    """Layer norm, dropout, a hidden layer where the config has fc_hidden_size, and the output layer of a softmax."""

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.dropout = nn.Dropout(config["dropout"])
        hidden = config.get("fc_hidden_size")
        self.hidden = nn.Sequential(
            nn.Linear(input_size, hidden), nn.ReLU(), nn.LayerNorm(hidden), nn.Dropout(config["dropout"])
        ) if hidden else nn.Identity()
        self.output = nn.Linear(hidden or input_size, num_labels)

    def forward(self, encoding: Tensor) -> Tensor:
        """encoding [B, H] -> logits [B, C]."""
        return self.output(self.hidden(self.dropout(self.norm(encoding))))


class LinearDecoder(nn.Module):
    """Dropout and the output layer of a softmax."""

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config["dropout"])
        self.output = nn.Linear(input_size, num_labels)

    def forward(self, encoding: Tensor) -> Tensor:
        """encoding [B, H] -> logits [B, C]."""
        return self.output(self.dropout(encoding))


class GaussianDecoder(nn.Module):
    """Gaussian naive Bayes: logit_c = log prior_c + sum_f log N(x_f; mean_cf, variance_cf).

    `fit` sets it in closed form; from there it trains like any other layer. A term common to all classes,
    -H/2 log(2 pi), is left out: the softmax does not see it.
    """

    def __init__(self, config: dict[str, Any], input_size: int, num_labels: int) -> None:
        super().__init__()
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
            return self.log_prior + log_density.sum(-1)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]], smoothing: float = 1e-3) -> None:
        """Set priors, means and variances from data by their maximum likelihood estimates.

        Args:
            batches: encodings [B, H] and the probability of each class [B, C] (one-hot for hard labels).
            smoothing: share of the largest feature variance that is added to all, for features that hardly vary.
        """
        count = self.log_prior.new_zeros(len(self.log_prior), dtype=torch.float64)
        total = self.mean.new_zeros(self.mean.shape, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for encoding, share in batches:
            x, share = encoding.double(), share.double().t()
            count += share.sum(1)
            total += share @ x
            squares += share @ x.square()
        size = count.clamp(min=1e-12).unsqueeze(1)
        mean = total / size
        variance = (squares / size - mean.square()).clamp(min=0.0)
        overall = squares.sum(0) / count.sum() - (total.sum(0) / count.sum()).square()
        variance = variance + smoothing * overall.max().clamp(min=1e-9)
        self.log_prior.copy_(((count + 1.0) / (count + 1.0).sum()).log())
        self.mean.copy_(mean)
        self.log_variance.copy_(variance.log())


# ------------------------------------------------------------------------------------------------------ classifier

# enc_class to (encoder, decoder).
ENCODERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "gnb": (MeanEncoder, GaussianDecoder),
    "cls": (CLSEncoder, LinearDecoder),
    "cnn": (CNNEncoder, SoftmaxDecoder),
    "densenet-cnn": (DenseNetCNNEncoder, SoftmaxDecoder),
    "densenet-dsa": (DenseNetDSAEncoder, SoftmaxDecoder),
}


class Classifier(nn.Module):
    """Embedding, encoder and decoder in a row: token ids in, logits out."""

    def __init__(self, embedding: Embedding, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] -> [B, H]."""
        return self.encoder(self.embedding(input_ids, attention_mask), attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids [B, T], attention_mask [B, T] bool -> logits [B, C]."""
        return self.decoder(self.encode(input_ids, attention_mask))


def build_model(config: dict[str, Any], num_labels: int, embedding: Embedding) -> Classifier:
    """Put the encoder and the decoder that a checked config describes on top of an embedding.

    Args:
        config: see arguments.py.
        num_labels: C.
    """
    encoder_class, decoder_class = ENCODERS[config["enc_class"]]
    encoder = encoder_class(config, embedding)
    decoder = decoder_class(config, encoder.output_size, num_labels)
    return Classifier(embedding, encoder, decoder)


def parameter_groups(model: Classifier, weight_decay: float, lr: float,
                     embedding_lr: float | None = None, layer_lr_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW: no decay on biases, norms, word vectors and the Gaussian decoder's statistics.

    Args:
        embedding_lr: a rate of its own for the embedding: word vectors, or the transformer.
        layer_lr_decay: a transformer's rate is multiplied by it once for each layer above: its lowest layers, which
            hold the most general knowledge, change least (ULMFiT, Howard and Ruder 2018, arXiv 1801.06146, section
            3.2; with a factor a layer as in ELECTRA, arXiv 2003.10555, appendix B).
    """
    kept = {id(p) for m in model.modules() if isinstance(m, WordEmbedding | nn.Embedding | GaussianDecoder)
            for p in m.parameters(recurse=False)}
    top = lr if embedding_lr is None else embedding_lr
    inside = {id(p): top for p in model.embedding.parameters()}
    if layer_lr_decay != 1 and isinstance(model.embedding, TransformerEmbedding):
        inside = {parameter: top * layer_lr_decay**above
                  for parameter, above in layers_above(model.embedding.transformer).items()}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and id(parameter) not in kept
            key = (id(parameter) not in inside, inside.get(id(parameter), lr), decayed)
            groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "lr": key[1], "weight_decay": weight_decay if key[2] else 0.0}
            for key in sorted(groups, reverse=True)]


# The embedding's class by the kind of encoded data that it reads.
EMBEDDINGS: dict[str, type[WordEmbedding | TransformerEmbedding]] = {
    WORDS: WordEmbedding, SUBWORDS: TransformerEmbedding}


def load_classifier(checkpoint: Checkpoint, folders: Iterable[str | None]) -> Classifier:
    """Rebuild the classifier of a checkpoint, on the CPU.

    Args:
        checkpoint: as train.py wrote it.
        folders: data folders in which frozen word vectors are looked for, in this order.

    Raises:
        InputError: the frozen vectors are in none of them.
    """
    run = checkpoint.run
    embedding = EMBEDDINGS[run.encoding.kind].from_checkpoint(checkpoint, [f for f in folders if f])
    model = build_model(run.config, len(run.labels), embedding)
    model.load_state_dict(checkpoint.model)
    return model
