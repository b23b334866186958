"""The slow, obvious oracle: LLaMA with an adapter in float64, one sample, one head, one position at a time.

Written from the equations alone. It shares no code with the project and has no cache, no batch, no fused
operation, and no grouping trick. Only autograd is borrowed, so that gradients can be compared as well.
"""

import math

import torch


def softmax(scores):
    exponentials = [torch.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def apply_rope(vector, position, theta):
    """Turn each pair (2i, 2i+1) of one head's vector by position * theta^(-2i/D)."""
    D = len(vector)
    turned = []
    for i in range(0, D, 2):
        angle = position * theta ** (-i / D)
        a, b = vector[i], vector[i + 1]
        turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(turned)


def attention_terms(q, keys, values, prompt_keys, prompt_values, gate):
    """What the words and what the prompts give to one query (D,) of one head, over lists of (D,) vectors; (D,) each.

    gate is a number, already through tanh.
    """
    scale = 1 / math.sqrt(len(q))
    over_words = softmax([q @ key * scale for key in keys])
    words = sum(weight * value for weight, value in zip(over_words, values))
    if not prompt_keys:
        return words, torch.zeros_like(words)
    over_prompts = softmax([q @ key * scale for key in prompt_keys])
    return words, sum(gate * weight * value for weight, value in zip(over_prompts, prompt_values))


def gated_attention(q, keys, values, prompt_keys, prompt_values, gate):
    words, prompts = attention_terms(q, keys, values, prompt_keys, prompt_values, gate)
    return words + prompts


def logits(weights, config, tokens, prompts=None, gates=None, terms=None):
    """Logits (T, V) of one sequence. prompts (L, K, C) and gates (L, H), before tanh, for the last L layers.

    Where `terms` is a dict, it gets `attention_terms` of all heads side by side, by layer and token: (H*D,) each.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    H, Hkv, D, N = config.n_heads, config.n_kv_heads, config.head_dim, config.n_layers
    L = 0 if prompts is None else len(prompts)
    xs = [w["tok_embeddings.weight"][token] for token in tokens]
    for n in range(N):
        layer = f"layers.{n}."
        matrices = {name: w[layer + f"attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}

        def project(name, x, of_head, layer=layer, matrices=matrices):
            """With what some have besides: a bias, and a norm of each head's q and k."""
            y = matrices[name] @ x
            if layer + f"attention.{name}.bias" in w:
                y = y + w[layer + f"attention.{name}.bias"]
            norm = w.get(layer + f"attention.{name[1]}_norm.weight")
            return y[of_head] if norm is None else rms_norm(y[of_head], norm, config.norm_eps)

        normed = [rms_norm(x, w[layer + "attention_norm.weight"], config.norm_eps) for x in xs]
        adapted = n >= N - L
        prompt = list(prompts[n - (N - L)].double()) if adapted else []

        outputs = []
        for t in range(len(tokens)):
            heads = []
            for h in range(H):
                kv = h // (H // Hkv)  # the key/value head that query head h shares
                of_q, of_kv = slice(h * D, (h + 1) * D), slice(kv * D, (kv + 1) * D)
                q = apply_rope(project("wq", normed[t], of_q), t, config.rope_theta)
                keys = [apply_rope(project("wk", normed[s], of_kv), s, config.rope_theta) for s in range(t + 1)]
                values = [project("wv", normed[s], of_kv) for s in range(t + 1)]
                prompt_keys = [project("wk", p, of_kv) for p in prompt]
                prompt_values = [project("wv", p, of_kv) for p in prompt]
                gate = torch.tanh(gates[n - (N - L)][h].double()) if adapted else None
                heads.append(attention_terms(q, keys, values, prompt_keys, prompt_values, gate))
            words, of_prompts = map(torch.cat, zip(*heads))
            if terms is not None:
                terms[n, t] = words, of_prompts
            outputs.append(matrices["wo"] @ (words + of_prompts))
        xs = [x + output for x, output in zip(xs, outputs)]

        w1, w2, w3 = (w[layer + f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        normed = [rms_norm(x, w[layer + "ffn_norm.weight"], config.norm_eps) for x in xs]
        xs = [x + w2 @ ((w1 @ y) * torch.sigmoid(w1 @ y) * (w3 @ y)) for x, y in zip(xs, normed)]
    return torch.stack([w["output.weight"] @ rms_norm(x, w["norm.weight"], config.norm_eps) for x in xs])


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + eps) * weight + bias


def encoder(weights, config, xs, norm_first, prompts=None, gates=None):
    """What the last of an encoder's layers puts out, T vectors (C,), for the embeddings xs of one sample.

    prompts (L, K, C) and gates (L, H), before tanh, for the last L layers; every token looks at all of them.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    H, N = config.n_heads, config.n_layers
    D = config.dim // H
    L = 0 if prompts is None else len(prompts)
    xs = [x.double() for x in xs]
    for n in range(N):

        def linear(name, x, layer=f"layers.{n}."):
            return w[layer + name + ".weight"] @ x + w[layer + name + ".bias"]

        def norm(name, x, layer=f"layers.{n}."):
            return layer_norm(x, w[layer + name + ".weight"], w[layer + name + ".bias"], config.norm_eps)

        def gelu(x):
            exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            return exact if config.activation == "gelu" else x / (1 + torch.exp(-1.702 * x))

        adapted = n >= N - L
        prompt = list(prompts[n - (N - L)].double()) if adapted else []
        seen = [norm("attention_norm", x) for x in xs] if norm_first else xs
        outputs = []
        for x in seen:
            heads = []
            for h in range(H):
                of_head = slice(h * D, (h + 1) * D)
                keys, values = ([linear(f"attention.{m}", y)[of_head] for y in seen] for m in ("wk", "wv"))
                of_prompts = [[linear(f"attention.{m}", p)[of_head] for p in prompt] for m in ("wk", "wv")]
                gate = torch.tanh(gates[n - (N - L)][h].double()) if adapted else None
                heads.append(gated_attention(linear("attention.wq", x)[of_head], keys, values, *of_prompts, gate))
            outputs.append(linear("attention.wo", torch.cat(heads)))
        xs = [x + output for x, output in zip(xs, outputs)]
        xs = xs if norm_first else [norm("attention_norm", x) for x in xs]
        fed = [linear("w2", gelu(linear("w1", norm("ffn_norm", x) if norm_first else x))) for x in xs]
        xs = [x + y for x, y in zip(xs, fed)]
        xs = xs if norm_first else [norm("ffn_norm", x) for x in xs]
    return torch.stack(xs)
