"""Silent bugs in what a run keeps, and in how it goes on from that."""

from __future__ import annotations

from mutant import Mutant

CHECKPOINT, STATE, MANIFEST = "lowrank/train/checkpoint.py", "lowrank/state.py", "lowrank/manifest.py"
OPTIM = "lowrank/train/optim.py"
DIED = "test_resume_exact.py::test_a_run_whose_process_died_ends_as_the_one_that_did_not"

MUTANTS = (
    Mutant(
        "resume: the optimizer's moments begin anew",
        STATE,
        'if state["optimizer_class"] == kind(self.loop.optimizer):',
        'if state["optimizer_class"] != kind(self.loop.optimizer):',
        (f"{DIED}[lora]",),
    ),
    Mutant(
        "resume: the data are a batch ahead",
        STATE,
        'self.loop.state = State(**state["loop"])',
        'self.loop.state = State(**{**state["loop"], "position": state["loop"]["position"] + 1})',
        (f"{DIED}[lora]",),
    ),
    Mutant(
        "resume: the loss scale begins anew",
        STATE,
        '        self.loop.precision.load_state_dict(state["scaler"])\n',
        "",
        (f"{DIED}[lora fp16]",),
    ),
    Mutant(
        "resume: a hook's state is forgotten",
        STATE,
        "                hook.load_state_dict(known[name])\n",
        "                pass\n",
        (f"{DIED}[adalora]",),
    ),
    Mutant(
        "resume: rows of steps that come again stay",
        STATE,
        "            lines.cut(state[name])\n",
        "            pass\n",
        (f"{DIED}[lora]",),
    ),
    Mutant(
        "resume: what the optimizer set in a group is forgotten",
        OPTIM,
        "target, device = what.removeprefix(GROUP), group, value.device",
        "target, device = what.removeprefix(GROUP), {}, value.device",
        ("train/test_optim.py::test_only_what_the_optimizer_itself_moved_in_a_group_is_kept",),
    ),
    Mutant(
        "resume: loaded moments share the file's memory",
        OPTIM,
        "target[what] = value.to(device, copy=True)",
        "target[what] = value.to(device)",
        ("train/test_optim.py::test_loading_copies_and_does_not_share_memory",),
    ),
    Mutant(
        "checkpoint: a manifest counts bytes and compares no hash",
        MANIFEST,
        '            same = same and hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256\n',
        "",
        ("train/test_checkpoint.py::test_every_flipped_bit_is_found_and_its_file_named",),
    ),
    Mutant(
        "checkpoint: the manifest is not held against its own hash",
        MANIFEST,
        'if name != "sha256"}) != raw:',
        'if name != "sha256"})[:1] != raw[:1]:',
        ("train/test_checkpoint.py::test_every_flipped_bit_is_found_and_its_file_named",),
    ),
    Mutant(
        "checkpoint: the newest by name, whether it verifies or not",
        MANIFEST,
        "        if fault is None:\n            return path, found\n",
        "        if fault is None or not found:\n            return path, found\n",
        ("train/test_checkpoint.py::test_a_part_that_is_missing_or_torn_is_named_and_the_older_one_used",),
    ),
    Mutant(
        "checkpoint: gets its name before its manifest",
        MANIFEST,
        "        staging.seal(about)\n        install(staging.folder, final)\n",
        "        install(staging.folder, final)\n        Staging(final, staging.files).seal(about)\n",
        ("train/test_commit.py::test_no_folder_called_step_is_ever_seen_in_part",),
    ),
    Mutant(
        "checkpoint: named before its files are on the disk",
        "lowrank/disk.py",
        "                total, left = total + count, left[count:]\n        os.fsync(descriptor)\n",
        "                total, left = total + count, left[count:]\n",
        ("train/test_checkpoint.py::test_files_that_a_state_tells_of_are_on_the_disk_before_its_commit",),
    ),
    Mutant(
        "checkpoint: its folder's name is not on the disk",
        MANIFEST,
        "        raise\n    sync(final.parent)\n    discard(old)",
        "        raise\n    discard(old)",
        ("train/test_checkpoint.py::test_files_that_a_state_tells_of_are_on_the_disk_before_its_commit",),
    ),
    Mutant(
        "keep: the best one goes",
        CHECKPOINT,
        "kept = {best, *paths[paths.index(good[-keep:][0]) :]}",
        "kept = {*paths[paths.index(good[-keep:][0]) :]}",
        ("train/test_checkpoint_kept.py::test_the_newest_stay_and_beside_them_the_best",),
    ),
    Mutant(
        "keep: older ones go before the newest is known to be good",
        CHECKPOINT,
        "good = [path for path in paths if path.name in known or verify(path) is None]",
        "good = list(paths)",
        ("train/test_checkpoint_kept.py::test_what_was_written_wrong_deletes_nothing",),
    ),
    Mutant(
        "keep: the best is forgotten on resume",
        CHECKPOINT,
        'self.best = checked_best(state.get("best"))',
        "self.best = None",
        ("train/test_checkpoint_kept.py::test_the_best_is_known_after_a_resume",),
    ),
    Mutant(
        "keep: the highest loss is the best",
        CHECKPOINT,
        'best is not None and loss >= best["loss"]',
        'best is not None and loss <= best["loss"]',
        ("train/test_checkpoint_kept.py::test_the_newest_stay_and_beside_them_the_best",),
    ),
    Mutant(
        "background: what is written changes with the next step",
        "lowrank/train/background.py",
        "        return self.copies\n",
        "        return files\n",
        ("train/test_checkpoint_background.py::test_what_changes_while_it_is_written_is_saved_as_it_was",),
    ),
    Mutant(
        "checkpoint: saves what is not finite",
        CHECKPOINT,
        "if not torch.isfinite(tensor.detach()).all():",
        "if torch.isnan(tensor.detach()).all():",
        ("train/test_checkpoint.py::test_what_is_not_finite_is_refused_by_name_before_a_file_is_written",),
    ),
    Mutant(
        "identity: the schedule is no part of it",
        "lowrank/identity.py",
        '    *("checkpoint", "eval", "track"),\n',
        '    *("checkpoint", "eval", "track", "schedule"),\n',
        ("test_resume_refusals.py::test_what_changes_a_run_is_refused_by_name[schedule]",),
    ),
    Mutant(
        "identity: a tokenizer is known by its vocabulary",
        "lowrank/identity.py",
        '            "rules": rules,\n',
        '            "rules": tokenizer.get_vocab(),\n',
        ("test_identity.py::test_whatever_makes_other_token_ids_is_another_tokenizer",),
    ),
    Mutant(
        "identity: a shorter run is not refused",
        "lowrank/resuming.py",
        "free = (STEPS,) if new[STEPS] < old.get(STEPS, 0) else LENGTH",
        "free = LENGTH",
        ("test_resume_extended.py::test_shorter_is_drift_and_below_what_is_done_cannot_be",),
    ),
    Mutant(
        "digests: a tensor is known by its first half",
        "lowrank/train/digests.py",
        "{name: hashlib.sha256(raw).hexdigest()[:DIGITS] for",
        "{name: hashlib.sha256(raw[: len(raw) // 2]).hexdigest()[:DIGITS] for",
        ("train/test_digests.py::test_every_bit_counts",),
    ),
    Mutant(
        "adapter: values of another folder pass for its own",
        "lowrank/adapters/store.py",
        "    if pair is not None and pair != hash_of(tensors):\n",
        "    if pair is None:\n",
        ("adapters/test_store.py::test_a_damaged_folder_is_refused_with_the_model_unchanged",),
    ),
)
