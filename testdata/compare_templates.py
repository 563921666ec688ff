"""Compares chat-text with transformers on published chat templates: the texts, and which part of them is learned.

usage: compare_templates.py PROGRAM CACHE [--show KIND] [--only WORD] [--markdown]

PROGRAM is crates/chat-text/examples/render_lines.rs, compiled (cargo build -p chat-text --example render_lines).
CACHE is a folder for the packages, which are fetched once with pip: llama-cpp-python 0.3.36 (its source carries
llama.cpp's templates), trl 1.16.0 and axolotl 0.19.0. Nothing of them is kept in the repository. Needs transformers
5.24 and jinja2.

Each conversation holds a word of its own in every field. The masks are judged by those words alone: each word that
an assistant wrote and that stands in the text has to be learned, none of anybody else, and the first token that
ends a turn behind the assistant's last word as well; a word that is not in the text has to be reported.
"""
import argparse, collections, json, re, subprocess, sys, tarfile, zipfile
from pathlib import Path

from transformers.utils import chat_template_utils as theirs

PACKAGES = [
    ("llama.cpp", ["llama-cpp-python==0.3.36", "--no-binary", ":all:"], "llama_cpp_python-0.3.36.tar.gz", "/models/templates/"),
    ("trl", ["trl==1.16.0"], "trl-1.16.0-py3-none-any.whl", "chat_templates/"),
    ("axolotl", ["axolotl==0.19.0"], "axolotl-0.19.0-py3-none-any.whl", "chat_templates/templates/"),
]
SPECIAL = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
ENDS = re.compile(r"<\|(?:im_end|eot_id|end|endoftext|eot|eom_id|return|call|END_OF_TURN_TOKEN|END_RESPONSE|END_ACTION|end_of_text|message_end|eom|observation|eos|endofassistant)\|>"
                  r"|</s>|<end_of_turn>|<turn\|>|<｜end▁of▁sentence｜>|\[e~\[|<end_of_message>|<\|tool_calls_section_end\|>|<\|assistant_end\|>|<seed:eos>|</answer>")


def templates(cache):
    for package, arguments, archive, folder in PACKAGES:
        path = cache / archive
        if not path.exists():
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, *arguments], check=False)
        seen = set()
        if path.suffix == ".gz":
            with tarfile.open(path) as tar:
                files = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]
        else:
            with zipfile.ZipFile(path) as wheel:
                files = [(name, wheel.read(name)) for name in wheel.namelist()]
        for name, data in sorted(files):
            if folder in name and name.endswith(".jinja") and data not in seen:
                seen.add(data)
                yield f"{package}/{Path(name).stem}", data.decode()


class Words:
    """Words that occur nowhere else, with who wrote them."""

    def __init__(self):
        self.owner, self.count = {}, 0

    def __call__(self, who, kind):
        self.count += 1
        word = "zq" + "".join(chr(ord("a") + int(d)) for d in f"{self.count:03}") + "w"
        self.owner[word] = (who, kind)
        return word


