"""The end of a log for a status: bounded, printable, and no secret in it whatever the log holds."""

from __future__ import annotations

import base64
import re
import time
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_operator.core.log_tail import MASK, MAX_LINE_LENGTH, MIN_SECRET_LENGTH, clean_tail, mask_secrets

SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
WEB_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
KEY_LINES = "MIIEowIBAAKCAQEAu1SU1LfVLPHCozMxH2Mo\n4lgOEePzNm0tRgeLezV6ffAt0gunVTLw"
KEY_BLOCK = f"-----BEGIN RSA PRIVATE KEY-----\n{KEY_LINES}\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        pytest.param("a\nb\nc\n", 2, ("b", "c"), id="the last lines, oldest first"),
        pytest.param("a\n\n  \nb\n\n", 5, ("a", "b"), id="lines that hold nothing are left out"),
        pytest.param("", 5, (), id="an empty log"),
        pytest.param("a", 0, (), id="no line is wanted"),
        pytest.param("\x1b[1;31mred\x1b[0m \x1b]0;title\x07x", 5, ("red x",), id="colours and titles"),
        pytest.param("10%\r 50%\r100%\ndone\r\n", 5, ("100%", "done"), id="a progress bar leaves its last state"),
        pytest.param("a\x00b\u202ec\u200bd\ud800e\tf", 5, ("abcde f",), id="characters that do not print"),
        pytest.param("  File x, line 3\n", 5, ("  File x, line 3",), id="a traceback keeps its indentation"),
    ],
)
def test_what_is_kept(text: str, lines: int, expected: tuple[str, ...]) -> None:
    assert clean_tail(text, lines=lines) == expected


def test_a_long_line_is_cut_and_says_so() -> None:
    (line,) = clean_tail("x" * 5000, lines=1)
    assert len(line) == MAX_LINE_LENGTH
    assert line.endswith("x…")


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        pytest.param("using hf_AbCdEfGhIjKlMnOpQrSt", "hf_AbCdEf", id="a hub's token"),
        pytest.param("key AKIAIOSFODNN7EXAMPLE used", "AKIAIOSFODNN7EXAMPLE", id="an AWS key id"),
        pytest.param("key ASIAIOSFODNN7EXAMPLE used", "ASIAIOSFODNN7EXAMPLE", id="a temporary AWS key id"),
        pytest.param(f"aws_secret_access_key = {SECRET_KEY}", SECRET_KEY[:8], id="an AWS secret key in a file"),
        pytest.param(f'{{"SecretAccessKey": "{SECRET_KEY}"}}', SECRET_KEY[:8], id="an AWS secret key in JSON"),
        pytest.param(f"the secret is {SECRET_KEY}", SECRET_KEY[:8], id="an AWS secret key in a sentence"),
        pytest.param("Authorization: Bearer abc.def-123456", "abc.def", id="a bearer token"),
        pytest.param("authorization: Basic dXNlcjpwYXNz", "dXNlcjpw", id="basic authorisation"),
        pytest.param(f"got {WEB_TOKEN}", "eyJzdWIi", id="a web token"),
        pytest.param("GET https://user:hunter2@hub/x", "hunter2", id="an address with a password"),
        pytest.param("GET https://user:hun/ter2@hub/x", "ter2", id="a password with a slash"),
        pytest.param("GET https://ghost7token@hub/x", "ghost7", id="an address with a user alone"),
        pytest.param("GET https://b/k?X-Amz-Signature=0a1b2c3d&x=1", "0a1b2c3d", id="a signed address"),
        pytest.param("HF_TOKEN=opensesame", "opensesame", id="a variable"),
        pytest.param("password: opensesame", "opensesame", id="a line of YAML"),
        pytest.param('{"api_key": "open sesame"}', "sesame", id="JSON with a space"),
        pytest.param('{\\"apiKey\\": \\"opensesame\\"}', "opensesame", id="JSON within JSON"),
        pytest.param("{'token': b'open sesame'}", "sesame", id="what Python prints"),
        pytest.param("--api-key opensesame --x 1", "opensesame", id="a command line"),
        pytest.param("-Dpassword=opensesame", "opensesame", id="a property"),
        pytest.param(KEY_BLOCK, "MIIEow", id="a private key"),
        pytest.param(KEY_BLOCK, "4lgOEe", id="a private key's second line"),
        pytest.param(KEY_BLOCK.split("\n", 1)[1], "MIIEow", id="a private key of which the start is missing"),
        pytest.param(KEY_BLOCK[:100], "4lgOEe", id="a private key of which the end is missing"),
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str, secret: str) -> None:
    assert secret in text
    shown = "\n".join(clean_tail(f"before\n{text}\nafter", lines=10))
    assert secret not in shown
    assert MASK in shown
    assert secret not in mask_secrets(text)


