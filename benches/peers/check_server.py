"""Talks to a running `qlora serve` with OpenAI's own client, and fails where an answer is not what that client expects.

    qlora serve --model M --adapter NAME=DIR --port 8000
    python3 benches/peers/check_server.py --url http://127.0.0.1:8000/v1 [--model NAME] [--key KEY]

Needs the package `openai`. What the model says does not matter, except that it must be the same in every form.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import openai

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def refused(expected, call):
    try:
        call()
    except openai.APIStatusError as error:
        assert error.status_code == expected, f"{error.status_code} instead of {expected}: {error.message}"
        assert error.body["message"] and error.body["type"], error.body
        return
    raise AssertionError(f"taken, where {expected} was expected")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.url, api_key=args.key, max_retries=0)
    names = [model.id for model in client.models.list()]
    model = args.model or names[-1]
    assert client.models.retrieve(model).id == model
    print("models:", ", ".join(names))

    common = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**common)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 16 and whole.usage.total_tokens > whole.usage.prompt_tokens
    print("chat:", json.dumps(text))

    stream = client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

    # The same seed, the same text, whatever runs beside it.
    hot = {**common, "temperature": 1.0, "seed": 7}
    alone = client.chat.completions.create(**hot).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: client.chat.completions.create(**hot).choices[0].message.content, range(8)))
    assert texts == [alone] * 8, (alone, texts)

    logprobs = client.chat.completions.create(**common, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    # Greedy: each token is the likeliest.
    assert all(token.logprob == token.top_logprobs[0].logprob for token in logprobs) and len(logprobs[0].top_logprobs) == 3

    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = client.chat.completions.create(**{**common, "max_tokens": 96, "response_format": form}).choices[0]
    if answer.finish_reason == "stop":
        person = json.loads(answer.message.content)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150, person
    print("schema:", answer.finish_reason, json.dumps(answer.message.content))

    choices = client.chat.completions.create(**hot, n=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2] and choices[0].message.content == alone

    echo = client.completions.create(model=model, prompt="The capital of France is", max_tokens=0, echo=True, logprobs=1)
    found = echo.choices[0].logprobs
    assert echo.choices[0].text == "The capital of France is" and found.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])

    refused(404, lambda: client.chat.completions.create(**{**common, "model": "nobody"}))
    refused(400, lambda: client.chat.completions.create(**{**common, "temperature": -1}))
    refused(400, lambda: client.chat.completions.create(**{**common, "messages": []}))
    refused(400, lambda: client.completions.create(model=model, prompt="x", suffix="y"))
    print("done")


if __name__ == "__main__":
    main()
