"""What is surely not meant: a file of another kind or encoding, a header line, swapped columns, quotes, look-alikes.

`file_fault` and `foreign_format` explain a file that cannot be read. The others look at data that can be read, and
return a warning that says what to do, or None.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from sentence_classifier.lines import open_input
from sentence_classifier.tables import LABEL_NAMES, TEXT_NAMES, find_encoding
from text.labels import shorten
from text.report import SplitReport

HEAD = 1 << 20  # bytes that tell what a file is
UNPACK = "unpack it first"
MAGIC = {
    b"\x1f\x8b": ("a gzip file", UNPACK), b"BZh": ("a bzip2 file", UNPACK), b"\xfd7zXZ": ("an xz file", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK), b"PK\x03\x04": ("a zip archive", UNPACK),
    b"\x93NUMPY": ("a numpy array", None), b"\x89HDF": ("an HDF5 file", None), b"PAR1": ("a parquet file", None),
    **{bytes([0x80, version]): ("a Python pickle, perhaps an older PyTorch file", None) for version in range(2, 6)},
    b"\xba\x16\x4f\x2f": ("a fastText model", "take the .vec file beside it"),
}
HANGUL, KANA, HAN = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af", "\u3040-\u30ff", "\u3400-\u9fff"
LEGACY = (("SHIFT_JIS", KANA, 0.3), ("CP949", HANGUL, 0.9), ("GB18030", HAN, 0.7))  # how much must be of the script


def foreign_format(head: bytes) -> tuple[str, str | None] | None:
    """What a file is that begins so and is no text, and what to do where that does not depend on its use."""
    for magic, (what, remedy) in MAGIC.items():
        if head.startswith(magic):
            if what == "a zip archive" and b"data.pkl" in head:
                return "a PyTorch file", None
            return ("numpy arrays", None) if what == "a zip archive" and b".npy" in head else (what, remedy)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", None
    if re.match(rb"\d+ \d+\n", head) and b"\0" in head:
        return "word2vec's binary format", None
    return None


def file_fault(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a file of text as a whole and what to do, where no single line is to blame."""
    with open_input(path) as file:
        head = file.read(HEAD)
    if found := foreign_format(head):
        return f"the file is {found[0]}, and lines of text are expected; {found[1] or 'save it as text'}."
    if b"\n" not in head and head.count(b"\r") > 1:
        return ("its lines end in CR alone; save it with LF or CRLF at the ends, for instance "
                f"tr '\\r' '\\n' < {path} > NEW.")
    if name := _encoding(head):
        return (f"the file looks like {name}, and UTF-8 is expected; save it as UTF-8, for instance "
                f"iconv -f {name} -t UTF-8 {path} > NEW.")
    return None


def _encoding(head: bytes) -> str | None:
    """The likely encoding of a file that is not UTF-8; None where it seems to be, with a broken line perhaps."""
    if not (name := find_encoding(head)).startswith("UTF-8"):
        return name
    lines = [line for line in head[: head.rfind(b"\n") + 1 or None].split(b"\n") if not line.isascii()]
    broken = [line for line in lines if not _decodes(line, "utf-8")]
    if len(broken) < 3 or 2 * len(broken) <= len(lines):
        return None
    for name, script, least in LEGACY:
        if _decodes(text := b"\n".join(broken), name):
            foreign = re.sub(r"[\0-\x7f]", "", text.decode(name))
            if len(re.findall(f"[{script}]", foreign)) >= least * len(foreign):
                return name
    return "CP1252" if any(0x80 <= byte < 0xA0 for byte in b"".join(broken)) else "ISO-8859-1"


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


