"""The tests whose numbers grow. `make torture` ends with a table and outputs/torture.json."""

# ruff: noqa: F401

from test_checkpoint import (
    canary,
    digits,
    linear,
    test_a_hand_made_file_is_refused,
    test_a_payload_is_refused_and_never_run,
    test_every_flipped_bit_is_noticed,
    test_every_number_survives,
    test_mutants_are_refused_or_mean_exactly_what_they_say,
)
from test_durable import (
    test_a_disk_too_small_by_any_amount,
    test_a_reader_sees_whole_files_only,
    test_a_run_that_dies_at_any_system_call_ends_as_if_it_had_not,
    test_a_save_that_dies_at_any_system_call_leaves_the_old_file_or_the_new,
    test_the_lock_of_a_killed_process_is_free_at_once,
    two_saves,
)
from test_fused import eight, test_a_stack_killed_at_any_instant_loses_no_finished_job
from test_resume import (
    one_thread,
    stops,
    test_a_run_resumed_at_a_step_ends_with_the_same_bits,
    test_kills_before_the_first_save_leave_nothing_in_the_way,
    test_one_job_alone_in_a_sweep_and_resumed_is_one_result,
    test_sigkill_at_any_instant_loses_nothing,
    test_the_state_of_early_stopping_survives,
)
from test_signals import (
    plain,
    test_a_second_signal_leaves_at_once_with_a_whole_checkpoint,
    test_a_signal_inside_any_system_call_of_a_save,
    test_a_signal_saves_the_step_and_the_run_goes_on_with_the_same_bits,
)
from test_sweep import (
    test_a_search_killed_at_any_instant_goes_on,
    test_a_sweep_killed_at_any_instant_loses_nothing,
    test_any_file_can_lie_in_the_folder,
    twelve,
)

pytest_plugins = ["faults"]
