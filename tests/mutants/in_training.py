"""Silent bugs in the loop, the loss, the schedule, the optimizer and the precision."""

from __future__ import annotations

from mutant import Mutant

LOOP, LOSS, SCHEDULE, OPTIM, PRECISION, FLAT = (
    f"lowrank/train/{name}.py" for name in ("loop", "loss", "schedule", "optim", "precision", "flat")
)

MUTANTS = (
    Mutant(
        "loss: a mean of the micro-batches' means",
        LOOP,
        "self.precision.backward(loss / targets)\n        penalty",
        "self.precision.backward(loss / (len(batch.targets) * len(batches)))\n        penalty",
        ("train/test_loop.py::test_accumulating_k_equals_one_batch_of_k",),
    ),
    Mutant(
        "loss: already a mean where a sum is meant",
        LOSS,
        'reduction="sum")',
        'reduction="mean")',
        ("train/test_loss.py::test_it_is_the_summed_cross_entropy_of_the_target_rows_with_its_gradients",),
    ),
    Mutant(
        "loss: in half precision",
        LOSS,
        "logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "logits",
        ("train/test_loss.py::test_it_is_summed_in_fp32_even_where_logits_are_bf16",),
    ),
    Mutant(
        "loss: the logits of padded rows in another order",
        LOSS,
        "return logits[batch.positions // width, at]",
        "return logits[batch.positions // width, at.sort().values]",
        ("train/test_loss.py::test_logits_are_those_of_the_targets_in_their_order",),
    ),
    Mutant(
        "gradients: not zeroed between steps",
        LOOP,
        "        self.update.clear()\n",
        "        if step == 1:\n            self.update.clear()\n",
        ("train/test_loop.py::test_a_step_is_the_textbooks",),
    ),
    Mutant(
        "gradients: clipped before they are unscaled",
        LOOP,
        "        self.precision.unscale(self.update.gathered())\n        norm = self.update.norm()\n",
        "        whole, norm = self.update.gathered(), self.update.norm()\n        self.precision.unscale(whole)\n",
        ("train/test_precision.py::test_clipping_comes_after_unscaling",),
    ),
    Mutant(
        "gradients: the norm that is told is the clipped one",
        LOOP,
        "lr, length, time.perf_counter()",
        "lr, min(length, self.max_norm), time.perf_counter()",
        ("train/test_loop.py::test_the_norm_is_the_one_before_clipping_and_gradients_are_no_longer_than_allowed",),
    ),
    Mutant(
        "penalty: once a micro-batch",
        LOOP,
        "penalty = self.penalty()",
        "penalty = self.penalty() * len(batches)",
        ("train/test_loop.py::test_a_penalty_is_added_once_a_step",),
    ),
    Mutant(
        "dropout: one mask for all micro-batches of a step",
        LOOP,
        "self.clock.set(step, index)",
        "self.clock.set(step, 0)",
        ("train/test_loop.py::test_micro_batches_and_steps_draw_masks_of_their_own",),
    ),
    Mutant(
        "dropout: the model's own goes by what was drawn before",
        LOOP,
        'torch.manual_seed(digest(self.clock.seed, "model dropout", step, index))',
        "torch.manual_seed(torch.randint(2**62, ()).item())",
        ("train/test_loop.py::test_the_models_own_dropout_and_the_adapters_replay_by_key",),
    ),
    Mutant(
        "loop: leaves its own seed in torch's generator",
        LOOP,
        "        torch.set_rng_state(cpu)\n        if cuda:",
        "        if cuda:",
        ("train/test_loop.py::test_a_step_restores_the_default_generator",),
    ),
    Mutant(
        "loop: goes on in evaluation mode after an evaluation",
        LOOP,
        "        self.model.train()\n",
        "",
        ("train/test_loop.py::test_a_hook_that_only_observes_cannot_change_the_run",),
    ),
    Mutant(
        "tokens: speed is over the target tokens",
        LOOP,
        "targets, real, real / seconds, memory",
        "targets, real, targets / seconds, memory",
        ("train/test_loop.py::test_tokens_are_counted_for_the_step_alone_and_summed_in_the_state",),
    ),
    Mutant(
        "schedule: by micro-batches",
        LOOP,
        "set_lr(self.optimizer, self.schedule(step))",
        "set_lr(self.optimizer, self.schedule((step - 1) * len(batches) + 1))",
        ("train/test_loop.py::test_a_step_is_the_textbooks",),
    ),
    Mutant(
        "schedule: warm-up begins at 0",
        SCHEDULE,
        "return lambda step: step / warm if step <= warm else after(step - 1)",
        "return lambda step: (step - 1) / warm if step <= warm else after(step - 1)",
        (
            "train/test_schedule.py::"
            "test_the_first_step_is_at_one_over_warm_up_of_the_peak_and_the_peak_is_reached_at_its_end",
        ),
    ),
    Mutant(
        "schedule: the fall is a step early",
        SCHEDULE,
        "if step <= warm else after(step - 1)",
        "if step <= warm else after(step)",
        ("train/test_schedule.py::test_after_warm_up_it_is_transformers_schedule",),
    ),
    Mutant(
        "schedule: a whole cosine",
        SCHEDULE,
        "math.cos(math.pi * progress(done))",
        "math.cos(2 * math.pi * progress(done))",
        ("train/test_schedule.py::test_linear_and_cosine_are_their_formulas",),
    ),
    Mutant(
        "optimizer: weight decay on norms and biases",
        OPTIM,
        'rule.get("weight_decay", weight_decay if parameter.ndim > 1 else 0.0)',
        'rule.get("weight_decay", weight_decay)',
        ("train/test_optim.py::test_weight_decay_is_never_on_vectors",),
    ),
    Mutant(
        "optimizer: the last rule that fits decides",
        OPTIM,
        "index = next((i for i, rule in enumerate(rules) if",
        "index = next((i for i, rule in reversed(list(enumerate(rules))) if",
        ("train/test_optim.py::test_the_first_rule_that_fits_decides_and_what_it_leaves_out_is_the_default",),
    ),
    Mutant(
        "optimizer: every group at the first one's rate",
        OPTIM,
        'group["lr"] = group["peak_lr"] * factor',
        'group["lr"] = optimizer.param_groups[0]["peak_lr"] * factor',
        ("train/test_optim.py::test_the_schedule_keeps_the_groups_ratio",),
    ),
    Mutant(
        "LoRA+: the ratio is on A",
        "conf/optim/lora_plus.yaml",
        'groups: [{match: "*.adapter.B", lr_ratio: 16}]',
        'groups: [{match: "*.adapter.A", lr_ratio: 16}]',
        ("train/test_optim.py::test_the_choice_lora_plus_makes_b_of_every_site_16_times_as_fast",),
    ),
    Mutant(
        "AdamW: the two decays change places",
        "conf/optim/adamw.yaml",
        "betas: [0.9, 0.999]",
        "betas: [0.999, 0.9]",
        ("test_optim_choices.py::test_the_choices_of_adam_step_as_the_papers_algorithm_with_its_constants",),
    ),
    Mutant(
        "AdamW in 8 bits: the two decays change places",
        "conf/optim/adamw8bit.yaml",
        "betas: [0.9, 0.999]",
        "betas: [0.999, 0.9]",
        ("test_optim_choices.py::test_the_choices_of_adam_step_as_the_papers_algorithm_with_its_constants",),
    ),
    Mutant(
        "fp16: an overflowed step is counted and calls the hooks",
        LOOP,
        "            self.precision.halve()\n            return None\n",
        "            self.precision.halve()\n            norm, length = norm.nan_to_num(posinf=0.0), 0.0\n",
        ("train/test_precision.py::test_an_overflowed_step_calls_no_hook",),
    ),
    Mutant(
        "flat: a parameter without a gradient decays with the others",
        FLAT,
        "return all(grad is not None for grad in given)",
        "return True",
        ("train/test_flat.py::test_a_parameter_without_a_gradient_is_left_alone_with_its_state",),
    ),
    Mutant(
        "flat: parameters that are behind take the others' count",
        FLAT,
        "        if not alike(held):\n            return False\n",
        "",
        ("train/test_flat.py::test_a_parameter_without_a_gradient_is_left_alone_with_its_state",),
    ),
    Mutant(
        "flat: a gradient that a hook has replaced does not count",
        FLAT,
        "complete = [stretch.gather() for stretch in self.stretches]",
        "complete = [all(p.grad is not None for p in stretch.parameters) for stretch in self.stretches]",
        ("train/test_flat.py::test_what_hooks_write_counts",),
    ),
    Mutant(
        "flat: the learning rate stays that of the start",
        FLAT,
        "            follow(self.whole.param_groups, self.optimizer.param_groups)\n",
        "",
        ("train/test_flat.py::test_twenty_steps_are_those_of_each_parameter_by_itself",),
    ),
    Mutant(
        "clipping: left out just above the longest norm",
        "lowrank/train/update.py",
        "return length * (1 + 1e-5) + 1e-5 > max_norm",
        "return length > 1.5 * max_norm",
        ("train/test_flat.py::test_gradients_are_cut_however_little_they_are_too_long",),
    ),
    Mutant(
        "in backward: a gradient that is not finite moves its parameter",
        "lowrank/train/in_backward.py",
        "(~torch.isfinite(length)).float()",
        "torch.zeros(())",
        (
            "train/test_in_backward.py::test_a_gradient_that_is_not_finite_does_not_reach_its_parameter_and_stops_the_run",
        ),
    ),
    Mutant(
        "in backward: gradients stay",
        "lowrank/train/in_backward.py",
        "        parameter.grad = None\n",
        "",
        ("train/test_in_backward.py::test_gradients_take_the_largest_parameters_memory_and_no_more",),
    ),
    Mutant(
        "fp16: the scaler begins anew after a resume",
        PRECISION,
        "            self.scaler.load_state_dict(state)\n",
        "",
        ("train/test_precision.py::test_the_scalers_state_round_trips",),
    ),
    Mutant(
        "guard: an infinite loss goes on",
        "lowrank/train/guard.py",
        'if not math.isfinite(value):\n                raise NotFinite(self.fault(f"loss is {value}", index))',
        'if math.isnan(value):\n                raise NotFinite(self.fault(f"loss is {value}", index))',
        ("train/test_guard.py::test_a_loss_that_is_not_finite_is_named_and_touches_nothing",),
    ),
    Mutant(
        "guard: a skipped batch comes again",
        LOOP,
        "        self.state.consume(self.batches.at(self.state.position + 1))\n        for hook",
        "        for hook",
        ("train/test_finite.py::test_skipping_takes_the_next_batch_for_the_same_step",),
    ),
    Mutant(
        "average: without the correction for its start",
        "lowrank/train/average.py",
        "weight = (1 - self.decay) / (1 - self.decay**self.updates)",
        "weight = 1 - self.decay",
        ("train/test_average.py::test_it_is_the_weighted_mean_of_the_weights_after_each_update",),
    ),
    Mutant(
        "average: training goes on from it",
        "lowrank/train/average.py",
        "            put(self.trained, held)\n",
        "            pass\n",
        ("train/test_average.py::test_training_does_not_see_it_though_it_is_used_between_steps",),
    ),
    Mutant(
        "early stop: an equal loss counts as better",
        "lowrank/train/early.py",
        'loss >= best["loss"]',
        'loss > best["loss"]',
        ("train/test_early.py::test_it_stops_at_the_evaluation_that_makes_so_many_without_a_better_one",),
    ),
    Mutant(
        "hooks: a method sees gradients that are not yet clipped",
        LOOP,
        """        self.update.clip(self.max_norm, norm, length)
        for hook in self.hooks:
            hook.before_update(step)
""",
        """        for hook in self.hooks:
            hook.before_update(step)
        self.update.clip(self.max_norm, norm, length)
""",
        ("train/test_loop.py::test_the_norm_is_the_one_before_clipping_and_gradients_are_no_longer_than_allowed",),
    ),
    Mutant(
        "fp16: the penalty's gradient is not scaled like the loss's",
        LOOP,
        "        if isinstance(penalty, Tensor):\n            self.precision.backward(penalty)\n",
        "        if isinstance(penalty, Tensor):\n            penalty.backward()\n",
        ("train/test_precision.py::test_a_penalty_counts_as_it_does_in_fp32",),
    ),
    Mutant(
        "guard: an update that spoils a parameter is not seen",
        LOOP,
        "        guard.updated(lr)\n",
        "",
        ("train/test_finite.py::test_an_update_that_spoils_a_parameter_is_found_before_anything_sees_it",),
    ),
    Mutant(
        "data order: its hash does not know the order",
        LOOP,
        "rows = [list(batch.rows) for batch in batches]",
        "rows = sorted(row for batch in batches for row in batch.rows)",
        ("train/test_data_order.py::test_the_hash_is_of_rows_micro_batches_and_steps_in_their_order",),
    ),
    Mutant(
        "early stop: a resumed run has new patience",
        "lowrank/train/early.py",
        'self.best, self.since = state["best"], state["since"]',
        'self.best, self.since = state["best"], 0',
        ("train/test_early.py::test_a_resumed_run_stops_where_it_would_have",),
    ),
    Mutant(
        "average: what a method has pruned comes back",
        "lowrank/train/average.py",
        ".masked_fill_(parameter == 0, 0)",
        "",
        ("train/test_average.py::test_an_entry_that_a_method_sets_to_zero_is_zero_in_the_average",),
    ),
)
