//! Who used which right, from the API server's audit log.

use std::{collections::BTreeSet, fs, process::Command};

use serde_json::Value;

use super::{Cluster, OPERATOR};

/// One kind of request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    /// `GROUP/RESOURCE` or `GROUP/RESOURCE/SUBRESOURCE`; the core group is empty.
    pub resource: String,
    pub verb: String,
}

impl Use {
    /// Whether it changes anything.
    pub fn is_write(&self) -> bool {
        ["create", "update", "patch", "delete", "deletecollection"].contains(&self.verb.as_str())
    }
}

/// This machine's clock, which is the API server's too, in the audit log's form.
pub fn now() -> String {
    let date = Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S.%6NZ"])
        .output();
    String::from_utf8_lossy(&date.expect("date is everywhere").stdout)
        .trim()
        .to_owned()
}

/// What the operator asked for at or after a time (RFC 3339 in UTC), one for each request and one more for each
/// apply that created something; and what it was refused for want of a right.
pub fn operator_uses(cluster: &Cluster, since: &str) -> (Vec<Use>, BTreeSet<String>) {
    let log = fs::read_to_string(cluster.audit_log()).expect("the API server writes an audit log");
    let (mut used, mut refused) = (Vec::new(), BTreeSet::new());
    for line in log.lines() {
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            continue; // The last line may be half written.
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let at = text(&event["requestReceivedTimestamp"]);
        if event["user"]["username"] != OPERATOR || at.as_str() < since {
            continue;
        }
        let object = &event["objectRef"];
        if object["resource"].is_null() {
            continue; // /version and its like, which everybody may ask for.
        }
        let mut resource = format!("{}/{}", text(&object["apiGroup"]), text(&object["resource"]));
        if let Some(sub) = object["subresource"].as_str() {
            resource = format!("{resource}/{sub}");
        }
        let one = Use {
            resource,
            verb: text(&event["verb"]),
        };
        // Other refusals with the same code are about the object: its namespace ends, its pod is not secure enough.
        if event["annotations"]["authorization.k8s.io/decision"] == "forbid" {
            let words = text(&event["responseStatus"]["message"]);
            refused.insert(format!("{} {}: {words}", one.verb, one.resource));
            continue;
        }
        // Server-side apply of what is not there: the API server asks for the right to create, and logs a patch.
        if one.verb == "patch" && event["responseStatus"]["code"] == 201 {
            used.push(Use {
                verb: "create".into(),
                ..one.clone()
            });
        }
        used.push(one);
    }
    (used, refused)
}
