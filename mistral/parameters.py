"""Every weight of a model, described once: name and shape. Runs without torch."""

from __future__ import annotations

from mistral.args import ModelArgs

OUTPUT, EMBEDDINGS = "output.weight", "tok_embeddings.weight"


def expected_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, in its order.

    Worked out, not read off a model: with sizes that are wrong by a factor of a million none can be made.
    """
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layer = {
        "attention.wq": (q, args.dim),
        "attention.wk": (kv, args.dim),
        "attention.wv": (kv, args.dim),
        "attention.wo": (args.dim, q),
        "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim),
        "feed_forward.w3": (args.hidden_dim, args.dim),
        "attention_norm": (args.dim,),
        "ffn_norm": (args.dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes.update({"norm": (args.dim,), "output": (args.vocab_size, args.dim)})
    return {f"{name}.weight": shape for name, shape in shapes.items()}
