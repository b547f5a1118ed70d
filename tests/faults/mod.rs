//! The faults: what is done, what must come of it, and the tests that show it.

/// A row of the table.
pub struct Fault {
    /// Its number.
    pub number: u32,
    /// What breaks.
    pub name: &'static str,
    /// How a test breaks it.
    pub made: &'static str,
    /// When it is survived.
    pub passes: &'static str,
    /// Test binary and test.
    pub tests: &'static [(&'static str, &'static str)],
}

/// Numbers of faults that take a cluster or a day.
pub const TESTED_ELSEWHERE: [(u32, &str); 2] = [
    (
        16,
        "rolling restarts of routers and workers are tested on a cluster, `tests/cluster`",
    ),
    (
        32,
        "a day of unique prompts is a soak, not a test; the bounds that it would find are tested: `properties` the cache index never exceeds the pool",
    ),
];

/// By number.
pub const FAULTS: &[Fault] = &[
    Fault {
        number: 1,
        name: "A worker dies in the middle of streams",
        made: "one of three workers is torn down with its sockets under 500 streams; and, read through both fronts, under 150: greedy, seeded, two candidates, log-probabilities, stop strings, JSON schemas; real workers are killed with SIGKILL",
        passes: "every stream is what it would have been, token for token and to the last character; each moved once, and is counted; the gap is below 1 s at p99; usage counts the prompt once; nothing is generated twice",
        tests: &[
            (
                "dispatch",
                "storms::five_hundred_streams_survive_one_of_three_workers",
            ),
            (
                "faults",
                "resumes::what_clients_read_is_that_of_an_undisturbed_run",
            ),
            ("resume", "streams_of_a_killed_worker_go_on_bit_for_bit"),
            (
                "dispatch",
                "resume::a_started_stream_goes_on_elsewhere_when_its_replica_dies",
            ),
            ("dispatch", "resume::candidates_that_are_over_are_not_run_again"),
            (
                "dispatch",
                "resume::a_request_that_showed_nothing_moves_when_its_replica_dies",
            ),
            (
                "dispatch",
                "resume::a_started_stream_waits_for_a_replica_and_fails_when_none_comes",
            ),
        ],
    },
    Fault {
        number: 2,
        name: "A device hangs while its process and connections live",
        made: "the engine stands still and answers no ping",
        passes: "its streams go on elsewhere after 2 s, where a step is short; each moves once",
        tests: &[
            (
                "dispatch",
                "storms::a_device_that_hangs_in_a_stream_is_left_after_two_seconds",
            ),
            (
                "dispatch",
                "faults::a_wedged_engine_is_lost_though_its_connection_lives",
            ),
        ],
    },
    Fault {
        number: 3,
        name: "A TCP connection is half open",
        made: "a relay swallows all packets, towards a worker and towards a client; an idle channel whose connection was closed",
        passes: "noticed within 10 s on both sides; the worker is told; no stream is leaked; the idle channel's first request succeeds",
        tests: &[
            (
                "dispatch",
                "faults::a_peer_that_is_gone_without_a_word_is_noticed",
            ),
            (
                "faults",
                "clients::a_client_that_is_gone_without_a_word_leaks_no_stream",
            ),
            ("faults", "clients::an_idle_channel_serves_its_first_request"),
        ],
    },
    Fault {
        number: 4,
        name: "One rank of a group dies",
        made: "the worker tells every request that its group failed, and ends",
        passes: "the replica leaves as a whole and its streams go on elsewhere",
        tests: &[("dispatch", "resume::an_engine_that_fails_hands_its_streams_over")],
    },
    Fault {
        number: 5,
        name: "No replica is there, or none any more",
        made: "requests come before the first replica; the only replica goes away",
        passes: "they wait, up to their own limit and the router's, and are then refused as 503, not 429; who still waits is served when one comes",
        tests: &[
            (
                "dispatch",
                "admission::an_unknown_model_is_refused_and_a_known_one_waits_for_its_first_replica",
            ),
            (
                "dispatch",
                "admission::a_wait_ends_after_the_shorter_of_both_limits",
            ),
        ],
    },
    Fault {
        number: 6,
        name: "Clients that read slowly, or not at all",
        made: "200 clients that take 10 bytes a second, over SSE and gRPC, beside 200 others, before the real program; 200 others alone before a second one, to compare; 200 that stop reading; a slow stream whose worker dies",
        passes: "the time between the others' tokens is at p99 what it is without slow ones, 10 % and 8 ms more at most; a slow one costs 64 KiB of the router's memory and 1,024 tokens of the worker at most, which is a window and what its socket holds, and is parked; a client that reads at last has everything; one that takes nothing for `--slow-client-seconds` is given up and told so over both fronts",
        tests: &[
            (
                "faults",
                "readers::two_hundred_that_take_ten_bytes_a_second_slow_nobody_and_cost_little",
            ),
            (
                "faults",
                "readers::a_client_that_takes_nothing_is_given_up_in_its_time_and_told_so",
            ),
            (
                "dispatch",
                "windows::two_hundred_slow_clients_cost_their_window_and_no_more",
            ),
            (
                "dispatch",
                "windows::a_client_that_reads_nothing_for_too_long_is_told_so",
            ),
            ("dispatch", "windows::a_slow_stream_moves_with_its_window"),
            (
                "session",
                "requests::a_request_whose_client_does_not_read_waits_for_it",
            ),
            (
                "schedule",
                "doors::a_full_window_costs_no_step_and_leaves_its_slot_to_others",
            ),
        ],
    },
    Fault {
        number: 7,
        name: "Ten thousand streams wait while a thousand run",
        made: "10,000 gRPC streams held in prefill over 12 connections of the real program",
        passes: "at most 20 KiB of memory a stream; probes take less than 50 ms; the thousand are served",
        tests: &[(
            "faults",
            "process::ten_thousand_streams_that_wait_cost_little_and_slow_nobody",
        )],
    },
    Fault {
        number: 8,
        name: "A client vanishes",
        made: "cancel, FIN and RST over gRPC (stream and unary), SSE and plain HTTP, in the queue, in prefill, in decode",
        passes: "the worker is told within 50 ms and confirms; places and tokens come back",
        tests: &[
            (
                "faults",
                "clients::a_client_that_leaves_is_a_cancel_in_every_phase_on_every_transport",
            ),
            (
                "dispatch",
                "cancel::a_client_that_leaves_the_queue_was_never_at_a_worker",
            ),
            ("dispatch", "cancel::many_clients_leave_at_once_and_share_frames"),
        ],
    },
    Fault {
        number: 9,
        name: "A deadline passes",
        made: "a timeout of 300 ms in the queue, in prefill, in decode, for streams and whole answers over gRPC and HTTP; an engine that stands still",
        passes: "over at 300 ms, 20 ms more or less; the worker is told; the status is DEADLINE_EXCEEDED, or 504",
        tests: &[
            ("faults", "clients::a_deadline_is_kept_in_every_phase"),
            ("dispatch", "cancel::a_deadline_binds_in_the_queue"),
            ("dispatch", "cancel::a_deadline_binds_in_prefill"),
            ("dispatch", "cancel::a_deadline_binds_in_decode"),
            ("fronts", "grpc::errors::a_deadline_binds_the_whole_of_a_stream"),
            (
                "fronts",
                "openai::waiting::a_clients_deadline_binds_the_whole_request",
            ),
        ],
    },
    Fault {
        number: 10,
        name: "Bad input",
        made: "damaged JSON and protobuf, huge and odd numbers, 100,000 nested brackets, 10,000 stop strings; sessions between router and worker with damaged, repeated, lost and invented frames, from either side",
        passes: "refused as what it is, in less than 10 ms of CPU each; no panic; the connection lives; a peer that breaks the session protocol is named and left, others notice nothing, memory stays flat",
        tests: &[
            ("faults", "garbage::damaged_json_is_refused_and_costs_little"),
            ("faults", "garbage::damaged_protobuf_is_refused"),
            ("faults", "garbage::json_that_is_made_to_hurt_is_refused"),
            (
                "faults",
                "liars::a_worker_that_sends_damaged_frames_is_left_and_the_others_serve",
            ),
            (
                "faults",
                "liars::a_frame_that_makes_no_sense_ends_its_session_by_name",
            ),
            (
                "session",
                "nonsense::damaged_frames_end_their_session_and_hurt_nobody",
            ),
            ("text", "ten_thousand_overlapping_stop_strings_cost_one_pass"),
        ],
    },
    Fault {
        number: 11,
        name: "An oversized prompt",
        made: "a body of 64 MiB, a prompt with more bytes than the context can hold, one token too many, one repeated character",
        passes: "refused by its size before it is tokenised; four times the text costs at most five times the time",
        tests: &[
            (
                "faults",
                "garbage::a_prompt_that_is_too_large_is_refused_before_it_is_tokenised",
            ),
            ("text", "tokenising_grows_no_faster_than_the_text"),
        ],
    },
    Fault {
        number: 12,
        name: "Stop strings across pieces",
        made: "random text cut at random places, overlapping stop strings",
        passes: "the text is what a search of the whole would leave, and nothing of a stop string leaks",
        tests: &[
            (
                "text",
                "stop_strings_in_any_pieces_are_found_where_a_search_of_the_whole_finds_them",
            ),
            (
                "text",
                "any_transcript_is_the_whole_output_cut_at_its_first_stop_string",
            ),
        ],
    },
    Fault {
        number: 13,
        name: "Characters cut between tokens",
        made: "random UTF-8 and bytes that are none, in pieces of every size",
        passes: "every piece is valid text, together they are the decoding of the whole",
        tests: &[
            ("text", "bytes_in_any_pieces_decode_as_the_whole_does"),
            ("text", "offsets_count_whole_characters"),
        ],
    },
    Fault {
        number: 14,
        name: "Floods of frames and headers",
        made: "CONTINUATION without end, streams opened and reset, PING and SETTINGS whose answers nobody reads, header lists of 20 kB and of 200 lines",
        passes: "the connection ends or stands still, memory stays flat, others are served",
        tests: &[
            ("faults", "floods::continuation_frames_without_end"),
            ("faults", "floods::streams_that_are_opened_and_reset"),
            ("faults", "floods::pings_and_settings_whose_answers_nobody_reads"),
            ("faults", "floods::large_and_many_headers"),
        ],
    },
    Fault {
        number: 15,
        name: "Clients that crawl",
        made: "300 sockets with a byte now and then: request heads, bodies, HTTP/2 prefaces; 400 TLS handshakes",
        passes: "each is cut in its time, a body's request with 408; others are served meanwhile",
        tests: &[
            (
                "faults",
                "slow::headers_bodies_and_prefaces_that_crawl_are_cut_and_the_others_are_served",
            ),
            ("faults", "slow::a_body_that_stops_is_answered_with_408"),
            (
                "faults",
                "slow::handshakes_that_crawl_are_cut_and_the_others_are_served",
            ),
            (
                "faults",
                "slow::a_kept_connection_may_idle_and_is_closed_in_its_time",
            ),
        ],
    },
    Fault {
        number: 17,
        name: "Clocks that are wrong, or jump",
        made: "the program's wall clock is set an hour on and back, a year on, and to 1970, under a stream; no code that decides reads it",
        passes: "deadlines, streams, sessions, probes and measured times are as ever",
        tests: &[
            (
                "faults",
                "clocks::a_wall_clock_that_jumps_changes_no_deadline_no_stream_and_no_count",
            ),
            ("tidy", "nothing_that_decides_reads_a_wall_clock"),
        ],
    },
    Fault {
        number: 18,
        name: "Names that do not resolve",
        made: "a replica behind a name, another behind one that never resolves",
        passes: "sessions that run go on; no request looks a name up",
        tests: &[(
            "dispatch",
            "storms::a_name_is_looked_up_for_a_session_and_never_for_a_request",
        )],
    },
    Fault {
        number: 19,
        name: "The API server is away, forgets, or talks nonsense",
        made: "a scripted API server: outage, 410 Gone, watches that end, garbled and repeated events",
        passes: "the last good set stays, its age is a metric, readiness stays, and all is listed anew without flapping",
        tests: &[
            (
                "dispatch",
                "discovery::while_the_api_server_is_away_the_last_set_stays",
            ),
            (
                "dispatch",
                "discovery::a_forgotten_version_begins_again_with_a_list",
            ),
            (
                "dispatch",
                "discovery::watches_that_end_or_say_nonsense_are_begun_again",
            ),
        ],
    },
    Fault {
        number: 20,
        name: "Discovery and worker contradict each other",
        made: "slices that name terminating pods, other pods at known addresses, workers of other models, files and versions",
        passes: "the Welcome decides; serving and terminating are respected",
        tests: &[
            (
                "dispatch",
                "discovery::slices_of_a_service_are_the_replicas_of_a_model",
            ),
            (
                "dispatch",
                "discovery::another_pod_at_the_same_address_is_another_replica",
            ),
            (
                "dispatch",
                "faults::a_worker_that_serves_something_else_is_not_used",
            ),
            (
                "dispatch",
                "faults::replicas_with_other_files_wait_until_the_old_ones_are_gone",
            ),
        ],
    },
    Fault {
        number: 21,
        name: "What is known of a cache is lost",
        made: "a dropped session, a restarted worker, a missed event, a cache of 100,000 blocks",
        passes: "a new process has an empty cache; a snapshot of all blocks is in within 200 ms; a gap is noticed",
        tests: &[
            (
                "dispatch",
                "storms::a_cache_of_a_hundred_thousand_blocks_is_known_in_a_moment",
            ),
            (
                "dispatch",
                "faults::a_restarted_worker_is_found_again_with_an_empty_cache",
            ),
            ("dispatch", "spread::a_missed_cache_event_is_noticed"),
        ],
    },
    Fault {
        number: 22,
        name: "Replicas push back",
        made: "one replica of three, or all of them, answer that they have no room",
        passes: "retries are at most a tenth of the load, and ten; it counts as no failure; others serve all where they can",
        tests: &[
            (
                "dispatch",
                "storms::one_replica_of_three_that_pushes_back_costs_a_tenth_at_most",
            ),
            ("dispatch", "faults::a_retry_budget_stops_a_storm"),
            (
                "dispatch",
                "faults::no_room_after_all_sends_a_request_elsewhere_and_is_no_failure",
            ),
        ],
    },
    Fault {
        number: 23,
        name: "Three times the load, one tenant greedy",
        made: "simulated time: steady arrivals of requests of very different sizes; and an open loop of two tenants on a real queue before a real session",
        passes: "each gets its share of the tokens within 10 %; the queue stays within its bounds; Retry-After is within 30 % of the real drain time; goodput is 95 % of the capacity",
        tests: &[
            ("overload", "a_greedy_tenant_gets_its_share_and_no_more"),
            (
                "overload",
                "shares_follow_weights_and_what_nobody_wants_goes_to_the_others",
            ),
            (
                "overload",
                "a_higher_priority_goes_first_and_takes_the_places_of_a_lower_one",
            ),
            (
                "overload",
                "whoever_is_turned_away_is_told_when_the_queue_will_have_drained",
            ),
            (
                "dispatch",
                "admission::tenants_take_turns_and_a_full_queue_is_shared",
            ),
            (
                "dispatch",
                "overload::three_times_the_load_of_two_tenants_is_shared_bounded_and_forgotten",
            ),
        ],
    },
    Fault {
        number: 24,
        name: "After an overload",
        made: "simulated time: a minute of three times the load, then as before; and five seconds on a real queue",
        passes: "waits are as before within one drain of the queue",
        tests: &[
            ("overload", "after_an_overload_all_is_as_before_within_one_drain"),
            (
                "dispatch",
                "overload::three_times_the_load_of_two_tenants_is_shared_bounded_and_forgotten",
            ),
        ],
    },
    Fault {
        number: 25,
        name: "A hot prefix",
        made: "nine of ten prompts begin with the same 8,000 tokens",
        passes: "the busiest replica has at most 1.5 times the mean of the tokens",
        tests: &[
            (
                "properties",
                "a_hot_prefix_is_spread_within_one_and_a_half_of_the_mean",
            ),
            ("dispatch", "spread::a_hot_prefix_spills_over_to_the_others"),
        ],
    },
    Fault {
        number: 26,
        name: "A session breaks after a submit and before its acceptance",
        made: "the session is cut while a request waits at the worker, and at ten moments under 30 requests; the same generation is submitted twice",
        passes: "it is tried again as another attempt; no attempt runs twice",
        tests: &[
            (
                "dispatch",
                "faults::a_broken_session_is_made_again_and_its_requests_are_tried_again",
            ),
            (
                "dispatch",
                "faults::a_session_that_breaks_at_any_moment_runs_no_attempt_twice",
            ),
            ("session", "requests::a_generation_never_runs_twice"),
        ],
    },
    Fault {
        number: 27,
        name: "The router gets no processor time",
        made: "the only thread of its runtime is taken; the program, under `ulimit -n 200`, gets 20 ms of each 100 ms, and 400 requests that it cannot serve",
        passes: "liveness and readiness are answered within 50 ms by their own threads, with a fifth of a processor within 1 s; what is too much is refused, memory stays below 64 MiB, and all is as before afterwards",
        tests: &[
            (
                "faults",
                "process::probes_are_answered_while_the_runtime_stands_still",
            ),
            (
                "faults",
                "starved::with_a_fifth_of_a_processor_and_little_memory_it_sheds_and_lives",
            ),
        ],
    },
    Fault {
        number: 28,
        name: "No file descriptors, nobody who reads the log",
        made: "the program under `ulimit -n 200` with 150 idle clients; its standard error unread at level trace",
        passes: "clients wait in the backlog and are served in the end; probes are answered; log lines are dropped and counted",
        tests: &[
            (
                "faults",
                "process::without_file_descriptors_clients_wait_and_probes_do_not",
            ),
            ("faults", "process::a_log_that_nobody_reads_stops_nobody"),
        ],
    },
    Fault {
        number: 29,
        name: "A request that kills workers",
        made: "a prompt at which the mock worker dies",
        passes: "after the second worker it is refused; the third lives",
        tests: &[
            (
                "dispatch",
                "resume::a_request_that_kills_replicas_is_refused_after_the_second",
            ),
            (
                "dispatch",
                "resume::a_started_stream_that_loses_two_replicas_is_not_tried_on_a_third",
            ),
        ],
    },
    Fault {
        number: 30,
        name: "API keys and certificates change",
        made: "the file of keys is replaced under a stream of a key that goes, by a broken one and then by a sound one; the certificate and its key under a TLS stream, one after the other",
        passes: "the streams go on; new keys are known, new connections see the new certificate; a broken file, or a key without its certificate, changes nothing",
        tests: &[
            ("faults", "keys::keys_change_and_no_stream_is_dropped"),
            ("faults", "tls::certificates_change_and_no_stream_is_dropped"),
        ],
    },
    Fault {
        number: 31,
        name: "Releases are mixed",
        made: "a worker that sends frames of a later version, one that knows no windows, one of another protocol, one under its old names",
        passes: "what both know is used; another protocol is refused by name",
        tests: &[
            (
                "dispatch",
                "storms::a_worker_of_the_next_version_is_understood_as_far_as_this_one_goes",
            ),
            (
                "dispatch",
                "windows::a_worker_that_knows_no_windows_is_not_told_of_any",
            ),
            (
                "dispatch",
                "faults::a_worker_that_serves_something_else_is_not_used",
            ),
            (
                "dispatch",
                "discovery::old_names_serve_while_a_change_of_names_rolls_out",
            ),
        ],
    },
];
