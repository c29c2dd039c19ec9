"""Damaged and odd files, drawn from a seed: for test_fuzz.py, and for any other kind of file.

    mutated_bytes(data, draw)     the bytes with a few flipped, cut out, doubled, or the end missing
    mutated_json(value, draw)     a JSON value with one or two places changed
    outcome(load, folder)         what load() returns, or None where it refused as it should
"""

import copy
import json
import time

HUGE = "a number of 5,000 digits"
ODD = [None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 1e400, 0.5, 1e-300, "", "gelu", "x" * 500, "\x1b[2J\n", "\ud800",
       [], [[]], [1, "a"], {}, {"type": "linear"}, HUGE]


def mutated_bytes(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(data)) if data else 0
        size = draw.choice([1, 1, 4, 100])
        how = draw.choice(["flip", "flip", "cut", "double", "random", "end"])
        if how == "flip" and data:
            data[at] ^= 1 << draw.randrange(8)
        elif how == "cut":
            del data[at:at + size]
        elif how == "double":
            data[at:at] = data[at:at + size]
        elif how == "random":
            data[at:at + size] = draw.randbytes(size)
        elif how == "end":
            del data[at:]
    return bytes(data)


def places(value):
    """Every (container, key) inside a JSON value."""
    for key in (list(value) if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def mutated_json(value, draw):
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 2])):
        where = list(places(value))
        if not where:
            break
        container, key = draw.choice(where)
        how = draw.choice(["odd", "odd", "near", "move", "remove", "rename"])
        old = container[key]
        if how == "near" and type(old) in (int, float):
            container[key] = draw.choice([old + 1, old - 1, old * 2, -old, str(old), float(old), [old]])
        elif how == "move":
            other, name = draw.choice(where)
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = copy.deepcopy(other[name])
        elif how == "remove":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[draw.choice([key + "s", key.upper(), "", "\x1b]0;x\x07", "é" + key])] = container.pop(key)
        else:
            container[key] = draw.choice(ODD)
    return value


def json_text(value):
    return json.dumps(value).replace(json.dumps(HUGE), "9" * 5000)


def outcome(load, folder, seconds=5):
    """The rule: load() returns in time, or raises an error for people that names a file in the folder."""
    start = time.monotonic()
    try:
        return load()
    except (ValueError, OSError) as error:
        text = str(error)
        assert str(folder) in text, f"does not name the file: {text[:300]!r}"
        first, *more = text.split("\n")
        assert not more or first.endswith("do not fit its config.json: ") and len(more) <= 11, text[:500]
        assert all(line.isprintable() and len(line) <= 300 + len(str(folder)) for line in [first, *more]), text[:500]
        assert not isinstance(error, UnicodeError), text[:300]
        return None
    finally:
        assert time.monotonic() - start < seconds, "takes too long"
