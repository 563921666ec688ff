"""Writes pairs of answers to arithmetic word problems, as chat messages in JSONL: of each pair one answer reasons rightly, and the other
takes a wrong operation or leaves the last step out.

usage: make_pairs.py OUT.jsonl [--rows 800] [--seed 1]
"""
import argparse, json, pathlib, random, sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "quickstart"))
from make_word_problems import NAMES, PLACES, THINGS


def buy(r):
    n, t, p = r.choice(NAMES), r.choice(THINGS), r.choice(PLACES)
    a, b, c = r.randint(3, 60), r.randint(2, 9), r.randint(2, 20)
    q = f"{n} has {a} {t}. At the {p}, {n} buys {b} boxes with {c} {t} in each box. How many {t} does {n} have now?"
    def steps(first, second):
        boxes = f"The boxes hold {b} {'*' if first else '+'} {c} = {b * c if first else b + c} {t}."
        held = b * c if first else b + c
        return [boxes, f"Together that makes {a} {'+' if second else '-'} {held} = {a + held if second else a - held} {t}."], a + held if second else a - held
    return q, steps, b * c


def give(r):
    n, m, t = *r.sample(NAMES, 2), r.choice(THINGS)
    a, b = r.randint(30, 99), r.randint(2, 15)
    d = r.randint(2, a - b)
    q = f"{n} collected {a} {t}, gave {b} of them to {m} and lost {d} on the way home. How many {t} are left?"
    def steps(first, second):
        rest = a - b if first else a + b
        left = rest - d if second else rest + d
        return [f"After the gift {a} {'-' if first else '+'} {b} = {rest} {t} remain.", f"After the loss {rest} {'-' if second else '+'} {d} = {left} {t} remain."], left
    return q, steps, a - b


def share(r):
    n, t = r.choice(NAMES), r.choice(THINGS)
    k, e, x = r.randint(2, 9), r.randint(2, 20), r.randint(2, 15)
    q = f"{n} shares {k * e} {t} equally among {k} friends. One of the friends already had {x} {t}. How many {t} does that friend have in the end?"
    def steps(first, second):
        each = e if first else k * e - k
        end = each + x if second else each - x
        return [f"Each friend gets {k * e} {'/' if first else '-'} {k} = {each} {t}.", f"That friend then has {each} {'+' if second else '-'} {x} = {end} {t}."], end
    return q, steps, e


def work(r):
    n, p = r.choice(NAMES), r.choice(PLACES)
    w, h, d = r.randint(5, 30), r.randint(2, 9), r.randint(2, 6)
    q = f"{n} earns {w} coins an hour at the {p} and works {h} hours a day. How many coins does {n} earn in {d} days?"
    def steps(first, second):
        day = w * h if first else w + h
        whole = d * day if second else d + day
        return [f"A day brings {w} {'*' if first else '+'} {h} = {day} coins.", f"{d} days bring {d} {'*' if second else '+'} {day} = {whole} coins."], whole
    return q, steps, w * h


def pair(r):
    question, steps, after_first = r.choice([buy, give, share, work])(r)
    write = lambda lines, answer: {"role": "assistant", "content": "\n".join([*lines, f"Answer: {answer}"])}
    right, answer = steps(True, True)
    mistake = r.choice(["first", "second", "left out"])
    if mistake == "left out":
        wrong = write(right[:1], after_first)
    else:
        wrong = write(*steps(mistake != "first", mistake != "second"))
    return {"prompt": [{"role": "user", "content": question}], "chosen": [write(right, answer)], "rejected": [wrong]}


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("out"); ap.add_argument("--rows", type=int, default=800); ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args(); r = random.Random(a.seed)
    with open(a.out, "w") as f:
        for _ in range(a.rows): f.write(json.dumps(pair(r)) + "\n")
