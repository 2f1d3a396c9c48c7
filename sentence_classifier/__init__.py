"""Classify sentences with an exported model; numpy, onnxruntime and tokenizers are all that this package needs.

    from sentence_classifier import load

    classifier = load("pytorch-model.onnx")
    classifier.predict("play some jazz").label
    classifier.predict(["play some jazz", "will it rain"])
"""

from sentence_classifier.classifier import load

__all__ = ["load"]
