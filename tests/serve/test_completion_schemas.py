"""What clients send: bodies that cannot be read, text that cannot be encoded, and parameters that change nothing."""

import json
import math
import threading
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MODEL, Running

from maveriq.serve.errors import ApiError
from maveriq.serve.json_body import MAX_DEPTH, MAX_MEMBERS, read_json
from maveriq.serve.tokenizers import ByteTokenizer

HALF = "\\ud83d"  # half of an emoji, as a client that cuts a text sends it
TEXT = {"model": MODEL, "prompt": "a", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def post(server: Running, path: str, body: bytes | str) -> httpx.Response:
    with server.client() as http:
        return http.post(path, content=body, headers={"Content-Type": "application/json"})


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def with_half(body: dict[str, Any]) -> str:
    """Return a body in which HALF stands where the text has `HALF`."""
    return json.dumps(body).replace("HALF", HALF)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        ("/v1/completions", {"prompt": "HALF"}, "prompt"),
        ("/v1/completions", {"prompt": ["HALF"]}, "prompt.0"),
        ("/v1/completions", {"prompt": "\\" + "HALF"}, "prompt"),
        ("/v1/completions", {"stop": "HALF"}, "stop"),
        ("/v1/completions", {"stop": ["a", "HALF"]}, "stop.1"),
        ("/v1/completions", {"user": "HALF"}, "user"),
        ("/v1/completions", {"model": "HALF"}, "model"),
        ("/v1/completions", {"suffix": "HALF"}, "suffix"),
        ("/v1/completions", {"metadata": {"a": "HALF"}}, "metadata.a"),
        ("/v1/completions", {"metadata": {"HALF": "a"}}, "metadata.\\ud83d"),
        ("/v1/completions", {"HALF": "a"}, "\\ud83d"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "cut HALF"}]}, "messages.0.content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "HALF"}]},
            "messages.1.content",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "HALF"}]}]},
            "messages.0.content.0.text",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "HALF", "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"tools": [{"type": "HALF"}]}, "tools.0.type"),
    ],
)
def test_half_a_character_names_the_field(
    server: Running, path: str, extra: dict[str, Any], param: str, *, stream: bool
) -> None:
    base = TEXT if path == "/v1/completions" else CHAT
    error = error_of(post(server, path, with_half(base | extra | {"stream": stream})))
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert param in error["message"]
    assert "\\ud83d, half of a character" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/models", {"model": "HALF"}, "model"),
        ("/endpoints", {"model": MODEL, "intent": "HALF"}, "intent"),
        ("/endpoints", {"model": MODEL, "placement": "HALF"}, "placement"),
    ],
)
def test_half_a_character_elsewhere(server: Running, path: str, body: dict[str, Any], param: str) -> None:
    error = error_of(post(server, path, with_half(body)))
    assert (error["code"], error["param"]) == ("invalid_value", param)