@pytest.mark.parametrize(
    "line",
    [
        "step 12/100 loss=1.25 tokens_per_second=5120.5 max_new_tokens=64",
        "eos_token: </s> pad_token_id=2 tokenizer=llama token_count: 12",
        "per-token loss is 1.2",
        "SecretMissing: the token at /etc/finetune/secrets/model-token is empty",
        '  File "/app/train.py", line 3, in <module>',
        "TokenError: tokens of row 12 exceed maxLength",
        "s3://bucket/prefix and https://hub/org/name@main",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert clean_tail(line, lines=1) == (line,)


secrets = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=MIN_SECRET_LENGTH, max_size=80).filter(
    lambda secret: set(secret) != {"*"}
)
noise = st.text(max_size=400)


@given(secrets, st.lists(noise, max_size=6), st.integers(1, 20))
def test_no_given_secret_ever_appears(secret: str, around: list[str], lines: int) -> None:
    text = secret.join(["", *around, ""])
    assert not any(secret in line for line in clean_tail(text, lines=lines, secrets=[secret]))
    assert secret not in mask_secrets(text, [secret])


@given(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=12, max_size=60),
    st.integers(MAX_LINE_LENGTH - 70, MAX_LINE_LENGTH + 10),
)
def test_no_part_of_a_secret_is_left_where_a_line_is_cut(secret: str, at: int) -> None:
    (line,) = clean_tail("-" * at + secret + "-" * 100, lines=1, secrets=[secret])
    assert not re.search("[a-z0-9]", line)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=12, max_size=60), st.data())
def test_no_part_of_a_secret_is_left_where_the_log_was_cut(secret: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(MIN_SECRET_LENGTH, len(secret) - MIN_SECRET_LENGTH))
    shown = "".join(clean_tail(f"{secret[cut:]} - {secret[:cut]}", lines=1, secrets=[secret]))
    assert not re.search("[a-z0-9]", shown)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=8, max_size=40), st.integers(1, 7))
def test_a_secret_with_colours_or_invisible_characters_within_is_masked(secret: str, at: int) -> None:
    for between in ("\x1b[31m", "\u200b", "\x00"):
        assert clean_tail(secret[:at] + between + secret[at:], lines=1, secrets=[secret]) == (MASK,)


def test_other_forms_of_a_secret_are_masked() -> None:
    secret = "open sesame/42"
    encoded = base64.b64encode(secret.encode()).decode()
    (line,) = clean_tail(f"{encoded} open%20sesame%2F42", lines=1, secrets=[f" {secret}\n"])
    assert "sesame" not in line
    assert encoded.rstrip("=") not in line


def test_each_line_of_a_secret_is_masked_and_short_ones_are_no_secrets() -> None:
    (line,) = clean_tail("first-line then second-line then abc", lines=1, secrets=["first-line\nsecond-line\nabc"])
    assert line == f"{MASK} then {MASK} then abc"


@given(st.text(max_size=3000), st.integers(0, 20))
def test_the_tail_is_always_bounded_and_printable(text: str, lines: int) -> None:
    tail = clean_tail(text, lines=lines)
    assert len(tail) <= lines
    assert all(line.strip() and len(line) <= MAX_LINE_LENGTH for line in tail)
    assert not any(unicodedata.category(char).startswith("C") for line in tail for char in line)
    "\n".join(tail).encode("utf-8")  # a lone surrogate could not be written


@given(noise)
def test_masking_twice_masks_no_more(text: str) -> None:
    assume("\x1b" not in text)
    assert mask_secrets(mask_secrets(text)) == mask_secrets(text)


@pytest.mark.parametrize(
    "piece", ["a", "secret", "key ", 'token="', "-----BEGIN PRIVATE KEY ", "eyJ", "http://", "::=", "\r"]
)
def test_a_log_made_to_be_slow_is_not(piece: str) -> None:
    began = time.process_time()
    clean_tail(piece * (65536 // len(piece)), lines=20, secrets=["opensesame"])
    assert time.process_time() - began < 1.0
