"""An exported model on ONNX Runtime, and what every loaded model has in common: `predict`.

`evaluate.py --convert_onnx` writes the file. It carries all that its use needs (labels, tokenizer or vocabulary, n_ctx,
lowercase), so that neither the checkpoint nor the data need be there.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from sentence_classifier.answers import AnsweredTable, predict_table
from sentence_classifier.batches import by_length, pad
from sentence_classifier.decisions import Decision
from sentence_classifier.errors import InputError
from sentence_classifier.labels import SEPARATOR, Labels
from sentence_classifier.processor import has_vnni
from sentence_classifier.tokenizers import Tokenizer, TokenizerInfo, make_tokenizer

if TYPE_CHECKING:  # most scripts read this module and open no .onnx file
    import onnxruntime

logger = logging.getLogger(__name__)

# In a .onnx file's metadata: what the file says of itself, as JSON, and the vocabulary or tokenizer that it reads with.
METADATA_KEY, VOCABULARY_KEY = "classifier", "vocabulary"
ONNX_FORMAT = 2
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
BUSY_WAIT = 0.1  # seconds after an answer in which a session's threads may still wait busily for the next request


class Prediction(NamedTuple):
    """The answer to one sentence.

    Attributes:
        label: the likeliest one.
        labels: the answer: that one, or of a model with several labels those that reach their thresholds, likeliest
            first, perhaps none.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    labels: tuple[str, ...]


def make_session(model: str | bytes, num_threads: int = 0) -> onnxruntime.InferenceSession:
    """A session for one request at a time, of a file's path or its content; 0 threads: ONNX Runtime's choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised, too
    # onnx_export.fuse has optimized the graph already: a start need not do it again.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class TextClassifier(ABC):
    """A loaded model that answers text: OnnxClassifier, or evaluate.TorchClassifier for a checkpoint."""

    def __init__(self, labels: Labels, tokenizer: Tokenizer, decision: Decision) -> None:
        self.labels = labels
        self.tokenizer = tokenizer
        self.decision = decision

    @abstractmethod
    def logits(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Logits [B, C] float32 of a batch of token id rows, each of at least one token."""

    def probabilities(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Class probabilities [B, C] of a batch of token id rows."""
        return self.decision.probabilities(self.logits(rows))

    @overload
    def predict(self, texts: str, batch_size: int = 32) -> Prediction: ...
    @overload
    def predict(self, texts: list[str] | tuple[str, ...], batch_size: int = 32) -> list[Prediction]: ...

    def predict(self, texts: str | Iterable[str], batch_size: int = 32) -> Prediction | list[Prediction]:
        """Classify one sentence or many.

        A sentence without words (an empty one, or one of blanks) is answered like an unknown word by word models, and
        by its special tokens alone by transformers.

        Args:
            texts: a sentence, or sentences; many are computed in batches of like length and answered in their order.
            batch_size: sentences a batch.

        Raises:
            ValueError: a batch size below 1; texts that is neither a string nor strings; or a string that cannot be
                encoded, for it holds half of a surrogate pair. The message names the sentence, counted from 1.
        """
        if isinstance(texts, str):
            return self.predict([texts], batch_size)[0]
        if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray):
            raise ValueError(f"texts is of type {type(texts).__name__}, and a string or a list of strings is needed.")
        return [self._answer(row) for row in self.predict_probabilities(list(texts), batch_size)]

    def predict_probabilities(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """The probabilities [N, C] of N sentences' classes, in the order of `labels`; see `predict`."""
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, and a whole number of at least 1 is needed.")
        for number, sentence in enumerate(texts, 1):
            _check_sentence(sentence, number)
        if len(texts) == 1:
            return self.probabilities([self.tokenizer(texts[0])])
        rows = [row for row, _ in self.tokenizer.tokenize_batch(texts)]
        answers = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        for places in by_length([len(row) for row in rows], batch_size):
            answers[places] = self.probabilities([rows[place] for place in places])
        return answers

    def predict_table(self, input_path: str | Path, output_path: str | Path, **options: Any) -> AnsweredTable:
        """Answer a table's sentences in a copy of it; see answers.predict_table, which takes the options."""
        return predict_table(self, str(input_path), str(output_path), **options)

    def _answer(self, row: np.ndarray) -> Prediction:
        named = dict(zip(self.labels.names, row.tolist(), strict=True))
        order = [self.labels.names[place] for place in np.argsort(-row, kind="stable")]
        chosen = {self.labels.names[place] for place in np.flatnonzero(self.decision.decide(row[None])[0])}
        labels = tuple(name for name in order if name in chosen) if self.decision.multi_label else (order[0],)
        return Prediction(order[0], named[order[0]], named, labels)


def _check_sentence(sentence: object, number: int) -> None:
    if not isinstance(sentence, str):
        raise ValueError(f"sentence {number} is of type {type(sentence).__name__}, and a string is needed.")
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"sentence {number}: {error}.") from None


