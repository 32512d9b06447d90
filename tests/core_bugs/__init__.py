"""Mistakes that scripts/mutants.py makes in the core, and the tests that must see them.

One after the other is put into a copy of the package, by text, so that it does not
matter in which file the text is. The kernels have lists of their own (kernel_bugs.py,
scan_bugs.py), the state machines too (scripts/machine_bugs.py).
"""

from .choosing import CHOOSING
from .holding import HOLDING
from .keeping import KEEPING
from .mutant import Mutant

__all__ = ["MUTANTS", "TESTS", "Mutant"]

MUTANTS: list[Mutant] = [*CHOOSING, *HOLDING, *KEEPING]

_PAPERS = "test_cache.py::test_outputs_and_positions_are_those_of_the_papers"
_CHUNKS = "test_cache.py::test_chunks_of_any_size_give_the_same_logits_and_tokens"
_HIDDEN = (
    "test_cache.py::test_a_step_sees_no_weight_of_what_is_hidden_nor_of_learned_sinks"
)
_ROWS = "test_batch.py::test_a_row_is_what_it_would_be_alone"
_HELD = "test_cache.py::test_keys_and_values_held_are_those_of_their_positions"
_NEWEST = "test_cache.py::test_the_newest_token_has_a_position_before_it_is_attended_to"
_WINDOW = "test_cache.py::test_the_mask_of_a_window_shows_what_a_token_alone_would_see"
_WIDE = "test_cache.py::test_an_array_of_a_mask_has_a_column_for_all_that_is_held"
_REFUSED = (
    "test_cache.py::"
    "test_a_window_of_the_models_is_refused_where_tokens_of_it_are_evicted"
)
_MASKS = "test_cache.py::test_the_models_mask_is_obeyed_across_blocks"

# By area, the cheapest first. Not the state machines, which see most of these too; and
# not a file next to a test in it: pytest would run the file in its own order.
TESTS: dict[str, tuple[str, ...]] = {
    "policies": ("test_policies.py", "test_eviction.py", _PAPERS),
    "scan": ("test_eviction.py", _PAPERS, _MASKS, _CHUNKS),
    "step": ("test_eviction.py", _HIDDEN, _PAPERS, _CHUNKS, _ROWS),
    "caches": (
        *("test_hooks.py", _HELD, _NEWEST, _WINDOW, _WIDE, _REFUSED, _PAPERS, _CHUNKS),
        "test_cache.py::test_what_was_taken_back_is_shared_no_more",
        "test_interrupted.py",
    ),
    "positions": ("test_rotary.py",),
    "batch": (
        "test_batch.py::test_what_cannot_be_one_batch_is_refused",
        "test_batch.py::test_merged_caches_are_left_as_they_are",
        "test_batch.py::test_rows_that_join_come_behind_those_that_are_there",
        "test_batch.py::test_a_model_with_its_own_attention_sees_no_padding",
        "test_batch.py::test_a_row_that_was_taken_out_goes_its_own_way",
        "test_batch.py::test_rows_may_leave_while_padded_prompts_are_read",
        "test_batch.py::test_padding_on_the_left_is_not_seen",
        "test_rotary.py::test_rows_that_pin_more_and_less_are_what_they_are_alone",
        "test_rotary.py::test_rows_of_a_batch_are_renumbered_each_when_it_is_due",
        "test_batch.py::test_a_row_is_what_it_would_be_alone",
    ),
    "journal": (
        "test_journal.py::"
        "test_what_a_policy_remembers_is_taken_back_before_the_first_eviction",
        "test_journal.py::test_what_the_journal_does_not_hold_is_refused",
        "test_journal.py::test_a_chunk_cut_once_cannot_be_taken_back",
        "test_journal.py::test_caches_in_a_list_are_taken_back_together_or_not_at_all",
        "test_journal.py::test_drafts_are_accepted_in_a_cache_that_has_evicted",
        "test_journal.py::test_speculative_decoding_past_the_journal_is_refused_aloud",
        "test_journal.py::test_trims_follow_each_other",
        "test_journal.py::test_trim_crosses_the_first_eviction",
        "test_interrupted.py",
        "test_journal.py::test_trim_is_as_if_the_tokens_had_not_been",
    ),
    "storage": (
        "test_hadamard.py",
        "test_packed.py::test_products_are_those_of_the_unpacked",
        "test_packed.py::test_bytes_are_as_described_and_fewer",
        "test_packed.py::test_a_cache_is_quantised_on_the_way",
        "test_packed.py::test_packed_rows_are_as_good_as_the_unpacked",
        "test_formats.py",
    ),
    "archive": (
        "test_row_log.py",
        "test_log_directory.py",
        "test_recall.py::test_rows_on_disk_are_taken_back_too",
        "test_recall.py::test_of_copies_on_one_disk_one_goes_on",
        "test_recall.py::test_a_limit_on_disk_is_kept_and_the_oldest_go",
        "test_recall.py::test_an_archive_on_disk_gives_what_one_in_memory_gives",
        "test_recall.py::test_bytes_stay_below_what_is_said_and_the_archive_is_counted_apart",
    ),
    "saved": (
        "test_rotary.py::test_pins_are_saved",
        "test_saved.py::test_as_many_tokens_can_be_taken_back_after_loading",
        "test_rotary.py::test_a_file_goes_on_as_the_cache_would",
        "test_rotary.py::test_rotary_positions_of_a_file_are_checked",
        "test_recall.py::test_a_saved_cache_goes_on_as_if_it_had_not_been",
        "test_recall.py::test_what_no_reading_could_have_left_is_refused",
        "test_saved.py::test_a_state_that_cannot_be_is_refused",
        "test_saved.py::test_fewer_slots_than_tokens_are_refused",
        "test_saved.py::test_a_token_still_to_come_is_refused",
        "test_saved.py::test_who_is_protected_must_be_held",
        "test_saved.py::test_the_dead_slot_holds_who_left_at_the_last_step",
        "test_saved.py::test_files_that_do_not_fit_the_model_are_refused",
        "test_saved.py::test_one_changed_weight_is_another_model",
        "test_saved.py::test_the_order_of_numbers_is_part_of_a_fingerprint",
        "test_saved.py::test_a_save_that_fails_leaves_the_old_file",
        "test_saved.py::test_a_file_that_was_put_together_wrongly_is_refused",
        "test_saved.py::test_models_with_caches_of_several_kinds_go_on_the_same",
        "test_saved.py::test_what_comes_after_loading_is_the_same_to_the_bit",
        "test_saved.py::test_a_changed_state_is_refused_or_goes_on",
    ),
    "conversion": ("test_conversion.py", "test_budget.py", "test_hooks.py"),
    "server": (
        "test_serving.py::"
        "test_a_conversation_pins_what_comes_before_its_first_question",
        "test_serving.py::test_more_drafts_than_can_be_taken_back_are_refused",
        "test_serving.py::test_a_draft_model_beside_shared_layers_is_refused",
        "test_serving.py::"
        "test_a_model_that_mixes_the_rows_of_a_batch_answers_one_by_one",
        "test_serving.py::test_a_stored_prompt_that_pins_otherwise_is_read_again",
        "test_serving.py::test_layers_without_a_position_stay_with_the_others",
        "test_serving.py::test_what_cannot_be_taken_back_is_read_anew",
        "test_serving.py::test_the_very_same_tokens_leave_one_to_read",
        "test_hooks.py",
        "test_serving.py::test_a_second_turn_goes_on_after_drafts_without_a_gap",
    ),
}
