from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tutelage.components.core.errors import DataError
from tutelage.components.core.records import Message
from tutelage.components.data_prep.checks import Rejected
from tutelage.components.data_prep.lengths import LengthCheck


def make_tokenizer(normalizer: Any = None) -> Any:
    """Every byte is a token, but for "ab", which is one. With special tokens there would be one more."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ab", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.post_processor = start
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def make_sentence_piece() -> Any:
    """Every byte is a token, and the mark that stands for a space, and goes in front, is three."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def make_check(max_tokens: int, *, start: bool = False, tokenizer: Any = None) -> LengthCheck:
    tokenizer = tokenizer or make_tokenizer()
    return LengthCheck(tokenizer, json.loads(tokenizer.to_str()), start=start, max_tokens=max_tokens)


def fits(check: LengthCheck, *texts: Any) -> bool:
    try:
        check(*texts)
    except Rejected:
        return False
    return True


def test_prompt_response_and_end_token_count() -> None:
    """3 + 4 + 1 tokens."""
    assert fits(make_check(8), "xyz", "xyzt")
    assert not fits(make_check(7), "xyz", "xyzt")


def test_a_start_token_counts() -> None:
    assert fits(make_check(9, start=True), "xyz", "xyzt")
    assert not fits(make_check(8, start=True), "xyz", "xyzt")


def test_tokens_count_and_not_bytes() -> None:
    """Forty bytes are twenty tokens."""
    assert fits(make_check(22), "x", "ab" * 20)
    assert not fits(make_check(21), "x", "ab" * 20)


def test_prompt_and_response_are_tokenized_apart() -> None:
    """As training does: "a" and "b" do not merge across the boundary."""
    assert not fits(make_check(2), "a", "b")
    assert fits(make_check(3), "a", "b")


def test_the_longest_response_counts() -> None:
    assert not fits(make_check(8), "xyz", "x", "xyztu")
    assert not fits(make_check(8), "xyz", "xyztu", "x")


def test_a_prompt_alone_leaves_room_for_one_token() -> None:
    assert fits(make_check(5), "xyz")
    assert not fits(make_check(4), "xyz")


def test_the_contents_of_messages_count() -> None:
    """Two and two bytes, and one between them."""
    messages = [Message(role="system", content="xy"), Message(role="user", content="zt")]
    assert fits(make_check(7), messages, "x")
    assert not fits(make_check(6), messages, "x")


def test_the_verdict_says_how_long_the_row_is() -> None:
    with pytest.raises(Rejected, match="8 tokens with prompt, response and end, the context holds 7"):
        make_check(7)("xyz", "xyzt")


def test_short_rows_are_not_tokenized() -> None:
    check = make_check(20)
    del check._tokenizer
    check("xyz", "é" * 4, "ab")
    with pytest.raises(AttributeError):
        check("xyz", "é" * 10)


short = st.text(st.characters(codec="utf-8") | st.sampled_from("ab \u0344\ufdfa"), min_size=1, max_size=12)


@example("x", "b" * 5, "sentence piece")
@example("x", "aa", "longer")
@example("x", "\U0001d160" * 2, "NFC")
@given(short, short, st.sampled_from(["plain", "NFC", "NFKC", "longer", "sentence piece"]))
def test_the_shortcut_never_lets_a_long_row_pass(prompt: str, response: str, kind: str) -> None:
    """Also where a tokenizer makes more of a text than its bytes."""
    from tokenizers import normalizers

    longer = {"NFC": normalizers.NFC(), "NFKC": normalizers.NFKC(), "longer": normalizers.Replace("a", "a" * 9)}
    tokenizer = make_sentence_piece() if kind == "sentence piece" else make_tokenizer(longer.get(kind))
    counted = [len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, response)]
    assert fits(make_check(16, tokenizer=tokenizer), prompt, response) == (sum(counted) + 1 <= 16)


def test_the_tokenizer_of_a_model_is_read(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    check = LengthCheck.of_model(str(tmp_path), 8, print)
    assert check is not None
    assert fits(check, "xyz", "xyzt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    check = LengthCheck.of_model(str(tmp_path), 8, print)
    assert check is not None
    assert not fits(check, "xyz", "xyzt")


def test_the_tokenizer_of_a_model_in_object_storage_is_read(bucket: str) -> None:
    import boto3

    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=bucket, Key="models/base/tokenizer.json", Body=make_tokenizer().to_str().encode())
    client.put_object(Bucket=bucket, Key="models/base/tokenizer_config.json", Body=b"{}")
    check = LengthCheck.of_model(f"s3://{bucket}/models/base", 8, print)
    assert check is not None
    assert fits(check, "xyz", "xyzt")
    assert not fits(check, "xyz", "xyztu")


@pytest.mark.parametrize("model_uri", ["", "org/name"])
def test_without_a_tokenizer_the_log_says_so(model_uri: str) -> None:
    lines: list[str] = []
    assert LengthCheck.of_model(model_uri, 8, lines.append) is None
    assert len(lines) == 1
    assert "lengths are checked when training" in lines[0]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer cannot be read") as caught:
        LengthCheck.of_model(str(tmp_path), 8, print)
    assert str(tmp_path) in str(caught.value)
