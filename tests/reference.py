"""The policies written from their papers, in plain NumPy, one token at a time.

Different in shape from the code on purpose: a list of held tokens per chooser, each a
dict, and no blocks, slots or masks.
"""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def similarity(keys, places, kv_heads):
    """Mean over heads of the cosine between each key and the mean of the unit keys."""
    total = np.zeros(len(places))
    for kv in kv_heads:
        some = keys[kv, places]
        anchor = np.mean([k / np.linalg.norm(k) for k in some], axis=0)
        for i, key in enumerate(some):
            total[i] += key @ anchor / np.linalg.norm(key) / np.linalg.norm(anchor)
    return total / len(kv_heads)


def run(queries, keys, values, scale, max_size, rule):
    """One layer on queries [H, T, D], keys and values [Hkv, T, D].

    Returns outputs [H, T, D] and, per chooser, the sorted kept positions.
    """
    n_heads, length, _ = queries.shape
    n_kv_heads = keys.shape[0]
    group = n_heads // n_kv_heads
    outputs = np.zeros((n_heads, length, values.shape[2]))
    per_head = rule["granularity"] == "head"
    if per_head:
        choosers = [range(h * group, (h + 1) * group) for h in range(n_kv_heads)]
    else:
        choosers = [range(n_heads)]
    kept = []
    for heads in choosers:
        held = []
        for t in range(length):
            held.append({"position": t, "score": 0.0})
            places = [token["position"] for token in held]
            received = np.zeros(len(held))
            for h in heads:
                kv = h // group
                weights = softmax(keys[kv, places] @ queries[h, t] * scale)
                outputs[h, t] = weights @ values[kv, places]
                if rule["value_weighted"]:
                    weights = weights * np.linalg.norm(values[kv, places], axis=1)
                received += weights / len(heads)
            for token, amount in zip(held, received, strict=True):
                token["score"] = rule["memory"] * token["score"] + amount
            if len(held) > max_size:
                free = [
                    token
                    for token in held
                    if token["position"] >= rule["n_sinks"]
                    and token["position"] <= t - rule["n_recent"]
                ]
                if rule["reads_keys"]:
                    likeness = similarity(keys, places, [h // group for h in heads])
                    most = {p: s for p, s in zip(places, likeness, strict=True)}
                    held.remove(max(free, key=lambda token: most[token["position"]]))
                elif not rule["reads_attention"]:
                    held.remove(free[0])
                else:
                    held.remove(min(free, key=lambda token: token["score"]))
        kept.append([token["position"] for token in held])
    return outputs, kept
