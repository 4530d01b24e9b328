//! A rollout in words, for terminals and logs.

use serde_json::Value;

use crate::cli::admin::table::{Table, cell, number, time};

/// Nothing happens to it any more.
pub(super) fn ended(rollout: &Value) -> bool {
    let ended = ["promoted", "rolled_back", "aborted", "failed"];
    rollout["state"].as_str().is_some_and(|state| ended.contains(&state))
}

/// The candidate won.
pub(super) fn promoted(rollout: &Value) -> bool {
    rollout["state"] == "promoted"
}

/// `step 2 of 5`, `paused at step 2 of 5`, `rolled back`.
pub(super) fn state(rollout: &Value) -> String {
    of_state(rollout, steps(rollout))
}

fn steps(rollout: &Value) -> usize {
    rollout["plan"]["steps"].as_array().map_or(0, Vec::len)
}

fn of_state(state: &Value, steps: usize) -> String {
    match state["state"].as_str() {
        Some("paused") => format!("paused at {}", stage(&state["at"], "stage", steps)),
        _ => stage(state, "state", steps),
    }
}

fn stage(stage: &Value, tag: &str, steps: usize) -> String {
    match stage[tag].as_str() {
        Some("step") => {
            let step = stage["step"].as_u64().unwrap_or(0) + 1;
            // A plan without steps has those of the gateway, which it does not spell out.
            if steps == 0 { format!("step {step}") } else { format!("step {step} of {steps}") }
        }
        Some("pending_hook") => format!("asking {}", cell(&stage["hook"])),
        Some(word) => word.replace('_', " "),
        None => String::new(),
    }
}

/// One line: what changes while it goes on.
pub(super) fn line(rollout: &Value) -> String {
    let weight = number(&rollout["weight"]);
    let samples = cell(&rollout["progress"]["samples"]);
    let mut out = format!("{}, weight {weight} %, {samples} requests at it", state(rollout));
    let waiting = cell(&rollout["waiting_for"]);
    if !waiting.is_empty() && !ended(rollout) {
        out += &format!(", waiting for {waiting}");
    }
    let reason = cell(&rollout["reason"]["message"]);
    if !reason.is_empty() {
        out += &format!(" ({reason})");
    }
    out
}

/// The whole of it.
pub(super) fn text(rollout: &Value) -> String {
    let dry = if rollout["plan"]["dry_run"] == true { ", dry run" } else { "" };
    let mut out = format!(
        "rollout {} of {}: version {} against {}{dry}\n",
        cell(&rollout["id"]),
        cell(&rollout["model"]),
        cell(&rollout["candidate"]),
        cell(&rollout["stable"])
    );
    let progress = &rollout["progress"];
    let seconds = progress["ms"].as_f64().unwrap_or(0.0) / 1000.0;
    let (by, started_for) = (cell(&rollout["started_by"]), cell(&rollout["started_for"]));
    let why = if started_for.is_empty() { String::new() } else { format!(": {started_for}") };
    let mut fields = vec![
        ("state", state(rollout)),
        ("because", cell(&rollout["reason"]["message"])),
        ("weight", format!("{} %", number(&rollout["weight"]))),
    ];
    if !ended(rollout) {
        fields.push(("at it", format!("{seconds:.0} s, {} requests", cell(&progress["samples"]))));
        fields.push(("waits", cell(&rollout["waiting_for"])));
    }
    fields.push(("started", format!("{} by {by}{why}", time(&rollout["started_at"]))));
    fields.push(("ended", time(&rollout["ended_at"])));
    for (name, value) in fields {
        if !value.is_empty() {
            out += &format!("{name:<8} {value}\n");
        }
    }
    out += &guards(rollout);
    let steps = steps(rollout);
    for change in rollout["history"].as_array().into_iter().flatten() {
        let reason = cell(&change["reason"]["message"]);
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        out += &format!(
            "{} {} -> {} by {}{why}\n",
            time(&change["at"]),
            of_state(&change["from"], steps),
            of_state(&change["to"], steps),
            cell(&change["by"])
        );
    }
    out
}

fn guards(rollout: &Value) -> String {
    let guards = rollout["guards"].as_array().map_or(&[][..], Vec::as_slice);
    if guards.is_empty() {
        return String::new();
    }
    let mut table = Table::new(["guard", "says", "evidence", "limit", "why"]);
    for guard in guards {
        table.row([
            cell(&guard["guard"]),
            cell(&guard["outcome"]),
            number(&guard["evidence"]),
            number(&guard["limit"]),
            cell(&guard["why"]),
        ]);
    }
    format!("\n{}\n", table.text())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rollout() -> Value {
        json!({
            "id": "r-1", "model": "iris", "candidate": "2", "stable": "1",
            "plan": {"steps": [{"weight": 5}, {"weight": 100}], "dry_run": false},
            "state": "paused", "at": {"stage": "step", "step": 0}, "weight": 5.0,
            "reason": {"cause": "person", "message": "looking"}, "waiting_for": ["380 requests"],
            "progress": {"ms": 61_500, "samples": 120},
            "guards": [{"guard": "error_rate", "outcome": "pass", "evidence": 0.25, "limit": 20, "why": "fine"}],
            "started_at": "2026-11-25T10:00:00Z", "started_by": "ci", "started_for": "new data", "ended_at": null,
            "history": [{"at": "2026-11-25T10:01:00Z", "from": {"state": "step", "step": 0},
                "to": {"state": "paused", "at": {"stage": "step", "step": 0}}, "by": "ann",
                "reason": {"cause": "person", "message": "looking"}}],
        })
    }

    #[test]
    fn states_are_in_words() {
        let mut rollout = rollout();
        assert_eq!(state(&rollout), "paused at step 1 of 2");
        for (json, want) in [
            (json!({"state": "step", "step": 1}), "step 2 of 2"),
            (json!({"state": "pending_hook", "hook": "confirm-rollout"}), "asking confirm-rollout"),
            (json!({"state": "rolled_back"}), "rolled back"),
        ] {
            rollout["state"] = json["state"].clone();
            rollout["step"] = json["step"].clone();
            rollout["hook"] = json["hook"].clone();
            assert_eq!(state(&rollout), want);
        }
        assert!(ended(&rollout) && !promoted(&rollout));
    }

    #[test]
    fn the_whole_and_its_line() {
        let rollout = rollout();
        assert_eq!(
            line(&rollout),
            "paused at step 1 of 2, weight 5 %, 120 requests at it, waiting for 380 requests (looking)"
        );
        assert_eq!(
            text(&rollout),
            "rollout r-1 of iris: version 2 against 1\nstate    paused at step 1 of 2\nbecause  looking\n\
             weight   5 %\nat it    62 s, 120 requests\nwaits    380 requests\n\
             started  2026-11-25 10:00:00 by ci: new data\n\n\
             guard       says  evidence  limit  why\nerror_rate  pass  0.25      20     fine\n\n\
             2026-11-25 10:01:00 step 1 of 2 -> paused at step 1 of 2 by ann: looking\n"
        );
    }
}
