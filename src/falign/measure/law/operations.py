"""What the operations between two layers do to the neurons that pass, by PyTorch's names for them."""

import re

POOLING = re.compile(
    r"_?(mkldnn_)?(adaptive_)?(max_pool|avg_pool|fractional_max_pool|upsample_\w+?|reflection_pad|replication_pad)(?P<dimensions>\d)d"
)
"""Channel by channel over the last positions."""

SAME_ORDER = {"view", "_unsafe_view", "squeeze", "unsqueeze", "alias", "clone", "_to_copy", "lift_fresh"}
"""The result is the operand, element by element in its order."""

CONSTANT = {
    "detach", "sign", "heaviside", "floor", "ceil", "round", "zeros_like", "ones_like", "empty_like", "full_like",
    "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
"""No error returns through these."""

MOVES = {
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "unfold",
    "split", "split_with_sizes", "unbind", "flip", "roll", "index_select", "gather", "index", "repeat", "diagonal",
    "constant_pad_nd", "cat", "stack", "alias", "lift_fresh", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
}  # fmt: skip
"""Elements change their places."""

CHOICES = {"where", "masked_fill"}
"""Each element is one of two."""

GATES = {
    "relu", "leaky_relu", "rrelu_with_noise", "rrelu_with_noise_functional", "abs", "neg", "_prelu_kernel",
    "native_dropout", "_fused_dropout", "mul", "div", "clone", "_to_copy", "contiguous",
}  # fmt: skip
"""Every element is multiplied by something that does not depend on its size."""

CLIPS = {"threshold", "clamp", "clamp_min", "clamp_max"}
"""Gates, where their bounds are zero or absent."""

JOINS = {"add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin"}
"""Homogeneous in both operands together."""

REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min"}
"""Homogeneous, where what is reduced is of one neuron."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_convolution", "linear", "matmul"}
"""Products with a matrix outside the layers."""

WORDS = {
    "elu": "elu (or selu, celu)", "hardtanh": "a clipped activation (hardtanh, relu6)", "silu": "silu (swish)",
    "clamp": "a clipped activation (clamp)", "native_layer_norm": "layer normalisation",
    "_fused_rms_norm": "rms normalisation", "native_group_norm": "group normalisation",
    "native_batch_norm": "batch normalisation outside its module", "_softmax": "softmax", "pow": "a power",
    "_log_softmax": "log-softmax", "_native_batch_norm_legit": "batch normalisation outside its module",
    "hardswish": "hard-swish", "hardsigmoid": "hard-sigmoid", "log_sigmoid_forward": "log-sigmoid",
}  # fmt: skip
"""What a user calls them."""
