//! The scenarios in the order in which they run: what leaves the cluster as it was before what changes it.

mod change;
mod chart;
mod lifecycle;
mod observe;
mod recovery;
mod refuse;
mod release;
mod rendered;
mod rights;
mod scale;
mod secure;
mod serve;

use std::fs;

use serde_json::Value;
use swallow_tests::root;

use crate::{Needs, Scenario};

/// Tokens of a long stream: twenty seconds for twenty of them on two cores.
const LONG: u32 = 2000;

macro_rules! scenarios {
    ($($needs:ident $module:ident::$function:ident),* $(,)?) => {
        pub const SCENARIOS: &[Scenario] = &[
            $(Scenario {
                name: concat!(stringify!($module), "::", stringify!($function)),
                needs: Needs::$needs,
                run: $module::$function,
            }),*
        ];
    };
}

scenarios![
    Cluster chart::templates_are_as_written,
    Cluster release::the_containerfile_builds,
    Cluster rendered::a_plan_that_is_applied_serves,
    Cluster rendered::streams_outlive_their_group_and_their_router,
    Cluster rendered::a_fetched_model_serves_under_restricted_security,
    Cluster rendered::a_claimed_model_serves_under_restricted_security,
    Operator refuse::an_invalid_model_is_refused_in_plain_words,
    Operator chart::a_second_release_stands_beside_and_comes_again,
    Operator serve::a_model_serves_golden_text,
    Operator serve::a_fetched_model_serves_under_restricted_security,
    Operator serve::a_claimed_model_serves_under_restricted_security,
    Operator serve::two_models_stand_behind_one_router,
    Operator secure::a_model_waits_for_its_secrets_and_follows_them,
    Operator scale::streams_survive_scaling,
    Operator scale::an_autoscaler_scales_up_under_load,
    Operator change::streams_survive_a_change,
    Operator change::a_change_without_room_drains_first,
    Operator change::replaced_routers_finish_their_streams,
    Operator change::old_revisions_are_forgotten,
    Operator change::a_killed_operator_leaves_a_rollout_to_the_next,
    Operator recovery::a_killed_worker_comes_back,
    Operator recovery::a_stalled_start_is_begun_again,
    Operator recovery::a_drained_node_is_left,
    Operator recovery::a_lost_node_is_replaced,
    Operator refuse::what_is_wrong_is_said,
    Operator refuse::gpus_that_are_short_are_named,
    Operator lifecycle::a_suspended_model_comes_back,
    Operator lifecycle::a_deleted_model_leaves_nothing,
    Operator lifecycle::a_deletion_that_is_held_up_ends_in_good_order,
    Operator lifecycle::an_orphaned_deployment_serves_on,
    Operator observe::alerts_and_dashboard_name_what_there_is,
    Operator rights::nothing_is_written_at_rest,
    Operator rights::every_right_is_used,
    Operator refuse::without_a_right_to_nodes_the_scheduler_is_quoted,
    Operator release::an_upgrade_and_an_uninstall_leave_models_alone,
];

/// A conversation of the fixture, and the answer that an independent implementation gave.
struct Golden {
    messages: Vec<(String, String)>,
    answer: String,
}

/// Conversations that end by themselves.
fn goldens() -> Vec<Golden> {
    let path = root().join("tests/fixtures/goldens/tiny.json");
    let text = fs::read_to_string(path).expect("the goldens are in the repository");
    let all: Value = serde_json::from_str(&text).expect("they are JSON");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    all["prompts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|prompt| prompt["finish"] == "stop" && prompt["messages"].is_array())
        .map(|prompt| Golden {
            messages: prompt["messages"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|message| (text(&message["role"]), text(&message["content"])))
                .collect(),
            answer: text(&prompt["output_text"]),
        })
        .collect()
}
