"""Silent bugs in what is learnt, from which tokens, in which order."""

from __future__ import annotations

from mutant import Mutant

PACK, CHAT, ORDER, BEST_FIT, SOURCES = (
    f"lowrank/data/{name}.py" for name in ("pack", "chat", "order", "best_fit", "sources")
)

MUTANTS = (
    Mutant(
        "labels: shifted by one",
        PACK,
        "(start + i - 1, document.tokens[i])",
        "(start + i, document.tokens[i])",
        ("data/test_pack.py::test_the_batchs_loss_and_gradients_are_those_of_its_documents_alone",),
    ),
    Mutant(
        "labels: a document's first token is learnt from the document before",
        PACK,
        "for i in range(1, len(document.tokens))",
        "for i in range(len(document.tokens))",
        ("data/test_pack.py::test_targets_are_the_marked_tokens_but_a_documents_first",),
    ),
    Mutant(
        "packing: positions run on over documents",
        PACK,
        "torch.cat([torch.arange(n) for n in lengths])[None]",
        "torch.arange(sum(lengths))[None]",
        ("data/test_pack.py::test_a_pack_holds_the_documents_end_to_end_with_positions_that_restart",),
    ),
    Mutant(
        "padding: the mask is off by one",
        PACK,
        "mask = torch.arange(width) < torch.tensor(lengths)[:, None]",
        "mask = torch.arange(width) <= torch.tensor(lengths)[:, None]",
        ("data/test_pack.py::test_padded_rows_are_masked_on_the_right",),
    ),
    Mutant(
        "tokens: padding counts as real",
        PACK,
        '"attention_mask": mask.long()}\n    return Batch(inputs, positions, targets, tuple(d.row for d in documents), '
        "sum(lengths))",
        '"attention_mask": mask.long()}\n    return Batch(inputs, positions, targets, tuple(d.row for d in documents), '
        "ids.numel())",
        ("data/test_pack.py::test_padding_never_counts_as_a_real_token",),
    ),
    Mutant(
        "mask: the prompt's last token is learnt",
        CHAT,
        "max(1, len(start) + len(asked))",
        "max(1, len(start) + len(asked) - 1)",
        ("data/test_chat.py::test_exactly_the_response_and_its_end_are_learnt",),
    ),
    Mutant(
        "mask: the end is not learnt",
        CHAT,
        "target = tuple(index >= first for index in range(len(tokens)))",
        "target = tuple(index >= first and tokens[index] not in end for index in range(len(tokens)))",
        ("data/test_chat.py::test_exactly_the_response_and_its_end_are_learnt",),
    ),
    Mutant(
        "mask: by the padding token, which for some is the end",
        CHAT,
        "target = tuple(index >= first for index in range(len(tokens)))",
        "target = tuple(index >= first and tokens[index] != tokenizer.pad_token_id for index in range(len(tokens)))",
        ("data/test_chat.py::test_the_mask_is_the_same_whatever_the_padding_token_is",),
    ),
    Mutant(
        "truncation: cuts the beginning",
        CHAT,
        "tokens = whole[:max_length]",
        "tokens = whole[-max_length:]",
        ("data/test_chat.py::test_truncation_cuts_the_end",),
    ),
    Mutant(
        "order: the same in every epoch",
        ORDER,
        'generator=key(self.seed, "order", epoch)',
        'generator=key(self.seed, "order")',
        ("data/test_order.py::test_epochs_and_seeds_have_orders_of_their_own_and_a_seed_repeats_its_own",),
    ),
    Mutant(
        "order: the last short batch of an epoch is dropped",
        ORDER,
        "for i in range(0, len(order), size)]",
        "for i in range(0, len(order) - size + 1, size)]",
        ("data/test_order.py::test_every_example_comes_once_an_epoch",),
    ),
    Mutant(
        "order: a token too many in a batch",
        ORDER,
        "if not micro or length > room:",
        "if not micro or length > room + 1:",
        ("data/test_order.py::test_in_order_a_token_budget_is_filled_while_the_next_document_fits",),
    ),
    Mutant(
        "best fit: a document goes where it does not fit",
        BEST_FIT,
        "place = bisect_left(room, (lengths[index], 0))",
        "place = bisect_left(room, (lengths[index] - 1, 0))",
        ("data/test_best_fit.py::test_every_document_is_in_one_pack_and_no_pack_of_several_is_over_the_budget",),
    ),
    Mutant(
        "best fit: the last pack of an epoch is lost",
        BEST_FIT,
        "return [*made, over] if over else made",
        "return made",
        ("data/test_best_fit.py::test_every_document_is_in_one_pack_and_no_pack_of_several_is_over_the_budget",),
    ),
    Mutant(
        "best fit: the longest documents come first in every epoch",
        ORDER,
        'torch.randperm(len(packs), generator=key(self.seed, "packs", epoch)).tolist()',
        "range(len(packs))",
        ("data/test_best_fit.py::test_full_packs_of_long_and_of_short_documents_are_mixed_over_an_epoch",),
    ),
    Mutant(
        "split: a group on both sides",
        SOURCES,
        "chosen = held_out([function.module for function in found], data.eval_fraction, data.seed)",
        "chosen = held_out(range(len(found)), data.eval_fraction, data.seed)",
        ("data/test_sources.py::test_no_module_of_the_library_is_on_both_sides",),
    ),
    Mutant(
        "data: the second file is not in the hash",
        SOURCES,
        "sha256 = hashlib.sha256((table.sha256 + other.sha256).encode()).hexdigest()",
        "sha256 = table.sha256",
        ("data/test_sources.py::test_the_sha256_is_the_file_s_and_covers_both_files",),
    ),
    Mutant(
        "rows: a table's row is numbered by the line that it ends on",
        "lowrank/data/table.py",
        "yield taken[0].number, cells",
        "yield taken[-1].number, cells",
        ("data/test_sources.py::test_a_csv_row_is_numbered_by_the_line_it_starts_on",),
    ),
    Mutant(
        "rows: what was dropped is not counted",
        "lowrank/data/table.py",
        "        self.dropped += 1\n",
        "        self.dropped = 1\n",
        ("data/test_malformed.py::test_the_note_counts_all_and_names_the_first_three",),
    ),
    Mutant(
        "template: the day of the run is in the tokens",
        CHAT,
        "add_generation_prompt=unanswered, date_string=DATE)",
        "add_generation_prompt=unanswered)",
        ("data/test_chat.py::test_the_day_of_the_run_is_not_in_the_tokens",),
    ),
    Mutant(
        "template: a second beginning token before the response",
        CHAT,
        "return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids",
        "return tokenizer(texts, return_attention_mask=False, verbose=False).input_ids",
        ("data/test_chat.py::test_a_beginning_token_stands_once_at_the_start_where_the_tokenizer_adds_it",),
    ),
)