# Scripts that are written without blanks between words, and Korean, which often is where it was typed in haste.
UNSPACED = re.compile(f"[{HANGUL}{KANA}{HAN}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
NOT_LATIN = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")


def split_warnings(path: str | os.PathLike[str], report: SplitReport, names: Sequence[str]) -> list[str]:
    """The warnings about the file at `path`, when it is encoded, with the labels `names`."""
    found = [header_line(report, names), unknown_labels(report, names), quoted_sentences(report), skipped(path, report)]
    return [f"[{report.name}] {warning}" for warning in found if warning]


def header_line(report: SplitReport, names: Sequence[str]) -> str | None:
    """The first line is a table's header."""
    sentence, label = (field.strip('"').casefold() for field in report.first_line)
    if label.rstrip("s") not in LABEL_NAMES and label not in LABEL_NAMES:
        return None
    ids = {name.strip('"').casefold(): number for number, name in enumerate(names)}
    if report.labels[ids.get(label, -1)] > 1 and sentence.rstrip("s") not in TEXT_NAMES:
        return None
    return (f"the first line, {report.first_line[0]!r} TAB {report.first_line[1]!r}, looks like a table's header, and "
            "is taken for a sentence with its label; remove the line.")


def unknown_labels(report: SplitReport, names: Sequence[str]) -> str | None:
    """Labels that train.txt lacks."""
    if not report.unknown_labels:
        return None
    known = {_bare(name): name for name in names}
    alike = [f"; {shorten(name)} looks like {shorten(known[_bare(name)])}" for name in report.unknown_names
             if _bare(name) in known]
    labels = ", ".join(map(shorten, report.unknown_names[:5])) + ", ..." * (len(report.unknown_names) > 5)
    return (f"{report.unknown_labels} sentences have a label that train.txt lacks ({labels}{''.join(alike[:1])}): they "
            "stay in every measurement, as errors. If they are not meant to, correct the labels, or give train.txt "
            "sentences of them.")


def quoted_sentences(report: SplitReport) -> str | None:
    """Quotes that a spreadsheet has put round sentences."""
    if report.quoted * 50 <= report.sentences:
        return None
    return (f"{report.quoted} of {report.sentences} sentences stand in double quotes, as a spreadsheet writes them; "
            "the quotes are read as text. Save the table without quotes.")


def skipped(path: str | os.PathLike[str], report: SplitReport) -> str | None:
    """Many lines that could not be used."""
    lines = report.sentences + report.skipped
    if report.skipped * 10 <= lines:
        return None
    return (f"{report.skipped} of {lines} lines were skipped, {report.skipped / lines:.0%}; "
            + (file_fault(path) or "leave --skip_bad_lines out to see what is wrong with the first of them."))


def label_warnings(names: Iterable[str]) -> list[str]:
    """The warnings about train.txt's classes: quotes round their names, and names that look alike."""
    warnings = []
    quoted = [name for name in names if len(name) > 1 and name[0] == name[-1] == '"']
    if quoted:
        warnings.append(f"the label {quoted[0]} stands in double quotes, as a spreadsheet writes it; they are part of "
                        "the class's name. Save the table without quotes.")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_bare(name), []).append(name)
    alike = [" and ".join(map(shorten, group)) for group in groups.values() if len(group) > 1]
    if alike:
        warnings.append(f"labels that look alike are classes of their own: {', '.join(alike[:5])}"
                        f"{', ...' if len(alike) > 5 else ''}; give all sentences of a class the same label.")
    return [f"[train.txt] {warning}" for warning in warnings]


def _bare(name: str) -> str:
    """A label without what tells look-alikes apart: case, blanks, quotes."""
    return " ".join(name.casefold().strip("\"'“”‘’").split())


def swapped_columns(classes: int, sentences: int, texts: Iterable[Hashable]) -> str | None:
    """Labels before sentences in train.txt.

    Args:
        classes: how many there are, in so many sentences.
        texts: the sentences; read where the classes are many, until they are too many to be labels.
    """
    if 2 * classes <= sentences:
        return None
    distinct = set()
    for text in texts:
        distinct.add(hash(text))
        if 2 * len(distinct) > classes:
            return None
    return (f"[train.txt] {classes} labels in {sentences} lines, and {len(distinct)} different sentences: the columns "
            "seem to be swapped; each line is sentence TAB label.")


def unspaced_text(words: Counter[str], sentences: int) -> str | None:
    """Running text without blanks, whose sentences are read as one word each.

    Args:
        words: how often each word occurs in train.txt.
    """
    running = sum(words.values())
    characters = sum(len(word) * count for word, count in words.items())
    if characters < 5 * running:
        return None
    unspaced = sum(len(UNSPACED.findall(word)) * count for word, count in words.items() if not word.isascii())
    if 2 * unspaced <= characters:
        return None
    return (f"[train.txt] {running / sentences:.1f} words a sentence, of {characters / running:.1f} characters: the "
            "text seems to be written without blanks, and words are what blanks separate. Split it into words first "
            "(Korean: augment_data.py --no_augment --preserve_label --analyzer=kiwi), or take a transformer.")


def low_coverage(share: float, path: str, words: Sequence[str]) -> str | None:
    """A file of vectors in which hardly a word of the text occurs.

    Args:
        share: of the running words of train.txt that have a vector in the file at `path`.
        words: the file's.
    """
    if share >= 0.05:
        return None
    return (f"[coverage] only {share:.1%} of the running words of train.txt have a vector in {path}, whose words are "
            f"such as {', '.join(map(repr, words[:3]))}; take vectors of the text's language, with plain words, or "
            "--embedding_path=none.")


def not_english(sentences: Iterable[str], analyzer: str) -> str | None:
    """Text in another script, for an English analyzer."""
    text = "".join(sentences)
    foreign, letters = len(NOT_LATIN.findall(text)), sum(map(str.isalpha, text))
    if 2 * foreign <= letters:
        return None
    return (f"--analyzer={analyzer} knows English, and the text is in another script: its parts of speech mean "
            "nothing. Take --analyzer=kiwi for Korean, or --no_analyzer.")
