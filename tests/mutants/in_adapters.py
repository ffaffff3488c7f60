"""Silent bugs in putting adapters on a model, and in counting, routing, merging, combining and exporting them."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = (
    Mutant(
        "start: the same values on every site",
        "lowrank/adapters/inject.py",
        'generator=key(seed, "init", row.path)',
        'generator=key(seed, "init", row.adapter)',
        ("adapters/test_inject.py::test_every_site_starts_from_values_of_its_own",),
    ),
    Mutant(
        "apply: the base stays trainable",
        "lowrank/adapters/inject.py",
        "bare, own = dict(sites(model)), parameters(model)\n    model.requires_grad_(False)\n    for row",
        "bare, own = dict(sites(model)), parameters(model)\n    for row",
        ("adapters/test_inject.py::test_exactly_the_planned_parameters_require_grad",),
    ),
    Mutant(
        "merge: an adapter on a tied head changes the embeddings too",
        "lowrank/adapters/merge.py",
        "    config.tie_word_embeddings = False\n",
        "    embedding.weight = output.weight\n",
        ("adapters/test_merge.py::test_an_adapter_on_a_tied_head_leaves_the_embeddings_alone",),
    ),
    Mutant(
        "merge: the merged model says that its head is tied",
        "lowrank/adapters/merge.py",
        "    config.tie_word_embeddings = False\n",
        "",
        (
            "adapters/test_merge.py::test_an_adapter_on_a_tied_head_leaves_the_embeddings_alone",
            "adapters/test_merge.py::test_an_adapter_on_a_tied_embedding_leaves_the_head_alone",
        ),
    ),
    Mutant(
        "plan: a tied head is counted twice",
        "lowrank/adapters/sites.py",
        "return total + sum(p.numel() for p in parameters(model).values() if id(p) not in quantized)",
        "every = (p for _, m in sites(model) for p in m.parameters(False))\n"
        "    return total + sum(p.numel() for p in every if id(p) not in quantized)",
        ("adapters/test_plan.py::test_counts_are_those_of_the_adapters_that_apply_builds",),
    ),
    Mutant(
        "bank: mixed rows come back in another order",
        "lowrank/adapters/route.py",
        "return cls(dim, names, sizes, order, order.argsort())",
        "return cls(dim, names, sizes, order, order)",
        ("adapters/test_bank_rows.py::test_a_row_is_what_it_is_alone",),
    ),
    Mutant(
        "PEFT export: B without the scale",
        "lowrank/export/peft_lora.py",
        "A, B = adapter.A.detach(), adapter.scale * adapter.B.detach().double()",
        "A, B = adapter.A.detach(), adapter.B.detach().double()",
        ("export/test_export_peft.py::test_peft_computes_the_same_logits",),
    ),
    Mutant(
        "dropout: sites that read one input have masks of their own",
        "lowrank/adapters/plan.py",
        'group=f"{reader}:{shapes[path][1]}",',
        'group=f"{path}:{shapes[path][1]}",',
        ("adapters/methods/test_lora_dropout.py::test_sites_of_one_parent_that_read_one_input_share_a_mask",),
    ),
    Mutant(
        "combining: the weights count twice",
        "lowrank/adapters/combine.py",
        "A = torch.cat([A for _, _, (A, _) in here])",
        "A = torch.cat([w * A for _, w, (A, _) in here])",
        ("adapters/test_combine.py::test_a_sum_is_exact_at_every_site_of_any_of_them",),
    ),
    Mutant(
        "combining: the sign that most have, however small",
        "lowrank/adapters/algebra.py",
        "elected = weighted.sum(0).sign()",
        "elected = weighted.sign().sum(0).sign()",
        ("adapters/test_combine.py::test_ties_by_hand",),
    ),
    Mutant(
        "combining: a drawn share that is not scaled up",
        "lowrank/adapters/algebra.py",
        "result += w / density * change * mask",
        "result += w * change * mask",
        ("adapters/test_combine.py::test_dare_keeps_a_drawn_share_and_scales_it_up",),
    ),
    Mutant(
        "another rank: the scale of a rank-stabilised LoRA changes",
        "lowrank/adapters/rank.py",
        'scale * (math.sqrt(r) if options.get("rslora") else r)',
        "scale * r",
        ("adapters/test_resize.py::test_the_plan_and_the_file_follow",),
    ),
)