@pytest.mark.parametrize("text", ["\\ud83d\\ude00", "😀", "\\\\ud83d", "\\u0000", "\x7f", "\\uffff"])
def test_whole_characters_are_served(server: Running, text: str) -> None:
    assert post(server, "/v1/completions", json.dumps(TEXT).replace('"a"', f'"{text}"')).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model":"m","prompt":"h\xe9"}', "the body is not UTF-8: byte 0xe9 at position 24"),
        (b"\xff\xfe{\x00}\x00", "the body is not UTF-8: byte 0xff at position 0"),
        (b'{"model":"m","prompt":"h\xed\xa0\x80"}', "the body is not UTF-8: byte 0xed at position 24"),
        (b"[" * 100_000, f"the body is nested too deep: more than {MAX_DEPTH} levels"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, f"the body is nested too deep: more than {MAX_DEPTH} levels"),
        (b'{"tools":' + b"[" * 65 + b"]" * 65 + b"}", f"the body is nested too deep: more than {MAX_DEPTH} levels"),
        (b'{"model": "m", "pro', "the body ends too early: unterminated string starting at at line 1 column 16"),
        (b'{"model": "m", ', "the body ends too early: "),
        (b'{"model": "m"', "the body ends too early: "),
        (b'{"model": "m"}}', "the body is not valid JSON: extra data at line 1 column 15"),
        (b"{'model': 1}", "the body is not valid JSON: expecting property name"),
        (b'{"temperature": NaN}', "the body is not valid JSON: NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "the body is not valid JSON: -Infinity is not a JSON number"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", "the body is not valid JSON: "),
        (
            json.dumps({f"k{number}": 1 for number in range(MAX_MEMBERS + 1)}).encode(),
            f"an object of the body has {MAX_MEMBERS + 1} members; the maximum is {MAX_MEMBERS}",
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/models", "/endpoints"])
def test_bodies_that_cannot_be_read(server: Running, path: str, body: bytes, message: str) -> None:
    error = error_of(post(server, path, body))
    assert error["code"] == "invalid_json"
    assert error["message"].startswith(message)


def test_a_field_given_twice(server: Running) -> None:
    error = error_of(post(server, "/v1/completions", '{"model": "a", "model": "b", "prompt": "x"}'))
    assert error["message"] == "model is given twice in one object"


def test_a_byte_order_mark_is_ignored(server: Running) -> None:
    assert post(server, "/v1/completions", b"\xef\xbb\xbf" + json.dumps(TEXT).encode()).status_code == 200


def test_compressed_bodies_are_refused(server: Running) -> None:
    with server.client() as http:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        answer = http.post("/models", content=b"\x1f\x8b", headers=headers)
    assert "leave out Content-Encoding" in error_of(answer, 415)["message"]


@pytest.mark.parametrize(
    "extra",
    [
        # vllm bench serve, GuideLLM, AIPerf and SGLang's benchmark
        {"repetition_penalty": 1.0, "logprobs": None, "stream": True, "stream_options": {"include_usage": True}},
        {"temperature": 0.0, "top_k": 50, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "stop": None},
        {"best_of": 1, "n": 1, "temperature": 0.0, "ignore_eos": True, "stream": False},
        # vLLM's defaults
        {"use_beam_search": False, "top_k": -1, "min_p": 0.0, "length_penalty": 1.0, "stop_token_ids": []},
        {"top_k": 0, "include_stop_str_in_output": False, "min_tokens": 0, "skip_special_tokens": True},
        {"spaces_between_special_tokens": True, "truncate_prompt_tokens": None, "allowed_token_ids": None},
        {"prompt_logprobs": None, "add_special_tokens": True, "response_format": {"type": "text"}, "priority": 0},
        {"guided_json": None, "structured_outputs": None, "logits_processors": None, "kv_transfer_params": None},
        {"return_tokens_as_token_ids": False, "bad_words": [], "vllm_xargs": {}, "cache_salt": "a", "top_k": 1},
        # OpenAI's defaults
        {"best_of": None, "echo": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"suffix": "", "seed": 7, "user": "me", "top_p": 1, "stop": [], "logprobs": False},
        dict.fromkeys(("n", "echo", "seed", "stop", "stream", "stream_options", "priority", "metadata", "user")),
        {"metadata": {"a": "b", "c": None}, "stream_options": None, "stream": None, "never_heard_of": None},
        {"stream": False, "stream_options": {"include_usage": False}},
    ],
)
def test_parameters_that_change_nothing(server: Running, extra: dict[str, Any]) -> None:
    answer = post(server, "/v1/completions", json.dumps(TEXT | extra))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "top_logprobs": 0, "logprobs": False},
        {"modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None, "functions": []},
        {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False},
        {"chat_template": None, "chat_template_kwargs": {}, "documents": None, "mm_processor_kwargs": None},
        {"include_reasoning": True, "reasoning_effort": None, "verbosity": "low", "store": False, "n": 1},
        {"max_completion_tokens": 2, "max_tokens": None, "service_tier": "auto", "safety_identifier": "a"},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}},
    ],
)
def test_parameters_of_chats_that_change_nothing(server: Running, extra: dict[str, Any]) -> None:
    answer = post(server, "/v1/chat/completions", json.dumps(CHAT | extra))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "message",
    [
        {
            "content": "b",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"content": "b", "refusal": None, "annotations": [], "tool_calls": [], "reasoning_content": None},
        {"content": "", "reasoning": None, "name": None, "prefix": False, "refusal": ""},
        {"content": [{"type": "text", "text": "b", "annotations": None, "cache_control": {"type": "ephemeral"}}]},
        {"content": [], "tool_call_id": None},
    ],
)
def test_answers_put_back_into_a_chat(server: Running, message: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **message}, {"role": "user", "content": "c"}]
    answer = post(server, "/v1/chat/completions", json.dumps(CHAT | {"messages": messages}))
    assert answer.status_code == 200, answer.text


