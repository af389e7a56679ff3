"""Unusual shapes of a model of three layers, as in `per_layer_config`."""

ATTENTION, MLP, BOTH = {"skip": ["attention"]}, {"skip": ["mlp"]}, {"skip": ["attention", "mlp"]}
SHAPES = {
    "dense": {},
    "widths differ": {0: {"intermediate_size": 7}, 2: {"intermediate_size": 32}},
    "groups differ": {
        0: {"num_attention_heads": 3, "num_key_value_heads": 1},
        1: {"num_attention_heads": 2, "num_key_value_heads": 2},
    },
    "first without attention": {0: ATTENTION},
    "last without attention": {2: ATTENTION},
    "middle without MLP": {1: MLP},
    "last without MLP": {2: MLP},
    "middle without both": {1: BOTH},
    "first and last without both": {0: BOTH, 2: BOTH},
    "nothing left": {0: BOTH, 1: BOTH, 2: BOTH},
    "only half layers": {0: MLP, 1: ATTENTION, 2: MLP},
}