def conversations():
    def make(name, build, tools=False):
        w = Words()
        state = {"turn": 0, "id": 0}

        def system(role="system"): return {"role": role, "content": f"Be {w('other', 'content')} now."}
        def user(): return {"role": "user", "content": f"Ask {w('other', 'content')} here?"}

        def assistant(text=True, think=None, calls=0, learn=True, content="", as_text=False, **more):
            turn = state["turn"] = state["turn"] + 1
            who = ("assistant", turn) if learn else "other"
            message = {"role": "assistant", "content": content}
            if text:
                message["content"] = f"Say {w(who, 'content')} so."
            thought = lambda: f"Hm {w(who, 'reasoning')} then"
            if think == "content":
                message["content"] = f"<think>\n{thought()}\n</think>\n\n{message['content']}"
            elif think:
                message[think] = thought()
            if content == "missing":
                del message["content"]
            if calls:
                message["tool_calls"] = []
                for _ in range(calls):
                    state["id"] += 1
                    arguments = {"city": f"In {w(who, 'arguments')} far", "days": 3}
                    message["tool_calls"].append({"id": f"call{state['id']:05}", "type": "function", "function": {
                        "name": w(who, "name"), "arguments": json.dumps(arguments) if as_text else arguments}})
            if not learn:
                message["weight"] = 0
            return {**message, **more}

        def result(number): return {"role": "tool", "content": f"Got {w('other', 'content')} back", "tool_call_id": f"call{number:05}", "name": "lookup"}
        messages = build(system, user, assistant, result)
        given = [{"type": "function", "function": {"name": "lookup", "description": f"Looks {w('other', 'tools')} up.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "description": "The city."}, "days": {"type": "integer", "description": "How many."}}, "required": ["city"]}}}] if tools else None
        return name, messages, given, w.owner

    yield make("one turn", lambda s, u, a, r: [u(), a()])
    yield make("system", lambda s, u, a, r: [s(), u(), a()])
    yield make("two turns", lambda s, u, a, r: [u(), a(), u(), a()])
    yield make("system, three turns", lambda s, u, a, r: [s(), u(), a(), u(), a(), u(), a()])
    yield make("call", lambda s, u, a, r: [u(), a(False, calls=1), r(1), a()])
    yield make("call, tools", lambda s, u, a, r: [u(), a(False, calls=1), r(1), a()], tools=True)
    yield make("text and call, tools", lambda s, u, a, r: [s(), u(), a(calls=1), r(1), a()], tools=True)
    yield make("two calls, tools", lambda s, u, a, r: [u(), a(False, calls=2), r(1), r(2), a()], tools=True)
    yield make("call last, tools", lambda s, u, a, r: [u(), a(False, calls=1)], tools=True)
    yield make("two questions and calls", lambda s, u, a, r: [u(), a(False, calls=1), r(1), a(), u(), a(False, calls=1), r(2), a()], tools=True)
    yield make("two calls in a row", lambda s, u, a, r: [u(), a(False, calls=1), r(1), a(False, calls=1), r(2), a()], tools=True)
    yield make("thinking in content", lambda s, u, a, r: [u(), a(think="content")])
    yield make("thinking in content, two turns", lambda s, u, a, r: [u(), a(think="content"), u(), a(think="content")])
    yield make("reasoning_content", lambda s, u, a, r: [u(), a(think="reasoning_content")])
    yield make("reasoning_content, two turns", lambda s, u, a, r: [u(), a(think="reasoning_content"), u(), a(think="reasoning_content")])
    yield make("reasoning_content and call", lambda s, u, a, r: [u(), a(False, think="reasoning_content", calls=1), r(1), a(think="reasoning_content")], tools=True)
    yield make("reasoning", lambda s, u, a, r: [u(), a(think="reasoning")])
    yield make("developer", lambda s, u, a, r: [s("developer"), u(), a()])
    yield make("call, null content", lambda s, u, a, r: [u(), a(False, calls=1, content=None), r(1), a()], tools=True)
    yield make("call, no content", lambda s, u, a, r: [u(), a(False, calls=1, content="missing"), r(1), a()], tools=True)
    yield make("arguments as text", lambda s, u, a, r: [u(), a(False, calls=1, as_text=True), r(1), a()], tools=True)
    yield make("two answers in a row", lambda s, u, a, r: [u(), a(), a()])
    yield make("two questions in a row", lambda s, u, a, r: [u(), u(), a()])
    yield make("weight 0", lambda s, u, a, r: [u(), a(learn=False), u(), a()])


RENDERED = {}


def their_text(template, messages, tools, **more):
    key = (template, json.dumps([messages, tools, more]))
    if key not in RENDERED:
        RENDERED[key] = render_theirs(template, messages, tools, **more)
    return RENDERED[key]


def render_theirs(template, messages, tools, **more):
    messages = [{k: v for k, v in m.items() if v is not None and k != "weight"} for m in messages]
    try:
        return theirs.render_jinja_template([messages], tools=tools, chat_template=template, **SPECIAL, **more)[0][0], None
    except Exception as e:
        return None, f"{type(e).__name__}: {e}"


def parsed(messages):
    messages = json.loads(json.dumps(messages))
    for m in messages:
        for call in m.get("tool_calls") or []:
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


def parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m for m in messages]


def judge(ours, owner, template, messages, tools):
    """What is wrong with a mask; an empty list if nothing is."""
    text, problems = ours["text"], []

    def partial(word):
        """The text up to the assistant's message that holds a word."""
        index = next(i for i, m in enumerate(messages) if word in json.dumps(m))
        return their_text(template, parsed(messages[: index + 1]), tools)[0] or ""

    def prompts(before):
        """Whether a generation prompt of transformers is exactly this text."""
        return any(their_text(template, parsed(messages[:i]), tools, add_generation_prompt=True)[0] == before for i in range(1, len(messages)))

    raw = text.encode()
    spans = []
    for a, b in ours["spans"]:
        a, b = len(raw[:a].decode()), len(raw[:b].decode())
        if spans and spans[-1][1] == a:
            a = spans.pop()[0]
        spans.append((a, b))
    inside = lambda a, b: any(s <= a and b <= e for s, e in spans)
    reported = {u["part"].split(" of role")[0] for u in ours["unwritten"]}
    part_of = dict(content=("content", "whole text"), reasoning=("reasoning",), name=("tool calls",), arguments=("tool calls",), tools=("tool definitions",))
    last = {}
    for word, (who, kind) in owner.items():
        places = [m.start() for m in re.finditer(word, text)]
        if not places and not reported.intersection(part_of[kind]):
            problems.append(f"dropped in silence: {kind}")
        if who == "other":
            problems += [f"learned: {word} ({kind})" for p in places if any(s < p + len(word) and p < e for s, e in spans)]
            continue
        learned = [inside(p, p + len(word)) for p in places]
        if places and not (any(learned) if kind == "name" else all(learned)):
            problems.append(f"masked: {word} ({kind})")
        for p, l in zip(places, learned):
            if l:
                last[who] = max(last.get(who, 0), p + len(word))
    words = sorted((m.start(), m.group()) for m in re.finditer("zq[a-z]{3}w", text))
    for who, at in last.items():
        stop = next((p for p, word in words if p >= at), len(text))
        end = ENDS.search(text, at, stop)
        # What ends the turn when it is the last one: some templates write another token in a history.
        written = max((m.end(), m.group()) for m in re.finditer("zq[a-z]{3}w", text[:at]))[1]
        own = ENDS.search(partial(written).partition(written)[2]) if end else None
        if end and not inside(end.start(), end.end()) and (not own or own.group() == end.group()):
            problems.append(f"end masked: {end.group()}")
    for (a, first), (b, second) in zip(words, words[1:]):
        # A turn's words with nobody else's between them are learned with all that joins them.
        whose = owner[first][0]
        if whose != "other" and whose == owner[second][0] and (inside(a, a + 1) and inside(b, b + 1)) and not inside(a, b + len(second)):
            problems.append(f"gap: {text[a:b]!r}")
    for s, e in spans:
        # A span begins where a generation prompt of transformers ends, but for a thinking block that it opens or closes.
        # (Where the text has a header: some templates write none behind a tool's result.)
        variants = [{}, *({name: on} for name in ("enable_thinking", "thinking") for on in (True, False) if name in template)]
        before = max([p + len(word) for p, word in words if p < s], default=0)
        theirs = set()
        for i in range(1, len(messages)):
            plain = their_text(template, parsed(messages[:i]), tools)[0]
            for variant in variants:
                prompt = their_text(template, parsed(messages[:i]), tools, add_generation_prompt=True, **variant)[0]
                if plain and prompt and prompt.startswith(plain):
                    tag = re.match(r"\s*<[^>]*>", prompt[len(plain):])
                    if tag and tag.group().strip() in text[before:s]:
                        theirs.add(prompt[-100:])
        if "generation %}" not in template and theirs and not any(text[:s][-8:] in prompt for prompt in theirs):
            problems.append(f"start: {text[:s][-40:]!r} | {text[s:e][:40]!r}")
        if "generation %}" in template or prompts(text[:s]):
            continue
        if re.search(r"<\|im_start\|>(assistant|user)|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<\|turn>|<\|START_OF_TURN_TOKEN\|><\|USER", text[s:e]):
            problems.append("header learned: " + repr(text[s:e][-60:]))
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program"); parser.add_argument("cache", type=Path)
    parser.add_argument("--show"); parser.add_argument("--only"); parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    pairs, lines = [], []
    everything = list(templates(options.cache))
    for name, template in everything:
        if options.only and options.only not in name:
            continue
        for title, messages, tools, owner in conversations():
            pairs.append((name, title, template, messages, tools, owner))
            lines.append(json.dumps(dict(template=template, messages=messages, tools=tools, special=SPECIAL)))
    out = subprocess.run([options.program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == len(pairs), (len(out), len(pairs))
    texts, masks, by_title = collections.Counter(), collections.Counter(), collections.defaultdict(collections.Counter)
    for (name, title, template, messages, tools, owner), line in zip(pairs, out):
        ours = json.loads(line)
        text, error = their_text(template, messages, tools)
        if text is None:
            kind = "both refuse" if ours.get("plain") is None else "transformers refuses"
        elif ours.get("plain") is None:
            kind = "refused here"
        elif ours["plain"] == text:
            kind = "equal"
        elif their_text(template, parsed(messages), tools)[0] == ours["plain"]:
            kind = "equal with arguments as an object"
        elif their_text(template, parts(parsed(messages)), tools)[0] == ours["plain"]:
            kind = "equal with contents as lists of parts"
        else:
            kind = "different"
        texts[kind] += 1
        detail = ""
        if kind in ("different", "refused here"):
            detail = f"\n--- theirs\n{text}\n--- ours\n{ours.get('plain') or ours.get('plain_error')}"
        if kind == "transformers refuses":
            detail = f" {error}"
        show(options, "text: " + kind, name, title, detail)
        if "text" not in ours:
            kinds = dict(content=("content",), tool=("name", "arguments")).get(ours["kind"].removeprefix("not written: ").split(" ")[0], ())
            if kinds and all(word in ours.get("plain", "") for word, (_, kind) in owner.items() if kind in kinds):
                ours["kind"] = "without a reason"
            mask = "error: " + ours["kind"] if text is not None or ours.get("plain") is not None else "both refuse"
            detail = " " + ours["error"]
            if ours.get("plain"):
                detail += "\n" + ours["plain"]
        else:
            problems = judge(ours, owner, template, messages, tools)
            mask = "wrong: " + problems[0].split(":")[0] if problems else "right"
            if mask == "right" and ours["unwritten"]:
                mask = "right, and what is not written is told"
            raw, shown, at = ours["text"].encode(), "", 0
            for a, b in ours["spans"]:
                shown += raw[at:a].decode() + "⟦" + raw[a:b].decode() + "⟧"
                at = b
            detail = f" {problems} {ours['unwritten']}\n{shown}{raw[at:].decode()}"
        if text is None and "text" in ours and not mask.startswith("wrong"):
            mask += " (transformers refuses)"
        masks[mask] += 1
        by_title[title][mask] += 1
        show(options, "mask: " + mask, name, title, detail)
    print(f"{len({p[0] for p in pairs})} templates, {len(pairs)} pairs")
    for head, counts in (("text", texts), ("mask", masks)):
        for kind, count in counts.most_common():
            print(f"| {head}: {kind} | {count} |" if options.markdown else f"{count:6} {head}: {kind}")
    if options.markdown:
        columns = sorted({m for c in by_title.values() for m in c})
        print("| conversation | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
        for title, counts in by_title.items():
            print(f"| {title} | " + " | ".join(str(counts[c]) for c in columns) + " |")


def show(options, kind, name, title, detail):
    if options.show and kind.startswith(options.show):
        print(f"=== {kind} [{name}] [{title}]{detail}")


if __name__ == "__main__":
    main()