class OnnxClassifier(TextClassifier):
    """A loaded .onnx file.

    Attributes:
        metadata: what the file says of itself; compression.onnx_export writes it.
        vocabulary: the content of the vocabulary's file.
    """

    def __init__(self, session: onnxruntime.InferenceSession, metadata: dict[str, Any], vocabulary: str) -> None:
        encoding = metadata["run"]["encoding"]
        info = TokenizerInfo.from_json(encoding)
        decision = Decision(encoding.get("multi_label", False), tuple(metadata["run"].get("thresholds", ())),
                            encoding.get("label_separator") or SEPARATOR)
        super().__init__(Labels(tuple(encoding["labels"])), make_tokenizer(vocabulary, info), decision)
        self.session = session
        self.metadata = metadata
        self.vocabulary = vocabulary
        # Such a file measures activation scales on arrival, those of a whole batch: so each sentence is answered alone.
        self._alone = "int8" in metadata and not metadata["int8"].get("batch_invariant", False)
        self._ones = np.ones((1, max(1, info.n_ctx)), dtype=bool)

    def logits(self, rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """Logits [B, C] float32 of a batch of token id rows."""
        if self._alone and len(rows) > 1:
            return np.concatenate([self.logits([row]) for row in rows])
        if len(rows) == 1 and len(rows[0]) <= self._ones.shape[1]:  # nothing to pad
            ids = np.asarray(rows[0], dtype=np.int64)[None]
            mask = self._ones[:, : ids.shape[1]]
        else:
            ids, mask = pad(rows)
        return self.session.run([OUTPUT], {INPUTS[0]: ids, INPUTS[1]: mask})[0]


def load(path: str | Path, num_threads: int = 0) -> OnnxClassifier:
    """Open a .onnx file that `evaluate.py --convert_onnx` wrote; 0 threads: ONNX Runtime's choice.

    Raises:
        InputError: no such file, a truncated one, or one that this toolkit did not write.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; evaluate.py --convert_onnx writes it.")
    try:  # ONNX Runtime takes a path that is text; of another file, its content
        session = make_session(str(path) if str(path).isprintable() else Path(path).read_bytes(), num_threads)
    except Exception as error:  # onnxruntime raises a dozen kinds for a damaged file; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a whole ONNX file that ONNX Runtime can use ({reason}).") from None
    found = session.get_modelmeta().custom_metadata_map
    if not {METADATA_KEY, VOCABULARY_KEY} <= set(found):
        raise InputError(f"{path}: an ONNX file without this toolkit's metadata; write it with evaluate.py "
                         "--convert_onnx.")
    try:
        metadata = json.loads(found[METADATA_KEY])
        if metadata["format"] != ONNX_FORMAT or {one.name for one in session.get_inputs()} != set(INPUTS):
            raise ValueError("of another version of this toolkit")
        if metadata.get("int8", {}).get("weight_bits") == 8 and has_vnni() is False:
            logger.warning("%s: its 8-bit weights need a processor with VNNI, and this one has none: sums may be cut "
                           "off, and answers wrong. Write the file anew on this machine: evaluate.py --convert_onnx "
                           "--quantize_onnx.", path)
        return OnnxClassifier(session, metadata, found[VOCABULARY_KEY])
    except InputError:
        raise
    except Exception as error:  # likewise, of tokenizers
        raise InputError(f"{path}: its metadata cannot be used ({error}); write the file again with evaluate.py "
                         "--convert_onnx.") from None
