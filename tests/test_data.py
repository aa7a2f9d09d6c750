"""Text becomes the same token sequences everywhere, bytes add up, and every bad input is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tersor.compress import data as data_module
from tersor.compress.data import Source, overlap, read_samples
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.paths import resolve_path

LINES = [f"line {number}: the quick brown fox" for number in range(40)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", "utf-8")
    return path


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line, "id": line[5]}) for line in LINES) + "\n", "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for name, content in {
        "b.py": "beta",
        "a/z.txt": "alpha",
        "c.jsonl": '{"text": "gamma"}\n{"text": "delta"}',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, "utf-8")
    (root / ".hidden.txt").write_text("hidden", "utf-8")
    (root / "image.png").write_bytes(b"\x89PNG\xff")
    return root


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """Byte-level: a character outside ASCII is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def word_tokenizer() -> Any:
    """Lower case words; white space belongs to no token. [CLS] and [SEP] around a sequence."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "line", "the", "quick", "brown", "fox", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def read(path: Path, tokenizer: Any, *, windows: bool = True, seed: int | None = None, **options: Any) -> list[Any]:
    source = Source(str(path), **options)
    return read_samples(source, tokenizer, windows=windows, seed=seed, base=None, place="data.heldout")


def test_windows_are_the_stream_with_bos_in_front_and_no_remainder(text: Path, byte_tokenizer: Any) -> None:
    whole = text.read_text("utf-8")
    stream = [0, *byte_tokenizer(whole, add_special_tokens=False)["input_ids"]]
    samples = read(text, byte_tokenizer, length=32, samples=10_000)
    assert len(samples) == len(stream) // 32
    assert np.concatenate([s.ids for s in samples]).tolist() == stream[: len(samples) * 32]
    assert all(s.ids.dtype == np.int64 and s.ids.shape == (32,) for s in samples)


def test_records_are_documents_each_after_a_bos(records: Path, byte_tokenizer: Any) -> None:
    ids = np.concatenate([s.ids for s in read(records, byte_tokenizer, length=2, samples=10_000)])
    starts = np.flatnonzero(ids == 0)
    assert len(starts) == len(LINES)
    assert starts.tolist() == np.cumsum([0] + [len(line) + 1 for line in LINES[:-1]]).tolist()


def test_a_folder_is_its_files_by_path_without_hidden_and_binary_ones(folder: Path, byte_tokenizer: Any) -> None:
    ids = np.concatenate([s.ids for s in read(folder, byte_tokenizer, length=2)])
    assert byte_tokenizer.decode(ids) == "<s>alpha<s>beta<s>gamma<s>delt"  # 23 tokens, windows of 2


@pytest.mark.parametrize("length", [2, 5, 16])
def test_bytes_are_those_of_the_predicted_tokens(tmp_path: Path, byte_tokenizer: Any, length: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text("naïve café — 日本語 and 🙂 at the end\n" * 5, "utf-8")
    stream = np.concatenate([s.ids for s in read(path, byte_tokenizer, length=length, samples=10_000)])
    spent = 0
    for sample in read(path, byte_tokenizer, length=length, samples=10_000):
        assert sample.bytes == len(sample.text.encode())
        spent += sample.bytes
    # one byte a token here, so what is not counted is the bos and each window's first token; a character that
    # is cut by a window's edge belongs to the token that starts it
    first = len(stream) // length
    assert abs(spent - (len(stream) - first)) <= 3 * first


def test_a_window_of_the_whole_text_has_all_its_bytes(tmp_path: Path, byte_tokenizer: Any) -> None:
    path, content = tmp_path / "text.txt", "naïve 日本語 🙂\n"
    path.write_text(content, "utf-8")
    (sample,) = read(path, byte_tokenizer, length=len(content.encode()) + 1)
    assert (sample.text, sample.bytes) == (content, len(content.encode()))


def test_white_space_belongs_to_the_token_behind_it_and_the_rest_to_the_last(text: Path, word_tokenizer: Any) -> None:
    whole = text.read_text("utf-8")
    count = len(word_tokenizer(whole, add_special_tokens=False)["input_ids"])
    (sample,) = read(text, word_tokenizer, length=count)
    assert sample.text == whole[len("line") :]  # all but the first token's, white space and trailing newline included
    assert sample.bytes == len(whole) - len("line")


def test_a_slow_tokenizer_counts_the_decoded_text(text: Path, byte_tokenizer: Any) -> None:
    class Slow:
        """The same tokenizer without offsets."""

        is_fast, bos_token_id = False, 0
        decode = staticmethod(byte_tokenizer.decode)

        def __call__(self, text: str, return_offsets_mapping: bool, **options: Any) -> Any:
            assert not return_offsets_mapping
            return byte_tokenizer(text, **options)

    slow, fast = (read(text, t, length=32, samples=9) for t in (Slow(), byte_tokenizer))
    assert [(s.text, s.bytes, s.ids.tolist()) for s in slow] == [(s.text, s.bytes, s.ids.tolist()) for s in fast]


def test_a_token_that_stands_for_nothing_has_no_bytes(text: Path, byte_tokenizer: Any) -> None:
    class Marking:
        """The same tokenizer with every tenth token's offsets said to be (0, 0)."""

        is_fast, bos_token_id = True, 0

        def __call__(self, text: str, **options: Any) -> Any:
            encoded = dict(byte_tokenizer(text, **options))
            encoded["offset_mapping"] = [
                (0, 0) if i % 10 == 9 else at for i, at in enumerate(encoded["offset_mapping"])
            ]
            return encoded

    samples = read(text, Marking(), length=10, samples=10_000)
    assert {s.bytes for s in samples} <= {9, 10}


