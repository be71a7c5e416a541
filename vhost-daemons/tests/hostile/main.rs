//! A tester's program: clients that attack a daemon which serves an honest tenant on the same I/O thread. The tenant loses nothing
//! and is served all the time, nothing is left of an attacker, and the daemon ends when it is told to.
//!
//! Each attack is a test of its own in [`alone`], and [`one_after_the_other`] tries all of them on one daemon.

#[path = "../common/mod.rs"]
mod common;
mod events;
mod logging;
mod malformed;
mod pitfalls;
mod requests;
mod sharing;

use common::target::Target;

/// Names attacks by the modules that hold them.
macro_rules! attacks {
    ($($module:ident { $($attack:ident,)* })*) => {
        const ATTACKS: &[(&str, fn(&Target))] = &[$($((stringify!($attack), crate::$module::$attack),)*)*];

        mod alone {
            $(mod $module {
                $(#[test]
                fn $attack() {
                    let target = crate::Target::new();
                    crate::$module::$attack(&target);
                    target.end();
                })*
            })*
        }
    };
}

attacks! {
    events {
        a_call_that_becomes_blocking_and_full_holds_up_nobody,
        an_error_event_that_becomes_blocking_and_full_holds_up_nobody,
        an_event_of_the_log_that_becomes_blocking_and_full_holds_up_nobody,
        a_kick_that_never_ends_holds_up_nobody,
    }
    logging {
        pitfall_46_logs_that_can_not_be_are_refused,
        pitfall_46_what_a_log_is_too_short_for_is_left_out,
        pitfall_52_a_log_that_is_cut_short_ends_the_connection_only,
    }
    malformed {
        rings_that_are_not_there_are_refused,
        a_message_may_come_in_pieces,
        regions_that_can_not_be_are_refused,
        regions_beyond_the_slots_are_refused,
        descriptors_that_can_not_be_raised_are_refused_as_kick_and_call,
        a_client_that_ends_a_ring_without_end_is_answered_meanwhile,
        malformed_headers_and_unknown_messages_end_the_connection,
        payloads_may_be_too_long_and_not_too_short,
        configuration_is_read_at_many_offsets_and_sizes,
        a_ring_that_its_driver_breaks_raises_err_once_and_needs_a_reset,
        noise_ends_connections_and_nothing_else,
    }
    pitfalls {
        pitfall_44_descriptors_on_the_wrong_message_do_not_leak,
        pitfall_44_replacing_descriptors_closes_those_before,
        pitfall_45_inflight_table_and_queue_size_that_disagree_are_refused,
        pitfall_47_bit_8_of_a_ring_index_means_no_descriptor,
        pitfall_48_no_kick_and_no_call_is_lost_over_starts_and_changes,
        pitfall_48_a_call_that_is_full_and_blocking_stops_nobody,
        pitfall_49_features_early_late_and_twice,
        pitfall_49_without_protocol_features_rings_start_enabled,
        pitfall_50_resets_under_load_are_answered,
        pitfall_51_a_client_that_forgot_its_base_loses_and_repeats_nothing,
        pitfall_51_a_client_may_vanish_between_any_two_messages_and_within_any,
        pitfall_52_memory_that_is_cut_short_ends_the_connection_only,
        pitfall_52_memory_that_is_cut_short_before_a_ring_starts,
        pitfall_53_memory_changes_while_requests_are_in_flight,
        pitfall_54_a_message_that_never_completes_and_a_reply_that_is_never_read,
        pitfall_55_what_was_in_flight_is_served_again_once_and_index_0_too,
    }
    requests {
        whole_disk_reads_are_not_drained_for_a_client_that_has_gone,
        whole_disk_reads_with_a_log_hold_up_nobody,
        chains_over_very_many_regions_hold_up_nobody,
        a_flood_of_flushes_holds_up_nobody,
        faults_while_regions_come_and_go_end_one_connection,
    }
    sharing {
        a_hugetlb_region_of_part_of_a_page_is_refused,
        a_hugetlb_region_without_pages_ends_the_connection_only,
        tables_and_logs_of_huge_pages_are_unmapped,
        memory_that_somebody_stands_behind_is_refused,
        a_table_that_is_cut_short_ends_the_connection_only,
        a_table_padded_to_72_bytes_is_taken,
        regions_keep_no_descriptors,
        client_memory_is_left_out_of_core_dumps,
        descriptors_whose_close_waits_keep_nobody_waiting,
        a_guard_covers_the_end_of_a_region_that_is_no_page,
    }
}

#[test]
fn one_after_the_other() {
    let target = Target::new();
    for (name, attack) in ATTACKS {
        target.begin();
        target.honest.longest();
        attack(&target);
        eprintln!("{name}: the honest tenant waited for {:?} at most", target.honest.longest());
    }
    target.end();
}
