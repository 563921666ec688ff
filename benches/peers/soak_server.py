"""Sends many requests of random lengths, models and fates to a running `qlora serve`, and checks what comes back.

    qlora serve --model M --adapter a=DIR --adapter b=DIR --max-waiting 64 --port 8000
    python3 benches/peers/soak_server.py --url http://127.0.0.1:8000 --requests 10000 [--pid PID]

Needs the package `httpx`. Some clients read slowly, some go away in the middle, some send nonsense. Greedy answers to the
same prompt must be the same every time, and a sample of them is asked for once more, one after the other. With --pid the
process's resident memory is told after each tenth. With --terminate it gets SIGTERM in the end while it answers: these
answers must come whole, and the process must be gone then.
"""

import argparse
import asyncio
import json
import os
import random
import signal
from pathlib import Path

import httpx

NONSENSE = [b"", b"{", b"[]", b'{"messages": 7}', b'{"prompt": {"a": 1}}', b'{"prompt": "x", "max_tokens": -1}', b"\xff" * 64]


def resident(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


async def one(client, number, models, answers, counts):
    dice = random.Random(number)
    model, prompt = dice.choice(models), f"{dice.randrange(40)} " * dice.randrange(1, 60)
    body = {"model": model, "prompt": prompt, "max_tokens": dice.randrange(1, 24), "temperature": 0, "stream": True}
    fate = dice.choices(["read", "slow", "leave", "nonsense"], [12, 1, 4, 2])[0]
    if fate == "nonsense":
        answer = await client.post("/v1/completions", content=dice.choice(NONSENSE))
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], answer.text
        counts["refused"] += 1
        return
    while True:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                counts["told to wait"] += 1
                assert int(answer.headers["retry-after"]) >= 0
                await asyncio.sleep(dice.uniform(0.05, 0.5))
                continue
            assert answer.status_code == 200, await answer.aread()
            text = ""
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"] if event["choices"] else ""
                if fate == "leave" and dice.random() < 0.3:
                    counts["left"] += 1
                    return
                if fate == "slow":
                    await asyncio.sleep(0.02)
            break
    # The longest answer to a prompt begins with all shorter ones.
    known = answers.setdefault((model, prompt), text)
    short, long = sorted((known, text), key=len)
    assert long.startswith(short), (model, prompt, known, text)
    answers[(model, prompt)] = long
    counts["read"] += 1


async def alone(client, answers, sample):
    """The same answers of a server that has nothing else to do."""
    for model, prompt in random.Random(0).sample(sorted(answers), min(sample, len(answers))):
        body = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        text = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        assert text.startswith(answers[(model, prompt)]), (model, prompt, answers[(model, prompt)], text)


async def terminated(client, models, pid, streams):
    """Answers that are under way when the server is told to end."""
    begun, told = [asyncio.Event() for _ in range(streams)], asyncio.Event()

    async def one(number):
        body = {"model": models[number % len(models)], "prompt": f"{number} ", "max_tokens": 64, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            events = []
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                    begun[number].set()
        assert told.is_set(), "an answer was over before the signal"
        assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] == 64, events[-3:]

    running = [asyncio.create_task(one(number)) for number in range(streams)]
    for one_of_them in begun:
        await one_of_them.wait()
    os.kill(pid, signal.SIGTERM)
    told.set()
    await asyncio.gather(*running)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "(zombie)" in Path(f"/proc/{pid}/status").read_text():
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("the server does not end")
    print(f"SIGTERM: {streams} answers came whole, and the server has ended")


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--terminate", action="store_true", help="needs --pid")
    args = parser.parse_args()
    counts = {"read": 0, "left": 0, "refused": 0, "told to wait": 0}
    answers, places = {}, asyncio.Semaphore(args.at_once)
    limits = httpx.Limits(max_connections=args.at_once)
    async with httpx.AsyncClient(base_url=args.url, timeout=600, limits=limits) as client:
        models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]

        async def held(number):
            async with places:
                await one(client, number, models, answers, counts)

        tenth = max(args.requests // 10, 1)
        for first in range(0, args.requests, tenth):
            await asyncio.gather(*(held(number) for number in range(first, min(first + tenth, args.requests))))
            memory = f", {resident(args.pid)} MiB" if args.pid else ""
            print(f"{min(first + tenth, args.requests)} requests: {counts}{memory}", flush=True)
        assert counts["read"] + counts["left"] + counts["refused"] == args.requests, counts
        await asyncio.sleep(2)
        metrics = (await client.get("/metrics")).text
        left = {line.split()[0]: line.split()[1] for line in metrics.splitlines() if not line.startswith("#") and " " in line}
        for gauge in ["qlora_requests_waiting", "qlora_requests_running", "qlora_cache_blocks_used"]:
            assert left[gauge] == "0", f"{gauge} is {left[gauge]}"
        await alone(client, answers, args.sample)
        print(f"{min(args.sample, len(answers))} of {len(answers)} answers are the same alone")
        if args.terminate:
            await terminated(client, models, args.pid, args.at_once // 2)
    print("done")


asyncio.run(main())