def test_encoders_get_one_sequence_a_line_with_special_tokens(text: Path, records: Path, word_tokenizer: Any) -> None:
    lines = read(text, word_tokenizer, windows=False, samples=100)
    assert [s.text for s in lines] == LINES
    assert all(s.ids[0] == 1 and s.ids[-1] == 2 for s in lines)
    from_records = read(records, word_tokenizer, windows=False, samples=100)
    assert [s.ids.tolist() for s in from_records] == [s.ids.tolist() for s in lines]


def test_encoders_truncate_and_count_what_is_left(text: Path, word_tokenizer: Any) -> None:
    (sample, *_) = read(text, word_tokenizer, windows=False, length=5)
    assert len(sample.ids) == 5
    assert sample.text == "line 0:"
    assert sample.bytes == 7


def test_blank_lines_and_carriage_returns_are_no_sequences(tmp_path: Path, word_tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfthe fox\r\n\r\n   \nthe quick\x0cfox")
    assert [s.text for s in read(path, word_tokenizer, windows=False)] == ["the fox", "the quick\x0cfox"]


def test_heldout_is_evenly_spaced_and_calibration_a_seeded_choice(text: Path, word_tokenizer: Any) -> None:
    def numbers(**options: Any) -> list[int]:
        return [LINES.index(s.text) for s in read(text, word_tokenizer, windows=False, samples=8, **options)]

    assert numbers() == [0, 5, 10, 15, 20, 25, 30, 35]
    first = numbers(seed=1)
    assert first == numbers(seed=1)
    assert first == sorted(set(first))
    assert len(first) == 8
    assert first != numbers(seed=2)


def test_fewer_than_asked_is_all_there_is(text: Path, word_tokenizer: Any) -> None:
    assert len(read(text, word_tokenizer, windows=False, samples=1000, seed=3)) == len(LINES)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_spans_that_touch_share_no_line(kind: str, request: Any, word_tokenizer: Any) -> None:
    path = request.getfixturevalue(kind)
    low, high = (read(path, word_tokenizer, windows=False, span=span, samples=99) for span in ("0%-33%", "33%-100%"))
    assert [s.text for s in low + high] == LINES
    assert len(low) == int(40 * 0.33)


def test_a_folders_span_counts_files(folder: Path, byte_tokenizer: Any) -> None:
    texts = [s.text for s in read(folder, byte_tokenizer, windows=False, span="34%-100%")]
    assert texts == ["beta", "gamma", "delta"]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (None, None, True),
        ("0%-60%", "60%-100%", False),
        ("0%-60%", "59.9%-100%", True),
        ("0%-60%", None, True),
        ("10%-20%", "15%-16%", True),
    ],
)
def test_overlap_of_spans(text: Path, one: str | None, other: str | None, shared: bool) -> None:
    a, b = Source(str(text), span=one), Source(str(text), span=other)
    assert overlap(a, b, None) is shared
    assert overlap(b, a, None) is shared