def test_the_first_answer_dumped_into_the_second_turn(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "a"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices[0].message
    messages += [first.model_dump(), {"role": "user", "content": "b"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2).choices[0].message.content


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        ("/v1/completions", {"repetition_penalty": 1.1}, "repetition_penalty"),
        ("/v1/completions", {"repetition_penalty": True}, "repetition_penalty"),
        ("/v1/completions", {"top_k": 40}, "top_k"),
        ("/v1/completions", {"min_p": 0.1, "temperature": 0.5}, "min_p"),
        ("/v1/completions", {"min_tokens": 2}, "min_tokens"),
        ("/v1/completions", {"min_tokens": 2, "ignore_eos": True, "stop": "a"}, "min_tokens"),
        ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/completions", {"stop_token_ids": [2]}, "stop_token_ids"),
        ("/v1/completions", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("/v1/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/completions", {"add_special_tokens": False}, "add_special_tokens"),
        ("/v1/completions", {"skip_special_tokens": False}, "skip_special_tokens"),
        ("/v1/chat/completions", {"tools": [{"type": "function", "strict": None}]}, "tools"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("/v1/chat/completions", {"add_generation_prompt": False}, "add_generation_prompt"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]},
            "messages.0.tool_calls",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "annotations": [1]}]}]},
            "messages.0.content.0.annotations",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a", "reasoning": "b"}]},
            "messages.0.reasoning",
        ),
    ],
)
def test_parameters_that_change_something_are_refused(
    server: Running, path: str, extra: dict[str, Any], param: str
) -> None:
    base = TEXT if path == "/v1/completions" else CHAT
    error = error_of(post(server, path, json.dumps(base | extra)))
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert error["message"].startswith(f"{param} is not supported")


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": [None]}, "prompt"),
        ({"stop": [None]}, "stop"),
        ({"priority": 1}, "priority"),
        ({"guided_json": {}}, "guided_json"),
        ({"stream_options": {"frequency": 1}, "stream": True}, "stream_options.frequency"),
    ],
)
def test_other_values_are_refused_by_name(server: Running, extra: dict[str, Any], param: str) -> None:
    error = error_of(post(server, "/v1/completions", json.dumps(TEXT | extra)))
    assert str(error["param"]).startswith(param)


def test_usage_in_every_chunk(client: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in stream] == [1, 2, 3, 3, 3]


def test_messages_of_errors_are_short(server: Running) -> None:
    answer = post(server, "/v1/completions", json.dumps(TEXT | {"x" * 100_000: 1}))
    assert error_of(answer)["code"] == "unknown_parameter"
    assert len(answer.text) < 2_000


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=5) | st.dictionaries(st.text(), values, max_size=5),
)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@given(JSON_VALUES)
def test_read_json_agrees_with_json(value: Any) -> None:
    for ascii_only in (True, False):
        assert read_json(json.dumps(value, ensure_ascii=ascii_only).encode(), max_items=5) == without_nulls(value)


@given(st.binary(min_size=1) | st.text(min_size=1, alphabet='[]{}":,\\u0d8a1.en').map(str.encode))
def test_any_bytes_are_content_or_an_error(body: bytes) -> None:
    try:
        content = read_json(body, max_items=3)
    except ApiError as error:
        content = error.to_json()
    json.dumps(content, ensure_ascii=False).encode()


def test_long_arrays_are_refused(server: Running) -> None:
    with pytest.raises(ApiError, match=r"prompt\.0 has 4 items; the maximum is 3"):
        read_json(b'{"prompt": [[1, 2, 3, 4]]}', max_items=3)
    error = error_of(post(server, "/v1/completions", json.dumps(TEXT | {"prompt": [1] * 33_000})))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_what_the_cluster_would_refuse_as_too_long_is_400(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.cluster, "why_too_long", lambda _endpoint, tokens: f"{tokens} tokens are too long here")
    error = error_of(post(server, "/v1/completions", json.dumps(TEXT | {"prompt": [5] * 7, "max_tokens": 3})))
    assert (error["message"], error["code"]) == ("10 tokens are too long here", "context_length_exceeded")
    monkeypatch.setattr(server.cluster, "why_too_long", lambda _endpoint, _tokens: None)
    monkeypatch.setattr(server.cluster, "max_sequence_tokens", lambda _endpoint: 9)
    body = {name: value for name, value in TEXT.items() if name != "max_tokens"} | {"prompt": [5] * 7}
    answer = post(server, "/v1/completions", json.dumps(body))
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_infinite_numbers_do_no_harm(server: Running) -> None:
    assert math.isinf(read_json(b"1e999", max_items=1))
    assert post(server, "/v1/completions", json.dumps(TEXT)[:-1] + ', "temperature": 1e999}').status_code == 200
    assert post(server, "/v1/completions", json.dumps(TEXT)[:-1] + ', "slo_ms": 1e999}').status_code == 400


def test_prompts_that_are_surely_too_long_are_not_tokenized(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "_encode", lambda _self, _text: pytest.fail("it is tokenized"))
    long_text = "a" * 600_000
    for path, extra, param in (
        ("/v1/completions", {"prompt": long_text}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long_text}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long_text[:100_000]}] * 6}, "messages"),
    ):
        base = TEXT if path == "/v1/completions" else CHAT
        error = error_of(post(server, path, json.dumps(base | extra)))
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "600000 characters; the maximum is 524288" in error["message"]


def test_long_work_is_done_outside_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    encode = ByteTokenizer._encode

    def noted(self: ByteTokenizer, text: str) -> tuple[int, ...]:
        threads.append(threading.current_thread().name)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "_encode", noted)
    post(server, "/v1/completions", json.dumps(TEXT | {"prompt": "a" * 20_000}))
    assert [name.startswith("maveriq-background") for name in threads] == [True]
