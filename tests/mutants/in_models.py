"""Silent bugs in 4-bit weights, attention, fused layers, and in what a base is known by."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = (
    Mutant(
        "NF4: the mean of doubly quantised scales is forgotten",
        "lowrank/quant/nf4.py",
        "absmax, offset = self.absmax.data, scales[-1]",
        "absmax, offset = self.absmax.data, torch.zeros_like(scales[-1])",
        ("quant/test_nf4.py::test_dequantised_bytes_are_those_of_linear4bit",),
    ),
    Mutant(
        "NF4: a row's end begins a new block",
        "lowrank/quant/nf4.py",
        "shape=torch.Size((1, self.out_features * self.in_features)),",
        "shape=torch.Size((self.out_features, self.in_features)),",
        ("quant/test_nf4.py::test_each_weight_is_its_level_times_the_scale_of_its_block_whatever_the_width",),
    ),
    Mutant(
        "NF4: a weight's scale is another block's",
        "lowrank/quant/nf4.py",
        "return absmax.repeat_interleave(BLOCK)[:size]",
        "return absmax.repeat(BLOCK)[:size]",
        ("quant/test_rounding.py::test_a_layer_dequantises_to_exactly_the_levels_that_its_codes_name",),
    ),
    Mutant(
        "NF4: the low half of a byte comes first",
        "lowrank/quant/nf4.py",
        "torch.stack([self.packed >> 4, self.packed & 15], dim=1)",
        "torch.stack([self.packed & 15, self.packed >> 4], dim=1)",
        ("quant/test_rounding.py::test_a_layer_dequantises_to_exactly_the_levels_that_its_codes_name",),
    ),
    Mutant(
        "NF4: the head is quantised too",
        "lowrank/quant/convert.py",
        "if layer is not head and not any(named(path, pattern) for pattern in skip)",
        "if not any(named(path, pattern) for pattern in skip)",
        ("quant/test_convert.py::test_the_head_stays_dense_whatever_it_is_called_and_whatever_skip_says",),
    ),
    Mutant(
        "packing: documents see those before them",
        "lowrank/models/attention.py",
        "for a, b in pairwise(edges)",
        "for a, b in [(edges[0], edges[-1])]",
        ("data/test_pack.py::test_a_documents_loss_has_exactly_zero_gradient_to_every_other_document",),
    ),
    Mutant(
        "attention: a sliding window of one token more",
        "lowrank/models/attention.py",
        "mask = (distance >= 0) & (distance < window)",
        "mask = (distance >= 0) & (distance <= window)",
        ("models/test_attention.py::test_the_function_is_masked_softmax_attention_with_its_gradients",),
    ),
    Mutant(
        "attention: a sliding window of one token more in the kernel for all documents",
        "lowrank/models/varlen.py",
        "(-1 if window is None else window - 1, 0)",
        "(-1 if window is None else window, 0)",
        ("models/test_varlen.py::test_it_is_asked_for_what_goes_document_by_document_elsewhere",),
    ),
    Mutant(
        "attention: a token sees the one after it",
        "lowrank/models/attention.py",
        "mask = (distance >= 0) & (distance < window)",
        "mask = (distance >= -1) & (distance < window)",
        ("models/test_attention.py::test_the_function_is_masked_softmax_attention_with_its_gradients",),
    ),
    Mutant(
        "attention: the model's own scale is not taken",
        "lowrank/models/attention.py",
        'scale=kwargs.get("scaling"),',
        "scale=None,",
        ("models/test_attention.py::test_packed_logits_equal_the_models_own_unpacked_path",),
    ),
    Mutant(
        "attention: the prefix is out of sight behind a mask",
        "lowrank/models/attention.py",
        "value=1 if mask.dtype == torch.bool else 0)",
        "value=0)",
        ("adapters/methods/test_prefix.py::test_a_sliding_window_never_hides_the_prefix",),
    ),
    Mutant(
        "SwiGLU: a factor's gradient is the other's",
        "lowrank/fast/swiglu.py",
        "return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)",
        "return torch.ops.aten.silu_backward(grad, gate) * up, grad * torch.sigmoid(gate)",
        ("fast/test_swiglu.py::test_logits_gradients_and_a_third_of_the_block_less_memory",),
    ),
    Mutant(
        "fingerprint: a tensor's bytes, whatever its type and shape",
        "lowrank/models/fingerprint.py",
        'hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\\n".encode())',
        "hashed = hashlib.sha256()",
        ("models/test_fingerprint.py::test_type_shape_and_name_count_beside_the_bytes",),
    ),
    Mutant(
        "keys: parts run together",
        "lowrank/keys.py",
        'text = "\\x1f".join(repr(part) for part in what)',
        'text = "".join(str(part) for part in what)',
        ("test_keys.py::test_every_part_of_a_key_counts_and_parts_do_not_run_together",),
    ),
    Mutant(
        "keys: masks do not depend on the micro-batch",
        "lowrank/keys.py",
        'return digest(self.seed, "dropout", self.rank, *self.now, group)',
        'return digest(self.seed, "dropout", self.rank, self.now[0], group)',
        ("test_keys.py::test_a_set_clock_repeats_and_depends_on_seed_rank_step_micro_batch_and_group",),
    ),
    Mutant(
        "NF4: quantised from the file's own type, not the model's",
        "lowrank/quant/convert.py",
        "layer.fill((tensor.T if layers[path] else tensor).to(dtype))",
        "layer.fill(tensor.T if layers[path] else tensor)",
        ("quant/test_convert.py::test_loading_quantised_equals_quantising_what_was_loaded",),
    ),
)