def test_overlap_sees_through_links_relative_paths_and_folders(text: Path, folder: Path, records: Path) -> None:
    link = text.with_name("link.txt")
    link.symlink_to(text)
    assert overlap(Source(str(text)), Source("link.txt"), text.parent)
    assert not overlap(Source(str(text)), Source(str(records)), None)
    copy = text.with_name("copy.md")
    copy.write_bytes(text.read_bytes())
    assert overlap(Source(str(text), span="0%-60%"), Source(str(copy)), None)
    assert not overlap(Source(str(text), span="0%-60%"), Source(str(copy), span="60%-100%"), None)
    copy.write_bytes(text.read_bytes()[::-1])
    assert not overlap(Source(str(text)), Source(str(copy)), None)
    assert overlap(Source(str(folder)), Source(str(folder / "b.py")), None)
    assert not overlap(Source(str(folder), span="0%-34%"), Source(str(folder / "b.py")), None)


def test_paths_start_from_the_recipe_or_a_package(text: Path, tmp_path: Path) -> None:
    assert resolve_path("text.txt", tmp_path, "data.path") == text
    assert resolve_path(str(text), Path("/nowhere"), "data.path") == text
    inside = resolve_path("package:tersor.compress/arch/llama.py", None, "data.path")
    assert "ARCHITECTURE" in inside.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "greater than 0"),
        ({"length": 1}, "greater than 1"),
        ({"samples": 1.5}, "valid integer"),
        ({"span": "60%-40%"}, "'0%-60%'"),
        ({"span": "0-60"}, "'0%-60%'"),
        ({"span": "0%-101%"}, "'0%-60%'"),
        ({"lenght": 5}, "lenght"),
    ],
)
def test_a_source_refuses_what_it_cannot_mean(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source("x.txt", **options)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "options", "error", "message"),
    [
        ("gone.txt", None, {}, PreflightError, "no such file or folder"),
        ("empty.txt", "", {}, PreflightError, "nothing but blanks"),
        ("blank.jsonl", "\n\n", {}, PreflightError, "nothing but blanks"),
        ("latin.txt", b"caf\xe9", {}, PreflightError, r"not UTF-8 \(0xe9 at 3\)"),
        ("table.xlsx", "x", {}, RecipeError, r"kind '.xlsx', expected .txt, .jsonl, .csv, .tsv, .parquet or a folder"),
        (
            "bad.jsonl",
            '{"text": "a"}\n{"text"',
            {},
            PreflightError,
            r"bad.jsonl:2: found a line that is not JSON",
        ),
        ("list.jsonl", "[1]", {}, PreflightError, r"list.jsonl:1: found a JSON list"),
        ("deep.jsonl", "[" * 100_000, {}, PreflightError, r"deep.jsonl:1: found a line that is not JSON"),
        (
            "other.jsonl",
            '{"text": "a"}\n\n{"body": "a", "id": 3}',
            {},
            RecipeError,
            r"other.jsonl:3: found no field 'text', expected one of its texts: body. Set data.heldout.field.",
        ),
        ("number.jsonl", '{"text": 5}', {}, RecipeError, "a field 'text' that is no text"),
        (
            "short.txt",
            "abc",
            {"length": 8},
            RecipeError,
            "4 tokens, expected at least one window of 8. Lower data.heldout.length",
        ),
        ("three.txt", "a\nb\nc\n", {"span": "0%-10%"}, RecipeError, "0%-10% of 3 lines, which is none"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    byte_tokenizer: Any,
    name: str,
    content: str | bytes | None,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(error, match=message) as caught:
        read(path, byte_tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_and_a_checkpoint_without_tokenizer(
    tmp_path: Path, text: Path, byte_tokenizer: Any
) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PreflightError, match="a folder without text"):
        read(tmp_path / "nothing", byte_tokenizer)
    with pytest.raises(PreflightError, match="a checkpoint without a tokenizer"):
        read(text, None)


def test_a_stream_that_would_fill_the_memory_is_refused(
    text: Path, byte_tokenizer: Any, word_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "MOST_TEXT", 500)
    with pytest.raises(PreflightError, match=r"all are tokenised\. Take a share of them with data\.heldout\.span"):
        read(text, byte_tokenizer)
    assert read(text, byte_tokenizer, length=8, span="0%-30%")
    assert read(text, word_tokenizer, windows=False)


def test_a_package_that_is_not_there_or_is_left(byte_tokenizer: Any) -> None:
    for path, message in {
        "package:no_such/x.txt": "no package",
        "package:tersor.compress/../x.txt": "leaves",
    }.items():
        with pytest.raises(PreflightError, match=message):
            read_samples(Source(path), byte_tokenizer, windows=True, seed=None, base=None)
