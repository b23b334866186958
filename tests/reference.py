"""Slow reference: LLaMA and encoders with an adapter in float64, one sample, head and position at a time.

It is written from the equations alone. It shares no code with the project, and has no cache, no batches, no fused
operations and no shortcut for grouped queries. It supports autograd, so that gradients can be compared as well.
"""

import math

import torch


def softmax(scores):
    exponentials = [torch.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def apply_rope(vector, position, theta):
    """Rotate each pair (2i, 2i+1) of one head's vector by the angle position * theta^(-2i/D)."""
    D = len(vector)
    rotated = []
    for i in range(0, D, 2):
        angle = position * theta ** (-i / D)
        a, b = vector[i], vector[i + 1]
        rotated += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(rotated)


def attention_terms(q, keys, values, prompt_keys, prompt_values, gate):
    """Return the attention over the tokens and the gated attention over the prompts, (D,) each, for one query.

    The query (D,) is that of one head; keys and values are lists of (D,) vectors. `gate` is a number, after tanh.
    Without prompts, `gate` is ignored and the second result is zero.
    """
    scale = 1 / math.sqrt(len(q))
    token_weights = softmax([q @ key * scale for key in keys])
    token_term = sum(weight * value for weight, value in zip(token_weights, values))
    if not prompt_keys:
        return token_term, torch.zeros_like(token_term)
    prompt_weights = softmax([q @ key * scale for key in prompt_keys])
    return token_term, sum(gate * weight * value for weight, value in zip(prompt_weights, prompt_values))


def gated_attention(q, keys, values, prompt_keys, prompt_values, gate):
    token_term, prompt_term = attention_terms(q, keys, values, prompt_keys, prompt_values, gate)
    return token_term + prompt_term


def logits(weights, config, tokens, prompts=None, gates=None, terms=None):
    """Return the logits (T, V) of one sequence. The last L layers have prompts (L, K, C) and gates (L, H), before tanh.

    If `terms` is a dict, terms[layer, position] is set to the two results of `attention_terms`, each of them with all
    heads concatenated, (H*D,).
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    H, Hkv, D, N = config.n_heads, config.n_kv_heads, config.head_dim, config.n_layers
    L = 0 if prompts is None else len(prompts)
    xs = [w["tok_embeddings.weight"][token] for token in tokens]
    for n in range(N):
        layer = f"layers.{n}."
        matrices = {name: w[layer + f"attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}

        def project(name, x, head_slice, layer=layer, matrices=matrices):
            """Return the projection of x for one head, with the bias and the norm that some models have."""
            y = matrices[name] @ x
            if layer + f"attention.{name}.bias" in w:
                y = y + w[layer + f"attention.{name}.bias"]
            norm = w.get(layer + f"attention.{name[1]}_norm.weight")
            return y[head_slice] if norm is None else rms_norm(y[head_slice], norm, config.norm_eps)

        normed = [rms_norm(x, w[layer + "attention_norm.weight"], config.norm_eps) for x in xs]
        adapted = n >= N - L
        prompt = list(prompts[n - (N - L)].double()) if adapted else []

        outputs = []
        for t in range(len(tokens)):
            heads = []
            for h in range(H):
                kv = h // (H // Hkv)  # the key/value head that query head h shares
                q_slice, kv_slice = slice(h * D, (h + 1) * D), slice(kv * D, (kv + 1) * D)
                q = apply_rope(project("wq", normed[t], q_slice), t, config.rope_theta)
                keys = [apply_rope(project("wk", normed[s], kv_slice), s, config.rope_theta) for s in range(t + 1)]
                values = [project("wv", normed[s], kv_slice) for s in range(t + 1)]
                prompt_keys = [project("wk", p, kv_slice) for p in prompt]
                prompt_values = [project("wv", p, kv_slice) for p in prompt]
                gate = torch.tanh(gates[n - (N - L)][h].double()) if adapted else None
                heads.append(attention_terms(q, keys, values, prompt_keys, prompt_values, gate))
            token_terms, prompt_terms = map(torch.cat, zip(*heads))
            if terms is not None:
                terms[n, t] = token_terms, prompt_terms
            outputs.append(matrices["wo"] @ (token_terms + prompt_terms))
        xs = [x + output for x, output in zip(xs, outputs)]

        w1, w2, w3 = (w[layer + f"feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        normed = [rms_norm(x, w[layer + "ffn_norm.weight"], config.norm_eps) for x in xs]
        xs = [x + w2 @ ((w1 @ y) * torch.sigmoid(w1 @ y) * (w3 @ y)) for x, y in zip(xs, normed)]
    return torch.stack([w["output.weight"] @ rms_norm(x, w["norm.weight"], config.norm_eps) for x in xs])


def layer_norm(x, weight, bias, eps):
    centered = x - x.mean()
    return centered / torch.sqrt((centered * centered).mean() + eps) * weight + bias


def encoder(weights, config, xs, norm_first, prompts=None, gates=None):
    """Return the output (T, C) of an encoder's last layer, for one sample's embeddings `xs`, a list of T vectors (C,).

    `norm_first` is true for ViT (norms before attention and MLP) and false for RoBERTa (norms after the residual sums).
    prompts (L, K, C) and gates (L, H), before tanh, are those of the last L layers. Every token attends to all tokens
    and prompts.
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
        attention_inputs = [norm("attention_norm", x) for x in xs] if norm_first else xs
        outputs = []
        for x in attention_inputs:
            heads = []
            for h in range(H):
                head_slice = slice(h * D, (h + 1) * D)
                keys, values = (
                    [linear(f"attention.{m}", y)[head_slice] for y in attention_inputs] for m in ("wk", "wv")
                )
                prompt_kv = [[linear(f"attention.{m}", p)[head_slice] for p in prompt] for m in ("wk", "wv")]
                gate = torch.tanh(gates[n - (N - L)][h].double()) if adapted else None
                heads.append(gated_attention(linear("attention.wq", x)[head_slice], keys, values, *prompt_kv, gate))
            outputs.append(linear("attention.wo", torch.cat(heads)))
        xs = [x + output for x, output in zip(xs, outputs)]
        xs = xs if norm_first else [norm("attention_norm", x) for x in xs]
        ffn_outputs = [linear("w2", gelu(linear("w1", norm("ffn_norm", x) if norm_first else x))) for x in xs]
        xs = [x + y for x, y in zip(xs, ffn_outputs)]
        xs = xs if norm_first else [norm("ffn_norm", x) for x in xs]
    return torch.stack(xs)
