"""Every way of int8 on every architecture that the reference's tables name, through the scripts (make test-matrix)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import make_case
from helpers import ENCODERS, ROOT, code_hash, refusal, write_config
from test_quantization import TRAINED_WAYS, predicted, results, share

import evaluate
import preprocess
import train

TRANSFORMERS = ("BERT", "DistilBERT", "SqueezeBERT", "MobileBERT", "ALBERT", "RoBERTa", "ELECTRA", "DeBERTa-v2",
                "ConvBERT", "BART", "GPT-2", "ModernBERT")
MATRIX = [*[(name, encoder) for name in TRANSFORMERS for encoder in ("cls", "cnn")],
          *[("GloVe", encoder) for encoder in ENCODERS]]
WAYS = ("fp32", "dqm", *TRAINED_WAYS)


def run_ways(root: Path, name: str, encoder: str, caplog: pytest.LogCaptureFixture) -> Iterator[dict[str, Any]]:
    """Each way of a model through the scripts, from encoded and from raw text; a row of figures for each."""
    caplog.set_level(logging.INFO)
    if name == "GloVe":
        case = make_case(root, "BERT", encoder)
        write_config(root / "config.json", encoder)
        preprocess.main([f"--config={root / 'config.json'}", f"--data_dir={root / 'data'}", "--embedding_path=none"])
    else:
        case = make_case(root, name, encoder)
        preprocess.main(case.flags())
    for way in WAYS:
        flag = [] if way == "fp32" else [f"--enable_{way}"]
        if encoder == "gnb" and flag:
            said = refusal(evaluate.main if way == "dqm" else train.main,
                           *(case.evaluate_flags() if way == "dqm" else case.train_flags("--epoch=1")), *flag)
            yield {"way": way, "refused": said}
            continue
        if way != "dqm":
            # Word vectors begin at random.
            train.main(case.train_flags(f"--epoch={30 if name == 'GloVe' else 12}", *flag))
        row: dict[str, Any] = {"way": way}
        caplog.clear()
        for mode, kind in (("--batch_size=1", "pred"), ("--enable_inference", "inference")):
            evaluate.main(case.evaluate_flags(mode))
            plain = predicted(root / "data", kind)
            evaluate.main(case.evaluate_flags(mode, *flag))
            changed = sum(one != other for one, other in zip(plain, predicted(root / "data", kind), strict=True))
            row |= {kind: results(root / "model.pt")["accuracy"], f"{kind}_changed": changed}
        row["share"] = share(caplog.text) if way in ("dqm", "qat", "qat_fx") else None
        row["said"] = re.findall(r"\[(?:graph|DiffQ)\] .*", caplog.text)[:1]
        yield row


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "encoder"), MATRIX)
def test_matrix(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, encoder: str) -> None:
    """Figures go to .matrix/int8/; what stands there already, by the same code, is not run again."""
    sources = (ROOT / "compression" / file for file in ("products.py", "quantization.py"))
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    kept = ROOT / ".matrix/int8" / f"{name}-{encoder}-{code_hash()}-{code}.json"
    if not kept.exists():
        rows = list(run_ways(tmp_path / "case", name, encoder, caplog))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"architecture": name, "encoder": encoder, "rows": rows}))
    for row in json.loads(kept.read_text())["rows"]:
        if encoder == "gnb" and row["way"] != "fp32":
            assert "no matrices to quantize" in row["refused"]
            continue
        assert row["pred"] == row["inference"] and row["pred"] >= 0.5, row  # four labels
        assert row["share"] is None or row["share"] >= 90.0, row
        assert row["pred_changed"] <= 6, row  # of 60
